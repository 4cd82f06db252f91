"""Jobs of a family with a module that no family runs: the error and the log say why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import language_models
import pytest
import qwen_image_models
import torch
import wan_models
from diffusers import FluxTransformer2DModel, UNet2DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from flux_pipelines import CONFIG, flux_transformer
from pipeline_folders import flux_vae
from pipeline_parts import seeded
from running_daemon import RunningDaemon
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from xditd.client import BadRequest, Client, Unsupported

pytestmark = pytest.mark.slow

WIDE = {**CONFIG, "attention_head_dim": 128, "num_attention_heads": 1, "axes_dims_rope": (16, 56, 56)}


def refusal_of(client: Client, module: Any, **arguments: Any) -> str:
    with client.lend(module, **arguments) as loan, pytest.raises(BadRequest) as error:
        client.generate(loan, conditioning={"prompt_embeds": torch.zeros(1, 7, 32)}, height=16, width=16)
    return error.value.detail


def test_module_that_no_family_runs(one_worker: RunningDaemon, client: Client) -> None:
    # As in a config.json, which has lists alone.
    module = seeded(FluxTransformer2DModel(in_channels=16, num_layers=2, **{**CONFIG, "axes_dims_rope": [4, 4, 8]}))
    said = refusal_of(client, module)
    assert "runs as its class FluxTransformer2DModel, by client.call(), since no family runs it: flux1: " in said
    assert "hidden size 32" in said
    assert "as_class" not in said
    logged = one_worker.log_text()
    assert "FluxTransformer2DModel runs as its class, since no family runs it: flux1: hidden size 32" in logged


def test_module_that_was_changed(one_worker: RunningDaemon, client: Client) -> None:
    module = flux_transformer()
    module.norm_out.norm.eps = 0.5
    why = "since no family runs it: it is not as its class makes it: "
    said = refusal_of(client, module)
    assert why in said
    assert "eps of norm_out.norm is 0.5" in said
    assert f"FluxTransformer2DModel runs as its class, {why}" in one_worker.log_text()


def test_module_of_unknown_tensor_names(client: Client) -> None:
    said = refusal_of(
        client,
        seeded(
            UNet2DModel(
                block_out_channels=(32, 64), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
            )
        ),
    )
    assert "since no family runs it: its tensor names are of none of flux1, flux1_controlnet, flux2, " in said


def test_folder_with_another_configuration(client: Client, tmp_path: Path) -> None:
    seeded(FluxTransformer2DModel(in_channels=64, num_layers=1, **WIDE)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "axes_dims_rope": [32, 48, 48]}))
    said = refusal_of(client, tmp_path)
    assert "since no family runs it: flux1: its configuration differs: axes_dims_rope=[32, 48, 48]" in said


def test_module_with_another_configuration(client: Client) -> None:
    """Its tensors are those of the family, which would compute something else with them."""
    module = seeded(FluxTransformer2DModel(in_channels=64, num_layers=1, **{**WIDE, "axes_dims_rope": [32, 48, 48]}))
    said = refusal_of(client, module)
    assert "since no family runs it: flux1: its configuration differs: axes_dims_rope=[32, 48, 48]" in said


@pytest.mark.parametrize("is_folder", [False, True], ids=["live", "folder"])
def test_a_kind_needs_a_family_that_computes_with_the_configuration(
    is_folder: bool, client: Client, tmp_path: Path
) -> None:
    module = seeded(FluxTransformer2DModel(in_channels=64, num_layers=1, **WIDE)).eval()
    module.save_pretrained(tmp_path)
    source: Any = tmp_path if is_folder else module
    client.prepare(source, kind="transformer")
    with client.lend(source, kind="transformer") as loan:
        assert (loan.family, loan.facts.family_reason) == ("flux1", "")
    with pytest.raises(BadRequest, match="vae"):
        client.lend(source, kind="vae")
    if is_folder:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "axes_dims_rope": [32, 48, 48]}))
    else:
        source = seeded(
            FluxTransformer2DModel(in_channels=64, num_layers=1, **{**WIDE, "axes_dims_rope": [32, 48, 48]})
        )
    with pytest.raises(Unsupported) as error:
        client.lend(source, kind="transformer")
    assert error.value.names == ("axes_dims_rope",)
    assert (
        "flux1: its configuration differs: axes_dims_rope=[32, 48, 48] (the family computes with (16, 56, 56)); lend "
        "it without a kind to run it as its class"
    ) in error.value.detail
    with client.lend(module.state_dict(), kind="transformer") as loan:
        assert loan.family == "flux1"


def test_a_kind_needs_a_module_as_its_class_makes_it(client: Client) -> None:
    module = seeded(FluxTransformer2DModel(in_channels=64, num_layers=1, **WIDE)).eval()
    module.norm_out.norm.eps = 0.5
    with pytest.raises(
        Unsupported, match=r"it is not as its class makes it: eps of norm_out.norm is 0.5.*without a kind"
    ):
        client.lend(module, kind="transformer")


def test_a_kind_needs_the_class_of_its_family(client: Client, tmp_path: Path) -> None:
    seeded(FluxTransformer2DModel(in_channels=64, num_layers=1, **WIDE)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKL"}))
    with pytest.raises(Unsupported, match=r"_class_name='AutoencoderKL' \(the family computes with 'FluxTransf"):
        client.lend(tmp_path, kind="transformer")


@pytest.mark.parametrize(
    ("changed", "family", "says"),
    [
        ({}, "clip_l", ""),
        ({"hidden_act": "gelu"}, "CLIPTextModel", "hidden_act='gelu'"),
        ({"layer_norm_eps": 1e-6}, "CLIPTextModel", "layer_norm_eps=1e-06"),
        ({"num_attention_heads": 4}, "CLIPTextModel", "num_attention_heads=4"),
    ],
    ids=["as released", "activation", "epsilon", "heads"],
)
@pytest.mark.parametrize("is_folder", [False, True], ids=["live", "folder"])
def test_text_encoder_with_other_settings(
    changed: dict[str, Any], family: str, says: str, is_folder: bool, client: Client, tmp_path: Path
) -> None:
    """A family knows them by heart: no tensor shows them."""
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 1}
    tokens = {"bos_token_id": 62, "eos_token_id": 63}
    module = CLIPTextModel(CLIPTextConfig(**{**sizes, **tokens, "num_attention_heads": 2, **changed})).eval()
    if is_folder:
        module.save_pretrained(tmp_path)
    with client.lend(tmp_path if is_folder else module) as loan:
        reason = f"clip_l: its configuration differs: {says}" if says else ""
        assert (loan.family, loan.facts.family_reason) == (family, reason)


def test_t5_with_another_largest_distance(client: Client) -> None:
    sizes = {"vocab_size": 64, "d_model": 128, "d_ff": 256, "num_layers": 1, "num_heads": 2, "d_kv": 64}
    config = T5Config(**sizes, feed_forward_proj="gated-gelu", relative_attention_max_distance=16)
    with client.lend(T5EncoderModel(config).eval()) as loan:
        assert loan.facts.family_reason == "t5: its configuration differs: relative_attention_max_distance=16"


def test_folder_with_null_in_its_configuration(client: Client, tmp_path: Path) -> None:
    """The class has no norm then, and reads no tensors of it."""
    wan_models.reference(wan_models.state_dict(1)).save_pretrained(tmp_path)
    rewrite_config(tmp_path, {"qk_norm": None})
    with client.lend(tmp_path) as loan:
        assert loan.facts.family_reason == "wan: its configuration differs: qk_norm=None"


def rewrite_config(folder: Path, changed: dict[str, Any], without: str = "") -> None:
    config = {**json.loads((folder / "config.json").read_text()), **changed}
    config.pop(without, None)
    (folder / "config.json").write_text(json.dumps(config))


def test_folder_whose_class_has_another_default(client: Client, tmp_path: Path) -> None:
    """What a configuration does not say is as the class says, and not as the family does."""
    module = language_models.reference("qwen3", 1).model
    module.save_pretrained(tmp_path)
    with client.lend(tmp_path) as loan:
        assert loan.family == "qwen3"
    rewrite_config(tmp_path, {}, without="rope_parameters")
    with client.lend(tmp_path) as loan:
        assert loan.facts.family_reason == "qwen3: its configuration differs: rope_theta=10000.0"


def test_folder_of_a_vae_without_its_scaling(client: Client, tmp_path: Path) -> None:
    flux_vae().save_pretrained(tmp_path)
    rewrite_config(tmp_path, {}, without="scaling_factor")
    with client.lend(tmp_path) as loan:
        assert loan.facts.family_reason.startswith("flux_vae: its configuration differs: scaling_factor=0.18215")


def wan_with(rope: Any) -> Any:
    module = wan_models.reference(wan_models.state_dict(1))
    module.rope = rope.eval()
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_module_with_other_tables_of_positions(dtype: torch.dtype, client: Client) -> None:
    """The attributes are the same, and no checkpoint holds the tables: the family would use its own."""
    module = wan_with(WanRotaryPosEmbed(128, (1, 2, 2), 1024, theta=5000.0)).to(dtype)
    with pytest.raises(Unsupported, match=r"family wan makes rope.freqs_cos, rope.freqs_sin by itself.*as_class"):
        client.lend(module)
    with client.lend(module, as_class=True) as loan:
        assert loan.family == "WanTransformer3DModel"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_module_with_the_same_tables_of_positions(dtype: torch.dtype, client: Client) -> None:
    """Also rounded with the weights, or computed on another device."""
    module = wan_with(WanRotaryPosEmbed(128, (1, 2, 2), 1024)).to(dtype)
    module.rope.freqs_cos += 1e-6
    with client.lend(module) as loan:
        assert loan.family == "wan"


def test_tables_of_another_dtype_than_the_weights(client: Client) -> None:
    module = wan_with(WanRotaryPosEmbed(128, (1, 2, 2), 1024).to(torch.bfloat16))
    with pytest.raises(Unsupported, match=r"family wan makes rope.freqs_cos"):
        client.lend(module)


def test_changed_tensor_that_is_an_attribute(client: Client) -> None:
    module = qwen_image_models.reference(qwen_image_models.state_dict(1))
    module.pos_embed.pos_freqs = module.pos_embed.pos_freqs.conj().resolve_conj()
    with pytest.raises(Unsupported, match=r"qwen_image makes pos_embed.pos_freqs by itself, and yours differs"):
        client.lend(module)


@pytest.mark.parametrize("as_class", [False, True])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_the_module_itself(register: str, as_class: bool, client: Client) -> None:
    """Jobs do not run in the caller's process, where the hook is."""
    module = flux_transformer()
    getattr(module, register)(lambda *_: None)
    with pytest.raises(Unsupported, match=r"hooks of the module is function .* Remove the hooks, and lend it again"):
        client.lend(module, as_class=as_class)


@pytest.mark.parametrize("kind", [tuple, list])
def test_module_with_a_tuple_or_a_list_in_its_configuration(kind: type, client: Client) -> None:
    """A default of the class is a tuple, and a value of a config.json a list."""
    module = seeded(
        FluxTransformer2DModel(in_channels=64, num_layers=1, **WIDE | {"axes_dims_rope": kind((16, 56, 56))})
    )
    with client.lend(module) as loan:
        assert (loan.family, loan.facts.family_reason) == ("flux1", "")


def test_component_named_by_its_id(client: Client) -> None:
    module = flux_transformer()
    module.norm_out.norm.eps = 0.5
    conditioning = {"prompt_embeds": torch.zeros(1, 7, 32)}
    with client.lend(module) as loan, pytest.raises(BadRequest, match="no family runs it: it is not as its class"):
        client.generate(loan.component_id, conditioning=conditioning, height=16, width=16)


def test_module_lent_as_its_class(client: Client) -> None:
    said = refusal_of(client, flux_transformer(), as_class=True)
    assert "since as_class was given" in said
    assert said.endswith("without as_class")


def test_module_in_place_of_a_lora(client: Client) -> None:
    with client.lend(flux_transformer()) as loan, pytest.raises(BadRequest) as error:
        loan.with_loras([(loan, 1.0)])
    assert error.value.detail == "lora: FluxTransformer2DModel is a module; name a lora"


def test_method_that_is_no_name(client: Client) -> None:
    method: Any = 3
    with (
        client.lend(flux_transformer(), as_class=True) as loan,
        pytest.raises(BadRequest, match="method: 3 is of type int, use a name such as 'forward'"),
    ):
        client.call(loan, {"hidden_states": torch.zeros(1, 6, 16)}, method=method)
