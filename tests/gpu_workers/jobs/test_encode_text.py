"""Text encoding jobs: what is written, and what is refused by place and value.

That the bits are those of transformers is in ``families/test_text_operations.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
import qwen2_5_vl_models
import torch
from text_checkpoints import clip_l_state_dict, t5_state_dict

from xditd.ipc.errors import BadRequest, NotFinite
from xditd.ipc.requests import EncodeText

if TYPE_CHECKING:
    from one_rank import OneRank, Room

VOCABULARY = 300
WIDTH = 128


def job(
    room: Room,
    ids: torch.Tensor,
    *,
    encoder_id: str = "clip",
    pooled: tuple[int, ...] | None = None,
    out: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    images: Mapping[str, torch.Tensor] | None = None,
) -> EncodeText:
    token_ids = room.input(ids)
    given = {name: room.input(each) for name, each in (images or {}).items()}
    places = {"out": room.output(*(out or (*ids.shape, WIDTH)), dtype=dtype)}
    if pooled is not None:
        places["out_pooled"] = room.output(*pooled)
    return EncodeText(
        request_id="r", encoder_id=encoder_id, token_ids=token_ids, images=given, io=room.block(), **places
    )


@pytest.fixture
def lent(rank: OneRank) -> OneRank:
    rank.lend("clip", clip_l_state_dict(3, vocabulary=VOCABULARY))
    rank.lend("t5", t5_state_dict(3, vocabulary=VOCABULARY))
    return rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hidden_and_pooled_states_are_written_in_the_dtype_that_was_asked_for(
    lent: OneRank, direct: ModuleType, dtype: torch.dtype
) -> None:
    ids = torch.arange(20).view(2, 10)
    room = lent.room()
    asked = job(room, ids, pooled=(2, WIDTH), dtype=dtype)
    lent.run(asked)
    hidden, pooled = direct.encode_text(lent.components.get("clip", "text_encoder").match.model, ids, pooled=True)
    assert asked.out_pooled is not None
    assert torch.equal(room.read(asked.out), hidden.to(dtype))
    assert torch.equal(room.read(asked.out_pooled), pooled)


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (
            torch.tensor([[1, 2, 300]]),
            r"token_ids\[0\]\[2\]: 300 is not in the vocabulary of clip_l, which has 300 tokens, from 0; use the token",
        ),
        (torch.tensor([[1], [-1]]), r"token_ids\[1\]\[0\]: -1 is not in the vocabulary"),
        (torch.zeros(1, 78, dtype=torch.int64), r"78 tokens, but clip_l takes up to 77; split the text into chunks"),
        (torch.zeros(1, 7), r"token_ids: dtype is torch\.float32, use torch\.int64"),
        (torch.zeros(7, dtype=torch.int64), r"token_ids are \[7\]: use \[batch, tokens\]"),
        (torch.zeros(1, 0, dtype=torch.int64), r"token_ids are \[1, 0\]"),
        (torch.zeros(65, 1, dtype=torch.int64), r"a batch up to 64"),
    ],
    ids=str,
)
def test_tokens_that_cannot_be_read_are_refused_by_place_and_value(lent: OneRank, ids: torch.Tensor, says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        lent.run(job(lent.room(), ids))


def test_places_of_another_shape_are_refused_before_the_work(lent: OneRank) -> None:
    ids = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(BadRequest, match=r"out: the place for it is \[2, 5, 64\], but the result will be"):
        lent.run(job(lent.room(), ids, out=(2, 5, 64)))
    with pytest.raises(BadRequest, match=r"out_pooled: the place for it is \[1, 128\], but the result will be"):
        lent.run(job(lent.room(), ids, pooled=(1, WIDTH)))


def test_t5_has_no_pooled_state_and_a_bound(lent: OneRank) -> None:
    with pytest.raises(BadRequest, match="pooled: t5 has no pooled state; take its hidden states, or ask a CLIP"):
        lent.run(job(lent.room(), torch.zeros(1, 4, dtype=torch.int64), encoder_id="t5", pooled=(1, WIDTH)))
    with pytest.raises(BadRequest, match="4097 tokens, but t5 takes up to 4096"):
        lent.run(job(lent.room(), torch.zeros(1, 4097, dtype=torch.int64), encoder_id="t5"))


def test_states_that_are_not_finite_name_the_encoder(rank: OneRank) -> None:
    broken = clip_l_state_dict(3, vocabulary=VOCABULARY)
    next(tensor for name, tensor in broken.items() if name.endswith("final_layer_norm.bias"))[0] = torch.nan
    rank.lend("clip", broken)
    with pytest.raises(NotFinite, match=r"text_encoder clip \(.*\): hidden states: some values are NaN or infinite"):
        rank.run(job(rank.room(), torch.zeros(1, 4, dtype=torch.int64)))


def test_images_are_checked_by_the_facts(rank: OneRank, direct: ModuleType) -> None:
    rank.lend("clip", clip_l_state_dict(3, vocabulary=VOCABULARY))
    rank.lend("vl", qwen2_5_vl_models.state_dict())
    ids = torch.full((1, 4), 151655)
    given = {"pixel_values": torch.ones(16, 1176), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    room = rank.room()
    asked = job(room, ids, encoder_id="vl", images=given)
    rank.run(asked)
    model = rank.components.get("vl", "text_encoder").match.model
    hidden, _ = model.operations.encode(model, ids, pooled=False, images=given)
    assert float((room.read(asked.out) - hidden).abs().max()) <= 1e-5
    endless = torch.ones(16, 1176)
    endless[3, 4] = torch.inf
    for change, says in (
        ({"pixels": torch.ones(1)}, "images: pixels cannot be given; it takes image_grid_thw, mm_token_type_ids, pix"),
        ({"pixel_values": None}, "images: pixel_values is missing"),
        ({"pixel_values": torch.ones(16, 588)}, r"images.pixel_values: shape is \[16, 588\], use \[any, 1176\]"),
        ({"pixel_values": endless}, "images.pixel_values: some values are not finite in float32"),
    ):
        changed = {name: each for name, each in {**given, **change}.items() if each is not None}
        with pytest.raises(BadRequest, match=says):
            rank.run(job(rank.room(), ids, encoder_id="vl", images=changed))
    with pytest.raises(BadRequest, match="images: clip_l takes texts alone"):
        rank.run(job(rank.room(), torch.zeros(1, 4, dtype=torch.int64), images=given))
