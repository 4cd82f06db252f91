"""A real ComfyUI in this process, on the CPU, beside the real daemon of the other end-to-end tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def comfy() -> SimpleNamespace:
    """ComfyUI's modules. ``COMFYUI_PATH`` names a checkout of 0.33 or later whose requirements are installed."""
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("COMFYUI_PATH names no ComfyUI checkout")
    sys.path.insert(0, path)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.lora
    import comfy.sample
    import comfy.samplers
    import comfy.sd
    import nodes
    from comfy_extras import nodes_custom_sampler, nodes_flux

    return SimpleNamespace(comfy=comfy, nodes=nodes, custom=nodes_custom_sampler, flux=nodes_flux, root=Path(path))


@pytest.fixture
def connected(comfy, daemon, monkeypatch) -> Iterator[None]:
    """Point the node pack at the session's daemon, and end its loans after the test."""
    from xditd.client.comfyui import connections

    monkeypatch.setenv("XDITD_RUNTIME_DIR", str(daemon.runtime_dir))
    yield
    comfy.comfy.model_management.unload_all_models()
    connections.disconnect()


@pytest.fixture
def remote(connected, files) -> Any:
    from xditd.client.comfyui.nodes.unet_loader import load_unet

    return load_unet(str(files.transformer))


@pytest.fixture(scope="session")
def local(comfy, files) -> Any:
    return comfy.comfy.sd.load_diffusion_model(str(files.transformer))


@pytest.fixture(scope="session")
def conditioning() -> Callable[..., list[Any]]:
    """Make what text encoding would give: embeddings of a length, with a guidance scale."""

    def make(seed: int, tokens: int = 16, guidance: float | None = None) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        extras = {"pooled_output": torch.randn(1, 768, generator=generator)}
        if guidance is not None:
            extras["guidance"] = guidance
        return [[torch.randn(1, tokens, 4096, generator=generator), extras]]

    return make


@pytest.fixture(scope="session")
def ksample(comfy) -> Callable[..., torch.Tensor]:
    """Run ComfyUI's own KSampler node; returns latents."""

    def run(model: Any, positive: list[Any], negative: list[Any], latent: dict[str, Any], **more: Any) -> torch.Tensor:
        options = {"seed": 7, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
        options |= more
        (out,) = comfy.nodes.common_ksampler(
            model=model, positive=positive, negative=negative, latent=latent, **options
        )
        return out["samples"]

    return run
