"""A client of the fake daemon, and ways in which the daemon answers to Generate."""

import pytest

from xditd.client import Client
from xditd.ipc.replies import CancelNoted, Failed, Generated, Queued
from xditd.ipc.requests import Cancel, Generate


@pytest.fixture
def client(daemon, folder):
    def cancel(request):
        target = request.target_request_id
        return [
            CancelNoted(request_id=request.request_id),
            Failed(request_id=target, code="cancelled", detail="cancelled at step 1"),
        ]

    daemon.answers[Cancel] = cancel
    with Client(folder, deadline_s=5.0) as client:
        yield client


@pytest.fixture
def generates(daemon):
    """Make the daemon answer with latents filled with the seed, and a grey image."""
    from generated_jobs import step, write

    def answer(request):
        write(daemon, request.io, request.out_latents, float(request.sampling.seed or 0))
        if request.out_image is not None:
            write(daemon, request.io, request.out_image, 0.0)
        return [
            Queued(request_id=request.request_id, ahead=1, reason="another job runs"),
            *(step(request, number, request.sampling.steps) for number in range(1, request.sampling.steps + 1)),
            Generated(
                request_id=request.request_id,
                timings_ms={"denoise": 3.0},
                reused_steps=2 if request.sampling.step_cache_threshold else 0,
            ),
        ]

    daemon.answers[Generate] = answer


@pytest.fixture
def stalls(daemon):
    """Make the daemon send the first step and then nothing."""
    from generated_jobs import step

    daemon.answers[Generate] = lambda request: [step(request, 1, request.sampling.steps)]
