"""Bad inputs of a generation, by family: the client or the workers refuse each, and name the thing and its value.

What the client lets through, the workers refuse before any step, and the workers refuse what another client would send.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import flux1_variants
import flux2_models
import pytest
import qwen_image_models
import torch
import wan_models

from xditd.client.jobs.component import Component
from xditd.client.jobs.job_requests import generate_request
from xditd.ipc.arguments import ListOf
from xditd.ipc.errors import BadRequest, NotFinite, Unsupported
from xditd.ipc.job_parts import Sampling
from xditd.ipc.requests import Generate
from xditd.ipc.tensors import ComponentKind

if TYPE_CHECKING:
    from one_rank import OneRank

State = dict[str, torch.Tensor]
REFUSALS = (BadRequest, Unsupported, NotFinite)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Asked:
    """What a generation is asked for."""

    conditioning: dict[str, Any]
    noise: torch.Tensor
    sampling: dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A variant of a family with a good generation of one row."""

    state: Callable[[], State]
    conditioning: dict[str, Any]
    noise: tuple[int, ...]
    sides: dict[str, int]
    guidance: float
    more: dict[str, Any] = field(default_factory=dict)

    def asked(self) -> Asked:
        return Asked(
            dict(self.conditioning),
            drawn(*self.noise, seed=1),
            {**self.sides, "steps": 2, "guidance_scale": self.guidance, "options": dict(self.more)},
        )


def flux1(channels: int) -> Subject:
    given: dict[str, Any] = {**flux1_variants.text(1), **flux1_variants.pictures(channels)}
    sides = {"height": flux1_variants.HEIGHT, "width": flux1_variants.WIDTH}
    return Subject(lambda: flux1_variants.state_of(channels), given, (1, 16, 8, 12), sides, 3.5)


PAIR = {"prompt_embeds": drawn(1, 9, 96, seed=2), "negative_prompt_embeds": drawn(1, 7, 96, seed=3)}
OF_WAN = {"prompt_embeds": drawn(1, 9, 48, seed=2), "negative_prompt_embeds": drawn(1, 7, 48, seed=3)}
MASKS = {"prompt_embeds_mask": torch.ones(1, 9), "negative_prompt_embeds_mask": torch.ones(1, 7)}
SUBJECTS = {
    "flux1 Kontext": flux1(64),
    "flux1 Canny": flux1(128),
    "flux1 Fill": flux1(384),
    "flux2 dev": Subject(
        lambda: flux2_models.state_dict(0),
        {"prompt_embeds": PAIR["prompt_embeds"], "reference_latents": [drawn(128, 2, 3)]},
        (1, 128, 4, 6),
        {"height": 64, "width": 96},
        4.0,
    ),
    "flux2 klein": Subject(
        lambda: flux2_models.state_dict(0, flux2_models.KLEIN),
        {**PAIR, "reference_latents": [drawn(128, 2, 3)]},
        (1, 128, 4, 6),
        {"height": 64, "width": 96},
        2.0,
    ),
    "qwen_image": Subject(
        lambda: qwen_image_models.state_dict(0),
        {**PAIR, **MASKS, "reference_latents": [drawn(16, 4, 6)]},
        (1, 16, 8, 12),
        {"height": 64, "width": 96},
        4.0,
    ),
    "wan": Subject(
        lambda: wan_models.state_dict(0), OF_WAN, (1, 16, 2, 4, 6), {"height": 32, "width": 48, "frames": 5}, 5.0
    ),
}
GUIDED = ("flux2 klein", "qwen_image", "wan")
WITH_REFERENCES = ("flux1 Kontext", "flux2 dev", "flux2 klein", "qwen_image")

Change = Callable[[Asked], None]


@dataclass(frozen=True)
class Case:
    """A fault: what makes it of a good generation, and what an error names. Only a client can make some."""

    change: Change
    says: tuple[str, ...]
    subjects: tuple[str, ...] = tuple(SUBJECTS)
    is_of_client: bool = False


def given(name: str, value: Any) -> Change:
    """Give another value of the conditioning, or of one made from that it has."""

    def change(asked: Asked) -> None:
        found = value(asked.conditioning.get(name)) if callable(value) else value
        if found is None:
            del asked.conditioning[name]
        else:
            asked.conditioning[name] = found

    return change


def sampled(**changes: Any) -> Change:
    return lambda asked: asked.sampling.update(changes)


def noised(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def run(asked: Asked) -> None:
        asked.noise = change(asked.noise)

    return run


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[3] = math.nan
    return changed


CASES = {
    "no prompt": Case(given("prompt_embeds", lambda _: None), ("prompt_embeds",)),
    "an input of no model": Case(given("style_embeds", drawn(1, 3)), ("style_embeds",)),
    "a prompt of another model": Case(given("prompt_embeds", drawn(1, 9, 100)), ("prompt_embeds", "100")),
    "a prompt without tokens": Case(given("prompt_embeds", lambda old: old[:, :0]), ("prompt_embeds", "0")),
    "a prompt without a batch": Case(given("prompt_embeds", lambda old: old[0]), ("prompt_embeds", "9|15")),
    "a prompt of integers": Case(given("prompt_embeds", lambda old: old.long()), ("prompt_embeds", "int64")),
    "a prompt that is not finite": Case(given("prompt_embeds", with_nan), ("prompt_embeds", "finite")),
    "more prompts than noise": Case(
        given("prompt_embeds", lambda old: old.repeat(2, 1, 1)), ("prompt_embeds|noise", "2")
    ),
    "another batch of negatives": Case(
        given("negative_prompt_embeds", lambda old: old.repeat(3, 1, 1)), ("negative_prompt_embeds", "3"), GUIDED
    ),
    "negatives without guidance": Case(
        sampled(guidance_scale=1.0), ("negative_prompt_embeds", "guidance_scale 1", "leave it out"), GUIDED
    ),
    "guidance without negatives": Case(
        given("negative_prompt_embeds", lambda _: None), ("negative_prompt_embeds is missing", "guidance_scale"), GUIDED
    ),
    "guidance that is no number": Case(
        sampled(guidance_scale=math.nan), ("guidance_scale", "nan", "0 to"), is_of_client=True
    ),
    "guidance below 0": Case(sampled(guidance_scale=-1.0), ("guidance_scale", "-1", "0 to"), is_of_client=True),
    "no steps": Case(sampled(steps=0), ("steps", "0", "1 to")),
    "odd sides": Case(sampled(height=65), ("height", "65", "multiple of")),
    "an option of no family": Case(sampled(options={"tilt": 1.0}), ("tilt",)),
    "sigmas that rise": Case(sampled(sigmas=(0.5, 0.9)), ("sigmas",)),
    "noise of another size": Case(noised(lambda old: old[..., :-2]), ("noise", r"(4|10)\]|(4|10)\)")),
    "noise of other channels": Case(noised(lambda old: old[:, :8]), ("noise", "8")),
    "noise of integers": Case(noised(lambda old: old.long()), ("noise", "int64")),
    "noise that is not finite": Case(noised(with_nan), ("noise", "finite")),
    "frames of an image": Case(
        sampled(frames=5), ("frames", "5", "1"), tuple(each for each in SUBJECTS if each != "wan"), is_of_client=True
    ),
    "frames between latents": Case(sampled(frames=4), ("frames", "4", "is near"), ("wan",)),
    "a reference without a list": Case(
        given("reference_latents", lambda old: old[0]), ("reference_latents", "list"), WITH_REFERENCES
    ),
    "no reference in the list": Case(given("reference_latents", []), ("reference_latents", "list"), WITH_REFERENCES),
    "a reference of pixels": Case(
        given("reference_latents", [drawn(3, 32, 48)]), (r"reference_latents\[0\]", "3", "16|128"), WITH_REFERENCES
    ),
    "a reference that is not finite": Case(
        given("reference_latents", lambda old: [with_nan(old[0])]),
        (r"reference_latents\[0\]", "finite"),
        WITH_REFERENCES,
    ),
    "a reference of odd sides": Case(
        given("reference_latents", [drawn(16, 5, 6)]),
        (r"reference_latents\[0\]", "5", "even|multiples of 2"),
        ("flux1 Kontext", "qwen_image"),
    ),
    "too many references": Case(
        given("reference_latents", lambda old: old * 2), ("reference_latents", "2", "one"), ("flux1 Kontext",)
    ),
    "more references than a message has": Case(
        given("reference_latents", lambda old: old * 2000),
        ("reference_latents", "1024 values"),
        WITH_REFERENCES[1:],
        is_of_client=True,
    ),
    "references of a model without any": Case(
        given("reference_latents", [drawn(16, 4, 6)]), ("reference_latents",), ("flux1 Canny", "flux1 Fill", "wan")
    ),
    "a control image of another size": Case(
        given("control_latents", drawn(1, 16, 6, 12)), ("control_latents", "6", "8"), ("flux1 Canny",)
    ),
    "no control image": Case(given("control_latents", lambda _: None), ("control_latents",), ("flux1 Canny",)),
    "a control image for another variant": Case(
        given("control_latents", drawn(1, 16, 8, 12)), ("control_latents",), ("flux1 Kontext", "flux1 Fill")
    ),
    "a mask of latents": Case(given("mask", torch.ones(1, 1, 8, 12)), ("mask", "8", "64"), ("flux1 Fill",)),
    "a masked image without its mask": Case(given("mask", lambda _: None), ("mask",), ("flux1 Fill",)),
    "a mask of another text": Case(
        given("prompt_embeds_mask", torch.ones(1, 7)), ("prompt_embeds_mask", "7", "9"), ("qwen_image",)
    ),
    "a mask of another batch": Case(
        given("prompt_embeds_mask", torch.ones(2, 9)), ("prompt_embeds_mask", "2", "1"), ("qwen_image",)
    ),
    "a cache beside guidance": Case(
        sampled(options={"kv_cache": True}), ("kv_cache", "guidance_scale 2", "use 1"), ("flux2 klein",)
    ),
    "a cache by halves": Case(sampled(options={"kv_cache": 0.5}), ("kv_cache", "0.5", "use 1"), ("flux2 klein",)),
    "a shift of nothing": Case(sampled(options={"shift": 0.0}), ("shift", "0"), ("qwen_image", "wan")),
    "a boundary of one transformer": Case(
        sampled(options={"boundary_ratio": 0.5}), ("boundary_ratio", "leave it out"), ("wan",)
    ),
}


def ask_client(facts: Any, asked: Asked) -> None:
    component = Component("t", SimpleNamespace(transformer=facts, kind=ComponentKind.TRANSFORMER))  # type: ignore[arg-type]
    sampling = dict(asked.sampling)
    generate_request(
        component,
        None,
        asked.conditioning,
        noise=asked.noise,
        seed=None,
        sigmas=sampling.pop("sigmas", None),
        previews=False,
        step_cache=0.0,
        variant="class",
        **sampling,
    )


def ask_workers(rank: OneRank, asked: Asked, latents: tuple[int, ...]) -> None:
    room = rank.room()
    conditioning: dict[str, Any] = {
        name: ListOf(items=tuple(map(room.argument, each))) if isinstance(each, list) else room.argument(each)
        for name, each in asked.conditioning.items()
    }
    sides = asked.sampling
    noise, out = room.input(asked.noise), room.output(*latents)
    job = Generate(
        request_id="r",
        components={"transformer": "t"},
        io=room.block(),
        conditioning=conditioning,
        sampling=Sampling(**sides),
        noise=noise,
        out_latents=out,
    )
    rank.run(job)


def refusal_of(ask: Callable[[], None]) -> str | None:
    """Return the message of a typed refusal; ``None`` if there is none."""
    try:
        ask()
    except REFUSALS as refused:
        return refused.detail
    return None


def unsaid(who: str, message: str | None, case: Case) -> list[str]:
    """Return what is wrong with the answer of the client, which may let a fault through, or of the workers."""
    if message is None:
        return [f"the {who} did not refuse it"] if who == "workers" or case.is_of_client else []
    return [f"{each!r} is not in what the {who} said: {message}" for each in case.says if not re.search(each, message)]


@pytest.fixture
def lent(rank: OneRank, request: pytest.FixtureRequest) -> OneRank:
    rank.lend("t", SUBJECTS[request.param].state())
    return rank


@pytest.mark.parametrize("lent", list(SUBJECTS), indirect=True)
def test_every_fault_is_refused_and_named(lent: OneRank, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["lent"]
    subject = SUBJECTS[name]
    facts = lent.components.get("t", "transformer").transformer_facts
    ask_client(facts, subject.asked())
    ask_workers(lent, subject.asked(), subject.noise)
    faults: list[str] = []
    for label, case in CASES.items():
        if name not in case.subjects:
            continue
        asked = subject.asked()
        case.change(asked)
        found = unsaid("client", refusal_of(lambda asked=asked: ask_client(facts, asked)), case)
        if not case.is_of_client:
            message = refusal_of(lambda asked=asked: ask_workers(lent, asked, subject.noise))
            found += unsaid("workers", message, case)
            found += ["steps ran before the refusal"] if message is not None and lent.steps else []
        faults += [f"{label}: {each}" for each in found]
    assert not faults, "\n".join(faults)
    ask_workers(lent, subject.asked(), subject.noise)
    assert lent.steps == [(1, 2), (2, 2)]
