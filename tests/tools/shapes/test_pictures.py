"""Pictures of README and the model card: right ones are written with their sentences, wrong ones are not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from shapes import pictures
from shapes.draw import draw, encode
from shapes.scenes import is_held_out

ROOT = Path(__file__).resolve().parents[3]


def drawn(texts: Sequence[str], _: int) -> torch.Tensor:
    """Draw what sentences ask for, without a model."""
    scenes = {each.text: each.scene for each in pictures.EXAMPLES.values()}
    return draw(encode([scenes[text] for text in texts]))


def test_right_pictures_are_written_with_their_sentences(tmp_path: Path) -> None:
    for page in pictures.PAGES:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text((ROOT / page).read_text(encoding="utf-8"), encoding="utf-8")
    images, wrong = pictures.draw_examples(drawn, 0)
    assert not wrong
    for _ in range(2):  # what is there is replaced
        written = pictures.write_pictures(tmp_path, images)
    assert len(written) == len(pictures.EXAMPLES) + len(pictures.PAGES)
    for page, to in zip(pictures.PAGES, ("docs/shapes", "../../docs/shapes"), strict=True):
        text = (tmp_path / page).read_text(encoding="utf-8")
        assert text.count(f"]({to}/circle.png)") == 1
        assert (tmp_path / page).parent.joinpath(to, "circle.png").is_file()
        assert all(text.count(each.text) == 2 for each in pictures.EXAMPLES.values())


def test_wrong_pictures_are_told() -> None:
    _, wrong = pictures.draw_examples(lambda texts, _: -torch.ones(len(texts), 3, 256, 256), 0)
    assert wrong.keys() == pictures.EXAMPLES.keys()
    assert "no green circle" in wrong["circle"]


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# xditd\n")
    with pytest.raises(ValueError, match=r"README\.md: no <!-- pictures"):
        pictures.write_pictures(tmp_path, {})


def test_each_sentence_is_the_scene_that_it_names() -> None:
    assert [each.language for each in pictures.EXAMPLES.values()].count("zh") == 1
    for request in list(pictures.EXAMPLES.values())[:2]:
        assert any(is_held_out(each.form, each.colour) for each in request.scene.things)
