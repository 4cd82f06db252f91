"""Announced components: built by idle workers before they are lent; nothing depends on them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from xditd.ipc.outlines import Outline, OutlinedTensor
from xditd.ipc.replies import Announced, Generated
from xditd.ipc.requests import Announce
from xditd.ipc.tensors import ComponentKind

TENSORS = (OutlinedTensor("a.weight", "bfloat16", (2, 2)),)


def announcement(label: str, **more: Any) -> Announce:
    return Announce(request_id="", outline=Outline(**({"label": label, "tensors": TENSORS} | more)))


def announce(client: Any, label: str) -> None:
    client.ask(announcement(label), Announced)


def test_it_is_answered_while_workers_start_and_built_once_they_are_ready(start_daemon: Any, wait_until: Any) -> None:
    daemon = start_daemon(worker_flags=["--late-s", "1"])
    announce(daemon.client(), "early")
    assert "label=early" not in daemon.log
    daemon.ready_client()
    wait_until(lambda: "model built ahead of its lend label=early" in daemon.log)


def test_what_workers_refuse_harms_nothing(start_daemon: Any, memory: Any, wait_until: Any, fake: ModuleType) -> None:
    daemon = start_daemon()
    client = daemon.ready_client()
    announce(client, fake.REFUSED_LABEL)
    wait_until(lambda: f"model not built ahead label={fake.REFUSED_LABEL} code=bad_checkpoint" in daemon.log)
    lent = client.lend(memory.manifest())
    client.ask(memory.generate(lent.component_id), Generated)
    assert client.status().counters.group_starts == 1


def test_a_model_is_warmed_up_after_it_was_built(
    start_daemon: Any, memory: Any, wait_until: Any, fake: ModuleType
) -> None:
    daemon = start_daemon()
    client = daemon.ready_client()
    announce(client, fake.WARM_LABEL)
    wait_until(lambda: f"warmed up {fake.WARM_LABEL}" in daemon.log)
    lent = client.lend(memory.manifest())
    client.ask(memory.generate(lent.component_id), Generated)
    assert client.status().counters.group_starts == 1


def test_jobs_go_before_announcements(start_daemon: Any, memory: Any, wait_until: Any) -> None:
    daemon = start_daemon(worker_flags=["--step-s", "0.2"])
    client = daemon.ready_client()
    lent = client.lend(memory.manifest())
    client.send(memory.generate(lent.component_id))
    second = client.send(memory.generate(lent.component_id))
    announce(client, "later")
    client.wait(second)
    wait_until(lambda: "label=later" in daemon.log)
    assert daemon.log.index(f"request_id={second}") < daemon.log.index("model built ahead of its lend label=later")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tensors": ()}, "neither tensors nor a class"),
        ({"tensors": TENSORS * 2}, "listed twice"),
        ({"kind": ComponentKind.LORA}, "no model is built for the kind lora"),
    ],
)
def test_an_inconsistent_outline_is_refused(client: Any, more: dict[str, Any], message: str) -> None:
    failed = client.fail(announcement("x", **more))
    assert failed.code == "bad_request"
    assert message in failed.detail
