"""Write the figures of ``shapes`` into its model card, from the files that training and the judge have written.

    PYTHONPATH=tools:.pkg python -m shapes.card models/shapes --runs out/words.json out/flow.json out/distilled.json \\
        --judged out/judged.json --repeated out/again.json --formats out/formats.json --lora out/outlines.json

``--runs`` are the ``report.json`` of the runs in their order. ``--judged`` and ``--formats`` are what
``shapes.judge --json`` has written, ``--repeated`` what it has of a training that was repeated from the seed,
``--lora`` what ``shapes.lora`` or ``shapes.judged_lora`` has. What is not given is not written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from shapes import train
from shapes.pages import replaced

BEGIN: Final = "<!-- figures of shapes: written by tools/shapes/card.py -->"
END: Final = "<!-- end of figures -->"
_GROUPS: Final = {
    "1 object": "1 object",
    "2 objects": "2 objects",
    "3 objects": "3 objects",
    "en": "English",
    "zh": "Chinese",
    "all": "all",
}
"""Heads of columns by the names of the judge's groups."""
_UNSAID: Final = {"out", "start", "device", "workers", "profile", "sentences", "folder", "state"}
"""Flags that have no influence on what is learned."""


def figures(
    runs: Sequence[Mapping[str, Any]],
    judged: Mapping[str, Any],
    *,
    repeated: Mapping[str, Any] | None = None,
    formats: Mapping[str, Any] | None = None,
    lora: Mapping[str, Any] | None = None,
) -> str:
    """Return the part of the card, in Markdown, from what the files hold."""
    parts = [_training(runs), _judge(runs, judged, repeated)]
    if formats:
        parts.append(_formats(formats))
    if lora:
        parts.append(_lora(lora))
    return "\n\n".join(parts)


def command(run: Mapping[str, Any]) -> str:
    """Return the command of a run, with the flags that change what is learned."""
    usual = {name: str(value) for name, value in vars(train.parse(["out/shapes"])).items()}
    given = run["arguments"]
    told = {name: value for name, value in given.items() if name not in _UNSAID and value != usual.get(name)}
    flags = [f"--{name.replace('_', '-')} {_short(value)}" for name, value in told.items()]
    start = ["--start out/shapes"] if given.get("start", "None") != "None" else []
    return " ".join(["python -m shapes.train out/shapes", *start, *flags])


def _short(value: str) -> str:
    return value.removesuffix(".0")


def _training(runs: Sequence[Mapping[str, Any]]) -> str:
    seconds = [run["seconds"] for run in runs if "seconds" in run]
    devices = ", ".join(dict.fromkeys(run["device"] for run in runs))
    rows = [
        (str(at), "; ".join(_learned(run)), f"{run['seconds'] / 60:.1f}" if "seconds" in run else "")
        for at, run in enumerate(runs, 1)
    ]
    whole = f", {sum(seconds) / 60:.0f} minutes in all" if len(seconds) == len(runs) else ""
    return "\n".join(
        [
            f"Trained on one {devices}{whole}:",
            "",
            _table(("run", "learned", "minutes"), rows),
            "",
            "```console",
            "$ export PYTHONPATH=tools:.pkg",
            *(f"$ {command(run)}" for run in runs),
            "```",
        ]
    )


def _learned(run: Mapping[str, Any]) -> Iterator[str]:
    if float(run["arguments"].get("vae_seconds", 0)) or int(run["arguments"].get("vae_steps", 0)):
        yield "the VAE"
    if "words" in run:
        yield f"text encoders, {run['words']['steps']:,} steps"
    if "flow" in run:
        yield f"transformer, {run['flow']['steps']:,} steps of rectified flow"
    if "distilled" in run:
        yield f"guidance, {run['distilled']['steps']:,} steps"


def _judge(runs: Sequence[Mapping[str, Any]], judged: Mapping[str, Any], repeated: Mapping[str, Any] | None) -> str:
    vae = max((run["vae"] for run in reversed(runs)), key=lambda found: found["of"])
    named: list[tuple[str, Mapping[str, Any]]] = [("these weights, in float32 on a CPU, 20 steps", judged["table"])]
    trained = runs[-1].get("distilled_table") or runs[-1].get("flow_table")
    if trained:
        named.append(("at the end of training", trained))
    if repeated:
        named.append(("those of a second training from the same seeds", repeated["table"]))
    groups = [group for group in _GROUPS if group in judged["table"]]
    rows = [(name, *(_percent(table.get(group)) for group in groups)) for name, table in named]
    count = judged["table"]["all"]["of"]
    return "\n".join(
        [
            f"The judge draws {count} sentences that training never saw, and reads the pictures back",
            "(`python -m shapes.judge models/shapes`). So many are right:",
            "",
            _table(("", *(_GROUPS[group] for group in groups)), rows),
            "",
            f"Of {vae['of']} drawn pictures that the VAE alone encodes and decodes, {vae['right']} are right.",
        ]
    )


def _formats(formats: Mapping[str, Any]) -> str:
    names = " ".join(name for name in formats if name != "diffusers")
    groups = [group for group in _GROUPS if "object" in group or group == "all"]
    rows = [
        (
            name,
            *(_percent(row["table"].get(group)) for group in groups),
            f"{row['same_reading_percent']:.1f} %",
            f"{row['relative_error']:.2g}",
        )
        for name, row in formats.items()
    ]
    return "\n".join(
        [
            "The judge also compares the formats in which people share FLUX.1, and paths of forwards. The workers of "
            f"xditd draw all rows but the first (`python -m shapes.judge models/shapes --formats {names}`):",
            "",
            _table(("transformer", *groups, "same reading as the first row", "error of pictures"), rows),
        ]
    )


def _lora(found: Mapping[str, Any]) -> str:
    rows = [
        (strength, str(row["objects"]), str(row["filled"]), str(row["outlines"])) for strength, row in found.items()
    ]
    return "\n".join(
        [
            "`loras/outlines.safetensors` draws outlines in place of filled forms (`python -m shapes.judged_lora`, in "
            "float32; rings, whose outlines fill them, are not counted):",
            "",
            _table(("strength", "objects", "right and filled", "right and outlines"), rows),
        ]
    )


def _percent(row: Mapping[str, Any] | None) -> str:
    return f"{row['percent']:.1f} %" if row else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(head), "|".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" if at != 1 else f"|{line}|" for at, line in enumerate(lines))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the figures of shapes into its model card.")
    parser.add_argument("folder", type=Path, help="the pipeline's folder, whose README.md is the card")
    parser.add_argument("--runs", type=Path, nargs="+", required=True, metavar="REPORT", help="report.json of each run")
    parser.add_argument("--judged", type=Path, required=True, help="what shapes.judge --json wrote")
    parser.add_argument("--repeated", type=Path, help="what shapes.judge --json wrote of a training that was repeated")
    parser.add_argument("--formats", type=Path, help="what shapes.judge --formats --json wrote")
    parser.add_argument("--lora", type=Path, help="the .json that shapes.lora or shapes.judged_lora wrote")
    given = parser.parse_args(arguments)
    more = {name: _read(path) for name in ("repeated", "formats", "lora") if (path := getattr(given, name))}
    runs, judged = [_read(path) for path in given.runs], _read(given.judged)
    try:
        content = figures(runs, judged, **more)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SystemExit(f"a file lacks {error}: is each what its flag names (--help)? nothing is written") from error
    card = given.folder / "README.md"
    card.write_text(replaced(card.read_text(encoding="utf-8"), card, BEGIN, END, content), encoding="utf-8")
    print(card)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: cannot be read: {error}; nothing is written") from error


if __name__ == "__main__":
    main()
