"""Fixtures: a real ComfyUI in this process, on the CPU, and the real daemon of the other end-to-end tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfyui_families
import numpy as np
import pytest
import text_checkpoints
import torch
from PIL import Image
from safetensors.torch import save_file

from xditd.client.cli import comfyui as pack
from xditd.client.demo import checkpoints


@pytest.fixture(scope="session")
def comfy() -> Iterator[SimpleNamespace]:
    """ComfyUI's modules; they build tiny models, too.

    ``COMFYUI_PATH`` names a checkout of 0.33 or later whose requirements are installed.
    """
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("COMFYUI_PATH names no ComfyUI checkout")
    sys.path.insert(0, path)
    import comfy.cli_args
    import comfy_aimdo.control

    # As in main.py, before modules that use its library, so that DynamicVRAM loads files on a CPU too.
    comfy_aimdo.control.init()
    comfy.cli_args.args.cpu = True
    import comfy.lora
    import comfy.sample
    import comfy.samplers
    import comfy.sd
    import nodes
    from comfy_extras import nodes_custom_sampler, nodes_flux

    with pytest.MonkeyPatch.context() as patch:
        comfyui_families.detect_small_models(patch)
        yield SimpleNamespace(comfy=comfy, nodes=nodes, custom=nodes_custom_sampler, flux=nodes_flux, root=Path(path))


@pytest.fixture
def connected(comfy, daemon, monkeypatch) -> Iterator[None]:
    """Point the node pack at the session's daemon, and end its loans after the test."""
    from xditd.client.comfyui import connections

    monkeypatch.setenv("XDITD_RUNTIME_DIR", str(daemon.runtime_dir))
    monkeypatch.setattr(connections, "_client", None)
    yield
    comfy.comfy.model_management.unload_all_models()
    if connections._client is not None:
        connections._client.close()


@pytest.fixture
def remote(connected, files) -> Any:
    from xditd.client.comfyui.nodes.unet_loader import load_unet

    return load_unet(str(files.transformer))


@pytest.fixture(scope="session")
def local(comfy, files) -> Any:
    return comfy.comfy.sd.load_diffusion_model(str(files.transformer))


@pytest.fixture(scope="session")
def conditioning() -> Callable[..., list[Any]]:
    """Make conditioning as text encoding does: embeddings of a length, with a guidance scale."""

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


@pytest.fixture
def latent() -> dict[str, Any]:
    return {"samples": torch.zeros(1, 16, 16, 16)}


@pytest.fixture
def xsample(connected, conditioning, latent):
    """Run XDiT KSampler; returns latents, image and its note."""
    from xditd.client.comfyui.nodes.ksampler import sample

    def run(model: Any, **more: Any) -> tuple[torch.Tensor, Any, str]:
        options = {"seed": 7, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
        options |= {"positive": conditioning(1), "negative": conditioning(2), "latent_image": latent}
        out, image, note = sample(model=model, **(options | more))
        return out["samples"], image, note

    return run


@pytest.fixture(scope="session")
def decoder_file(tmp_path_factory) -> Path:
    """A small VAE that ComfyUI loads: its decoder's width may vary, its encoder's may not."""
    path = tmp_path_factory.mktemp("vae") / "decoder.safetensors"
    save_file(checkpoints.flux_vae_state_dict(3, channels=(64, 128, 256, 256), encoder=False), path)
    return path


@pytest.fixture(scope="session")
def whole_file(tmp_path_factory) -> Path:
    """A VAE of the real size, with its encoder."""
    path = tmp_path_factory.mktemp("vae") / "whole.safetensors"
    save_file(checkpoints.flux_vae_state_dict(4, channels=(128, 256, 512, 512)), path)
    return path


@pytest.fixture(scope="session")
def stock_vae(comfy, decoder_file) -> Any:
    return comfy.comfy.sd.VAE(sd=comfy.comfy.utils.load_torch_file(str(decoder_file)))


@pytest.fixture
def vae(connected, decoder_file) -> Any:
    from xditd.client.comfyui.nodes.vae_loader import load_vae

    return load_vae(str(decoder_file))


@pytest.fixture(scope="session")
def variant_file(tmp_path_factory) -> Callable[[str], Path]:
    """Write the tiny checkpoint of a variant of ``comfyui_families``, once for a seed."""
    folder = tmp_path_factory.mktemp("variants")

    def write(name: str, seed: int = 0) -> Path:
        path = folder / f"{name}_{seed}.safetensors"
        if not path.exists():
            save_file(comfyui_families.VARIANTS[name].make(seed), path)
        return path

    return write


@pytest.fixture(scope="session")
def stock(comfy, variant_file) -> Callable[..., Any]:
    """The MODEL of a variant as ComfyUI runs it."""
    return cache(lambda name, seed=0: comfy.comfy.sd.load_diffusion_model(str(variant_file(name, seed))))


@pytest.fixture
def weightless(connected, variant_file) -> Callable[..., Any]:
    """The MODEL of a variant from XDiT UNet Loader."""
    from xditd.client.comfyui.nodes.unet_loader import load_unet

    return lambda name, seed=0: load_unet(str(variant_file(name, seed)))


TEXT_SIZES = {"context_dim": 128, "pooled_dim": 128}
"""Of the transformer of :class:`Server`, whose text encoders are tiny."""


class Server:
    """A ComfyUI process with folders of its own."""

    def __init__(self, root: Path, base: Path, runtime_dir: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self.base = base
        self.log = base / "comfyui.log"
        command = [sys.executable, "main.py", "--cpu", "--disable-auto-launch", "--base-directory", str(base)]
        command += ["--port", self.url.rsplit(":", 1)[1], "--database-url", "sqlite:///:memory:"]
        environment = os.environ | {"XDITD_RUNTIME_DIR": str(runtime_dir)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=root, stdout=log, stderr=log, env=environment)

    def ask(self, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=30) as reply:
            text = reply.read().decode()
        return json.loads(text) if reply.headers.get_content_type() == "application/json" else text

    def is_up(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        try:
            return bool(self.ask("/system_stats"))
        except (urllib.error.URLError, ConnectionError):
            return False

    def queue(self, prompt: dict[str, Any]) -> str:
        return str(self.ask("/prompt", {"prompt": prompt})["prompt_id"])

    def outcome(self, prompt_id: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.ask(f"/history/{prompt_id}").get(prompt_id)
        return found

    def picture(self, prompt_id: str, wait_until: Callable[..., Any]) -> np.ndarray:
        done = wait_until(lambda: self.outcome(prompt_id), "the prompt to end", self.log)
        said = [each.get("exception_message") or name for name, each in done["status"]["messages"]]
        assert done["status"]["status_str"] == "success", said
        (image,) = [image for output in done["outputs"].values() for image in output.get("images", [])]
        return np.asarray(Image.open(self.base / "output" / image["subfolder"] / image["filename"])).astype(int)

    def error(self, prompt_id: str, wait_until: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
        done = wait_until(lambda: self.outcome(prompt_id), "the prompt to end", self.log)
        assert done["status"]["status_str"] == "error"
        name, detail = done["status"]["messages"][-1]
        return name, detail

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def start_server(comfy, daemon, tmp_path_factory, wait_until) -> Iterator[Callable[[], Server]]:
    running: list[Server] = []
    base = tmp_path_factory.mktemp("comfyui")
    models = ("diffusion_models", "text_encoders", "vae", "controlnet")
    for folder in (*(f"models/{each}" for each in models), "custom_nodes", "input"):
        (base / folder).mkdir(parents=True)
    transformer = checkpoints.flux1_state_dict(1, **TEXT_SIZES)
    save_file(transformer, base / "models/diffusion_models/flux1-dev.safetensors")
    text_checkpoints.write_clip_l(base / "models/text_encoders/clip_l.safetensors", seed=5)
    text_checkpoints.write_t5(base / "models/text_encoders/t5xxl_fp16.safetensors", seed=6)
    vae = checkpoints.flux_vae_state_dict(3, channels=(64, 128, 256, 256), encoder=False)
    save_file(vae, base / "models/vae/ae.safetensors")
    pack.install(base / "custom_nodes" / pack.FOLDER)

    def start(runtime_dir: Path | None = None) -> Server:
        running.append(Server(comfy.root, base, runtime_dir or daemon.runtime_dir))
        wait_until(running[-1].is_up, "ComfyUI to answer", running[-1].log)
        return running[-1]

    yield start
    for server in running:
        if server.process.poll() is None:
            server.kill()


@pytest.fixture(scope="module")
def server(start_server) -> Server:
    return start_server()
