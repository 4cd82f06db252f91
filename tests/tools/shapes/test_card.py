"""The model card has the figures that training and the judge wrote, and commands that can be run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from shapes import card, train

ROOT = Path(__file__).resolve().parents[3]


def table(percent: float) -> dict[str, Any]:
    return {group: {"right": 1, "of": 200, "percent": percent} for group in ("1 object", "2 objects", "en", "all")}


def run(flags: str, **found: Any) -> dict[str, Any]:
    given = train.parse(["/tmp/somewhere", *shlex.split(flags)])
    arguments = {name: str(value) for name, value in vars(given).items()}
    vae = {"right": 63, "of": 64}
    return {"arguments": arguments, "device": "NVIDIA H200", "seconds": 540.0, "vae": vae, **found}


RUNS = [
    run(
        "--vae-seconds 150 --text-seconds 60 --seconds 0 --distill-seconds 0 --workers 12 --sentences 64",
        words={"steps": 6600},
    ),
    run(
        "--start /tmp/somewhere --seed 2 --vae-seconds 0 --text-seconds 0 --seconds 300.5 --rate 8e-4",
        flow={"steps": 8000},
        flow_table=table(91.0),
        distilled={"steps": 2000},
        distilled_table=table(92.5),
    ),
]


def test_commands_have_the_flags_that_matter_and_can_be_run() -> None:
    first, second = map(card.command, RUNS)
    assert first == (
        "python -m shapes.train out/shapes --vae-seconds 150 --text-seconds 60 --seconds 0 --distill-seconds 0"
    )
    assert second.startswith("python -m shapes.train out/shapes --start out/shapes --seed 2 ")
    again = train.parse(shlex.split(second)[3:])
    assert (again.seconds, again.rate, again.seed, again.vae_seconds) == (300.5, 8e-4, 2, 0)


def test_a_card_gets_what_the_files_hold(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text((ROOT / "models" / "shapes" / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    formats = {"fp8": {"table": table(94.5), "same_reading_percent": 99.0, "relative_error": 0.0123}}
    files = {
        "first": RUNS[0],
        "second": RUNS[1],
        "judged": {"table": table(93.5)},
        "again": {"table": table(90.5)},
        "formats": formats,
        "lora": {"0.5": {"objects": 64, "filled": 31, "outlines": 29}},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    first, second, judged, again, packed, lora = (str(tmp_path / f"{name}.json") for name in files)
    arguments = [str(tmp_path), "--runs", first, second, "--judged", judged]
    card.main([*arguments, "--repeated", again, "--formats", packed, "--lora", lora])
    text = page.read_text(encoding="utf-8")
    for part in (
        "Trained on one NVIDIA H200, 18 minutes in all:",
        "| 1 | the VAE; text encoders, 6,600 steps | 9.0 |",
        "| 2 | transformer, 8,000 steps of rectified flow; guidance, 2,000 steps | 9.0 |",
        "$ export PYTHONPATH=tools:.pkg\n$ python -m shapes.train out/shapes ",
        "|  | 1 object | 2 objects | English | all |",
        "| these weights, in float32 on a CPU, 20 steps | 93.5 % |",
        "| at the end of training | 92.5 % |",
        "| those of a second training from the same seeds | 90.5 % |",
        "but the first (`python -m shapes.judge models/shapes --formats fp8`):",
        "| fp8 | 94.5 % | 94.5 % |  | 94.5 % | 99.0 % | 0.012 |",
        "| 0.5 | 64 | 31 | 29 |",
        "Of 64 drawn pictures that the VAE alone encodes and decodes, 63 are right.",
    ):
        assert part in text
    card.main(arguments)
    shorter = page.read_text(encoding="utf-8")
    assert "fp8" not in shorter[shorter.index(card.BEGIN) : shorter.index(card.END)]
    assert shorter.count(card.BEGIN) == 1


def test_a_card_without_marks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# shapes")
    (tmp_path / "a.json").write_text(json.dumps(RUNS[1] | {"table": table(90.0)}))
    with pytest.raises(ValueError, match=r"README\.md: no <!-- figures"):
        card.main([str(tmp_path), "--runs", str(tmp_path / "a.json"), "--judged", str(tmp_path / "a.json")])
