"""ComfyUI nodes of the benchmark part comfyui: make random conditioning, and record times.

The benchmark copies this folder into the ComfyUI that it starts. ``GET /xditd_bench`` returns the times recorded since
the last request, and this ComfyUI's settings.
"""

import time
from pathlib import Path

import comfy.ldm.flux.math
import comfy.memory_management
import comfy.model_management
import comfy.utils
import folder_paths
import torch
from aiohttp import web
from safetensors.torch import save_file
from server import PromptServer

from xditd.client.client import Client
from xditd.client.comfyui.forward import RemoteForward

steps: list[float] = []
marks: dict[str, float] = {}
forwards: dict[str, list[float]] = {"forward_ms": [], "call_ms": []}
_update = comfy.utils.ProgressBar.update_absolute


def _record_step(bar, value, total=None, preview=None):
    steps.append(time.time())
    return _update(bar, value, total, preview)


comfy.utils.ProgressBar.update_absolute = _record_step


def _timed(name, function):
    def run(*given, **more):
        _wait_for_gpu()
        started = time.perf_counter()
        result = function(*given, **more)
        _wait_for_gpu()
        forwards[name].append((time.perf_counter() - started) * 1e3)
        return result

    return run


RemoteForward.run = _timed("forward_ms", RemoteForward.run)
Client.call_parts = _timed("call_ms", Client.call_parts)


def _is_cuda():
    return comfy.model_management.get_torch_device().type == "cuda"


def _wait_for_gpu():
    if _is_cuda():
        torch.cuda.synchronize()


@PromptServer.instance.routes.get("/xditd_bench")
async def report(request):
    found = {
        "steps": list(steps),
        "marks": dict(marks),
        "forwards": {name: list(times) for name, times in forwards.items()},
        "allocator": torch.cuda.get_allocator_backend() if _is_cuda() else "none, on the CPU",
        "dynamic_vram": bool(comfy.memory_management.aimdo_enabled),
        "attention": comfy.ldm.flux.math.optimized_attention.__name__,
        "torch": torch.__version__,
    }
    steps.clear()
    marks.clear()
    for times in forwards.values():
        times.clear()
    return web.json_response(found)


class BenchConditioning:
    CATEGORY = "benchmark"
    FUNCTION = "make"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {}), "tokens": ("INT", {}), "guidance": ("FLOAT", {})}}

    def make(self, seed, tokens, guidance):
        generator = torch.Generator().manual_seed(seed)
        pooled = torch.randn(1, 768, generator=generator)
        embeds = torch.randn(1, tokens, 4096, generator=generator)
        return ([[embeds, {"pooled_output": pooled, "guidance": guidance}]],)


class BenchLatents:
    """Records when latents are finished, and saves them in the output folder."""

    CATEGORY = "benchmark"
    FUNCTION = "note"
    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": ("LATENT",), "name": ("STRING", {})}}

    def note(self, latent, name):
        _wait_for_gpu()
        marks["latents"] = time.time()
        kept = latent["samples"].float().cpu().contiguous()
        save_file({"latents": kept}, Path(folder_paths.get_output_directory()) / f"{name}.safetensors")
        return (latent,)


class BenchSink:
    """Output node for latents that no other node takes."""

    CATEGORY = "benchmark"
    FUNCTION = "take"
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": ("LATENT",)}}

    def take(self, latent):
        return {}


class BenchImage:
    """Records when an image is finished. It is not saved as PNG, which would take longer than some steps."""

    CATEGORY = "benchmark"
    FUNCTION = "note"
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",)}}

    def note(self, image):
        _wait_for_gpu()
        marks["image"] = time.time()
        return {"ui": {"shape": [list(image.shape)], "is_finite": [bool(image.isfinite().all())]}}


NODE_CLASS_MAPPINGS = {cls.__name__: cls for cls in (BenchConditioning, BenchLatents, BenchSink, BenchImage)}
