"""The layout chosen for each number of workers, the reasons, and the errors."""

from __future__ import annotations

import pytest

from xditd.ipc import limits
from xditd.ipc.degrees import Degrees, parse_layout
from xditd.ipc.errors import Unsupported
from xditd.ipc.layout_choice import Workload, _splits, choose_layout, for_heads

TABLE = [
    # workers, asked, chosen
    (1, "auto", Degrees()),
    (2, "auto", Degrees(ulysses=2)),
    (3, "auto", Degrees(ulysses=3)),
    (4, "auto", Degrees(ulysses=4)),
    (5, "auto", Degrees(ring=5)),
    (6, "auto", Degrees(ulysses=6)),
    (7, "auto", Degrees(ring=7)),
    (8, "auto", Degrees(ulysses=8)),
    (10, "auto", Degrees(ulysses=2, ring=5)),
    (16, "auto", Degrees(ulysses=8, ring=2)),
    (2, "ring=2", Degrees(ring=2)),
    (2, "cfg=2", Degrees(cfg=2)),
    (4, "ring=2", Degrees(ulysses=2, ring=2)),
    (4, "ulysses=1", Degrees(ring=4)),
    (4, "cfg=2", Degrees(ulysses=2, cfg=2)),
    (8, "cfg=2,ring=2", Degrees(ulysses=2, ring=2, cfg=2)),
    (8, "ulysses=1,ring=8,cfg=1", Degrees(ring=8)),
    (10, "cfg=2", Degrees(ring=5, cfg=2)),
]


@pytest.mark.parametrize(("workers", "asked", "chosen"), TABLE, ids=[f"{row[0]} {row[1]}" for row in TABLE])
def test_what_each_number_of_workers_gets(workers: int, asked: str, chosen: Degrees) -> None:
    choice = choose_layout(workers, parse_layout(asked))
    assert choice.degrees == chosen
    assert chosen.world_size == workers
    for name, degree in parse_layout(asked).items():
        assert f"{name}={degree}" in choice.reason


@pytest.mark.parametrize("workers", [1, 2, 4, 6, 8])
def test_every_split_is_listed_once_and_all_but_the_chosen_one_with_a_reason(workers: int) -> None:
    choice = choose_layout(workers)
    splits = {
        (ulysses, ring, cfg)
        for cfg in (1, 2)
        for ring in range(1, workers + 1)
        for ulysses in range(1, workers + 1)
        if ulysses * ring * cfg == workers
    }
    listed = [tuple(candidate.degrees.named().values()) for candidate in choice.candidates]
    assert sorted(listed) == sorted(splits)
    assert [candidate.degrees for candidate in choice.candidates if not candidate.why_not] == [choice.degrees]


@pytest.mark.parametrize(
    ("workers", "asked", "workload", "words"),
    [
        (4, "ulysses=3", Workload(), "layout ulysses=3 with 4 workers: these degrees make 3; use --workers 3"),
        (4, "ulysses=2,ring=1", Workload(), "these degrees make 2; use --workers 2, or degrees that make 4"),
        (6, "cfg=3", Workload(), "cfg=3: a batch has at most two halves, prompt and negative prompt; use cfg=2"),
        (8, "auto", Workload(image_tokens=4), "512 text and 4 image tokens are too few to split over 8 workers"),
        (8, "ring=4", Workload(text_tokens=7), "7 text and 4096 image tokens are too few .* use at most 7"),
    ],
)
def test_what_cannot_work_is_refused_by_number(workers: int, asked: str, workload: Workload, words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        choose_layout(workers, parse_layout(asked), workload)


@pytest.mark.parametrize(
    ("workers", "asked", "workload", "reason"),
    [
        (
            4,
            "ulysses=4",
            Workload(heads=6),
            "ulysses=4 as asked; ulysses=4 does not divide the 6 attention heads (assumed), "
            "which run with ulysses=2,ring=2 instead",
        ),
        (
            5,
            "ulysses=5",
            Workload(),
            "ulysses=5 as asked; ulysses=5 does not divide the 24 attention heads (assumed), "
            "which run with ring=5 instead",
        ),
    ],
)
def test_degrees_that_do_not_divide_the_heads_are_a_preference(
    workers: int, asked: str, workload: Workload, reason: str
) -> None:
    choice = choose_layout(workers, parse_layout(asked), workload)
    assert choice.degrees == Degrees(**parse_layout(asked))
    assert choice.reason == reason


@pytest.mark.parametrize(
    ("preferred", "heads", "degrees"),
    [
        (Degrees(ulysses=4), 24, Degrees(ulysses=4)),
        (Degrees(ulysses=4), 30, Degrees(ulysses=2, ring=2)),
        (Degrees(ulysses=4), 38, Degrees(ulysses=2, ring=2)),
        (Degrees(ulysses=4), 40, Degrees(ulysses=4)),
        (Degrees(ulysses=4), 1, Degrees(ring=4)),
        (Degrees(ulysses=8), 30, Degrees(ulysses=2, ring=4)),
        (Degrees(ulysses=6), 40, Degrees(ulysses=2, ring=3)),
        (Degrees(ulysses=5), 40, Degrees(ulysses=5)),
        (Degrees(ulysses=2, ring=2), 24, Degrees(ulysses=2, ring=2)),
        (Degrees(ulysses=2, ring=2), 3, Degrees(ring=4)),
        (Degrees(ulysses=2, cfg=2), 3, Degrees(ring=2, cfg=2)),
        (Degrees(ulysses=2, ring=3), 3, Degrees(ulysses=3, ring=2)),
    ],
)
def test_a_model_gets_the_degrees_that_its_heads_allow(preferred: Degrees, heads: int, degrees: Degrees) -> None:
    assert for_heads(preferred, heads) == degrees
    assert degrees.world_size == preferred.world_size


def test_the_most_candidates_fit_a_message() -> None:
    assert max(len(list(_splits(workers))) for workers in range(1, 1025)) == 56
    assert limits.MAX_LAYOUT_CANDIDATES >= 56


def test_reasons_name_what_decides() -> None:
    reasons = {str(candidate.degrees): candidate.why_not for candidate in choose_layout(16).candidates}
    assert reasons["ulysses=16"] == (
        "ulysses=16 does not divide the 24 attention heads (assumed), which run with ulysses=8,ring=2 instead"
    )
    assert "more Ulysses is faster" in reasons["ulysses=4,ring=4"]
    assert "ask for it by name" in reasons["ulysses=8,cfg=2"]
    asked = {str(candidate.degrees): candidate.why_not for candidate in choose_layout(4, {"ring": 2}).candidates}
    assert asked["ulysses=4"] == "ring=2 was asked for"


@pytest.mark.parametrize(
    "text", ["", "two", "ulysses", "ulysses=0", "ulysses=-1", "ring=2,ring=2", "tensor=2", "cfg=2,"]
)
def test_text_that_names_no_layout(text: str) -> None:
    with pytest.raises(ValueError, match="layout"):
        parse_layout(text)


def test_degrees_are_spelled_as_they_are_read() -> None:
    degrees = Degrees(ulysses=2, ring=2, cfg=2)
    assert str(degrees) == "ulysses=2,ring=2,cfg=2"
    assert parse_layout(str(degrees)) == {"ulysses": 2, "ring": 2, "cfg": 2}
    assert parse_layout(" ulysses = 4 , cfg = 1") == {"ulysses": 4, "cfg": 1}
