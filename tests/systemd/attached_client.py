"""A user's program during the journey: it lends, starts a job that does not end, sees it end, and is served again.

    python attached_client.py RUNTIME_DIR [CHECKPOINT]

Without a checkpoint the workers are the fake group of the integration tests, whose jobs need no tensors.
Prints a line for each thing that happens, with the seconds since it started.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

from xditd.client.client import Client
from xditd.ipc.addresses import RuntimeDir
from xditd.ipc.errors import XditdError
from xditd.ipc.replies import Failed, StepDone
from xditd.ipc.status import GroupState

CONFTEST = Path(__file__).resolve().parent.parent / "integration" / "daemon" / "conftest.py"
STARTED_S = time.monotonic()


def say(text: str) -> None:
    print(f"{time.monotonic() - STARTED_S:6.2f} s  client: {text}", flush=True)


def load_helpers() -> ModuleType:
    """The raw client of the integration tests: a job of the fake workers needs no tensors."""
    spec = importlib.util.spec_from_file_location("daemon_conftest", CONFTEST)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def next_daemon(client: Client) -> int:
    """Ask until another daemon answers than the one at the start; its pid."""
    before, end_s = client.daemon_pid, time.monotonic() + 30
    while True:
        try:
            pid = client.status().pid
            if pid != before:
                return pid
        except XditdError as error:
            say(f"asks again after {error.code}")
            if time.monotonic() > end_s:
                raise
        time.sleep(0.1)  # what a polite program does between two tries


def run_real(runtime: RuntimeDir, checkpoint: str) -> None:
    """A FLUX.1 checkpoint on loan, and a job of a thousand steps."""
    import torch

    with Client(runtime.path) as client:
        client.check_memory()
        say(f"memory seen by every worker of daemon {client.daemon_pid}")
        loan = client.lend(checkpoint)
        say(f"has lent {loan.label}, {loan.lent_bytes} bytes")
        text = {"prompt_embeds": torch.zeros(1, 16, 4096), "pooled_prompt_embeds": torch.zeros(1, 768)}
        job = client.generate(loan, text, height=512, width=512, steps=1000, seed=1)
        events = iter(job)
        next(events)
        say("its job runs")
        try:
            job.result()
            say("its job ended as if nothing were")
        except XditdError as error:
            say(f"its job ended: {error.code}")
        say(f"served again, by daemon {next_daemon(client)}")


def main() -> int:
    runtime = RuntimeDir(Path(sys.argv[1]))
    if len(sys.argv) > 2:
        run_real(runtime, sys.argv[2])
        return 0
    helpers = load_helpers()
    client = helpers.RawClient(runtime)
    client.wait_status(lambda status: status.group_state is GroupState.READY)
    memory = helpers.Memory()
    with Client(runtime.path) as watcher:
        watcher.check_memory()
        say(f"memory seen by every worker of daemon {watcher.daemon_pid}")
        lent = client.lend(memory.manifest())
        say("has lent a component")
        running = client.send(memory.generate(lent.component_id, steps=1000))
        client.wait_event(running, StepDone)
        say("its job runs")
        reply = client.wait(running, 60)
        say(f"its job ended: {reply.code}" if isinstance(reply, Failed) else "its job ended as if nothing were")
        say(f"served again, by daemon {next_daemon(watcher)}")
    client.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
