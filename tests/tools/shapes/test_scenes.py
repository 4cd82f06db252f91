"""What scenes may show, and what their sentences state."""

from __future__ import annotations

from itertools import combinations
from random import Random

import pytest
from shapes.scenes import COLOURS, FORMS, HELD_OUT, PAIRS, is_held_out
from shapes.words import LANGUAGES, sample_request


def test_combinations_held_out_leave_every_form_and_colour_in_training() -> None:
    assert len(PAIRS) + len(HELD_OUT) == len(FORMS) * len(COLOURS)
    assert 4 <= len(HELD_OUT) <= 10
    assert {form for form, _ in PAIRS} == set(FORMS)
    assert {colour for _, colour in PAIRS} == set(COLOURS)
    for position in (0, 1):
        held = [pair[position] for pair in HELD_OUT]
        assert len(held) == len(set(held)), "a form or colour loses more than one combination"


def test_training_never_sees_what_is_held_out_and_the_judge_always_does() -> None:
    rng = Random(1)
    for is_held in (False, True):
        for _ in range(400):
            things = sample_request(rng, held_out=is_held).scene.things
            assert any(is_held_out(each.form, each.colour) for each in things) == is_held


def test_things_lie_in_the_picture_apart_from_each_other_and_in_their_thirds() -> None:
    rng = Random(2)
    for _ in range(400):
        scene = sample_request(rng).scene
        for each in scene.things:
            assert each.r < each.x < 1 - each.r
            assert each.r < each.y < 1 - each.r
            assert each.cell == int(each.y * 3) * 3 + int(each.x * 3)
        for one, other in combinations(scene.things, 2):
            assert (one.x - other.x) ** 2 + (one.y - other.y) ** 2 > (one.r + other.r) ** 2
            assert (one.form, one.colour) != (other.form, other.colour)


@pytest.mark.parametrize("language", LANGUAGES)
def test_relations_that_a_sentence_states_hold_in_its_scene(language: str) -> None:
    rng = Random(3)
    seen = set()
    for _ in range(300):
        request = sample_request(rng, style="relations", objects=rng.choice((2, 3)), language=language)
        assert len(request.relations) == len(request.scene.things) - 1
        for at, relation, other in request.relations:
            seen.add(relation)
            one, two = request.scene.things[at], request.scene.things[other]
            across, down = two.x - one.x, two.y - one.y
            ahead = {"left": across, "right": -across, "above": down, "below": -down}[relation]
            assert ahead > 0.2
    assert seen == {"left", "right", "above", "below"}


def test_the_same_seed_gives_the_same_requests() -> None:
    one, other = ([sample_request(rng) for _ in range(20)] for rng in (Random(4), Random(4)))
    assert one == other


def test_sentences_name_the_things_of_their_scene() -> None:
    request = sample_request(Random(5), objects=1, language="en", style="places")
    thing = request.scene.things[0]
    assert thing.colour in request.text or thing.colour in {"cyan", "purple"}
    assert request.places == {0}
