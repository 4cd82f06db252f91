"""Load Dual CLIP (xDiT) gives the conditioning that ComfyUI's own encoders give, through ComfyUI's own nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from xditd.client import BadRequest, Unsupported
from xditd.client.demo import text_checkpoints

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

TOLERANCE = 2e-6
LONG = "a lighthouse on a cliff at dusk, long exposure, " * 30


@pytest.fixture(scope="session")
def text_files(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    text_checkpoints.write_clip_l(folder / "clip_l.safetensors", seed=5)
    text_checkpoints.write_t5(folder / "t5xxl.safetensors", seed=6)
    return [str(folder / "t5xxl.safetensors"), str(folder / "clip_l.safetensors")]


@pytest.fixture
def clip(connected, text_files) -> Any:
    from xditd.client.comfyui.nodes.clip_loader import load_clip

    return load_clip(*text_files)


@pytest.fixture(scope="session")
def stock_clip(comfy, text_files) -> Any:
    """ComfyUI's encoders at the size of the small files, which its loader nodes would not recognise."""
    from comfy.text_encoders import flux

    t5, clip = (load_file(path) for path in text_files)
    layer = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    sizes = {
        "clip_l_model_config": {
            "hidden_size": 128,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "intermediate_size": clip["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        },
        "t5xxl_model_config": {
            "d_model": 128,
            "d_ff": t5[layer].shape[0],
            "d_kv": 64,
            "num_heads": 2,
            "num_layers": 2,
        },
    }
    target = comfy.comfy.supported_models_base.ClipTarget(flux.FluxTokenizer, flux.flux_clip(torch.float32))
    options = sizes | {"dtype": torch.float32}
    return comfy.comfy.sd.CLIP(target, state_dict=[clip, t5], model_options=options)


@pytest.mark.parametrize("text", ["", "a lighthouse", "a (lighthouse:1.4) on a [cliff] (at dusk:0.6)", LONG])
def test_clip_text_encode(text, comfy, clip, stock_clip, relative_error):
    found = [comfy.nodes.CLIPTextEncode().encode(each, text)[0][0] for each in (clip, stock_clip)]
    (actual, extras), (expected, stock_extras) = found
    assert actual.shape == expected.shape
    assert actual.shape[1] >= 256
    assert relative_error(actual, expected) <= TOLERANCE
    assert relative_error(extras["pooled_output"], stock_extras["pooled_output"]) <= TOLERANCE


def test_clip_text_encode_flux(comfy, clip, stock_clip, relative_error):
    found = [
        comfy.flux.CLIPTextEncodeFlux.execute(each, "a cliff", "a lighthouse at dusk", 2.5).result[0][0]
        for each in (clip, stock_clip)
    ]
    assert relative_error(found[0][0], found[1][0]) <= TOLERANCE
    assert relative_error(found[0][1]["pooled_output"], found[1][1]["pooled_output"]) <= TOLERANCE
    assert found[0][1]["guidance"] == 2.5


@pytest.mark.parametrize(
    "name", ["text_model.encoder.layers.1.mlp.fc1.weight", "encoder.block.1.layer.0.SelfAttention.v.weight"]
)
def test_a_zeroed_tensor_shows(name, comfy, connected, text_files, stock_clip, tmp_path, relative_error):
    from xditd.client.comfyui.nodes.clip_loader import load_clip

    paths = []
    for path in text_files:
        tensors = load_file(path)
        if name in tensors:
            tensors[name] = torch.zeros_like(tensors[name])
        paths.append(str(tmp_path / path.rsplit("/", 1)[1]))
        save_file(tensors, paths[-1])
    found = [comfy.nodes.CLIPTextEncode().encode(each, "a cliff")[0][0] for each in (load_clip(*paths), stock_clip)]
    (actual, extras), (expected, stock_extras) = found
    errors = relative_error(actual, expected), relative_error(extras["pooled_output"], stock_extras["pooled_output"])
    assert max(errors) > 10 * TOLERANCE


def test_what_cannot_run_is_refused_by_name(comfy, clip, text_files):
    from xditd.client.comfyui.nodes.clip_loader import load_clip

    (skipped,) = comfy.nodes.CLIPSetLastLayer().set_last_layer(clip, -2)
    with pytest.raises(Unsupported, match="CLIP Set Last Layer"):
        comfy.nodes.CLIPTextEncode().encode(skipped, "a cliff")
    with pytest.raises(BadRequest, match="one CLIP-L and one T5"):
        load_clip(text_files[0], text_files[0])
