"""Token plans made wrong in one declaration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from xditd.gpu_workers.models.token_plans import Attention, Cache, CachedHeads, CachedTokens, Split, TokenPlan, never

ORDER = "in another order"
"""In the names of those that only show with a mask over all tokens of several streams."""


def mutations(plan: TokenPlan) -> dict[str, TokenPlan]:
    """Return wrong plans by what is wrong with them."""
    found: dict[str, TokenPlan] = {}
    for part in ("splits", "gathers"):
        declared: Mapping[str, Mapping[Any, Any]] = getattr(plan, part)
        for path, splits in declared.items():
            for name, split in splits.items():
                for what, changed in _splits(split, plan):
                    others = {key: each for key, each in splits.items() if key != name}
                    new = others if changed is None else {**splits, name: changed}
                    wrong = {key: each for key, each in ({**declared, path: new}).items() if each}
                    found[f"{part} of {path or 'the module'}, {name}: {what}"] = replace(plan, **{part: wrong})
    for path, attention in plan.attentions.items():
        without = {key: each for key, each in plan.attentions.items() if key != path}
        found[f"attention of {path}: not declared"] = replace(plan, attentions=without)
        for what, wrong_attention in _attentions(attention, plan):
            changed_all = {**plan.attentions, path: wrong_attention}
            found[f"attention of {path}: {what}"] = replace(plan, attentions=changed_all)
    exchanges: Mapping[str, Any] = getattr(plan, "exchanges", {})
    for path, exchange in exchanges.items():
        without = {key: each for key, each in exchanges.items() if key != path}
        found[f"exchange of {path}: not declared"] = replace(plan, **{"exchanges": without})
        for name in exchange.inputs:
            fewer = replace(exchange, inputs={key: each for key, each in exchange.inputs.items() if key != name})
            found[f"exchange of {path}: without {name}"] = replace(plan, **{"exchanges": {**exchanges, path: fewer}})
    if plan.cache is not None:
        found |= {f"cache: {what}": replace(plan, cache=wrong) for what, wrong in _caches(plan.cache, plan)}
    for path in plan.whole:
        rest = tuple(each for each in plan.whole if each != path)
        found[f"whole {path}: not declared"] = replace(plan, whole=rest)
    return found


def _caches(cache: Cache, plan: TokenPlan) -> Iterator[tuple[str, Cache | None]]:
    """Yield wrong declarations of a cache. Which calls make one matters to jobs alone."""
    yield "not declared", None
    for name, declared in cache.tensors.items():
        yield (
            f"{name} removed",
            replace(cache, tensors={key: each for key, each in cache.tensors.items() if key != name}),
        )
        for what, wrong in _cached(declared, plan):
            yield f"{name} {what}", replace(cache, tensors={**cache.tensors, name: wrong})
    for name in cache.counts:
        yield f"{name} removed", replace(cache, counts={key: each for key, each in cache.counts.items() if key != name})
    if cache.is_read is not never:
        yield "never read", replace(cache, is_read=never)
        yield "always read", replace(cache, is_read=lambda _: True)


def _cached(declared: CachedTokens | CachedHeads, plan: TokenPlan) -> Iterator[tuple[str, CachedTokens | CachedHeads]]:
    wrong = declared.dim + 1 if declared.dim in (0, 1, -2) else declared.dim - 1
    yield f"in dimension {wrong}", replace(declared, dim=wrong)
    if isinstance(declared, CachedHeads):
        return
    for stream in sorted(plan.streams - {declared.read}):
        yield f"read as {stream}", replace(declared, read=stream)
    yield from _without_options(declared)
    if not declared.written:
        return  # where nothing is written, any tokens may be
    yield "never written", replace(declared, written=())
    for stream in sorted(plan.streams - set(declared.written)):
        yield f"also written from {stream}", replace(declared, written=(*declared.written, stream))
    for stream in declared.written:
        rest = tuple(each for each in declared.written if each != stream)
        if rest:
            yield f"not written from {stream}", replace(declared, written=rest)


def _splits(split: Any, plan: TokenPlan) -> Iterator[tuple[str, Any]]:
    yield "removed", None
    for stream in sorted(plan.streams - {split.stream}):
        yield f"of {stream}", replace(split, stream=stream)
    if isinstance(split, Split):
        wrong = split.dim + 1 if split.dim in (0, 1, -2) else split.dim - 1
        yield f"in dimension {wrong}", replace(split, dim=wrong)
    yield from _without_options(split)


def _without_options(declared: Any) -> Iterator[tuple[str, Any]]:
    """Yield a declaration without each of the options that it makes use of."""
    for each in fields(declared):
        is_option = each.default is None or each.default is False
        if is_option and getattr(declared, each.name) != each.default:
            yield f"without {each.name}", replace(declared, **{each.name: each.default})


def _attentions(attention: Attention, plan: TokenPlan) -> Iterator[tuple[str, Attention]]:
    """Yield wrong declarations of one attention.

    Queries that are declared whole are no fault: the rank attends from those that it has, without Ulysses. Neither is
    the order of queries alone, where every rank has all keys: it matters only to a mask with rows.
    """
    queries, keys = attention.queries, attention.keys
    for names, part in ((queries, "queries"), (keys, "keys")):
        for name in names:
            rest = tuple(each for each in names if each != name)
            if rest:
                yield f"{part} without {name}", replace(attention, **{part: rest})
        for name in sorted(plan.streams - set(names)):
            yield f"{part} with {name}", replace(attention, **{part: (*names, name)})
    if keys:
        yield "keys whole", replace(attention, keys=())
        if len(keys) > 1:
            yield f"keys {ORDER}", replace(attention, keys=keys[::-1])
            yield f"queries and keys {ORDER}", replace(attention, queries=queries[::-1], keys=keys[::-1])
    elif queries:
        yield "keys split", replace(attention, keys=queries)
    yield from _without_options(attention)
    for number, other in enumerate(attention.others):
        rest_of = attention.others[:number] + attention.others[number + 1 :]
        yield f"call {number + 2} not declared", replace(attention, others=rest_of)
        for what, wrong in _attentions(other, plan):
            changed = (*attention.others[:number], wrong, *attention.others[number + 1 :])
            yield f"call {number + 2}: {what}", replace(attention, others=changed)
