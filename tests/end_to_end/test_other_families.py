"""A model family of an installed package, through a real daemon: lent, told of, called, generated with, refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from xditd.client import BadCheckpoint, BadRequest, UnknownFamily

PACKAGE = Path(__file__).parents[1] / "family_package"
SCALE = torch.tensor([0.5, -1.0, 2.0, 0.25])
SIGMAS = (1.0, 0.75, 0.5, 0.25)


@pytest.mark.slow
def test_a_family_of_another_package_is_served_as_our_own(start_daemon, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(PACKAGE))
    daemon = start_daemon(2)
    daemon.wait_ready()
    with daemon.connect() as client:
        loan = client.lend({"scale.weight": SCALE}, kind="transformer", label="scale")
        assert (loan.family, loan.facts.class_name, loan.facts.transformer.latents.channels) == ("scale", "Scale", 4)
        status = client.status()
        assert [(component.label, component.facts.family) for component in status.components] == [("scale", "scale")]
        assert [worker.loaded for worker in status.workers] == [1, 1]

        sample, prompt = torch.randn(2, 4, 3, 5), torch.randn(2, 4)
        (result,) = client.call(loan, {"sample": sample, "prompt": prompt})
        assert torch.equal(result, forward(sample, prompt))
        parts = [{"sample": sample[:1], "prompt": prompt[:1]}, {"sample": sample[1:, :, :2], "prompt": prompt[1:]}]
        for (found,), part in zip(client.call_parts(loan, parts), parts, strict=True):
            assert torch.equal(found, forward(**part))
        with pytest.raises(BadRequest, match=r"prompt: shape is \[1, 4\], use \[2, 4\]"):
            client.call(loan, {"sample": sample, "prompt": client.keep(prompt[:1])})

        noise = torch.randn(1, 4, 2, 3)
        given = {"prompt": prompt[:1]}
        job = client.generate(loan, given, height=16, width=24, noise=noise, sigmas=SIGMAS, previews=True)
        for (sigma, then), _ in zip(zip(SIGMAS, (*SIGMAS[1:], 0.0), strict=True), job, strict=True):
            noise = noise + (then - sigma) * forward(noise, prompt[:1])
        torch.testing.assert_close(job.result().latents, noise)

        with pytest.raises(BadCheckpoint, match=r"odd: checkpoint does not fit scale: .*1 unexpected: other\.weight"):
            client.lend({"scale.weight": SCALE, "other.weight": SCALE}, kind="transformer", label="odd")
        with pytest.raises(UnknownFamily, match=r"or a scale of the tests \(scale\.safetensors\)"):
            client.lend({"other.weight": SCALE}, kind="transformer")
        loan.return_()
        assert [worker.loaded for worker in client.status().workers] == [0, 0]
    daemon.stop()


def forward(sample: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    return sample * SCALE[:, None, None] + prompt[:, :, None, None]
