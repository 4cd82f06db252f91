"""Make a ComfyUI VAE whose decoder and encoder run in the workers, for every node that takes a VAE."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any, Final

import comfy.model_management
import comfy.sd
import torch

from xditd.client.client import Client
from xditd.client.comfyui.families import adapters, titles
from xditd.client.comfyui.naming import name_of
from xditd.client.comfyui.patcher import make_patcher, make_weights
from xditd.client.comfyui.stock_dtypes import FLOAT8
from xditd.client.comfyui.understood import Understood
from xditd.client.comfyui.vae_widths import other_widths, quant_convs
from xditd.client.comfyui.weights import RemoteWeights, check_plain, refuse_known
from xditd.client.loans import Loan
from xditd.client.packed_markers import MARKER, is_old_marker
from xditd.ipc import limits
from xditd.ipc.errors import Unsupported
from xditd.ipc.facts import LatentFacts, LatentScaling
from xditd.ipc.name_lists import listed
from xditd.ipc.tensor_names import bare_name
from xditd.ipc.tensors import ComponentKind

_Run = Callable[[Client, Loan, torch.Tensor], torch.Tensor]

_COUNTER: Final = ".num_batches_tracked"
"""How torch's batch norms name the number of batches that they were trained with, on which no image depends."""

_SCALES: Final = (MARKER, ".weight_scale", ".scale_weight")
"""Name endings beside packed weights."""

_UNSCALED: Final = LatentScaling(factor=1.0, shift=0.0)

_WITH_FRAMES: Final = 3
"""Dimensions of latents with frames."""


class RemoteStage(torch.nn.Module):
    """Replaces the model inside ComfyUI's VAE; ComfyUI crops, tiles and scales the values.

    ComfyUI's latents are ``z``, and so are the daemon's here: a scaling would round them in half precision. Those with
    a dimension of frames are normalised for each channel, by ComfyUI's own ``latent_format``.
    """

    def __init__(self, weights: RemoteWeights, shapes: torch.nn.Module, latent_format: Any = None) -> None:
        """``shapes`` is ComfyUI's own module on the meta device, on which changes by nodes are detected.

        ``latent_format`` is that of latents with frames, else ``None``.
        """
        super().__init__()
        self._weights = weights
        self._format = latent_format
        for name, child in shapes.named_children():
            self.add_module(name, child)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the tensors, for nodes that save.

        Raises:
            StaleSource: their file was written over since a loader read it.
        """
        self._weights.check_files()
        return dict(self._weights.base)

    def decode(self, z: torch.Tensor, **_: Any) -> torch.Tensor:
        """Decode to (batch, 3, height, width), about in [-1, 1]: ComfyUI clips after it has joined the tiles.

        Latents with frames become (batch, 3, frames, height, width).
        """
        if self._format is not None:
            return self._with_frames(_decode, self._format.process_in(z.float())).to(z.dtype)
        return self._in_batches(_decode, z.float()).to(z.dtype)

    def encode(self, pixels: torch.Tensor, **_: Any) -> torch.Tensor:
        """Encode (batch, 3, height, width) in [-1, 1] to the posterior's mode.

        Of a VAE with frames, ``pixels`` are (batch, 3, frames, height, width); as in ComfyUI, frames behind the last
        whole latent are left out.
        """
        if self._format is not None:
            step = self._latents().frames
            whole = pixels[:, :, : 1 + (pixels.shape[2] - 1) // step * step]
            z: torch.Tensor = self._format.process_out(self._with_frames(_encode, whole.float()))
            return z.to(pixels.dtype)
        return self._in_batches(_encode, pixels.float()).to(pixels.dtype)

    def _latents(self) -> LatentFacts:
        facts = self._weights.loan.facts.vae
        assert facts is not None
        return facts.latents

    def _with_frames(self, run: _Run, x: torch.Tensor) -> torch.Tensor:
        """Run with (batch, channels, frames, height, width); of one frame, as an image."""
        if x.shape[2] == 1:
            return self._in_batches(run, x[:, :, 0]).unsqueeze(2)
        return self._in_batches(run, x)

    def _in_batches(self, run: _Run, x: torch.Tensor) -> torch.Tensor:
        parts = []
        for part in torch.split(x, limits.MAX_BATCH):
            comfy.model_management.throw_exception_if_processing_interrupted()
            parts.append(run(self._weights.connect(), self._weights.loan, part))
        return torch.cat(parts)


def _decode(client: Client, loan: Loan, latents: torch.Tensor) -> torch.Tensor:
    return client.decode(loan, latents, scaling=_UNSCALED, clamp=False)


def _encode(client: Client, loan: Loan, pixels: torch.Tensor) -> torch.Tensor:
    return client.encode(loan, pixels, scaling=_UNSCALED)


def make_vae(tensors: Mapping[str, torch.Tensor], label: str) -> Any:
    """Make a VAE object from a checkpoint's tensors. As in stock ComfyUI, they are cast to the dtype that it chooses.

    Raises:
        Unsupported: not the VAE of a family that the workers run, or weights in another packed format.
    """
    plain = {bare_name(name): tensor for name, tensor in tensors.items() if not name.endswith(_COUNTER)}
    _check_format(plain, label)
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in plain.items()}
    try:
        vae = _on_meta(shapes)
    except (RuntimeError, ValueError) as error:
        refuse_known(tensors, label)
        raise Unsupported(f"{label}: ComfyUI makes no VAE of tensors with these names and sizes: {error}") from error
    formats = _latents()
    latents = vae.latent_channels, vae.latent_dim
    if vae.first_stage_model is None or latents not in formats:
        refuse_known(tensors, label)
        raise Unsupported(f"{label}: not the VAE of {titles()}; use Load VAE")
    plain = _cast(plain, vae.vae_dtype)
    weights = make_weights(plain, ComponentKind.VAE, label, is_whole=True)
    latent_format = formats[latents] if vae.latent_dim == _WITH_FRAMES else None
    vae.first_stage_model = RemoteStage(weights, vae.first_stage_model, latent_format)
    vae.patcher = make_patcher(vae.first_stage_model, weights, vae.device, comfy.model_management.vae_offload_device())
    vae.size = 0
    # Activations are in the workers' memory; not zero, because ComfyUI divides by it.
    vae.memory_used_decode = vae.memory_used_encode = lambda *_: 1
    vae.xditd_functions = _functions(vae)
    return vae


def _check_format(tensors: Mapping[str, torch.Tensor], label: str) -> None:
    """Refuse packed weights that a VAE of stock ComfyUI does not read, such as fp8 with scales, which it would ignore.

    Raises:
        Unsupported: names some of them.
    """
    scaled = sorted(name for name in tensors if name.endswith(_SCALES) or is_old_marker(name))
    if scaled:
        raise Unsupported(
            f"{label}: ComfyUI reads no scales of a VAE's weights, and without them its images would be wrong: use a "
            f"VAE in fp32, bf16, fp16 or fp8 without scales; {len(scaled)} of {len(tensors)} tensors: {listed(scaled)}",
            names=scaled,
        )
    check_plain({name: tensor for name, tensor in tensors.items() if tensor.dtype not in FLOAT8}, label)


def weights_of(vae: Any) -> RemoteWeights:
    """Return the weights of an xDiT or a stock VAE's decoder, ready to be lent."""
    if isinstance(vae.first_stage_model, RemoteStage):
        comfy.model_management.load_models_gpu([vae.patcher])
        own: RemoteWeights = vae.patcher.weights
        return own
    found: RemoteWeights | None = getattr(vae, "xditd_weights", None)
    if found is None:
        # What only an encoder reads stays here.
        tensors = {
            name: tensor
            for name, tensor in vae.first_stage_model.state_dict().items()
            if not name.startswith(("encoder.", "quant_conv.")) and not name.endswith(_COUNTER)
        }
        tensors = _cast(tensors, vae.vae_dtype)  # with DynamicVRAM, stock does that when it loads them
        found = vae.xditd_weights = make_weights(tensors, ComponentKind.VAE, "vae", is_whole=False)
    return found


def why_local(vae: Any) -> str | None:
    """Return why a VAE has to decode in ComfyUI: somebody changed more than its weights. None if the workers can.

    An xDiT VAE's modules are checked when it is loaded. A stock VAE is compared with a fresh one of the same shapes.
    """
    if isinstance(vae.first_stage_model, RemoteStage):
        return _why_changed(vae, vae.xditd_functions)
    made = getattr(vae, "xditd_baseline", None)
    if made is None:
        tensors = vae.first_stage_model.state_dict()
        fresh = _on_meta({name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()})
        made = None if fresh.first_stage_model is None else (Understood(fresh.patcher), _functions(fresh))
        vae.xditd_baseline = made
    if made is None:
        return "ComfyUI does not know this kind of VAE"
    understood, functions = made
    found = next(understood.faults(vae.patcher), None)
    if found is None and vae.patcher.patches:
        found = "patches of its weights"
    return found or _why_changed(vae, functions)


def _cast(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: each.to(dtype) if each.is_floating_point() else each for name, each in tensors.items()}


def _functions(vae: Any) -> dict[str, Any]:
    """Return the code of the functions that ComfyUI sets on a VAE object, by name."""
    return {name: value.__code__ for name, value in vars(vae).items() if isinstance(value, types.FunctionType)}


def _why_changed(vae: Any, made: Mapping[str, Any]) -> str | None:
    if type(vae) is not comfy.sd.VAE:
        return f"it is a {name_of(type(vae))}"
    for name, value in vars(vae).items():
        if callable(value) and hasattr(comfy.sd.VAE, name):
            return f"its {name} was replaced ({name_of(value)})"
        if name in made and getattr(value, "__code__", None) is not made[name]:
            return f"its {name} was replaced ({name_of(value)})"
    return None


def _latents() -> dict[tuple[int, int], Any]:
    """Return ComfyUI's formats of all families' latents, by channels and dimensions."""
    formats = (config.latent_format() for each in adapters() for config in each.config_classes())
    return {(each.latent_channels, each.latent_dimensions): each for each in formats}


def _on_meta(shapes: Mapping[str, torch.Tensor]) -> Any:
    """Make ComfyUI's VAE on the meta device, which detects ratios, ranges and tile sizes from names and shapes.

    Widths that ComfyUI does not detect are given to it.
    """
    widths = other_widths(shapes)
    with torch.device("meta"):
        if widths is None:
            return comfy.sd.VAE(sd=dict(shapes))
        vae = comfy.sd.VAE(sd={**quant_convs(widths), **shapes}, config={"params": widths})
    vae.latent_channels = widths["embed_dim"]
    return vae
