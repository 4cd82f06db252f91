"""Each registered family is on the page of models, and each layout of each variant is found by names and shapes."""

from __future__ import annotations

import re
from typing import Any

import family_entries
import family_tables
import msgspec
import pytest
from family_entries import FamilyEntry

from xditd.client.comfyui import families as comfyui
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.family import Family
from xditd.gpu_workers.models.registry import detect, own_families
from xditd.gpu_workers.models.resolution import Resolution, resolve
from xditd.ipc.errors import BadCheckpoint, BadRequest, Unsupported

ENTRIES = family_entries.ENTRIES
LAYOUTS = [(entry, layout) for entry in ENTRIES for layout in entry.layouts]


def test_every_family_has_its_variants() -> None:
    assert {each.family for each in ENTRIES} == {each.name for each in own_families()}, "add it to family_entries.py"
    assert set(comfyui.MODULES) <= {each.family for each in family_tables.of_kind("transformer")}


@pytest.mark.parametrize(("entry", "layout"), LAYOUTS, ids=[f"{e.family} {e.variant}, {x}" for e, x in LAYOUTS])
def test_a_layout_is_found_by_names_and_shapes(entry: FamilyEntry, layout: str) -> None:
    config, tensors = entry.tensors(layout)
    found = family_tables.resolved(entry, layout)
    assert (found.family.name, found.config) == (entry.family, config)
    assert not found.skipped
    # Every tensor is read: without any one of them, or with another shape, it is no such model.
    used = {part.source for part in found.key_map.values()}
    assert used == {name for name, tensor in tensors.items() if all(tensor.shape)}


@pytest.mark.parametrize(
    "entry", family_tables.of_kind("transformer"), ids=lambda each: f"{each.family} {each.variant}"
)
def test_its_vae_and_its_text_encoders_fit_it(entry: FamilyEntry) -> None:
    facts = family_tables.transformer_facts(entry)
    vaes = [family_tables.facts(each).latents for each in family_tables.of_kind("vae") if each.family == entry.vae]
    fitting = [each for each in vaes if (each.channels, each.pixels) == (facts.latents.channels, facts.latents.pixels)]
    assert len(fitting) == 1
    facts.latents.check_vae(fitting[0])
    spaces = {each.variant: family_tables.facts(each).latents.space for each in family_tables.of_kind("vae")}
    assert facts.latents.space in spaces.values()
    for other in family_tables.of_kind("vae"):
        latents = family_tables.facts(other).latents
        if spaces[other.variant] == facts.latents.space:
            continue
        with pytest.raises(BadRequest, match="lend that model's VAE"):
            facts.latents.check_vae(latents)
        alike = msgspec.structs.replace(facts.latents, space=latents.space)
        with pytest.raises(
            BadRequest, match=f"of the space {latents.space}, the transformer's of {facts.latents.space}"
        ):
            facts.latents.check_vae(alike)
    widths = {each.variant: family_tables.facts(each).width for each in family_tables.of_kind("text_encoder")}
    taken = {each.shape[-1] for each in facts.conditioning}
    for name, layers in entry.encoders:
        assert layers * widths[name] in taken, name


def test_families_of_one_name_differ_by_what_the_test_says() -> None:
    """So that a row of the page is no copy of another one."""
    known = [(each.family, each.config) for each in ENTRIES]
    assert len({(family, repr(config)) for family, config in known}) == len(known)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda each: f"{each.family} {each.variant}")
def test_a_file_without_one_of_its_tensors_is_refused_and_the_tensor_named(entry: FamilyEntry) -> None:
    _, tensors = entry.tensors(next(iter(entry.layouts)))
    name = sorted(tensors)[len(tensors) // 2]
    family = detect(tensors)
    del tensors[name]
    with pytest.raises(BadCheckpoint, match=re.escape(name)):
        resolve(family, tensors)


def mixed() -> list[tuple[FamilyEntry, FamilyEntry, str]]:
    """Return pairs of variants of one family that have a layout in common."""
    return [
        (one, other, layout)
        for one in ENTRIES
        for other in ENTRIES
        if one.family == other.family and one != other
        for layout in one.layouts
        if layout in other.layouts
    ]


@pytest.mark.parametrize(("one", "other", "layout"), mixed(), ids=lambda each: getattr(each, "variant", each))
def test_a_tensor_of_another_variant_is_refused_and_named(one: FamilyEntry, other: FamilyEntry, layout: str) -> None:
    _, tensors = one.tensors(layout)
    _, others = other.tensors(layout)
    more = sorted(others.keys() - tensors.keys())
    unlike = sorted(name for name in tensors.keys() & others.keys() if tensors[name].shape != others[name].shape)
    assert more or unlike or tensors.keys() - others.keys()
    known = [each.tensors(layout)[1] for each in ENTRIES if each.family == one.family and layout in each.layouts]
    for names in filter(None, (more, unlike)):
        name = names[len(names) // 2]  # at the ends are first and last layers
        given = {**tensors, name: others[name]}
        found = outcome(given, detect(tensors))
        if isinstance(found, str):
            parts = {name, *others, *tensors} | {each.partition(".")[0] for each in given}
            assert any(part in found for part in parts), found
            assert found.startswith((one.family, "checkpoint does not fit")), found
        else:  # one tensor is all by which some variants differ: it is a whole model of that one
            assert found.config != one.config
            assert name in ("img_in.weight", "x_embedder.weight", "patch_embedding.weight") or given in known
            assert {part.source for part in found.key_map.values()} == set(given)


def outcome(tensors: dict[str, TensorInfo], family: Family[Any]) -> Resolution | str:
    """Return what the tensors are read as, or why they are refused."""
    try:
        return resolve(family, tensors)
    except (BadCheckpoint, Unsupported) as refused:
        return refused.detail
