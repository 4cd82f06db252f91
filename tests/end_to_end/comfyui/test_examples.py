"""The example workflows are valid for ComfyUI's own checks and run through its own executor, on tiny checkpoints.

Text encoders are replaced: ComfyUI loads them in their real sizes only.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wan_vaes
from comfyui_families import VARIANTS, Variant
from comfyui_workflows import EXAMPLES, Prompt, prompt_of, read_example
from PIL import Image
from safetensors.torch import save_file
from shapes.original import COMFYUI_FOLDERS, FILES

from xditd.ipc.tensors import ComponentKind

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

NAMES = sorted(path.stem for path in EXAMPLES.glob("*.json"))
TRANSFORMERS = {
    "flux1-dev.safetensors": ("flux1_dev", 0),
    "qwen_image_edit_2511_bf16.safetensors": ("qwen_image_edit_2511", 0),
    "wan2.2_i2v_high_noise_14B_fp16.safetensors": ("wan22_image", 0),
    "wan2.2_i2v_low_noise_14B_fp16.safetensors": ("wan22_image", 7),
}
VIDEO_VAES = ("qwen_image_vae.safetensors", "wan_2.1_vae.safetensors")
RUN = {
    "qwen_image_edit": ("qwen_image_edit_2511", {"steps": 2}),
    "wan22_image_to_video": ("wan22_image", {"steps": 4, "end_at_step": 2, "width": 96, "height": 64, "length": 5}),
}
"""Those that a test runs here, their variant, and what makes them small; test_server and test_shapes run the others."""


@pytest.fixture(scope="module")
def folder(comfy, variant_file, decoder_file, tmp_path_factory) -> Iterator[Path]:
    """A folder with the files that the examples name."""
    import folder_paths

    base = tmp_path_factory.mktemp("examples")
    for name in ("diffusion_models", "text_encoders", "vae", "controlnet", "input", "output"):
        (base / name).mkdir()
    for name, (variant, seed) in TRANSFORMERS.items():
        (base / "diffusion_models" / name).symlink_to(variant_file(variant, seed))
    for name in ("clip_l", "t5xxl_fp16", "qwen_2.5_vl_7b_fp8_scaled", "umt5_xxl_fp16"):
        (base / "text_encoders" / f"{name}.safetensors").touch()
    for part, name in FILES.items():
        (base / COMFYUI_FOLDERS[part] / name).touch()
    (base / "controlnet" / "FLUX.1-dev-ControlNet-Union-Pro-2.0.safetensors").touch()
    (base / "vae" / "ae.safetensors").symlink_to(decoder_file)
    for name in VIDEO_VAES:
        save_file(wan_vaes.state_dict(), base / "vae" / name)
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(base / "input" / "example.png")
    kinds = ("diffusion_models", "text_encoders", "vae", "controlnet")
    before = {kind: folder_paths.folder_names_and_paths[kind] for kind in kinds}
    places = folder_paths.get_input_directory(), folder_paths.get_output_directory()
    for kind in kinds:
        folder_paths.folder_names_and_paths[kind] = ([str(base / kind)], before[kind][1])
    folder_paths.set_input_directory(str(base / "input"))
    folder_paths.set_output_directory(str(base / "output"))
    yield base
    folder_paths.folder_names_and_paths.update(before)
    folder_paths.set_input_directory(places[0])
    folder_paths.set_output_directory(places[1])


@pytest.fixture(scope="module")
def nodes(comfy) -> Any:
    """ComfyUI's nodes, those beside its core, and ours."""
    from xditd.client.comfyui.extension import XditExtension

    asyncio.run(comfy.nodes.init_builtin_extra_nodes())
    for each in asyncio.run(XditExtension().get_node_list()):
        comfy.nodes.NODE_CLASS_MAPPINGS[each.define_schema().node_id] = each
    return comfy.nodes


@pytest.fixture
def prompt(nodes, folder) -> Callable[..., Prompt]:
    return lambda name, **changes: prompt_of(
        read_example(name), lambda kind: nodes.NODE_CLASS_MAPPINGS[kind].INPUT_TYPES(), **changes
    )


class TinyClip:
    """Gives texts the embeddings of a variant, whatever they say."""

    def __init__(self, variant: Variant) -> None:
        self._variant = variant

    def tokenize(self, text: str, **_: Any) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str, **_: Any) -> list[Any]:
        ((embeds, _extras),) = self._variant.text(1 + len(tokens))
        return [[embeds, {"pooled_output": None}]]


@pytest.mark.parametrize("name", NAMES)
def test_comfyui_finds_no_fault(name, connected, prompt):
    import execution

    valid, error, outputs, faults = asyncio.run(execution.validate_prompt("example", prompt(name), None))
    assert valid, (error, faults)
    assert not faults
    assert outputs


@pytest.mark.parametrize("name", NAMES)
def test_each_has_a_picture(name):
    with Image.open(EXAMPLES / f"{name}.jpg") as picture:
        assert min(picture.size) > 200


@torch.inference_mode()
@pytest.mark.parametrize("name", RUN)
def test_it_runs(name, connected, daemon, nodes, folder, prompt, monkeypatch):
    import execution

    variant, small = RUN[name]
    clip = TinyClip(VARIANTS[variant])
    monkeypatch.setattr(nodes.CLIPLoader, "load_clip", lambda *_, **__: (clip,))
    # Nodes for editing scale images to a million pixels.
    edit, scale = (
        nodes.NODE_CLASS_MAPPINGS[each].execute.__func__.__globals__
        for each in ("TextEncodeQwenImageEditPlus", "FluxKontextImageScale")
    )
    monkeypatch.setitem(edit, "math", SimpleNamespace(sqrt=lambda value: math.sqrt(value) / 10))
    monkeypatch.setitem(scale, "PREFERRED_KONTEXT_RESOLUTIONS", [(96, 64)])
    made = prompt(name, **small)
    if name == "wan22_image_to_video":
        second = next(node for node in made.values() if node["inputs"].get("add_noise") == "disable")
        second["inputs"] |= {"start_at_step": 2, "end_at_step": 4}
    _, _, outputs, _ = asyncio.run(execution.validate_prompt("example", made, None))
    server = SimpleNamespace(client_id=None, last_node_id=None, last_prompt_id=None, send_sync=lambda *_: None)
    executor = execution.PromptExecutor(server, cache_args={"lru": 0, "ram": 0.0, "ram_inactive": 0.0})
    executor.execute(made, "example", {}, outputs)
    assert executor.success, executor.status_messages[-1]
    lends = [each for each in daemon.status().components if each.kind == ComponentKind.TRANSFORMER]
    assert len(lends) == (2 if variant == "wan22_image" else 1)
    assert list((folder / "output").iterdir())
