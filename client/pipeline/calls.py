"""The arguments of a call of a pipeline: their names, types and defaults, before any model has to know of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from xditd.client.jobs.prompt_requests import check_second
from xditd.client.pipeline.pictures import as_list
from xditd.client.video_files import MAX_FPS
from xditd.ipc import limits
from xditd.ipc.errors import BadRequest
from xditd.ipc.name_lists import listed
from xditd.ipc.suggestions import did_you_mean

Texts = str | Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call as it was given: ``None`` where the default counts.

    ``prompts`` has one for each picture or for each group of ``num_images``; ``batch`` is how many pictures there are.
    """

    prompts: tuple[str, ...]
    negatives: tuple[str, ...] | None
    prompts_2: tuple[str, ...] | None = None
    """What the second encoder reads in place of ``prompts``, one for each."""
    batch: int
    defaults: Mapping[str, Any]
    conditioning: Mapping[str, Any] | None = None
    image: Any = None
    mask: Any = None
    last_image: Any = None
    references: tuple[Any, ...] = ()
    control: Any = None
    loras: tuple[Any, ...] = ()
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    max_sequence_length: int | None = None
    steps: int | None = None
    guidance: float | None = None
    sigmas: Any = None
    seed: int | None = None
    num_images: int = 1
    strength: float | None = None
    options: Mapping[str, Any] | None = None
    step_cache: float = 0.0


UNSET: Final[Mapping[str, Any]] = {"references": (), "loras": (), "num_images": 1, "step_cache": 0.0, "weights": False}
"""What an argument is if it is not given, where that is not ``None``."""

ARGUMENTS: Final = (
    "prompt",
    "prompt_2",
    "negative_prompt",
    "max_sequence_length",
    "weights",
    "image",
    "mask",
    "last_image",
    "references",
    "control",
    "loras",
    "width",
    "height",
    "frames",
    "steps",
    "guidance",
    "sigmas",
    "seed",
    "num_images",
    "strength",
    "options",
    "step_cache",
    "conditioning",
    "on_progress",
    "on_preview",
    "deadline_s",
)
"""Every argument of a call."""

OF_CALLERS: Final = ("on_progress", "on_preview")
"""Functions that a call runs itself: jobs have none."""
OF_JOBS: Final = (*(name for name in ARGUMENTS if name not in OF_CALLERS), "previews")
"""Every argument of ``Pipeline.start``."""

_MOST: Final = {
    "width": limits.MAX_SIDE_PIXELS,
    "height": limits.MAX_SIDE_PIXELS,
    "frames": limits.MAX_SIDE_PIXELS,
    "steps": limits.MAX_STEPS,
    "max_sequence_length": limits.MAX_TEXT_TOKENS,
    "num_images": limits.MAX_BATCH,
    "fps": MAX_FPS,
}
"""The highest values of whole numbers from 1."""


def check_function(name: str, value: Any) -> None:
    """Raise ``BadRequest`` unless an argument is a function or ``None``."""
    if value is not None and not callable(value):
        raise BadRequest(f"{name}: {value!r:.100} of type {type(value).__name__} cannot be called; give a function")


def is_given(name: str, value: Any) -> bool:
    """Return whether a call has this argument."""
    unset = UNSET.get(name)
    if unset is None:
        return value is not None
    try:
        if isinstance(unset, tuple):
            return value is not None and (not hasattr(value, "__len__") or len(value) > 0)
        return bool(value != unset)
    except (TypeError, ValueError, RuntimeError):  # an array has no truth, or no length
        return True


def check_refused(given: Mapping[str, Any], refused: Mapping[str, str], title: str) -> None:
    """Refuse the arguments that a model does not take.

    Raises:
        BadRequest: names each, and says why.
    """
    wrong = [name for name, value in given.items() if name in refused and is_given(name, value)]
    if wrong:
        if len(wrong) == 1:
            raise BadRequest(f"{title} cannot honour {wrong[0]}: {refused[wrong[0]]}; leave it out")
        reasons = "; ".join(f"{name}: {refused[name]}" for name in wrong)
        raise BadRequest(f"{title} cannot honour {listed(wrong)}: {reasons}; leave them out")


_NOT_AS_GIVEN: Final = ("prompts", "prompts_2", "negatives", "batch", "defaults", "references", "loras", "num_images")
"""Fields of a :class:`Call` that have other names or types than its arguments."""


def call_of(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Call:
    """Check the arguments of a call. Of texts for several prompts, one is repeated for each.

    Raises:
        BadRequest: an argument of another type, or numbers that no call can use; names it and its value.
    """
    conditioning = given.get("conditioning")
    prompts = _texts("prompt", given.get("prompt"))
    if (prompts is None) == (conditioning is None):
        raise BadRequest("prompt, conditioning: give either the words, or the tensors that stand for them")
    if conditioning is not None:
        _check_without_words(given)
    negatives = _for_each("negative_prompt", given.get("negative_prompt"), prompts or ())
    check_second("prompt_2", given.get("prompt_2"))
    seconds = _for_each("prompt_2", given.get("prompt_2"), prompts or ())
    count = _count("num_images", given.get("num_images", 1), 1, limits.MAX_BATCH)
    rows = len(prompts or ()) or _rows_of(conditioning or {})
    if rows * count > limits.MAX_BATCH:
        raise BadRequest(
            f"num_images: {count} of {rows} prompts are {rows * count} pictures; at most {limits.MAX_BATCH}"
        )
    known = {each.name for each in fields(Call)}.difference(_NOT_AS_GIVEN)
    rest = {name: value for name, value in given.items() if name in known and value is not None}
    _check_values(rest)
    if conditioning is not None and "max_sequence_length" in rest:
        raise BadRequest("max_sequence_length beside conditioning: its tensors have their lengths; leave it out")
    if "seed" in rest:
        _count("seed", rest["seed"], 0, 2**63 - 1)
    references = given.get("references")
    return Call(
        prompts=prompts or (),
        negatives=negatives,
        prompts_2=seconds,
        batch=rows * count,
        defaults=defaults,
        references=() if references is None else tuple(as_list(references)),
        loras=_loras(given.get("loras")),
        num_images=count,
        **rest,
    )


def _check_without_words(given: Mapping[str, Any]) -> None:
    """Check the conditioning of a call without prompts, and that no words are beside it."""
    conditioning = given["conditioning"]
    if not isinstance(conditioning, Mapping):
        raise BadRequest(
            f"conditioning: {conditioning!r:.100} of type {type(conditioning).__name__}; give a dict of tensors by name"
        )
    if _texts("negative_prompt", given.get("negative_prompt")) is not None:
        raise BadRequest("negative_prompt beside conditioning: its tensors have the negative prompt, too; leave it out")
    if _texts("prompt_2", given.get("prompt_2")) is not None:
        raise BadRequest("prompt_2 beside conditioning: its tensors stand for both texts; leave it out")


def _for_each(name: str, value: Texts | None, prompts: Sequence[str]) -> tuple[str, ...] | None:
    """Return an argument's text for each prompt; one for all of them is repeated."""
    texts = _texts(name, value)
    if texts is None:
        return None
    if len(texts) not in (1, len(prompts)):
        raise BadRequest(f"{name}: {len(texts)} for {len(prompts)} prompts; give one, or one for each")
    return texts * len(prompts) if len(texts) == 1 else texts


def check_defaults(
    given: Mapping[str, Any] | None, known: Mapping[str, Any], refused: Mapping[str, str], title: str
) -> dict[str, Any]:
    """Check the defaults that a pipeline is opened with; ``refused`` are the arguments that no call of it takes.

    Raises:
        BadRequest: one that no call has, or another than in ``known`` that the model cannot honour; names it.
    """
    if given is not None and not isinstance(given, Mapping):
        raise BadRequest(f"defaults: {given!r:.100} of type {type(given).__name__}; give a dict, {{'steps': 20}}")
    for name in given or {}:
        if name not in known:
            raise BadRequest(f"defaults: {name!r} is not known; give {listed(known)}{did_you_mean(str(name), known)}")
    found = {name: value for name, value in (given or {}).items() if value is not None}
    _check_values(found, "defaults: ")
    if (strength := found.get("strength", 0.0)) > 1 or strength < 0:
        raise BadRequest(f"defaults: strength: {strength!r} is not a number from 0 to 1")
    if (guidance := found.get("guidance", 0.0)) > limits.MAX_GUIDANCE or guidance < 0:
        raise BadRequest(f"defaults: guidance: {guidance!r} is not a number from 0 to {limits.MAX_GUIDANCE:g}")
    of_videos = {"fps": refused["frames"]} if "frames" in refused else {}
    changed = {name: value for name, value in found.items() if value != known[name]}
    check_refused(changed, {**refused, **of_videos}, f"defaults: {title}")
    if "negative_prompt" in found and not isinstance(found["negative_prompt"], str):
        raise BadRequest(f"defaults: negative_prompt: {found['negative_prompt']!r:.100} is no text")
    return found


def _check_values(given: Mapping[str, Any], before: str = "") -> None:
    for name, most in _MOST.items():
        if name in given:
            _count(before + name, given[name], 1, most)
    for name in ("guidance", "strength"):
        value = given.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadRequest(f"{before}{name}: {value!r:.100} is not a number")
        if not math.isfinite(value):
            raise BadRequest(f"{before}{name}: {value!r} is not a finite number")


def _loras(given: Any) -> tuple[Any, ...]:
    if given is not None and not isinstance(given, list | tuple):
        raise BadRequest(
            f"loras: {given!r:.100} is of type {type(given).__name__}; give pairs, [('x.safetensors', 0.8)]"
        )
    return tuple(given or ())


def _texts(name: str, value: Texts | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else ()
    if not texts or not all(isinstance(each, str) for each in texts):
        raise BadRequest(f"{name}: {value!r:.100} is no text, and no list of texts")
    return texts


def _count(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadRequest(f"{name}: {value!r} is not a whole number from {low} to {high}")
    return value


def _rows_of(conditioning: Mapping[str, Any]) -> int:
    first = next(iter(conditioning.values()), None)
    return len(first) if first is not None and hasattr(first, "__len__") else 1
