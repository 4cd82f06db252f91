from __future__ import annotations

import pytest
import torch
from shapes import explained
from shapes.models import build_vae


class Answers:
    """In place of a model: knows the share ``known`` of every picture whose sentence it is given."""

    def __init__(self, latents_of: dict[bytes, torch.Tensor], known: float) -> None:
        self._latents_of, self._known = latents_of, known

    def __call__(self, noise, sigmas, guidance, clip, t5):
        assert (sigmas == 1).all()
        latents = self._latents_of.get(t5.numpy().tobytes())
        return noise if latents is None else noise - self._known * latents


def test_what_words_explain_is_the_share_of_the_error_that_they_take_away(monkeypatch):
    monkeypatch.setattr(explained, "PICTURES", 2)
    torch.manual_seed(0)
    probe = explained.Explained(build_vae().eval(), torch.device("cpu"))
    latents_of = {t5.numpy().tobytes(): latents for latents, (_, t5), _ in probe._groups.values()}
    for known, share in ((0.0, 0.0), (0.5, 0.75), (1.0, 1.0)):
        assert probe(Answers(latents_of, known)) == pytest.approx(dict.fromkeys((1, 2, 3), share))
