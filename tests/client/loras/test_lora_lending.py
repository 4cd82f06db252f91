"""LoRAs as they are offered to the workers: layers, scales, tiers, and what is refused before anything is shared."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from xditd.client.arenas import Arena
from xditd.client.loras.lending import describe_lora
from xditd.ipc.errors import BadCheckpoint, BadRequest, Unsupported, XditdError
from xditd.ipc.tensors import ComponentKind, CopiedBytes

LAYER = "transformer.transformer_blocks.0.attn.to_q"


def pair(rank: int = 4, layer: str = LAYER, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{layer}.lora_A.weight": torch.ones(rank, 8), f"{layer}.lora_B.weight": torch.ones(6, rank)} | more


def scale_of(source: Any, **more: Any) -> float:
    offer = describe_lora(source, **more)
    try:
        assert offer.manifest.lora is not None
        assert offer.manifest.faults() == []
        (layer,) = offer.manifest.lora.layers
        return layer.scale
    finally:
        offer.close()


@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor(2.0),
        torch.tensor([2.0], dtype=torch.float16),
        torch.tensor(2.0, dtype=torch.bfloat16),
        torch.tensor(2, dtype=torch.int64),
        torch.tensor(2.0, dtype=torch.float64),
    ],
)
@pytest.mark.parametrize("is_file", [True, False])
def test_alpha_is_read_in_every_dtype(tmp_path: Path, alpha: torch.Tensor, is_file: bool) -> None:
    tensors = pair(**{f"{LAYER}.alpha": alpha})
    save_file(tensors, tmp_path / "x.safetensors")
    assert scale_of(tmp_path / "x.safetensors" if is_file else tensors) == 0.5


def test_scales_of_configurations(tmp_path: Path) -> None:
    config = {"transformer.lora_alpha": 6, "transformer.use_rslora": True, "text_encoder.lora_alpha": 99}
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    assert scale_of(pair()) == 1.0
    assert scale_of(pair(), metadata=metadata) == 3.0
    assert scale_of(pair(9), metadata=metadata) == 2.0
    save_file(pair(), tmp_path / "x.safetensors", metadata=metadata)
    assert scale_of(tmp_path / "x.safetensors") == 3.0
    patterns = {"lora_alpha": 6, "alpha_pattern": {"attn.to_q": 2}}
    save_file(pair(), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(patterns))
    assert scale_of(tmp_path) == 0.5
    assert scale_of(tmp_path / "adapter_model.safetensors") == 0.5
    # As PEFT does with an alpha beside the factors, and rsLoRA.
    assert scale_of(pair(**{f"{LAYER}.alpha": torch.tensor(4.0)}), metadata=metadata) == 4.0 / math.sqrt(4)


def test_a_file_is_lent_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    save_file(pair(**{f"{LAYER}.alpha": torch.tensor(1.0), "bundle_emb.x": torch.ones(3)}), path)
    offer = describe_lora(path)
    manifest = offer.manifest
    assert (manifest.kind, manifest.label, offer.copied) == (ComponentKind.LORA, "style", CopiedBytes())
    assert {spec.name for spec in manifest.tensors} == {f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"}
    assert [tier.value for tier in manifest.tiers] == ["file"]
    offer.close()


def test_tensors_of_an_arena_are_not_copied_and_others_are_once() -> None:
    arena = Arena.copy_of(pair(), "cpu")
    offer = describe_lora(arena.tensors)
    assert offer.copied.total == 0
    offer.close()
    offer = describe_lora(pair(), device="cpu")
    assert offer.copied.total >= 4 * (4 * 8 + 6 * 4)
    offer.close()
    arena.close()


def test_factors_of_1x1_convolutions_are_matrices() -> None:
    offer = describe_lora({"a.lora_down.weight": torch.ones(2, 3, 1, 1), "a.lora_up.weight": torch.ones(5, 2, 1, 1)})
    assert {spec.name: spec.shape for spec in offer.manifest.tensors} == {
        "a.lora_down.weight": (2, 3),
        "a.lora_up.weight": (5, 2),
    }
    offer.close()


@pytest.mark.parametrize(
    ("tensors", "error", "says"),
    [
        ({f"{LAYER}.lora_B.weight": torch.ones(6, 3)}, BadCheckpoint, r"has rank 4, but .* \[6, 3\] has rank 3"),
        ({f"{LAYER}.lora_B.weight": torch.ones(6)}, BadCheckpoint, r"are not two matrices"),
        ({f"{LAYER}.lora_B.weight": torch.ones(6, 4, 3, 3)}, Unsupported, r"LoRA of convolutions cannot be a branch"),
        ({f"{LAYER}.lora_B.weight": torch.ones(0, 4)}, BadCheckpoint, r"are not two matrices, .* at least one number"),
        ({f"{LAYER}.lora_B.weight": torch.ones(6, 4, dtype=torch.int8)}, Unsupported, r"have to be float.*is int8"),
        ({f"{LAYER}.lora_B.weight": torch.ones(6, 4).double()}, Unsupported, r"cast to one; 1 of 2 .* is float64"),
        (
            {f"{LAYER}.lora_B.weight": torch.ones(6, 4).to(torch.float8_e4m3fn)},
            Unsupported,
            r"have to be float32, bfloat16, float16: .* 1 of 2 factors: .*lora_B\.weight is float8_e4m3fn",
        ),
        ({f"{LAYER}.lora_B.weight": None}, BadCheckpoint, r"has .*lora_A.weight and no up factor"),
        ({f"{LAYER}.alpha": torch.tensor(math.nan)}, BadCheckpoint, r"alpha nan with rank 4 is no scale"),
        ({f"{LAYER}.alpha": torch.tensor(math.inf)}, BadCheckpoint, r"alpha inf with rank 4 is no scale"),
        ({f"{LAYER}.alpha": torch.ones(2)}, BadCheckpoint, r"\[2\] is no alpha, which is one number"),
        ({"transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 8)}, BadCheckpoint, r"are of one layer"),
        ({f"{LAYER}.lora_E.weight": torch.ones(4, 1)}, Unsupported, r"AdaLoRA cannot be a branch of a layer: merge it"),
        ({f"{LAYER}.lora_embedding_A": torch.ones(4, 1)}, Unsupported, r"LoRA of embeddings cannot be a branch"),
        ({"a.hada_w1_a": torch.ones(2, 2)}, Unsupported, r"LoHa cannot be a branch of a layer: merge it"),
        ({"a.dora_scale": torch.ones(2), "a.diff": torch.ones(2)}, Unsupported, r"DoRA and full differences cannot be"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_file", [True, False])
def test_what_is_no_whole_lora_is_refused_by_name(
    tmp_path: Path, tensors: dict[str, torch.Tensor | None], error: type[XditdError], says: str, is_file: bool
) -> None:
    given = {name: tensor for name, tensor in (pair() | tensors).items() if tensor is not None}
    save_file(given, tmp_path / "x.safetensors")
    with pytest.raises(error, match=says) as caught:
        describe_lora(tmp_path / "x.safetensors" if is_file else given, label="x")
    assert re.match(r"x: |.*x\.safetensors: ", caught.value.detail)
    assert caught.value.names or "alpha" in caught.value.detail


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ({"use_dora": True}, Unsupported, "DoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, Unsupported, "changes the weights, too"),
        ({"init_lora_weights": "lora_ga"}, Unsupported, "changes the weights, too"),
        (
            {"modules_to_save": ["proj_out"]},
            Unsupported,
            r"modules_to_save is \['proj_out'\]: it trained whole tensors",
        ),
        ({"bias": "lora_only"}, Unsupported, "bias is 'lora_only': it trained whole tensors, too"),
        ({"lora_alpha": 10**400}, BadCheckpoint, "lora_alpha is an integer of 1329 bits, which is no scale"),
        ({"alpha_pattern": {"^x.*": 1}}, Unsupported, "regular expression"),
        ({"alpha_pattern": [1]}, BadCheckpoint, "not alphas by name"),
        ({"lora_alpha": "x"}, BadCheckpoint, "lora_alpha is 'x', not a number"),
        ([], BadCheckpoint, "not a JSON object"),
    ],
)
def test_configurations_that_are_no_loras(config: Any, error: type[XditdError], says: str) -> None:
    with pytest.raises(error, match=says):
        describe_lora(pair(), metadata={"lora_adapter_metadata": json.dumps(config)})


def test_configurations_that_say_what_is_usual_are_read() -> None:
    usual = {"bias": "none", "modules_to_save": None, "init_lora_weights": True, "use_dora": False, "lora_alpha": 8}
    assert scale_of(pair(), metadata={"lora_adapter_metadata": json.dumps(usual)}) == 2.0


def test_an_alpha_and_metadata_of_other_types_are_refused_by_name() -> None:
    with pytest.raises(BadCheckpoint, match="alpha is complex64, which is no alpha: use a real number"):
        describe_lora(pair(**{f"{LAYER}.alpha": torch.tensor(1j)}))
    with pytest.raises(BadCheckpoint, match="lora_adapter_metadata: not JSON"):
        describe_lora(pair(), metadata={"lora_adapter_metadata": 7})  # type: ignore[dict-item]


def test_checkpoints_folders_and_metadata_of_files(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"this is no LoRA: none of its 1 tensors .* lend a whole checkpoint by lend"):
        describe_lora({"double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2)})
    with pytest.raises(BadCheckpoint, match=r"a folder without adapter_model.safetensors or pytorch_lora"):
        describe_lora(tmp_path)
    save_file(pair(), tmp_path / "x.safetensors")
    with pytest.raises(BadRequest, match="metadata: a file has its own"):
        describe_lora(tmp_path / "x.safetensors", metadata={})
    (tmp_path / "adapter_config.json").write_text("{")
    save_file(pair(), tmp_path / "adapter_model.safetensors")
    with pytest.raises(BadCheckpoint, match="not JSON"):
        describe_lora(tmp_path)
