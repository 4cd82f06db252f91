"""Snapshots: every change of a container is found and undone, also inside others and in objects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from xditd.gpu_workers.models.snapshots import Snapshot


def values() -> dict[str, Any]:
    processor = AttnProcessor2_0()
    processor.scale = 1.0
    found = {"list": [1, [2]], "set": {3}, "map": {"a": torch.zeros(1)}, "tuple": ([4],), "object": processor}
    found["itself"] = found
    return found


CHANGES = {
    "an item more": lambda found: found["list"].append(5),
    "another item": lambda found: found["list"].__setitem__(0, 9),
    "inside a list": lambda found: found["list"][1].clear(),
    "a set": lambda found: found["set"].add(4),
    "another tensor": lambda found: found["map"].update(a=torch.zeros(1)),
    "a key less": lambda found: found["map"].clear(),
    "inside a tuple": lambda found: found["tuple"][0].append(5),
    "an attribute": lambda found: setattr(found["object"], "scale", 2.0),
    "a new attribute": lambda found: setattr(found["object"], "cache", []),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_found_and_undone(name: str) -> None:
    found = values()
    snapshot = Snapshot([found])
    assert snapshot.is_current()
    CHANGES[name](found)
    assert not snapshot.is_current()
    snapshot.restore()
    assert snapshot.is_current()
    assert found["list"] == [1, [2]]
    assert (found["set"], found["tuple"], vars(found["object"])) == ({3}, ([4],), {"scale": 1.0})


def test_elements_of_tensors_are_not_copied() -> None:
    found = values()
    snapshot = Snapshot([found])
    found["map"]["a"].fill_(7)
    assert snapshot.is_current()
    snapshot.restore()
    assert found["map"]["a"].item() == 7
