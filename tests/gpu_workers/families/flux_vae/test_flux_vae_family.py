"""The FLUX VAE family: recognition, configuration, the key map against diffusers' converter, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from xditd.client.demo.checkpoints import flux_vae_state_dict
from xditd.gpu_workers.families.flux_vae.checkpoint import FluxVae
from xditd.gpu_workers.families.flux_vae.config import FluxVaeConfig
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.registry import detect
from xditd.gpu_workers.models.resolution import Resolution, resolve
from xditd.ipc.errors import BadCheckpoint, Unsupported, UnsupportedDtype

Infos = dict[str, TensorInfo]
State = dict[str, torch.Tensor]
DEMO = FluxVaeConfig(channels=(64, 64, 128, 128), residuals=2, has_mid_attention=True, has_encoder=True)
FULL = FluxVaeConfig(channels=(128, 256, 512, 512), residuals=2, has_mid_attention=True, has_encoder=True)


@pytest.fixture(scope="module")
def infos(demo_vae: State, describe: Callable[[State], Infos]) -> Infos:
    return describe(demo_vae)


def fitted(infos: Infos) -> Resolution:
    return resolve(detect(infos.keys()), infos)


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_every_prefix_is_recognised(infos: Infos, prefix: str) -> None:
    found = fitted({prefix + name: info for name, info in infos.items()})
    assert found.family.name == "flux_vae"
    assert found.family.kind == "vae"
    assert found.config == DEMO


def test_full_size_has_the_known_counts() -> None:
    entries = list(FluxVae().entries(FULL, ()))
    found = fitted({entry.source: TensorInfo("float32", entry.shape) for entry in entries})
    assert found.config == FULL
    assert len(entries) == 244
    assert sum(torch.Size(entry.shape).numel() for entry in entries) == 83_819_683


def test_key_map_equals_diffusers_converter_for_every_element() -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    generator = torch.Generator().manual_seed(0)
    state = {
        entry.source: torch.empty(entry.shape, dtype=torch.int16).random_(generator=generator).view(torch.bfloat16)
        for entry in FluxVae().entries(FULL, ())
    }
    config = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    expected = convert_ldm_vae_checkpoint(dict(state), config)
    found = fitted({name: TensorInfo.of(tensor) for name, tensor in state.items()})
    assert expected.keys() == found.key_map.keys()
    for target, part in found.key_map.items():
        ours = state[part.source][part.start : part.stop]
        ours = ours if part.shape is None else ours.view(part.shape)
        assert ours.shape == expected[target].shape, target
        assert torch.equal(ours.view(torch.int16), expected[target].view(torch.int16)), target


def test_a_decoder_alone_is_accepted(infos: Infos) -> None:
    found = fitted({name: info for name, info in infos.items() if name.startswith("decoder.")})
    assert found.config == replace(DEMO, has_encoder=False)


def test_an_encoder_in_part_lists_what_is_missing(infos: Infos) -> None:
    kept = {name: info for name, info in infos.items() if name.startswith("decoder.") or "encoder.conv_in" in name}
    with pytest.raises(BadCheckpoint) as caught:
        fitted(kept)
    assert set(caught.value.names) == {f"missing: {name}" for name in infos if name not in kept}
    assert len(caught.value.detail) < 1_000


def test_a_vae_without_mid_attention(infos: Infos) -> None:
    found = fitted({name: info for name, info in infos.items() if "attn_1" not in name})
    assert found.config == replace(DEMO, has_mid_attention=False)


def test_missing_unexpected_and_misshapen_tensors_are_all_named(infos: Infos) -> None:
    broken = dict(infos)
    del broken["decoder.norm_out.bias"]
    broken["quant_conv.weight"] = TensorInfo("float32", (32, 32, 1, 1))
    broken["encoder.conv_in.weight"] = TensorInfo("float32", (64, 4, 3, 3))
    broken["decoder.mid.attn_1.q.weight"] = TensorInfo("float32", (128, 64))
    with pytest.raises(BadCheckpoint) as caught:
        fitted(broken)
    message = caught.value.detail
    assert "1 missing: decoder.norm_out.bias" in message
    assert "1 unexpected: quant_conv.weight" in message
    assert "encoder.conv_in.weight is [64, 4, 3, 3], expected [64, 3, 3, 3]" in message
    assert "decoder.mid.attn_1.q.weight is [128, 64], expected [128, 128, 1, 1]" in message


def test_another_number_of_latent_channels_is_refused(infos: Infos) -> None:
    with pytest.raises(Unsupported, match="4 latent channels, not 16"):
        fitted({**infos, "decoder.conv_in.weight": TensorInfo("float32", (128, 4, 3, 3))})


def test_another_number_of_levels_is_refused(infos: Infos) -> None:
    with pytest.raises(Unsupported, match="3 levels of resolution, not 4"):
        fitted({name: info for name, info in infos.items() if not name.startswith("decoder.up.3.")})


def test_widths_that_do_not_fill_norm_groups_are_refused() -> None:
    narrow = {
        entry.source: TensorInfo("float32", entry.shape)
        for entry in FluxVae().entries(replace(DEMO, channels=(48, 64, 128, 128)), ())
    }
    with pytest.raises(BadCheckpoint, match="48 channels do not divide into 32 norm groups"):
        fitted(narrow)


def test_an_eight_bit_tensor_is_refused_by_name(infos: Infos) -> None:
    with pytest.raises(UnsupportedDtype, match=r"decoder\.conv_out\.bias is float8_e4m3fn"):
        fitted({**infos, "decoder.conv_out.bias": TensorInfo("float8_e4m3fn", (3,))})


def test_several_dtypes_are_kept(infos: Infos) -> None:
    found = fitted({**infos, "decoder.conv_out.bias": TensorInfo("float16", (3,))})
    assert (found.dtype, found.exceptions) == (torch.float32, {"decoder.conv_out.bias": torch.float16})


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model.", "module._orig_mod.", "model.vae.module."])
def test_any_prefix_and_the_losses_of_training(infos: Infos, prefix: str) -> None:
    spelled = {prefix + name: info for name, info in infos.items()}
    losses = {
        "loss.logvar": TensorInfo("float32", ()),
        f"{prefix}loss.discriminator.main.0.weight": infos["decoder.conv_in.weight"],
    }
    found = fitted({**spelled, **losses})
    assert (found.config, set(found.skipped)) == (fitted(infos).config, set(losses))
    assert {part.source for part in found.key_map.values()} == set(spelled)


def test_attention_may_be_linear_layers_and_shortcuts_too(infos: Infos) -> None:
    """The mid attention and 1x1 convolutions hold the same numbers as matrices."""
    flat = {name: TensorInfo(i.dtype, i.shape[:2]) if i.shape[2:] == (1, 1) else i for name, i in infos.items()}
    assert sum(flat[name] != infos[name] for name in infos) > 8
    found, usual = fitted(flat), fitted(infos)
    for target, part in found.key_map.items():
        view = torch.empty(flat[part.source].shape).view(part.shape or flat[part.source].shape)
        assert view.shape == torch.empty(infos[part.source].shape).view(
            usual.key_map[target].shape or infos[part.source].shape
        ).shape  # fmt: skip


def test_the_demo_can_be_written_without_an_encoder() -> None:
    state = flux_vae_state_dict(0, encoder=False, prefix="vae.", dtype=torch.bfloat16)
    found = fitted({name: TensorInfo.of(tensor) for name, tensor in state.items()})
    assert found.config == replace(DEMO, has_encoder=False)
    assert found.dtype == torch.bfloat16
