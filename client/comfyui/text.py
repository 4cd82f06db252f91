"""Make a ComfyUI CLIP whose encoders run in the workers; ComfyUI tokenizes and applies prompt weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

import comfy.hooks
import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import torch

from xditd.client.comfyui.families.text_adapter import EncoderFile, TextAdapter
from xditd.client.comfyui.lora_patches import Factors
from xditd.client.comfyui.packed_tensors import LendableTensors
from xditd.client.comfyui.patcher import make_patcher, make_weights
from xditd.client.comfyui.text_weights import hold_encoder
from xditd.client.comfyui.weights import Edit, RemoteWeights
from xditd.ipc.errors import Unsupported
from xditd.ipc.tensors import ComponentKind
from xditd.ipc.transports.tensor_views import torch_dtype

LAST_LAYER: Final = -1
"""Number of the last layer in ComfyUI's CLIP Set Last Layer; the workers return that layer's output."""

COMPUTE_DTYPE: Final = "float32"
"""The dtype into which packed weights are dequantised: stock and the workers compute text encoders in float32."""

_NO_WEIGHTS: Final = ("position_ids",)
"""Tensors in some files that no encoder computes with."""
_TOKENIZERS: Final = ("spiece_model", "tekken_model", "tokenizer_json")
"""Tensors whose bytes are a tokenizer, which ComfyUI reads."""


class RemoteEncoder(comfy.sd1_clip.ClipTokenWeightEncoder):
    """One text encoder in the workers. ComfyUI's base class splits prompts into sections and applies word weights."""

    def __init__(self, weights: RemoteWeights, special_tokens: Mapping[str, int], has_pooled: bool) -> None:
        self.special_tokens = special_tokens
        self._weights = weights
        self._has_pooled = has_pooled

    def encode(self, tokens: Sequence[Sequence[object]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode sections of equal length; returns hidden states and the pooled state, as float32 on the host."""
        ids = []
        for section in tokens:
            if not all(isinstance(token, int) for token in section):
                raise Unsupported(
                    f"{self._weights.label}: the prompt names a textual inversion embedding; XDiT's CLIP takes plain "
                    "text, use a stock CLIP loader for it"
                )
            ids.append([token for token in section if isinstance(token, int)])
        encoded = self._weights.connect().encode_text(self._weights.in_use, ids, pooled=self._has_pooled)
        return encoded.hidden_states, encoded.pooled


def encode_ids(weights: RemoteWeights, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    """Encode token ids (rows, tokens) by :meth:`Client.encode_text`; returns hidden states in float32 on the host."""
    states: torch.Tensor = weights.connect().encode_text(weights.in_use, ids, **more).hidden_states
    return states


class RemoteTextModel(torch.nn.Module):
    """Replaces ComfyUI's text model by encoders in the workers. A family's subclass combines their outputs."""

    def __init__(self, parts: Sequence[tuple[RemoteWeights, Mapping[str, str]]]) -> None:
        """Build modules on the meta device with the names of ComfyUI's text model, which LoRAs and nodes look up."""
        super().__init__()
        for weights, names in parts:
            shapes = weights.shapes
            for name, inner in names.items():
                if inner in shapes:  # else it is a companion of a packed weight
                    _add_meta_parameter(self, name, shapes[inner])

    def set_clip_options(self, options: Mapping[str, Any]) -> None:
        layer = options.get("layer")
        if layer not in (None, LAST_LAYER):
            raise Unsupported(f"CLIP Set Last Layer: {layer}, but XDiT's CLIP gives the last layer only; set it to -1")

    def reset_clip_options(self) -> None:
        """Do nothing: options are never stored."""

    def generate(self, *_: Any, **__: Any) -> Any:
        raise Unsupported("XDiT's CLIP encodes texts and generates none; use a stock CLIP loader for nodes that do")


class JointWeights:
    """Components that ComfyUI loads and unloads as one; ``lendable`` has the names of ComfyUI's text model."""

    compute_dtype: Final = COMPUTE_DTYPE

    def __init__(self, parts: Sequence[tuple[RemoteWeights, Mapping[str, str]]], *, has_branches: bool = True) -> None:
        self._parts = parts
        self.has_branches = has_branches
        self.lendable = LendableTensors({})
        for weights, names in parts:
            lendable = weights.lendable.renamed(
                {inner: name for name, inner in names.items() if inner in weights.lendable.tensors}
            )
            self.lendable.tensors.update(lendable.tensors)
            self.lendable.packed.update(lendable.packed)
            self.lendable.markers.update(lendable.markers)
            self.lendable = dataclasses.replace(self.lendable, tables=self.lendable.tables | lendable.tables)

    @property
    def base(self) -> dict[str, torch.Tensor]:
        """The unpatched tensors.

        Raises:
            Unsupported: one of the components has none that can be read.
        """
        for weights, _ in self._parts:
            _ = weights.base
        return self.lendable.tensors

    @property
    def size_bytes(self) -> int:
        return sum(weights.size_bytes for weights, _ in self._parts)

    @property
    def loaded_bytes(self) -> int:
        return sum(weights.loaded_bytes for weights, _ in self._parts)

    def check_files(self) -> None:
        """Check the files of all components, as :meth:`RemoteWeights.check_files` does."""
        for weights, _ in self._parts:
            weights.check_files()

    def apply(self, edits: Mapping[str, Edit]) -> None:
        """Lend all components, each with the edits of its own tensors."""
        for weights, names in self._parts:
            weights.apply({names[name]: edit for name, edit in edits.items() if name in names})

    def use_loras(self, branches: Mapping[str, Sequence[Factors]], holder: object) -> None:
        """Use the LoRAs of ``holder``, each with the component that has its layers."""
        for weights, names in self._parts:
            weights.use_loras({names[name]: each for name, each in branches.items() if name in names}, holder)

    def use_hooked_loras(self, branches: Mapping[str, Sequence[Factors]], holder: object) -> None:
        """Use the LoRAs of hooks besides, each with the component that has its layers."""
        for weights, names in self._parts:
            weights.use_hooked_loras({names[name]: each for name, each in branches.items() if name in names}, holder)

    def release(self) -> None:
        for weights, _ in self._parts:
            weights.release()


def read_encoder(
    tensors: Mapping[str, torch.Tensor], label: str, adapter: TextAdapter, quantization_metadata: str | None = None
) -> EncoderFile:
    """Hold a file's tensors as stock ComfyUI would for this family; those of none of its encoders as they are.

    ``quantization_metadata`` is the text of ``_quantization_metadata`` in its header.

    Raises:
        BadCheckpoint: packed weights do not have the form of their format.
        Unsupported: an unknown format of weights.
    """
    tokenizers = {name: tensor for name, tensor in tensors.items() if name in _TOKENIZERS}
    given = {name: each for name, each in tensors.items() if name not in tokenizers and not name.endswith(_NO_WEIGHTS)}
    stock = adapter.stock_encoder(given)
    lendable = LendableTensors(given)
    if stock is not None:
        given = {name: each for name, each in given.items() if not any(part in name for part in stock.unused)}
        lendable = hold_encoder(given, label, stock.dtype, stock.is_table, quantization_metadata)
    weights = make_weights(lendable, ComponentKind.TEXT_ENCODER, label, is_whole=True, dtype=torch_dtype(COMPUTE_DTYPE))
    return EncoderFile(weights, tokenizers)


def make_clip(files: Mapping[str, EncoderFile], adapter: TextAdapter) -> Any:
    """Make a CLIP object from the encoders of several files, by label, in any order.

    Raises:
        BadRequest: not the files of this family's encoders.
        Unsupported: a relative of them, or a file without a tokenizer.
    """
    text = adapter.text_model(files)
    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model = text.module
    clip.patcher = make_patcher(
        text.module,
        JointWeights(text.parts, has_branches=text.has_branches),
        comfy.model_management.text_encoder_device(),
        comfy.model_management.text_encoder_offload_device(),
    )
    clip.patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
    clip.patcher.is_clip = True
    clip.tokenizer = text.tokenizer
    clip.apply_hooks_to_conds = None
    clip.layer_idx = None
    clip.use_clip_schedule = False
    clip.tokenizer_options = {}
    return clip


def _add_meta_parameter(root: torch.nn.Module, name: str, like: torch.Tensor) -> None:
    """Register a parameter on the meta device under a dotted name, with the modules that it needs."""
    *path, leaf = name.split(".")
    module = root
    for part, below in zip(path, [*path[1:], leaf], strict=True):
        if part not in module._modules:
            module.add_module(part, torch.nn.ModuleList() if below.isdigit() else torch.nn.Module())
        module = module.get_submodule(part)
    shape = torch.empty_like(like, device="meta")
    module.register_parameter(leaf, torch.nn.Parameter(shape, requires_grad=False))
