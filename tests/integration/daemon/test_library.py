"""The Python library with a real daemon that is killed and started again, and garbage-collected clients."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402

from xditd.client import Client  # noqa: E402
from xditd.ipc.errors import DaemonUnreachable, LeaseLost  # noqa: E402
from xditd.ipc.status import DaemonStatus, GroupState  # noqa: E402


def weights() -> dict[str, Any]:
    return {"double_blocks.0.img_mlp.0.weight": torch.ones(3, 4)}


def is_idle(status: DaemonStatus) -> bool:
    """Whether nothing is lent any more, and the workers have unmapped it."""
    return not status.components and status.group_state is GroupState.READY


def test_a_loan_of_a_daemon_that_was_killed(start_daemon: Any, wait_until: Any) -> None:
    """Without a daemon, the error says so; another daemon does not know the loan."""
    first = start_daemon()
    first.ready_client()
    with Client(first.runtime.path) as client:
        loan = client.lend(weights())
        first.process.send_signal(signal.SIGKILL)
        first.wait()
        wait_until(lambda: not loan.is_live)
        with pytest.raises(DaemonUnreachable) as caught:
            client.generate(loan, {"prompt_embeds": torch.zeros(1, 2, 4)}, height=32, width=32)
        assert caught.value.retryable
        start_daemon().ready_client()
        with pytest.raises(LeaseLost, match=f"its loan ended with daemon {first.process.pid}; lend it again"):
            client.generate(loan, {"prompt_embeds": torch.zeros(1, 2, 4)}, height=32, width=32)
        assert client.lend(weights()).is_live


def test_a_client_that_nobody_holds_any_more(shared_daemon: Any, client: Any) -> None:
    forgotten = Client(shared_daemon.runtime.path)
    forgotten.lend(weights())
    assert len(client.status().components) == 1
    with pytest.warns(ResourceWarning, match="its loans end now"):
        del forgotten
    client.wait_status(is_idle)


@pytest.mark.parametrize(
    ("end", "status"), [("", 0), ("del client", 0), ("sys.exit(3)", 3), ("raise KeyboardInterrupt", -signal.SIGINT)]
)
def test_a_program_that_ends_without_closing_does_not_hang(
    shared_daemon: Any, client: Any, tmp_path: Path, end: str, status: int
) -> None:
    save_file(weights(), tmp_path / "t.safetensors")
    program = f"""
import sys
from xditd.client import Client
client = Client({str(shared_daemon.runtime.path)!r})
loan = client.lend({str(tmp_path / "t.safetensors")!r})
{end}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert "Exception ignored" not in done.stderr
    assert done.returncode == status, done.stderr
    client.wait_status(is_idle)
