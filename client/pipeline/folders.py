"""Read the folder of a pipeline that diffusers has saved: ``model_index.json`` and what it names.

Only JSON is read, and nothing outside the folder but what symbolic links in it point to.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from xditd.client.jobs.schedules import CLASS
from xditd.client.model_folders import has_variant
from xditd.client.model_json import read_json
from xditd.client.pipeline.clip_pictures import DEVIATIONS, MEANS, SIDE
from xditd.client.pipeline.sources import ENCODERS, IMAGE_ENCODER, SECOND, TRANSFORMER, VAE, Part, Source, kind_of
from xditd.ipc.errors import BadCheckpoint, Unsupported
from xditd.ipc.name_lists import listed

INDEX: Final = "model_index.json"
_MAX_INDEX_BYTES: Final = 1 << 20

PIPELINES: Final[Mapping[str, str]] = {
    "FluxPipeline": "flux1",
    "FluxImg2ImgPipeline": "flux1",
    "FluxInpaintPipeline": "flux1",
    "FluxKontextPipeline": "flux1",
    "FluxFillPipeline": "flux1",
    "FluxControlPipeline": "flux1",
    "Flux2Pipeline": "flux2",
    "Flux2KleinPipeline": "flux2",
    "Flux2KleinKVPipeline": "flux2",
    "QwenImagePipeline": "qwen_image",
    "QwenImageImg2ImgPipeline": "qwen_image",
    "QwenImageInpaintPipeline": "qwen_image",
    "QwenImageEditPipeline": "qwen_image",
    "QwenImageEditPlusPipeline": "qwen_image",
    "ZImagePipeline": "z_image",
    "ZImageImg2ImgPipeline": "z_image",
    "ZImageInpaintPipeline": "z_image",
    "WanPipeline": "wan",
    "WanImageToVideoPipeline": "wan",
    "WanVACEPipeline": "wan_vace",
}
"""The pipelines of diffusers that a folder may be of, with the family of their transformers."""

_LIBRARIES: Final = ("diffusers", "transformers")
_MODELS: Final = (TRANSFORMER, SECOND, VAE, IMAGE_ENCODER)
_TOKENIZERS: Final = ("tokenizer", "processor")
_NOT_READ: Final = ("feature_extractor", "image_processor", "safety_checker")
"""Parts that no job reads: a safety checker's extractor, and the processor of an image encoder, whose values are
those of CLIP."""
_KLEIN: Final = ("Flux2KleinPipeline", "Flux2KleinKVPipeline")
_OBEYED: Final[Mapping[str, tuple[str, ...]]] = {
    "boundary_ratio": ("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline"),
    "expand_timesteps": ("WanPipeline", "WanImageToVideoPipeline"),
    "is_distilled": _KLEIN,
}
"""Values that may stand beside the parts, and the pipelines that read them; ``families.py`` obeys or refuses them."""
_FIXED: Final[Mapping[str, Mapping[str, Any]]] = {
    "boundary_ratio": {},
    "expand_timesteps": {"": False},
    "is_distilled": {"": False},
    "force_zeros_for_empty_prompt": {"": False},
    "text_encoder_out_layers": {"Flux2Pipeline": [10, 20, 30], _KLEIN[0]: [9, 18, 27], _KLEIN[1]: [9, 18, 27]},
}
"""What is computed in any case, by pipeline (``""``: all others): another value than this one or null is refused."""


def is_model(role: str) -> bool:
    """Return whether a part of a folder is a model, which a pipeline lends."""
    return role in _MODELS or role.startswith(ENCODERS)


def is_read(role: str, value: Any) -> bool:
    """Return whether a part of ``model_index.json`` is read: it was not left out, and some job needs it."""
    return _is_part(value) and value[1] is not None and role not in _NOT_READ


def is_pipeline(path: str) -> bool:
    """Return whether this is a folder with a ``model_index.json``."""
    return os.path.isfile(os.path.join(path, INDEX))


def read_folder(path: str, name: str, variant: str | None = None) -> Source:
    """Read the parts of a pipeline's folder.

    Raises:
        BadCheckpoint: a file is missing or no JSON of its kind.
        Unsupported: a pipeline that no family runs; names it, and what runs it.
    """
    folder = Path(path)
    index = read_json(str(folder / INDEX), _MAX_INDEX_BYTES)
    pipeline_class = index.get("_class_name")
    if not isinstance(pipeline_class, str):
        raise BadCheckpoint(f"{folder / INDEX}: it names no class as _class_name")
    if pipeline_class not in PIPELINES:
        raise Unsupported(
            f"{path}: a {pipeline_class}, which no family runs from words to pictures: load it with diffusers, and "
            f"accelerate(pipe) runs its models in the workers; known are {listed(PIPELINES)}"
        )
    parts: dict[str, Part] = {}
    tokenizers: dict[str, str] = {}
    settings: dict[str, Any] = {}
    scheduler: Mapping[str, Any] | None = None
    for role, value in index.items():
        if role.startswith("_"):
            continue
        if not _is_part(value):
            _check_setting(folder / INDEX, pipeline_class, role, value)
            settings[role] = value
        elif not is_read(role, value):
            continue
        elif value[0] not in _LIBRARIES:
            raise Unsupported(
                f"{folder / INDEX}: the {role} is a {value[1]} of {value[0]}, code of its own, and none is run here: "
                "load it with diffusers, and accelerate(pipe) runs the models of diffusers' own classes"
            )
        elif role == "scheduler":
            # diffusers makes the class that the index names of the settings of another one, too.
            scheduler = {**read_scheduler(folder / role), CLASS: value[1]}
        elif role.startswith(_TOKENIZERS):
            tokenizers[role] = str(_there(folder / role, role))
        elif is_model(role):
            parts[role] = Part(str(_there(folder / role, role)), kind_of(role))
        else:
            raise Unsupported(f"{folder / INDEX}: the part {role} of a {pipeline_class} is not known here")
    if IMAGE_ENCODER in parts:
        _check_image_processor(folder / "image_processor" / "preprocessor_config.json")
    for role in (TRANSFORMER, VAE):
        if role not in parts:
            raise BadCheckpoint(f"{path}: it has no {role}; a pipeline needs one")
    return Source(
        name=name,
        parts=parts if variant is None else _with_variant(parts, variant, path),
        tokenizers=tokenizers,
        scheduler=scheduler,
        pipeline_class=pipeline_class,
        settings=settings,
        variant=_variant_of(folder / TRANSFORMER),
    )


def _with_variant(parts: Mapping[str, Part], variant: str, path: str) -> dict[str, Part]:
    """Return the parts with the variant of those that have it; diffusers takes the plain weights of the others, too.

    Raises:
        BadCheckpoint: none has it.
    """
    found = {role: replace(each, variant=variant) for role, each in parts.items() if has_variant(each.path, variant)}
    if not found:
        raise BadCheckpoint(f"{path}: no model in it has weights of variant {variant!r:.100}; leave the variant out")
    return {**parts, **found}


def _is_part(value: Any) -> bool:
    """Return whether a value is a library and a class, or two nulls for a part that is left out."""
    return isinstance(value, list) and len(value) == 2 and all(each is None or isinstance(each, str) for each in value)


def _check_setting(index: Path, pipeline_class: str, name: str, value: Any) -> None:
    """Refuse a value beside the parts that says something else than what is computed.

    Raises:
        Unsupported: names the setting and its value.
    """
    if pipeline_class in _OBEYED.get(name, ()) or (name in _FIXED and value is None):
        return
    known = _FIXED.get(name, {})
    fixed = known.get(pipeline_class, known.get(""))
    if fixed is None:
        raise Unsupported(f"{index}: {name}={value!r:.100} of {pipeline_class} is not known here")
    if value != fixed:
        raise Unsupported(
            f"{index}: {name}={value!r:.100}: a {pipeline_class} is computed with {fixed!r} here; set that if it is "
            "what the model was trained with, else load it with diffusers and accelerate(pipe)"
        )


def read_scheduler(path: Path) -> Mapping[str, Any]:
    """Read a scheduler's configuration, from its folder or its file."""
    file = path / "scheduler_config.json" if os.path.isdir(path) else path
    return read_json(str(file), _MAX_INDEX_BYTES)


def _check_image_processor(path: Path) -> None:
    """Refuse a processor of pictures that is not CLIP's, as ``clip_pictures.py`` has it.

    Raises:
        Unsupported: names the setting and its value.
    """
    if not os.path.isfile(path):
        return
    found = read_json(str(path), _MAX_INDEX_BYTES)
    wanted = {
        "image_mean": list(MEANS),
        "image_std": list(DEVIATIONS),
        "resample": 3,
        "do_resize": True,
        "do_center_crop": True,
        "do_normalize": True,
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
    }
    for name, value in wanted.items():
        if name in found and found[name] not in (value, SIDE if name in ("size", "crop_size") else value):
            raise Unsupported(f"{path}: {name}={found[name]!r:.100}; pictures are processed as CLIP's, with {value!r}")


def _there(path: Path, role: str) -> Path:
    if not os.path.isdir(path):
        raise BadCheckpoint(f"{path}: {INDEX} names a {role}, and there is no such folder")
    return path


def _variant_of(transformer: Path) -> str:
    """Return the variant of generations that a transformer's configuration asks for and its tensors do not show."""
    config = transformer / "config.json"
    if not os.path.isfile(config):
        return "class"
    found = read_json(str(config), _MAX_INDEX_BYTES)
    return "zero_cond_t" if found.get("zero_cond_t") is True else "class"
