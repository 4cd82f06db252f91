"""ControlNets of jobs: what is refused before anything is sent, and what is written for the daemon."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import sample_facts  # noqa: E402
from msgspec.structs import replace  # noqa: E402

from xditd.client.io_places import IoPlaces  # noqa: E402
from xditd.client.jobs.arguments import ArgumentWriter  # noqa: E402
from xditd.client.jobs.component import Component  # noqa: E402
from xditd.client.jobs.controls import (  # noqa: E402
    CallControl,
    Control,
    check_controls,
    write_controls,
    write_part_controls,
)
from xditd.ipc import limits  # noqa: E402
from xditd.ipc.errors import BadRequest  # noqa: E402
from xditd.ipc.facts import ControlNetFacts  # noqa: E402
from xditd.ipc.tensors import ComponentKind  # noqa: E402

UNION = replace(
    sample_facts.VAE,
    family="flux1_controlnet",
    kind=ComponentKind.CONTROLNET,
    vae=None,
    controlnet=ControlNetFacts(
        controls="flux1",
        heads=24,
        ulysses=1,
        ring=1,
        arguments=(),
        modes=3,
        residuals={"double": 2},
        latents=sample_facts.LATENTS,
    ),
)
IMAGE = torch.zeros(1, 3, 64, 96)
LATENTS = torch.zeros(1, 16, 8, 12)


def checked(facts: Any = UNION, has_vae: bool = True, **fields: Any) -> None:
    control = Control("c", **fields)
    check_controls([(Component("c", facts), control)], sample_facts.LATENTS, 64, 96, has_vae=has_vae)


@pytest.mark.parametrize("given", [{"image": IMAGE}, {"latents": LATENTS}, {"image": IMAGE, "start": 0.2, "end": 0.2}])
def test_what_fits_passes(given: dict[str, Any]) -> None:
    checked(mode=2, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": 0}, "give either the image or its latents"),
        ({"mode": 0, "image": IMAGE, "latents": LATENTS}, "give either the image or its latents"),
        ({"image": IMAGE}, r"controls\[0\].mode: a union ControlNet needs the kind of its picture, from 0 to 2"),
        ({"mode": 3, "image": IMAGE}, r"controls\[0\].mode: 3; this ControlNet has the modes 0 to 2"),
        ({"mode": True, "image": IMAGE}, r"controls\[0\].mode"),
        ({"mode": 0, "image": IMAGE[..., :64]}, r"controls\[0\].image: shape \(1, 3, 64, 64\) for .* 64x96; resize"),
        ({"mode": 0, "latents": LATENTS[..., :8]}, r"controls\[0\].latents: shape \(1, 16, 8, 8\)"),
        ({"mode": 0, "image": IMAGE[0]}, r"controls\[0\].image: shape"),
        ({"mode": 0, "image": IMAGE, "scale": float("nan")}, r"controls\[0\].scale"),
        ({"mode": 0, "image": IMAGE, "start": 0.5, "end": 0.4}, r"start 0.5 and end 0.4; use 0 <= start <= end"),
        ({"mode": 0, "image": IMAGE, "end": 1.5}, r"start 0 and end 1.5"),
        ({"mode": 0, "image": IMAGE, "has_vae": False}, r"controls\[0\].image: the generation's VAE encodes it"),
        ({"mode": 0, "image": IMAGE, "facts": sample_facts.VAE}, "a vae where a controlnet is needed"),
    ],
    ids=str,
)
def test_what_does_not_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        checked(**given)


def test_too_many_are_refused() -> None:
    many = [(Component("c", UNION), Control("c", IMAGE, mode=0))] * (limits.MAX_CONTROLS + 1)
    with pytest.raises(BadRequest, match=f"controls: {limits.MAX_CONTROLS + 1} ControlNets, at most"):
        check_controls(many, sample_facts.LATENTS, 64, 96, has_vae=True)


def test_pictures_get_places_of_their_own() -> None:
    places, inputs = IoPlaces(), []
    given = [Control("a", IMAGE, mode=1, scale=0.5), Control("b", latents=LATENTS, mode=0, start=0.2, end=0.8)]
    written = write_controls([(Component(each.controlnet, UNION), each) for each in given], places, inputs)
    assert [(each.component_id, each.scale, each.start, each.end, each.mode) for each in written] == [
        ("a", 0.5, 0.0, 1.0, 1), ("b", 1.0, 0.2, 0.8, 0),
    ]  # fmt: skip
    assert [place for place, _ in inputs] == [written[0].image, written[1].latents]
    assert written[0].latents is written[1].image is None


def test_a_call_writes_arguments_and_blocks() -> None:
    writer = ArgumentWriter(IoPlaces())
    given = CallControl("c", {"timestep": torch.tensor([0.5])}, 0.25, {"double": [0, 0, 1]})
    (written,) = write_part_controls(writer, [("c", given)], "")
    assert (written.component_id, written.scale, written.blocks) == ("c", 0.25, {"double": (0, 0, 1)})
    assert written.arguments.keys() == {"timestep"}
    for wrong, message in (
        (CallControl("c", {}, float("inf")), r"controls\[0\].scale"),
        (CallControl("c", {}, blocks={"double": [-1]}), r"controls\[0\].blocks.double"),
        (CallControl("c", {"x": object()}), r"controls\[0\].x: object cannot be sent"),
    ):
        with pytest.raises(BadRequest, match=message):
            write_part_controls(writer, [("c", wrong)], "")
