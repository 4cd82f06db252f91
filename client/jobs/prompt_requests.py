"""Build the request to encode prompts, after checks of what the transformer's facts say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from xditd.client.io_places import IoPlaces
from xditd.client.jobs.arguments import check_text
from xditd.client.jobs.component import Component
from xditd.client.jobs.job_requests import JobRequest
from xditd.client.jobs.prompt_images import image_tensors
from xditd.ipc import limits
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.facts import PromptFacts
from xditd.ipc.name_lists import listed
from xditd.ipc.requests import EncodePrompt
from xditd.ipc.tensors import HostShmBlock

if TYPE_CHECKING:
    import torch

_ROOM_BYTES: Final = 16 * 2**20
"""For results: those of one prompt of 512 tokens take 4 to 16 MiB. Longer ones come in a block of the workers."""

Texts = str | Sequence[str]


def prompt_facts(transformer: Component) -> PromptFacts:
    """Return what the prompts of a transformer need.

    Raises:
        Unsupported: its family encodes no prompts.
    """
    facts = transformer.transformer.prompt
    if facts is None:
        raise Unsupported(
            f"{transformer.facts.family}: its family encodes no prompts; encode token ids by encode_text, and give "
            "the tensors to generate"
        )
    return facts


def prompt_request(
    transformer: Component,
    prompt: Texts,
    *,
    negative_prompt: Texts | None,
    prompt_2: Texts | None = None,
    images: Sequence[Any],
    encoders: Mapping[str, Component],
    tokenizers: Mapping[str, Component],
    weights: bool,
    options: Mapping[str, bool | int | float] | None,
    device: torch.device | str | None,
    room_bytes: int = 0,
) -> JobRequest:
    """Build the request. ``room_bytes`` is the least room for results in the client's block.

    Raises:
        BadRequest, Unsupported: what the facts of the transformer do not have; names it and the remedy.
    """
    facts = prompt_facts(transformer)
    place_of_results = _device_of(device)
    family = transformer.facts.family
    prompts = check_texts("prompt", prompt)
    negatives = _as_many("negative_prompt", negative_prompt, len(prompts))
    if negatives and not facts.takes_negative:
        raise Unsupported(f"negative_prompt: {family} has no second prediction to weight against; leave it out")
    check_second("prompt_2", prompt_2)
    seconds = _as_many("prompt_2", prompt_2, len(prompts))
    if seconds and not facts.takes_second:
        raise Unsupported(f"prompt_2: {family} has one text for all of its encoders; leave it out")
    if not isinstance(weights, bool):
        raise BadRequest(f"weights: {weights!r:.100} is of type {type(weights).__name__}, use True or False")
    if weights:
        raise Unsupported(
            f"weights: {family} reads weights such as (cat:1.2) as text, as diffusers' pipeline does; leave weights out"
        )
    pictures = image_tensors(images)
    if images and not facts.max_images:
        raise Unsupported(f"images: {family}'s prompts take texts alone; leave them out")
    if len(images) > facts.max_images:
        raise BadRequest(f"images: {len(images)}, at most {facts.max_images} with a prompt of {family}")
    needed = facts.image_tokenizers if images else facts.tokenizers
    if encoders:
        _check_roles("encoders", encoders, facts.encoders, family)
    _check_roles("tokenizers", tokenizers, needed, family)
    chosen = _checked_options(options)
    unknown = sorted(set(chosen) - set(facts.options))
    if unknown:
        takes = ", ".join(facts.options) or "none"
        raise BadRequest(f"options: {listed(unknown)} is not known to {family}'s prompts; they take {takes}")
    places = IoPlaces()
    inputs = [(places.add_input(each), each) for each in pictures]
    room = max(room_bytes, _ROOM_BYTES)
    at = places.add_room(room)

    def write(request_id: str, io: HostShmBlock) -> EncodePrompt:
        return EncodePrompt(
            request_id=request_id,
            transformer_id=transformer.component_id,
            encoders={role: each.component_id for role, each in encoders.items()},
            tokenizers={role: each.component_id for role, each in tokenizers.items()},
            loras={role: each.loras for role, each in encoders.items() if each.loras},
            io=io,
            prompts=prompts,
            negative_prompts=negatives,
            prompts_2=seconds,
            images=tuple(place for place, _ in inputs),
            options=chosen,
            out_offset_bytes=at,
            out_size_bytes=room,
        )

    return JobRequest(places, inputs, {}, place_of_results, write)


def _checked_options(options: Mapping[str, bool | int | float] | None) -> dict[str, bool | int | float]:
    if options is not None and not isinstance(options, Mapping):
        raise BadRequest(f"options: {options!r:.100} is of type {type(options).__name__}, use a dict by name")
    for name, value in (options or {}).items():
        check_text("options: name", name)
        if not isinstance(value, (bool, int, float)) or not abs(value) < 2**63:
            raise BadRequest(f"options: {name}={value!r:.100} is not a finite number or a boolean")
    return dict(options or {})


def _device_of(device: torch.device | str | None) -> torch.device:
    import torch

    if not isinstance(device, str | torch.device | None):
        raise BadRequest(f"device: {device!r:.100} is of type {type(device).__name__}, use a text, such as 'cuda:1'")
    try:
        return torch.device("cpu" if device is None else device)
    except (RuntimeError, ValueError, UnicodeError):
        raise BadRequest(f"device: {device!r:.100} is none that torch knows, such as 'cpu' or 'cuda:1'") from None


def check_texts(name: str, given: Texts) -> tuple[str, ...]:
    """Return prompts as a tuple.

    Raises:
        BadRequest: no text and no list of texts, too many, or too long.
    """
    texts = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, (list, tuple)) else ()
    if not texts or not all(isinstance(each, str) for each in texts):
        raise BadRequest(f"{name}: {given!r:.100} is no text and no list of texts")
    if len(texts) > limits.MAX_BATCH:
        raise BadRequest(f"{name}: {len(texts)} texts, at most {limits.MAX_BATCH}; encode them in several calls")
    for number, text in enumerate(texts):
        where = name if len(texts) == 1 else f"{name}[{number}]"
        if len(text) > limits.MAX_PROMPT_CHARS:
            raise BadRequest(f"{where}: {len(text)} characters, at most {limits.MAX_PROMPT_CHARS}; shorten it")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRequest(f"{where}: it has half a character (a lone surrogate); decode the text again") from None
    if sum(map(len, texts)) > limits.MAX_PROMPTS_CHARS:
        raise BadRequest(f"{name}: more than {limits.MAX_PROMPTS_CHARS} characters in all; encode fewer at a time")
    return texts


def check_second(name: str, given: Texts | None) -> None:
    """Refuse the empty text for the second encoder, unless it is in a list.

    Raises:
        BadRequest: diffusers' pipeline takes it for none, and the encoder reads the prompt; a list is what it says.
    """
    if given == "":
        raise BadRequest(f"{name}: an empty text, for which diffusers takes the prompt: leave it out, or give ['']")


def _as_many(name: str, given: Texts | None, prompts: int) -> tuple[str, ...]:
    """Return texts beside the prompts, as many as these; one text is for all of them."""
    if given is None:
        return ()
    if isinstance(given, str):
        return check_texts(name, [given] * prompts)
    texts = check_texts(name, given)
    if len(texts) != prompts:
        raise BadRequest(f"{name}: {len(texts)} texts for {prompts} prompts; give as many, or one for all")
    return texts


def _check_roles(what: str, given: Mapping[str, Component], needed: Mapping[str, Sequence[str]], family: str) -> None:
    if given.keys() != needed.keys():
        roles = ", ".join(f"{role} ({' or '.join(kinds)})" for role, kinds in needed.items())
        raise BadRequest(f"{what}: given are {listed(sorted(given)) or 'none'}; {family} needs {roles}")
    for role, component in given.items():
        found = component.facts.family if what == "encoders" else component.facts.class_name
        if found not in needed[role]:
            raise BadRequest(f"{what}: {role} is a {found}; a {' or '.join(needed[role])} is needed")
