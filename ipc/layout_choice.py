"""Choose the parallel layout (degrees of ulysses, ring and cfg) of a group of workers, with the reasons.

A group starts before any model is lent. Its cfg degree, and so the number of workers that share an image's tokens, is
then fixed. Their split between Ulysses and ring is a preference, chosen for an assumed number of attention heads: a
component whose heads it does not divide gets degrees of its own (:func:`for_heads`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from xditd.ipc.degrees import Degrees, spell
from xditd.ipc.errors import Unsupported
from xditd.ipc.status import LayoutCandidate, LayoutReport

CFG_DEGREES: Final = (1, 2)
"""A batch has rows with the prompt, and rows with the negative prompt."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The workload that a layout is chosen for: attention heads, and tokens of one row.

    The defaults are a transformer of 24 heads and the 4,608 tokens of a 1024x1024 image with its text.
    """

    heads: int = 24
    text_tokens: int = 512
    image_tokens: int = 4_096


USUAL: Final = Workload()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A possible layout, and why it was not chosen; empty for the chosen one."""

    degrees: Degrees
    why_not: str = ""


@dataclass(frozen=True, slots=True)
class LayoutChoice:
    """The chosen layout of a group, the reason, and all candidates."""

    degrees: Degrees
    reason: str
    candidates: tuple[Candidate, ...]


def choose_layout(world_size: int, asked: Mapping[str, int] | None = None, workload: Workload = USUAL) -> LayoutChoice:
    """Choose degrees whose product is ``world_size``; the degrees in ``asked`` are kept.

    Raises:
        Unsupported: the degrees asked for cannot work; the message names the number and the remedy.
    """
    asked = asked or {}
    chosen = _choose(world_size, asked, workload)
    fault = why_impossible(chosen, workload)
    if fault:
        raise Unsupported(f"layout {spell(asked)} with {world_size} workers: {fault}")
    return LayoutChoice(
        degrees=chosen,
        reason=_reason(chosen, asked, workload),
        candidates=tuple(
            Candidate(degrees, "" if degrees == chosen else _why_not(degrees, chosen, asked, workload))
            for degrees in _splits(world_size)
        ),
    )


def report(choice: LayoutChoice, asked: Mapping[str, int]) -> LayoutReport:
    """Convert a choice to a message."""
    return LayoutReport(
        asked=spell(asked),
        reason=choice.reason,
        candidates=tuple(
            LayoutCandidate(layout=str(candidate.degrees), why_not=candidate.why_not) for candidate in choice.candidates
        ),
    )


def why_impossible(degrees: Degrees, workload: Workload) -> str:
    """Say why these degrees cannot work for these heads and tokens; empty if they can."""
    if degrees.cfg not in CFG_DEGREES:
        return f"cfg={degrees.cfg}: a batch has at most two halves, prompt and negative prompt; use cfg=2 or cfg=1"
    scarce = min(workload.text_tokens, workload.image_tokens)
    if degrees.sequence > scarce:
        return (
            f"{workload.text_tokens} text and {workload.image_tokens} image tokens are too few to split over "
            f"{degrees.sequence} workers (ulysses x ring); use at most {scarce}"
        )
    return ""


def most_ulysses(workers: int, heads: int) -> int:
    """Return the largest Ulysses degree that divides both; ring takes the rest of ``workers``."""
    return math.gcd(workers, heads)


def for_heads(preferred: Degrees, heads: int) -> Degrees:
    """Return the degrees for a model of ``heads`` attention heads in a group that was started with ``preferred``.

    The ranks that share an image's tokens stay the same, and so do the degrees if their Ulysses divides the heads.
    """
    if heads % preferred.ulysses == 0:
        return preferred
    ulysses = most_ulysses(preferred.sequence, heads)
    return dataclasses.replace(preferred, ulysses=ulysses, ring=preferred.sequence // ulysses)


def _choose(world_size: int, asked: Mapping[str, int], workload: Workload) -> Degrees:
    ulysses, ring, cfg = asked.get("ulysses", 0), asked.get("ring", 0), asked.get("cfg", 1)
    fixed = cfg * (ulysses or 1) * (ring or 1)
    is_whole = fixed == world_size if ulysses and ring else world_size % fixed == 0
    if not is_whole:
        raise Unsupported(
            f"layout {spell(asked)} with {world_size} workers: these degrees make {fixed}; "
            f"use --workers {fixed}, or degrees that make {world_size}"
        )
    rest = world_size // fixed
    if not ulysses:
        ulysses = rest if ring else most_ulysses(rest, workload.heads)
    return Degrees(ulysses=ulysses, ring=ring or world_size // (cfg * ulysses), cfg=cfg)


def _splits(world_size: int) -> Iterator[Degrees]:
    """Yield every way to write ``world_size`` as a product of degrees, the largest Ulysses degree first."""
    for cfg in CFG_DEGREES:
        for ring in _divisors(world_size, cfg):
            yield Degrees(world_size // (cfg * ring), ring, cfg)


def _divisors(world_size: int, taken: int) -> list[int]:
    rest, remainder = divmod(world_size, taken)
    return [] if remainder else [number for number in range(1, rest + 1) if rest % number == 0]


def _reason(chosen: Degrees, asked: Mapping[str, int], workload: Workload) -> str:
    if chosen.world_size == 1:
        return "one worker: nothing to split"
    parts = [f"{spell(asked)} as asked"] if asked else []
    if chosen.ulysses > 1 and "ulysses" not in asked:
        parts.append(f"ulysses={chosen.ulysses} divides the {workload.heads} attention heads (assumed)")
    if chosen.ring > 1 and "ring" not in asked:
        parts.append(f"ring={chosen.ring} takes the remaining workers")
    if workload.heads % chosen.ulysses:
        parts.append(_explain_replacement(chosen, workload))
    elif chosen.ulysses > 1:
        parts.append(f"models whose heads ulysses={chosen.ulysses} does not divide get degrees of their own")
    return "; ".join(parts)


def _explain_replacement(degrees: Degrees, workload: Workload) -> str:
    """Name the degrees that a model gets instead when Ulysses does not divide its heads."""
    return (
        f"ulysses={degrees.ulysses} does not divide the {workload.heads} attention heads (assumed), "
        f"which run with {for_heads(degrees, workload.heads)} instead"
    )


def _why_not(degrees: Degrees, chosen: Degrees, asked: Mapping[str, int], workload: Workload) -> str:
    fault = why_impossible(degrees, workload)
    if fault:
        return fault
    if workload.heads % degrees.ulysses:
        return _explain_replacement(degrees, workload)
    for name, degree in asked.items():
        if degrees.named()[name] != degree:
            return f"{name}={degree} was asked for"
    if degrees.cfg > chosen.cfg:
        return "cfg=2 halves only the work of jobs with a negative prompt; ask for it by name"
    return f"more Ulysses is faster: ring sends keys and values around, and runs unfused modules ({chosen})"
