"""Conditioning is sent once: what crosses with the first use, with later ones, and after the workers lost it."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from xditd.client import BadRequest, Client, Conditioning, UnknownConditioning  # noqa: E402
from xditd.ipc import limits  # noqa: E402
from xditd.ipc.replies import Denoised, Failed  # noqa: E402
from xditd.ipc.requests import Denoise  # noqa: E402

EMBEDS, POOLED = torch.randn(1, 3, 8), torch.randn(1, 4)
LATENTS = torch.randn(2, 16, 4, 6)


@pytest.fixture
def client(daemon, folder):
    """Its workers keep what they are sent, by id, and answer with the latents as they are."""
    daemon.kept = {}

    def answer(request):
        for part in request.parts:
            if part.prompt_embeds is not None:
                sent = daemon.open_io(request.io, part.prompt_embeds).clone()
                if part.conditioning_id is not None:
                    daemon.kept[part.conditioning_id] = sent
            elif part.conditioning_id not in daemon.kept:
                return [Failed(request_id=request.request_id, code="unknown_conditioning", detail="not kept")]
        daemon.open_io(request.io, request.out).copy_(daemon.open_io(request.io, request.latents))
        return [Denoised(request_id=request.request_id, timings_ms={})]

    daemon.answers[Denoise] = answer
    with Client(folder) as connected:
        yield connected


def sent_tensors(request: Denoise) -> list[bool]:
    return [part.prompt_embeds is not None and part.pooled_prompt_embeds is not None for part in request.parts]


def test_tensors_cross_once_and_then_only_the_name(client, daemon):
    conditioning = client.condition(EMBEDS, POOLED, guidance=3.5)
    for _ in range(3):
        assert torch.equal(client.denoise("c1", LATENTS, 0.5, conditioning), LATENTS)
    requests = daemon.requests(Denoise)
    assert [sent_tensors(request) for request in requests] == [[True], [False], [False]]
    assert {part.conditioning_id for request in requests for part in request.parts} == {conditioning.conditioning_id}
    assert all((part.rows, part.guidance) == (2, 3.5) for request in requests for part in request.parts)
    assert torch.equal(daemon.kept[conditioning.conditioning_id], EMBEDS)


def test_what_the_workers_lost_is_sent_again_unasked(client, daemon):
    conditioning = client.condition(EMBEDS, POOLED)
    client.denoise("c1", LATENTS, 0.5, conditioning)
    daemon.kept.clear()
    assert torch.equal(client.denoise("c1", LATENTS, 0.5, conditioning), LATENTS)
    assert [sent_tensors(request) for request in daemon.requests(Denoise)] == [[True], [False], [True]]
    client.denoise("c1", LATENTS, 0.5, conditioning)
    assert sent_tensors(daemon.requests(Denoise)[-1]) == [False]


def test_it_is_sent_again_once_and_not_for_ever(client, daemon):
    daemon.answers[Denoise] = lambda request: [
        Failed(request_id=request.request_id, code="unknown_conditioning", detail="never kept")
    ]
    with pytest.raises(UnknownConditioning):
        client.denoise("c1", LATENTS, 0.5, client.condition(EMBEDS, POOLED))
    assert len(daemon.requests(Denoise)) == 2


def test_the_next_daemon_is_sent_the_tensors(client, daemon):
    conditioning = client.condition(EMBEDS, POOLED)
    client.denoise("c1", LATENTS, 0.5, conditioning)
    client._current().connection.close()
    daemon.kept.clear()
    client.denoise("c1", LATENTS, 0.5, conditioning)
    assert [sent_tensors(request) for request in daemon.requests(Denoise)] == [[True], [True]]


def test_several_share_the_batch_out_in_one_request(client, daemon):
    first, second = client.condition(EMBEDS, POOLED, 3.5), client.condition(EMBEDS[:, :2], POOLED, 1.0)
    client.denoise("c1", LATENTS, 0.5, first)
    client.denoise("c1", LATENTS.repeat(2, 1, 1, 1), 0.5, [first, second])
    request = daemon.requests(Denoise)[-1]
    assert sent_tensors(request) == [False, True]
    assert [(part.rows, part.guidance) for part in request.parts] == [(2, 3.5), (2, 1.0)]
    assert request.parts[0].conditioning_id != request.parts[1].conditioning_id


def test_another_guidance_needs_nothing_sent(client, daemon):
    conditioning = client.condition(EMBEDS, POOLED, 3.5)
    client.denoise("c1", LATENTS, 0.5, conditioning)
    client.denoise("c1", LATENTS, 0.5, conditioning.with_guidance(7.0))
    client.denoise("c1", LATENTS, 0.5, conditioning, guidance=1.5)
    requests = daemon.requests(Denoise)
    assert [sent_tensors(request) for request in requests] == [[True], [False], [False]]
    assert [request.parts[0].guidance for request in requests] == [3.5, 7.0, 1.5]


def test_it_is_a_copy(client, daemon):
    embeds = EMBEDS.clone()
    conditioning = client.condition(embeds, POOLED)
    embeds.zero_()
    client.denoise("c1", LATENTS, 0.5, conditioning)
    assert torch.equal(daemon.kept[conditioning.conditioning_id], EMBEDS)


def test_tensors_alone_cross_every_time_and_are_not_kept(client, daemon):
    for _ in range(2):
        client.denoise("c1", LATENTS, 0.5, EMBEDS, POOLED)
    assert [sent_tensors(request) for request in daemon.requests(Denoise)] == [[True], [True]]
    assert not daemon.kept


def test_what_is_too_large_to_be_kept_crosses_every_time(client, daemon, monkeypatch):
    monkeypatch.setattr(limits, "MAX_KEPT_CONDITIONING_BYTES", 100)
    conditioning = client.condition(EMBEDS, POOLED)
    assert conditioning.conditioning_id is None
    for _ in range(2):
        client.denoise("c1", LATENTS, 0.5, conditioning)
    assert [sent_tensors(request) for request in daemon.requests(Denoise)] == [[True], [True]]


@pytest.mark.parametrize(
    ("conditioning", "says"),
    [
        (lambda: EMBEDS, "conditioning: Tensor alone cannot be used"),
        (lambda: "c1", "conditioning: str alone cannot be used"),
        (lambda: [], "a batch of 2 cannot be shared out evenly among 0"),
        (lambda: [Conditioning(EMBEDS, POOLED)] * 3, "a batch of 2 cannot be shared out evenly among 3"),
        (lambda: Conditioning(EMBEDS.repeat(3, 1, 1), POOLED.repeat(3, 1)), "3 rows for 2 of the 2 latents"),
        (lambda: [Conditioning(EMBEDS.repeat(2, 1, 1), POOLED.repeat(2, 1))] * 2, "2 rows for 1 of the 2 latents"),
        (lambda: Conditioning(EMBEDS, POOLED.repeat(2, 1)), "pooled_prompt_embeds: batch 2, but prompt_embeds"),
        (lambda: Conditioning(EMBEDS, POOLED, -1.0), "guidance: -1.0 is not a number from 0 to 1000"),
    ],
)
def test_refuses(client, conditioning, says):
    with pytest.raises(BadRequest, match=says):
        client.denoise("c1", LATENTS, 0.5, conditioning())
