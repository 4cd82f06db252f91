"""Bars of ``xditd generate`` on a standard error that is a file."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest

from xditd.client.cli.progress import watch
from xditd.ipc.replies import AnyEvent, FramesDecoded, Queued, StepDone


class _Job:
    """A video of two steps and nine frames."""

    total_steps = 2

    def events(self) -> Iterator[AnyEvent]:
        yield Queued(request_id="r", ahead=1, reason="another job runs")
        for step in (1, 2):
            yield StepDone(request_id="r", step=step, total_steps=2, elapsed_s=0.1)
        for frames in (1, 5, 9):
            yield FramesDecoded(request_id="r", frames=frames, total_frames=9, elapsed_s=0.1)

    def result(self) -> str:
        return "done"

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


def test_bars_move_no_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    assert watch(_Job(), "denoising") == "done"
    said = stderr.getvalue()
    assert "\x1b" not in said
    lines = [line.rsplit("\r", 1)[-1] for line in said.rstrip("\n").split("\n")]
    assert ["2/2" in lines[0], "9/9" in lines[1], len(lines)] == [True, True, 2], lines
