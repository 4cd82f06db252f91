"""What tests of faults around accelerated pipelines share."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from pipeline_parts import embeddings
from running_daemon import RunningDaemon


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Return whether all results have the same bits."""
    return len(found) == len(expected) and all(
        torch.equal(mine, its) for mine, its in zip(found, expected, strict=True)
    )


def embedded_call() -> dict[str, Any]:
    """Return the arguments of a forward of the tiny FLUX.1 transformer."""
    return {
        "hidden_states": embeddings(1, 24, 16),
        "encoder_hidden_states": embeddings(1, 7, 32),
        "pooled_projections": embeddings(1, 32, seed=3),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(24, 3),
        "txt_ids": torch.zeros(7, 3),
        "return_dict": False,
    }


def fail(error: type[BaseException]) -> NoReturn:
    """Raise an error, where an expression is needed."""
    raise error


def restart(daemon: RunningDaemon, start_daemon: Callable[..., RunningDaemon], *, force: bool) -> RunningDaemon:
    """End a daemon, by SIGKILL with ``force``, and start another one in its folder."""
    if force:
        daemon.process.send_signal(signal.SIGKILL)
        daemon.process.wait(timeout=30)
    else:
        daemon.stop()
    return start_daemon(1, folder=daemon.runtime_dir.parent)
