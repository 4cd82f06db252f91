"""Flags of the programs: wrong ones are refused in one line, before the work begins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from shapes import card, judge, judged_lora, lora, original, packed, pictures, train

SHAPES = str(Path(__file__).parents[3] / "models" / "shapes")


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (judge.main, ["nowhere"], "'nowhere': has no model_index.json"),
        (judge.main, [SHAPES, "--sentences", "0"], "--sentences: '0': use a whole number from 1 on"),
        (judge.main, [SHAPES, "--batch", "0"], "--batch: '0': use"),
        (judge.main, [SHAPES, "--json", "/dev/null/x.json"], "x.json': cannot be written: "),
        (judge.main, [SHAPES, "--sheet", "sheet.foo"], "'sheet.foo': name a .png file"),
        (judge.main, [SHAPES, "--daemon", "--dtype", "bfloat16"], "a daemon has its own device"),
        (judge.main, [SHAPES, "--daemon", "--processes", "2"], "--processes: of diffusers alone"),
        (pictures.main, ["nowhere"], "'nowhere': has no model_index.json"),
        (packed.main, ["nowhere", "out"], "'nowhere': has no model_index.json"),
        (original.main, ["nowhere", "out"], "'nowhere': has no model_index.json"),
        (judged_lora.main, ["nowhere", "lora.safetensors"], "'nowhere': has no model_index.json"),
        (judged_lora.main, [SHAPES, "nowhere.safetensors"], "'nowhere.safetensors': name a .safetensors file that is"),
        (lora.main, [SHAPES, "/dev/null/lora.safetensors"], "lora.safetensors': cannot be written: "),
        (lora.main, [SHAPES, "lora.json"], "'lora.json': name a .safetensors file"),
        (lora.main, [SHAPES, "lora.safetensors", "--chunk", "0"], "--chunk: '0': use a whole number from 1 on"),
        (train.main, ["out", "--chunk", "0"], "--chunk: '0': use a whole number from 1 on"),
        (train.main, ["out", "--steps", "-1"], "--steps: '-1': use a whole number from 0 on"),
    ],
)
def test_a_wrong_flag_is_misuse(
    main: Callable[[list[str]], None], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as found:
        main(arguments)
    assert found.value.code == 2
    assert message in capsys.readouterr().err


def test_a_checked_output_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        judge.main([SHAPES, "--json", str(tmp_path / "judged.json"), "--batch", "0"])
    assert not list(tmp_path.iterdir())


def test_a_training_starts_from_no_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--start .*nowhere: has no weights"):
        train.main([str(tmp_path / "out"), "--start", str(tmp_path / "nowhere"), "--steps", "1"])


def test_a_training_whose_folders_cannot_be_made_does_not_begin(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"/dev/null: cannot be made: File exists"):
        train.main([str(tmp_path / "out"), "--start", SHAPES, "--steps", "1", "--state", "/dev/null"])


@pytest.mark.parametrize(("content", "message"), [("{", "cannot be read"), ("{}", "lacks 'device'"), ("[]", "a file")])
def test_a_card_of_wrong_files_is_not_written(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    (tmp_path / "README.md").write_text(f"{card.BEGIN}\n{card.END}\n")
    given = [str(tmp_path), "--runs", str(tmp_path / "run.json"), "--judged", str(tmp_path / "run.json")]
    with pytest.raises(SystemExit, match=message):
        card.main(given)
    assert (tmp_path / "README.md").read_text() == f"{card.BEGIN}\n{card.END}\n"
    with pytest.raises(SystemExit, match="cannot be read"):
        card.main([str(tmp_path), "--runs", json.dumps("nowhere"), "--judged", "nowhere"])
