"""Chunks of training data: what is in them, and that the same number gives the same chunk, whoever makes it."""

from __future__ import annotations

import multiprocessing
import os
from itertools import islice
from random import Random

import torch
from shapes.chunks import chunks
from shapes.pool import Sentences
from shapes.scenes import BACKGROUNDS, COLOURS, FORMS, PATTERNS
from shapes.text_tokens import CLIP_TOKENS, T5_TOKENS, clip_tokenizer, t5_tokenizer, tokens
from shapes.words import sample_request

SEED, FIRST, SIZE = 5, 3, 40


def test_a_chunk_has_the_scenes_and_tokens_of_its_sentences() -> None:
    for number, (rows, clip, t5) in enumerate(islice(chunks(SEED, FIRST, SIZE, workers=0), 3)):
        rng = Random(f"{SEED} {FIRST + number}")
        requests = [sample_request(rng) for _ in range(SIZE)]
        for row, request in zip(rows, requests, strict=True):
            scene, things = request.scene, request.scene.things
            for at, thing in enumerate(things):
                named = (FORMS.index(thing.form), list(COLOURS).index(thing.colour))
                assert torch.equal(row[at], torch.tensor([*named, thing.x, thing.y, thing.r]))
            assert (row[len(things) : -1] == -1).all()
            behind = (PATTERNS.index(scene.pattern), list(BACKGROUNDS).index(scene.background))
            assert row[-1].tolist() == [*behind, -1, -1, -1]
        for found, tokenizer, length in ((clip, clip_tokenizer(), CLIP_TOKENS), (t5, t5_tokenizer(), T5_TOKENS)):
            texts = [each.text for each in requests]
            padded = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            assert found.dtype == torch.int32
            assert torch.equal(found.long(), padded.input_ids)


def test_processes_make_the_same_chunks_in_the_same_order() -> None:
    own, others = (islice(chunks(SEED, FIRST, SIZE, workers), 4) for workers in (0, 2))
    for one, other in zip(own, others, strict=True):
        assert all(torch.equal(mine, its) for mine, its in zip(one, other, strict=True))


def test_signals_to_the_trainings_group_leave_its_workers() -> None:
    made = chunks(SEED, FIRST, SIZE, workers=1)
    next(made)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    assert os.getpgid(worker.pid) == worker.pid
    made.close()  # type: ignore[attr-defined]
    worker.join(timeout=30)
    assert worker.exitcode == 0


def test_texts_that_are_too_long_end_as_the_tokenizers_end_them() -> None:
    texts = ["a red circle and " * 60, ""]
    for found, tokenizer, length in zip(
        tokens(texts), (clip_tokenizer(), t5_tokenizer()), (CLIP_TOKENS, T5_TOKENS), strict=True
    ):
        padded = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        assert torch.equal(found.long(), padded.input_ids)


def test_refreshing_replaces_the_oldest_chunk() -> None:
    pool = Sentences(torch.device("cpu"), seed=SEED, slots=2, size=SIZE, workers=0, first=FIRST)
    made = list(islice(chunks(SEED, FIRST, SIZE, workers=0), 3))
    # A chunk's place is its number's, so that a training that is continued has the pool that it had.
    places = [(FIRST + number) % 2 * SIZE for number in range(3)]
    for number in (0, 1):
        assert torch.equal(pool.t5[places[number] :][:SIZE], made[number][2])
    pool.refresh()
    assert torch.equal(pool.t5[places[2] :][:SIZE], made[2][2])
    assert torch.equal(pool.scenes[places[1] :][:SIZE], made[1][0])
    assert pool.waited_s > 0
