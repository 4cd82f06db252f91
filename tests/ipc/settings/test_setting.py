"""Properties of a setting, read from its field."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import pytest
from msgspec import Meta

from xditd.ipc.errors import BadRequest
from xditd.ipc.settings.setting import about, settings_of


def _even(number: int) -> None:
    if number % 2:
        raise ValueError(number)


class Oven(msgspec.Struct, frozen=True, kw_only=True):
    """An example."""

    heat_s: Annotated[float, Meta(gt=0, le=60), about("how long", section="oven", reload=True)] = 2.0
    pause_s: Annotated[float, Meta(ge=1, le=60), about("between two trays")] = 5.0
    trays: Annotated[
        Literal["all"] | Annotated[int, Meta(ge=1, le=8)], about("how many", section="oven", key="count")
    ] = "all"
    mode: Annotated[Literal["fan", "grill"], about("what heats", short="-m")] = "fan"
    racks: Annotated[int, Meta(ge=0, le=8), about("pairs", values="an even number", check=_even)] = 2
    note: Annotated[str | None, about("any text", flag="", variable="")] = None


HEAT, PAUSE, TRAYS, MODE, RACKS, NOTE = settings_of(Oven)


def test_names_follow_from_the_field() -> None:
    assert (HEAT.flag, HEAT.variable, HEAT.section, HEAT.key) == ("--heat-s", "XDITD_HEAT_S", "oven", "heat_s")
    assert (TRAYS.flag, TRAYS.key, TRAYS.metavar) == ("--trays", "count", "COUNT")
    assert MODE.flags == ("-m", "--mode")
    assert (NOTE.flags, NOTE.variable, NOTE.shown_default) == ((), "", "")
    assert (HEAT.is_reloaded, TRAYS.is_reloaded) == (True, False)
    assert (HEAT.shown_default, TRAYS.shown_default) == ("2", "all")


def test_accepted_values_in_words() -> None:
    assert [each.values for each in (HEAT, PAUSE, TRAYS, MODE, RACKS)] == [
        "seconds above 0, at most 60",
        "seconds from 1 to 60",
        '"all" or a whole number from 1 to 8',
        'one of "fan", "grill"',
        "an even number",
    ]


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        (HEAT, "1e1", 10.0),
        (HEAT, 3, 3.0),
        (PAUSE, "1", 1.0),
        (TRAYS, "all", "all"),
        (TRAYS, " 3 ", 3),
        (TRAYS, 3, 3),
        (MODE, "fan", "fan"),
    ],
)
def test_text_and_values_of_a_file_are_read(setting, value, expected) -> None:
    assert setting.read(value, "x") == expected


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        (HEAT, "nan"), (HEAT, float("nan")), (HEAT, "inf"), (HEAT, 0), (HEAT, True), (HEAT, ""), (PAUSE, 0.9),
        (TRAYS, 2.0), (TRAYS, "9"), (TRAYS, True), (TRAYS, [1]), (MODE, 1), (RACKS, 3), (RACKS, -2), (NOTE, 3),
        (TRAYS, "9" * 5000),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(setting, value) -> None:
    with pytest.raises(BadRequest):
        setting.read(value, "x")


def test_a_refusal_names_source_value_remedy_and_the_nearest_word() -> None:
    with pytest.raises(BadRequest) as caught:
        MODE.read("gril", "flag --mode")
    assert caught.value.detail == 'flag --mode = \'gril\': use one of "fan", "grill"; did you mean grill?'
