"""A CLIP whose encoders run in the workers; tokenizers and prompt weights stay ComfyUI's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import comfy.hooks
import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.text_encoders.flux
import folder_paths
import torch

from xditd.client.comfyui.patcher import bind, lendable
from xditd.client.comfyui.weights import Edit, RemoteWeights, check_plain
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.name_lists import listed
from xditd.ipc.tensors import ComponentKind

CLIP_TOKENS: Final = {"start": 49406, "end": 49407, "pad": 49407}
T5_TOKENS: Final = {"end": 1, "pad": 0}
LAST_LAYER: Final = -1
"""What ComfyUI's CLIP Set Last Layer calls the output that FLUX.1 reads anyway."""

_CLIP_PARTS = ("text_model.", "text_projection", "logit_scale")
_NO_WEIGHTS = ("position_ids", "spiece_model")
"""Numbers in some files that no encoder computes with."""


class RemoteEncoder(comfy.sd1_clip.ClipTokenWeightEncoder):
    """One text encoder. ComfyUI's base class cuts prompts into sections and applies the weights of words."""

    def __init__(self, weights: RemoteWeights, special_tokens: Mapping[str, int], has_pooled: bool) -> None:
        self.special_tokens = special_tokens
        self._weights = weights
        self._has_pooled = has_pooled

    def encode(self, tokens: Sequence[Sequence[object]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode sections of equal length; returns hidden states and the pooled one, as float32 on the host."""
        ids = []
        for section in tokens:
            if not all(isinstance(token, int) for token in section):
                raise Unsupported(
                    f"{self._weights.label}: the prompt names a textual inversion embedding; XDiT's CLIP takes plain "
                    "text, use DualCLIPLoader for it"
                )
            ids.append([token for token in section if isinstance(token, int)])
        encoded = self._weights.connect().encode_text(self._weights.loan, ids, pooled=self._has_pooled)
        return encoded.hidden_states, encoded.pooled


class RemoteTextModel(torch.nn.Module):
    """FLUX.1's pair of encoders, where ComfyUI has its text model."""

    def __init__(self, clip: RemoteWeights, t5: RemoteWeights) -> None:
        """The modules are names and shapes alone, as ComfyUI's text model has them: LoRAs and nodes look for them."""
        super().__init__()
        self._clip = RemoteEncoder(clip, CLIP_TOKENS, has_pooled=True)
        self._t5 = RemoteEncoder(t5, T5_TOKENS, has_pooled=False)
        for weights in (clip, t5):
            for name, inner in module_names(weights).items():
                _place(self, name, weights.base[inner])

    def encode_token_weights(self, tokens: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode what FLUX.1's tokenizer made: T5's states and CLIP's pooled one."""
        states, _ = self._t5.encode_token_weights(tokens["t5xxl"])
        _, pooled = self._clip.encode_token_weights(tokens["l"])
        return states, pooled

    def set_clip_options(self, options: Mapping[str, Any]) -> None:
        layer = options.get("layer")
        if layer not in (None, LAST_LAYER):
            raise Unsupported(f"CLIP Set Last Layer: {layer}, but XDiT's CLIP gives the last layer only; set it to -1")

    def reset_clip_options(self) -> None:
        """Nothing is ever set."""


class LentPair:
    """Two components that ComfyUI loads and unloads as one; ``base`` has the names that ComfyUI's text model has."""

    def __init__(self, *weights: RemoteWeights) -> None:
        self._weights = weights
        self._names = [module_names(each) for each in weights]
        self.base: dict[str, torch.Tensor] = {
            name: each.base[inner]
            for each, names in zip(weights, self._names, strict=True)
            for name, inner in names.items()
        }

    @property
    def size_bytes(self) -> int:
        return sum(each.size_bytes for each in self._weights)

    @property
    def loaded_bytes(self) -> int:
        return sum(each.loaded_bytes for each in self._weights)

    def apply(self, edits: Mapping[str, Edit]) -> None:
        """Lend both, each with the edits of its own tensors."""
        for each, names in zip(self._weights, self._names, strict=True):
            each.apply({names[name]: edit for name, edit in edits.items() if name in names})

    def release(self) -> None:
        for each in self._weights:
            each.release()


def module_names(weights: RemoteWeights) -> dict[str, str]:
    """The names that ComfyUI's text model gives an encoder's tensors, with those of its file."""
    found = {}
    for inner in weights.base:
        name = inner.removeprefix("transformer.")
        if is_clip(weights.base):
            found[f"clip_l.transformer.{name if name.startswith(_CLIP_PARTS) else f'text_model.{name}'}"] = inner
        else:
            found[f"t5xxl.transformer.{name}"] = inner
    return found


def is_clip(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether an encoder is CLIP, and not T5."""
    return any(name.endswith("embeddings.token_embedding.weight") for name in tensors)


def _place(root: torch.nn.Module, name: str, like: torch.Tensor) -> None:
    """Put a parameter without memory where its name says."""
    *path, leaf = name.split(".")
    module = root
    for part, below in zip(path, [*path[1:], leaf], strict=True):
        if part not in module._modules:
            module.add_module(part, torch.nn.ModuleList() if below.isdigit() else torch.nn.Module())
        module = module.get_submodule(part)
    shape = torch.empty_like(like, device="meta")
    module.register_parameter(leaf, torch.nn.Parameter(shape, requires_grad=False))


def make_clip(files: Mapping[str, Mapping[str, torch.Tensor]]) -> Any:
    """Make a CLIP object of the tensors of two files, by label, in either order.

    Raises:
        BadRequest: not one CLIP-L and one T5.
        Unsupported: quantised weights.
    """
    found: dict[bool, RemoteWeights] = {}
    for label, tensors in files.items():
        plain = {name: tensor for name, tensor in tensors.items() if not name.endswith(_NO_WEIGHTS)}
        check_plain(plain, label)
        found[is_clip(plain)] = lendable(plain, ComponentKind.TEXT_ENCODER, label, is_whole=True)
    if len(found) != 2:
        raise BadRequest(f"{listed(files, joint=' and ')}: FLUX.1 needs one CLIP-L and one T5 file; choose one of each")
    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model = RemoteTextModel(found[True], found[False])
    clip.patcher = bind(
        clip.cond_stage_model,
        LentPair(found[True], found[False]),
        comfy.model_management.text_encoder_device(),
        comfy.model_management.text_encoder_offload_device(),
    )
    clip.patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
    clip.patcher.is_clip = True
    clip.tokenizer = comfy.text_encoders.flux.FluxTokenizer(
        embedding_directory=folder_paths.get_folder_paths("embeddings")
    )
    clip.apply_hooks_to_conds = None
    clip.layer_idx = None
    clip.use_clip_schedule = False
    clip.tokenizer_options = {}
    return clip
