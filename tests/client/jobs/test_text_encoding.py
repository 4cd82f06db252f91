"""``Client.encode_text``: what is sent, what it returns, and what is refused before it is sent."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from xditd.client import BadRequest, Client, ComponentKind  # noqa: E402
from xditd.client.jobs.text_checks import check_images, check_token_ids  # noqa: E402
from xditd.ipc.facts import ArgumentFacts, TextEncoderFacts  # noqa: E402
from xditd.ipc.replies import TextEncoded  # noqa: E402
from xditd.ipc.requests import EncodeText  # noqa: E402

CLIP = {
    "text_model.embeddings.token_embedding.weight": torch.zeros(9, 6),
    "text_model.encoder.layers.0.layer_norm1.weight": torch.zeros(6),
}


@pytest.fixture
def client(daemon, folder):
    """Its workers answer with the token ids in every column, and minus one as the pooled state."""

    def answer(request):
        ids = daemon.open_io(request.io, request.token_ids)
        daemon.open_io(request.io, request.out).copy_(ids[..., None].float().expand(request.out.shape))
        if request.out_pooled is not None:
            daemon.open_io(request.io, request.out_pooled).fill_(-1.0)
        return [TextEncoded(request_id=request.request_id, timings_ms={})]

    daemon.answers[EncodeText] = answer
    with Client(folder) as connected:
        yield connected


def test_the_states_have_the_width_of_the_lent_encoder(client, daemon):
    loan = client.lend(CLIP)
    assert (loan.kind, loan.facts.text_encoder.width) == (ComponentKind.TEXT_ENCODER, 6)
    encoding = client.encode_text(loan, [[1, 2, 3], [4, 5, 6]], pooled=True)
    assert encoding.hidden_states.shape == (2, 3, 6)
    assert encoding.hidden_states.dtype == torch.float32
    assert encoding.hidden_states[..., 5].tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert encoding.pooled.tolist() == [[-1.0] * 6] * 2
    request = daemon.requests(EncodeText)[0]
    assert (request.encoder_id, request.token_ids.dtype, request.out.dtype) == (loan.component_id, "int64", "float32")


def test_pooled_is_returned_only_if_requested(client):
    assert client.encode_text(client.lend(CLIP), torch.ones(1, 2, dtype=torch.int32)).pooled is None


def test_the_facts_of_an_encoder_id_are_requested(client):
    assert client.encode_text("c3", [[1]]).hidden_states.shape == (1, 1, 6)


def test_a_component_of_another_kind_is_refused(client):
    vae = client.lend({"decoder.conv_in.weight": torch.zeros(2)})
    with pytest.raises(BadRequest, match="is a vae; name a text_encoder"):
        client.encode_text(vae, [[1]])


@pytest.mark.parametrize(
    ("token_ids", "says"),
    [
        ([[1, 2], [3]], r"rows of 1, 2 tokens; pad them"),
        ([["a"]], "rows of whole numbers are needed"),
        ([[2**70]], "rows of whole numbers are needed"),
        ([[0.5]], "dtype float32 cannot be used"),
        ([1, 2], r"shape \(2,\) instead of \(batch, tokens\)"),
        ([], "cannot be used|instead of"),
        (torch.zeros(1, 0, dtype=torch.int64), r"shape \(1, 0\) instead of"),
        (torch.zeros(65, 1, dtype=torch.int64), r"shape \(65, 1\), at most \(64, 4096\)"),
        (torch.zeros(1, 4097, dtype=torch.int64), r"shape \(1, 4097\), at most"),
        (torch.zeros(1, 4, dtype=torch.bool), "dtype bool cannot be used"),
    ],
)
def test_bad_token_ids_are_refused(token_ids, says):
    with pytest.raises(BadRequest, match=says):
        check_token_ids(token_ids)


IMAGES = TextEncoderFacts(
    width=6,
    max_tokens=77,
    has_pooled=False,
    layers=2,
    images=(
        ArgumentFacts(name="pixels", shape=("patches", 12)),
        ArgumentFacts(name="sizes", shape=("images", 3)),
        ArgumentFacts(name="types", shape=("images",), is_needed=False),
    ),
)


def test_images_are_those_of_the_facts():
    given = {"pixels": torch.ones(4, 12, dtype=torch.bfloat16), "sizes": torch.ones(2, 3, dtype=torch.int32)}
    found = check_images({**given, "types": None}, IMAGES)
    assert list(found) == ["pixels", "sizes"]
    assert (found["pixels"].dtype, found["sizes"].dtype) == (torch.bfloat16, torch.int64)
    assert check_images({}, TextEncoderFacts(width=6, max_tokens=77, has_pooled=False)) == {}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"grid": torch.ones(1)}, r"images: grid is not known here; this encoder takes pixels \(patches, 12\), sizes"),
        ({"sizes": None}, r"images: lacks sizes; this encoder takes"),
        ({"pixels": [1.0]}, r"images\.pixels: a torch tensor \(patches, 12\) is needed, not list"),
        ({"pixels": torch.ones(4, 12) > 0}, r"images\.pixels: dtype bool cannot be used"),
        ({"pixels": torch.ones(4, 11)}, r"images\.pixels: shape \(4, 11\) instead of \(patches, 12\)"),
        ({"pixels": torch.ones(0, 12)}, r"images\.pixels: shape \(0, 12\) instead of"),
        ({"types": torch.ones(3)}, r"images\.types: images 3, but images\.sizes has images 2"),
    ],
)
def test_bad_images_are_refused(change, says):
    given = {"pixels": torch.ones(4, 12), "sizes": torch.ones(2, 3, dtype=torch.int64)}
    with pytest.raises(BadRequest, match=says):
        check_images({**given, **change}, IMAGES)


def test_images_of_an_encoder_of_texts_are_refused(client):
    with pytest.raises(BadRequest, match="images: this encoder takes texts alone"):
        client.encode_text(client.lend(CLIP), [[1, 2]], images={"pixels": torch.ones(1, 12)})
