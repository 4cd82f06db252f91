"""Results: a short representation, and saving to files."""

import pytest

torch = pytest.importorskip("torch")

from xditd.client import GenerationResult, TextEncoding  # noqa: E402
from xditd.ipc.errors import BadRequest, OutputFailed  # noqa: E402


def result(image=True):
    latents = torch.zeros(1, 16, 2, 2, dtype=torch.bfloat16)
    return GenerationResult(latents, torch.zeros(1, 3, 16, 16) if image else None, {"denoise": 1.0}, 7)


def test_results_are_shown_in_one_line_without_values():
    assert repr(result()) == (
        "<GenerationResult image (1, 3, 16, 16) float32 on cpu, latents (1, 16, 2, 2) bfloat16 on cpu, seed 7>"
    )
    assert "no image" in repr(result(image=False))
    encoding = TextEncoding(torch.zeros(1, 77, 768), torch.zeros(1, 768))
    assert repr(encoding) == "<TextEncoding hidden_states (1, 77, 768) float32 on cpu, pooled (1, 768) float32 on cpu>"
    assert "not pooled" in repr(TextEncoding(torch.zeros(1, 77, 768), None))


def test_a_missing_image_is_an_error():
    with pytest.raises(BadRequest, match="index 1: the batch has 1 images"):
        result().to_pil(1)


def test_saving_can_be_repeated_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    made = result()
    with pytest.raises(BadRequest, match="has no suffix"):
        made.save(tmp_path / "out")
    with pytest.raises(OutputFailed, match="choose another place"):
        made.save("/sys/out.png")
    assert made.save("~/new/out.png") == tmp_path / "new" / "out.png"
    assert (tmp_path / "new" / "out.png").is_file()
