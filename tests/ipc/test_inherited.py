"""Reset of inherited signals, streams and folders, in real child processes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from xditd.ipc.inherited import search_path

SIGNALS = """
import os, signal, sys
from xditd.ipc.inherited import reset_signals
reset_signals()
child = os.fork()
if child == 0:
    os._exit(7)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
blocked = sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
ignored = sorted(n.name for n in signal.valid_signals() if isinstance(n, signal.Signals)
                 and signal.getsignal(n) is signal.SIG_IGN)
print(status, blocked, *ignored)
"""

STREAMS = """
import os, socket, sys
from xditd.ipc.inherited import open_streams
open_streams()
print("to nobody")
print("to nobody", file=sys.stderr)
assert sys.stdin.read() == ""
with open(sys.argv[1], "w") as found, socket.socket() as another:
    print(min(found.fileno(), another.fileno()), *(os.readlink(f"/proc/self/fd/{n}") for n in range(3)), file=found)
"""


def test_signals_that_a_parent_blocked_or_ignored() -> None:
    def spoil() -> None:
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())

    done = subprocess.run(
        [sys.executable, "-c", SIGNALS], preexec_fn=spoil, capture_output=True, text=True, timeout=60, check=True
    )
    # SIGHUP is what nohup(1) has ignored; Python itself ignores the other two.
    assert done.stdout == "7 [] SIGHUP SIGPIPE SIGXFSZ\n"


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "2>&-", "<&- 2>&-"])
def test_streams_that_were_closed(tmp_path: Path, closed: str) -> None:
    word = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", STREAMS, str(tmp_path / "found")]
    done = subprocess.run(word, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=60, check=False)
    assert done.returncode == 0
    lowest, *streams = (tmp_path / "found").read_text().split()
    assert int(lowest) > 2
    assert streams == ["/dev/null"] * 3


def test_search_path() -> None:
    assert search_path(":/a:.:b/c:./", Path("/srv")) == "/a:/srv/b/c"
    assert search_path(":/a:.:b/c", None) == "/a"
    assert search_path("", Path("/srv")) == ""
