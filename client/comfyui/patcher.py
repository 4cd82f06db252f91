"""Make a ComfyUI MODEL without weights on this side: its tensors are lent, its forward runs in the workers."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP

from xditd.client.comfyui.connections import connect
from xditd.client.comfyui.controlnets import RemoteControlModel
from xditd.client.comfyui.families import adapter_of_config, titles
from xditd.client.comfyui.families.adapter import Adapter, ControlSource, ModelAdapter
from xditd.client.comfyui.forward import RemoteForward
from xditd.client.comfyui.lora_patches import Factors, read_bypass, read_patches
from xditd.client.comfyui.merging import edit_of, quantised_tensor
from xditd.client.comfyui.packed_tensors import LendableTensors, find_packed, lendable_tensors
from xditd.client.comfyui.placement import place_conditioning
from xditd.client.comfyui.run_checks import RunChecks
from xditd.client.comfyui.stock_dtypes import CHOICES, WeightDtype, hold_as_stock
from xditd.client.comfyui.understood import Understood
from xditd.client.comfyui.unsupported import refuse
from xditd.client.comfyui.weights import Edit, RemoteWeights, refuse_known
from xditd.client.packed_markers import MARKER, METADATA
from xditd.ipc.errors import BadCheckpoint, Unsupported
from xditd.ipc.tensor_names import bare_name
from xditd.ipc.tensors import ComponentKind, ComputeDType
from xditd.ipc.transports.tensor_views import dtype_name

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NO_INJECTION = PatcherInjection(inject=lambda _: None, eject=lambda _: None)

WRAPPER_KEY = "xditd"
PREFIX = "diffusion_model."
"""Prefix of ComfyUI's parameter names, which checkpoints do not have."""


class RemotePatcher(comfy.model_patcher.ModelPatcher):
    """A ModelPatcher whose weights are lent to the workers when ComfyUI loads it, and returned when ComfyUI unloads it.

    It reports the loan's bytes on ComfyUI's GPU, so ComfyUI's memory management makes room for them first.
    """

    understood: Understood
    """Finds changes that the workers cannot run."""

    injections: dict[str, list[Any]]

    @property
    def weights(self) -> RemoteWeights:
        found: RemoteWeights = self.model.xditd_weights
        return found

    @property
    def family(self) -> ModelAdapter:
        """The adapter of this transformer."""
        found: ModelAdapter = self.model.xditd_family
        return found

    def model_size(self) -> int:
        return self.weights.size_bytes

    def loaded_size(self) -> int:
        return self.weights.loaded_bytes

    def get_free_memory(self, device: Any) -> int:
        """Return free bytes as the base class does, but do not ask the driver at each step if any number is enough."""
        if getattr(self.model, "memory_usage_factor", None) == 0.0:
            return sys.maxsize
        free: int = super().get_free_memory(device)
        return free

    def clone(self, *args: Any, **kwargs: Any) -> RemotePatcher:
        made: RemotePatcher = super().clone(*args, **kwargs)
        made.understood = self.understood
        return made

    def load(
        self,
        device_to: Any = None,
        lowvram_model_memory: int = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        """Lend the weights with this patcher's patches; a no-op if they are lent like that.

        A weight whose patches are all LoRAs gets branches beside it, if the component takes any; the patches of others
        are merged into them.

        Raises:
            Unsupported: the patcher or its modules were changed in a way that the workers cannot run.
        """
        self.understood.check(self)
        branches = self._branches() if self.weights.has_branches else {}
        merged = [key for key in self.patches if key.removeprefix(PREFIX) not in branches]
        self.weights.apply({key.removeprefix(PREFIX): self._edit(key) for key in merged})
        for injections in self.injections.values():
            for name, added in (read_bypass(injections, self._shape_of) or {}).items():
                branches.setdefault(name.removeprefix(PREFIX), []).extend(added)
        self.weights.use_loras(branches, self)
        self.patch_hooks(self.forced_hooks if self.is_clip else self.current_hooks)
        self.model.current_weight_patches_uuid = self.patches_uuid
        self.model.device = self.load_device
        for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
            callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)

    def inject_model(self) -> None:
        """Inject nothing: bypass LoRAs are branches in the workers, and other injections are refused."""
        with self._without_injecting():
            super().inject_model()

    def eject_model(self) -> None:
        with self._without_injecting():
            super().eject_model()

    @contextmanager
    def _without_injecting(self) -> Iterator[None]:
        """Replace injections by ones that do nothing, so that only their callbacks run."""
        kept: dict[str, list[Any]] = self.injections
        self.injections = {key: [_NO_INJECTION for _ in each] for key, each in kept.items()}
        try:
            yield
        finally:
            self.injections = kept

    def patch_hooks(self, hooks: Any) -> None:
        """Use the LoRAs of hooks with their strengths at this step, besides the patches; ``None`` uses none.

        Raises:
            Unsupported: a hook changes weights in another way.
        """
        branches: dict[str, list[Factors]] = {}
        for key, patches in self.get_combined_hook_patches(hooks).items():
            factors = read_patches(patches, self._shape_of(key))
            if factors is None:
                refuse([f"hooks that change {key} by what is no LoRA"])
            else:
                branches[key.removeprefix(PREFIX)] = factors
        self.weights.use_hooked_loras(branches, self)
        self.current_hooks = hooks

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        self.patch_hooks(None)

    def partially_load(self, device_to: Any, extra_memory: int = 0, force_patch_weights: bool = False) -> int:
        self.understood.check(self)
        super().unpatch_model(None, unpatch_weights=False)  # another clone's object patches
        before = self.loaded_size()
        self.patch_model(device_to)
        return self.loaded_size() - before

    def partially_unload(self, device_to: Any, memory_to_free: int = 0, force_patch_weights: bool = False) -> int:
        """Free nothing: a loan is returned as a whole, which ComfyUI does next."""
        return 0

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        if unpatch_weights:
            self.weights.release()
            self.model.current_weight_patches_uuid = None
            self.model.device = self.offload_device
        super().unpatch_model(None, unpatch_weights=False)

    def patch_weight_to_device(self, key: str, *_: Any, **__: Any) -> Any:
        raise Unsupported(f"XDiT: {key} is lent to the workers and cannot be patched alone; add the patch to the MODEL")

    def model_state_dict_for_saving(self, model: Any = None, prefix: str = "") -> dict[str, torch.Tensor]:
        """Return the tensors with patches merged, for nodes that save, by the names of ``model`` below ``prefix``.

        Raises:
            StaleSource: their file was written over since a loader read it.
        """
        self.weights.check_files()
        found: dict[str, torch.Tensor] = {}
        for name in (self.model if model is None else model).state_dict():
            base = self._base_name(prefix + name)
            if base is not None:
                start = name.removesuffix(base)
                found |= {start + each: tensor for each, tensor in self._merged(prefix + name, base).items()}
        return found

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, Any]:
        """Return keys and patches as the base class does, with the lent tensors: model merging nodes read them.

        Raises:
            StaleSource: their file was written over since a loader read it.
        """
        self.weights.check_files()
        found: dict[str, Any] = super().get_key_patches(filter_prefix)
        for key, patches in found.items():
            name = self._base_name(key)
            if name is not None:
                found[key] = [(self._base(name), patches[0][1]), *patches[1:]]
        return found

    def _base_name(self, key: str) -> str | None:
        """Return the lent tensor's name of ComfyUI's parameter ``key``, or None if it is not lent."""
        name = key.removeprefix(PREFIX)
        return name if name in self.weights.base else None

    def _base(self, name: str) -> torch.Tensor:
        """Return an unpatched tensor; a packed weight is dequantised."""
        lendable, dtype = self.weights.lendable, self.weights.compute_dtype
        packed = lendable.packed.get(name)
        if packed is None or packed.scale is None or dtype is None:
            return lendable.tensors[name]
        whole: torch.Tensor = quantised_tensor(packed, lendable.group_tensors(name), dtype).dequantize()
        return whole

    def _merged(self, key: str, name: str) -> dict[str, torch.Tensor]:
        """Return a tensor with its companions and marker, patched."""
        lendable = self.weights.lendable
        tensors: Sequence[torch.Tensor] = lendable.group_tensors(name)
        if key in self.patches:
            tensors = [tensor.to("cpu") for tensor in self._edit(key).merged(tensors)]
        marker = name.removesuffix(".weight") + MARKER
        markers = {marker: lendable.markers[marker]} if name in lendable.packed and marker in lendable.markers else {}
        return dict(zip(lendable.group(name), tensors, strict=True)) | markers

    def _branches(self) -> dict[str, list[Factors]]:
        """Return the factors of the weights whose patches are all LoRAs, by the lent tensors' names."""
        found = {}
        for key, patches in self.patches.items():
            factors = read_patches(patches, self._shape_of(key))
            if factors is not None:
                found[key.removeprefix(PREFIX)] = factors
        return found

    def _shape_of(self, key: str) -> torch.Size:
        shape: torch.Size = comfy.utils.get_attr(self.model, key).shape
        return shape

    def _edit(self, key: str) -> Edit:
        lendable, name = self.weights.lendable, key.removeprefix(PREFIX)
        if name in lendable.tables:
            raise Unsupported(
                f"XDiT: {name} is a packed table of tokens, and a patch of it would be dequantised: remove the LoRA or "
                "merging node, or load a bf16 or fp16 file"
            )
        packed = lendable.packed.get(name)
        return edit_of(self.patches[key], key, self.load_device, packed, self.weights.compute_dtype)


def plain_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """Return a checkpoint's transformer tensors, named without prefixes."""
    prefix = comfy.model_detection.unet_prefix_from_state_dict(tensors)
    inside = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    chosen = inside or dict(tensors)
    return {bare_name(name): value for name, value in chosen.items()}


def make_model(
    tensors: Mapping[str, torch.Tensor],
    label: str,
    *,
    choice: WeightDtype = CHOICES["default"],
    metadata: Mapping[str, str] | None = None,
) -> RemotePatcher:
    """Make a MODEL from a checkpoint's transformer tensors. They are lent when ComfyUI first needs them.

    ComfyUI's own model class is built on the meta device: every name and shape, no memory. ``metadata`` is that of the
    file's header, which may say what ComfyUI reads from no tensor.

    Raises:
        Unsupported: a model family that the workers do not run, or packed weights of an unknown format.
        BadCheckpoint: packed weights do not have the form of their format.
    """
    quantization_metadata = (metadata or {}).get(METADATA)
    packing = find_packed(tensors, label, quantization_metadata)
    shapes = lendable_tensors(tensors, packing, lambda packed: packed.quantises_input).logical(torch.bfloat16)
    # ComfyUI tells by the values of a norm whether a model may run in float16.
    values = {name: each for name, each in tensors.items() if each.ndim == 1 and name in shapes}
    config, family = config_of({**shapes, **values}, label, metadata)
    named = config.process_unet_state_dict(dict(tensors))  # names of ComfyUI's modules, which may differ from the file
    lendable, dtype = hold_as_stock(config, named, label, choice, quantization_metadata)
    logger.debug("weightless model label=%s dtype=%s packed=%d", label, dtype, len(lendable.packed))
    config.set_inference_dtype(dtype, None)
    config.custom_operations = comfy.ops.disable_weight_init
    weights = make_weights(lendable, ComponentKind.TRANSFORMER, label, is_whole=True, dtype=dtype)
    return make_transformer_patcher(build_weightless(config, lendable.logical(dtype)), weights, family)


def config_of(
    shapes: Mapping[str, torch.Tensor], label: str, metadata: Mapping[str, str] | None = None
) -> tuple[Any, Adapter]:
    """Return ComfyUI's configuration of a transformer with these tensors, and the family that runs it.

    ``metadata`` is that of the file's header: some models differ in nothing else.

    Raises:
        Unsupported: a model family that the workers do not run.
        BadCheckpoint: the header's ``config`` is no configuration in JSON.
    """
    try:
        config = comfy.model_detection.model_config_from_unet(shapes, "", metadata=dict(metadata or {}))
    except (ValueError, TypeError, AttributeError) as error:
        if "config" not in (metadata or {}):
            raise
        raise BadCheckpoint(f"{label}: config in the file's header is no configuration in JSON: {error}") from error
    family = adapter_of_config(config)
    if family is None:
        found = "no diffusion model that ComfyUI knows" if config is None else type(config).__name__
        refuse_known(shapes, label if config is None else f"{label} ({found})")
        raise Unsupported(f"{label}: {found}; XDiT runs {titles()}")
    family.check_config(config, label)
    return config, family


def build_weightless(config: Any, shapes: Mapping[str, torch.Tensor], operations: type | None = None) -> Any:
    """Build ComfyUI's model of a configuration with parameters on the meta device, like ``shapes``.

    ``operations`` are the classes of its layers, else those that the configuration chooses.
    """
    before = config.custom_operations
    config.custom_operations = before if operations is None else operations
    try:
        model = config.get_model(dict(shapes), "", device=torch.device("meta"))
    finally:
        config.custom_operations = before
    # With DynamicVRAM linear layers have no parameters until they are loaded; LoRA loaders need the names.
    model.diffusion_model.load_state_dict(shapes, strict=False, assign=True)
    return model


def make_transformer_patcher(model: Any, weights: RemoteWeights, family: Adapter) -> RemotePatcher:
    """Make the MODEL of a transformer on the meta device and the weights that are lent for it."""
    model.memory_usage_factor = 0.0  # activations are in the workers: nothing to reserve, everything fits in one batch
    adapted = model.xditd_family = family.adapt(model)
    patcher = make_patcher(
        model, weights, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    )
    patcher.add_wrapper_with_key(adapted.wrapper, WRAPPER_KEY, RemoteForward(weights, adapted, patcher.understood))
    patcher.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, WRAPPER_KEY, place_conditioning)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, RunChecks(adapted, make_control))
    return patcher


def make_weights(
    tensors: Mapping[str, torch.Tensor] | LendableTensors,
    kind: ComponentKind,
    label: str,
    *,
    is_whole: bool,
    dtype: torch.dtype | None = None,
) -> RemoteWeights:
    """Make lendable weights from tensors; ``is_whole`` loads them into an arena if ComfyUI runs on a GPU.

    ``dtype`` is the compute dtype of packed weights, if there are any.
    """
    device = comfy.model_management.get_torch_device()
    is_loaded_now = is_whole
    is_whole = is_whole and device.type == "cuda"
    has_packed = isinstance(tensors, LendableTensors) and bool(tensors.packed)
    weights = RemoteWeights(
        tensors,
        kind=kind,
        label=label,
        device=str(device),
        is_whole=is_whole,
        connect=connect,
        compute_dtype=cast("ComputeDType", dtype_name(dtype)) if has_packed and dtype is not None else None,
    )
    if is_loaded_now:  # a loader's: what it loads is lent by a later node
        weights.announce()
    return weights


def make_control(source: ControlSource, load_device: Any) -> tuple[RemoteControlModel, RemotePatcher]:
    """Make what replaces the model of a stock ControlNet, and its patcher. It is lent when ComfyUI loads it."""
    weights = make_weights(source.tensors, ComponentKind.CONTROLNET, source.label, is_whole=False)
    model = RemoteControlModel(weights, source)
    return model, make_patcher(model, weights, load_device, comfy.model_management.unet_offload_device())


def make_patcher(model: Any, weights: Any, load_device: Any, offload_device: Any) -> RemotePatcher:
    """Make the patcher of a module on the meta device and the weights that are lent for it.

    ``weights`` are ``RemoteWeights``, or have the same methods. The loan ends at the latest with the module.
    """
    model.xditd_weights = weights
    weakref.finalize(model, weights.release).atexit = False
    patcher = RemotePatcher(model, load_device=load_device, offload_device=offload_device)
    patcher.understood = Understood(patcher)
    return patcher
