"""Pictures that were drawn are read back as what they show; pictures of something else are not."""

from __future__ import annotations

from random import Random

import pytest
import torch
from shapes.draw import OUTLINE, draw, encode
from shapes.judge import faults, held_out_requests, judge, table
from shapes.reading import read
from shapes.scenes import FORMS
from shapes.words import Request, sample_request


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    rng = Random(1)
    return [sample_request(rng, held_out=at % 2 == 0) for at in range(40)]


@pytest.fixture(scope="module")
def pictures(requests: list[Request]) -> torch.Tensor:
    return draw(encode([each.scene for each in requests]))


def test_drawn_pictures_are_right(requests: list[Request], pictures: torch.Tensor) -> None:
    found = {request.text: faults(request, read(image)) for request, image in zip(requests, pictures, strict=True)}
    assert not {text: each for text, each in found.items() if each}


def test_noise_is_no_fault(requests: list[Request], pictures: torch.Tensor) -> None:
    noise = torch.randn(pictures[:12].shape, generator=torch.Generator().manual_seed(1))
    noisy = (pictures[:12] + 0.05 * noise).clamp(-1, 1)
    assert all(not faults(request, read(image)) for request, image in zip(requests[:12], noisy, strict=True))


def test_pictures_of_other_scenes_are_wrong(requests: list[Request], pictures: torch.Tensor) -> None:
    assert all(faults(request, read(image)) for request, image in zip(requests[1:13], pictures[:12], strict=True))


def test_an_empty_picture_has_no_objects() -> None:
    reading = read(torch.ones(3, 256, 256))
    assert reading.things == ()
    assert (reading.pattern, reading.background) == ("plain", "white")


def test_a_speck_beside_an_object_is_an_object_without_a_form() -> None:
    request = sample_request(Random(1), objects=1, style="names")
    (image,) = draw(encode([request.scene]))
    assert not faults(request, read(image))
    image[:, 2:8, 2:8] = -0.9
    assert faults(request, read(image)) == ["also black something"]


def test_outlines_are_read_as_outlines_and_wide_forms_not_as_filled() -> None:
    rng = Random(3)
    requests = [sample_request(rng, objects=1) for _ in range(16)]
    outlined = draw(encode([each.scene for each in requests]), outline=OUTLINE)
    wide = 0
    for request, image in zip(requests, outlined, strict=True):
        (thing,), (found,), (filled,) = request.scene.things, read(image, outline=OUTLINE).things, read(image).things
        assert (found.form, found.colour) == (thing.form, thing.colour)
        if thing.form in {"circle", "square", "triangle", "heart"}:
            wide += 1
            assert filled.form != thing.form
    assert wide > 3


def test_sentences_of_the_judge_are_of_all_forms_and_both_languages() -> None:
    requests = held_out_requests()
    assert len(requests) == 200
    assert {len(each.scene.things) for each in requests} == {1, 2, 3}
    assert {thing.form for each in requests for thing in each.scene.things} == set(FORMS)
    assert [each.language for each in requests].count("zh") == 100


def test_the_table_counts_by_objects_and_language() -> None:
    requests = held_out_requests(10)
    scenes = {each.text: each.scene for each in requests}
    images, found = judge(lambda texts, _: draw(encode([scenes[text] for text in texts])), requests, batch=4)
    assert images.shape == (10, 3, 256, 256)
    found[0] = ["no red circle"]
    rows = table(requests, found)
    assert rows["all"] == {"right": 9, "of": 10, "percent": 90.0}
    assert rows["1 object"]["of"] == 4
