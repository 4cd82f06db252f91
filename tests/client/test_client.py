"""Loans: what is sent, which memory is kept alive, and how they end."""

import gc
import os
import threading
import time

import pytest

torch = pytest.importorskip("torch")

from xditd.client import Client, RowsOf, session  # noqa: E402
from xditd.client.connection import CONTROL_DEADLINE_S  # noqa: E402
from xditd.ipc.errors import (  # noqa: E402
    BadCheckpoint,
    BadRequest,
    Closed,
    DaemonUnreachable,
    DeadlineExceeded,
    LeaseLost,
    StaleSource,
)
from xditd.ipc.replies import Announced, Failed, Lent, MemoryChecked  # noqa: E402
from xditd.ipc.requests import Announce, Cancel, CheckMemory, Goodbye, Lend, ReturnLoan  # noqa: E402
from xditd.ipc.tensors import ComponentKind, Tier  # noqa: E402

TEXT = {"prompt_embeds": torch.zeros(1, 2, 8), "pooled_prompt_embeds": torch.zeros(1, 4)}


def transformer():
    return {"double_blocks.0.img_mlp.0.weight": torch.arange(12.0).reshape(3, 4)}


@pytest.fixture
def client(daemon, folder):
    with Client(folder, deadline_s=5.0) as client:
        yield client


def test_the_reply_of_a_lend_is_analysed_while_it_is_announced(daemon, client, monkeypatch):
    warmed = []
    daemon.answers[Announce] = lambda request: [Announced(request_id=request.request_id)]
    monkeypatch.setattr(session.reply_decoder, "warm_up", lambda *kinds: warmed.extend(kinds))
    client.prepare(transformer())
    assert warmed == [Lent]


def test_a_lend_does_not_wait_for_its_announcement(daemon, client):
    """It has a deadline of its own; a daemon that is busy answers late."""
    began = time.monotonic()
    loan = client.lend(transformer(), device="cpu", deadline_s=5.0)  # nothing answers an Announce here
    assert time.monotonic() - began < CONTROL_DEADLINE_S
    assert [type(each) for each in daemon.seen if isinstance(each, (Announce, Lend))] == [Announce, Lend]
    assert loan.is_live


def lose(client):
    """End the session as the daemon's exit does; integration/daemon has tests that kill the daemon."""
    connection = client._current().connection
    connection._io.close()
    assert connection.wait_lost(5.0)


def test_a_loan_has_tiers_bytes_and_copies(client, daemon):
    loan = client.lend(transformer(), label="tiny")
    sent = daemon.requests(Lend)[0]
    assert loan.kind is ComponentKind.TRANSFORMER
    assert (loan.component_id, loan.family, loan.label) == ("c1", "flux1", "tiny")
    assert loan.tiers == (Tier.HOST_SHM,)
    assert loan.lent_bytes == 48
    assert sent.copied.host_to_host == 48
    assert loan.timings_ms["total"] >= loan.timings_ms["describe"]


def test_the_memory_check_runs_once_a_session_before_the_first_loan(client, daemon):
    client.lend(transformer())
    client.lend(transformer())
    assert len(daemon.requests(CheckMemory)) == 1
    assert isinstance(next(each for each in daemon.seen if isinstance(each, (CheckMemory, Lend))), CheckMemory)


@pytest.mark.parametrize("digests", [(), (bytes(16), bytes(16))])
def test_a_worker_that_reads_other_memory_is_refused(client, daemon, digests):
    daemon.answers[CheckMemory] = lambda request: [MemoryChecked(request_id=request.request_id, digests=digests)]
    with pytest.raises(StaleSource, match=r"memory check: .*likely causes: .*pid namespaces"):
        client.lend(transformer())
    assert daemon.requests(Lend) == []


def test_the_kind_is_that_of_the_workers_facts(client, daemon):
    assert client.lend({"decoder.conv_in.weight": torch.zeros(2)}).kind is ComponentKind.VAE
    assert client.lend({"what.weight": torch.zeros(2)}, kind="vae").kind is ComponentKind.VAE
    assert [request.manifest.kind for request in daemon.requests(Lend)] == [None, ComponentKind.VAE]
    with pytest.raises(BadRequest, match="kind 'unet': unknown; choose one of transformer, vae"):
        client.lend(transformer(), kind="unet")


def test_a_returned_loan_cannot_be_used(client, daemon):
    with client.lend(transformer()) as loan:
        assert loan.is_live
    assert daemon.requests(ReturnLoan)[0].component_id == loan.component_id
    assert not loan.is_live
    with pytest.raises(LeaseLost, match="was returned; lend it again"):
        client.generate(loan, TEXT)
    loan.return_()
    assert len(daemon.requests(ReturnLoan)) == 1


def test_a_component_lent_twice_stays_alive_until_its_last_return(client, daemon, open_memfds, wait_until):
    daemon.answers[Lend] = lambda request: [daemon.lent(request, "same", is_reused=bool(daemon.requests(Lend)))]
    first, second = client.lend(transformer()), client.lend(transformer())
    assert (first.is_reused, second.is_reused) == (False, True)
    held = open_memfds()
    client.return_(second)  # the daemon counts loans as well, so each return is sent
    assert len(daemon.requests(ReturnLoan)) == 1
    assert open_memfds() == held
    client.return_(first)
    assert len(daemon.requests(ReturnLoan)) == 2
    wait_until(lambda: open_memfds() == held - 2)


def test_descriptors_of_a_late_lend_of_the_same_bytes_stay_open(client, daemon, open_memfds, wait_until):
    daemon.answers[Lend] = lambda request: [daemon.lent(request, "same")]
    loan = client.lend(transformer())
    held = open_memfds()
    del daemon.answers[Lend]
    with pytest.raises(DeadlineExceeded):
        client.lend(transformer(), deadline_s=0.1)
    daemon.send(daemon.lent(daemon.requests(Lend)[-1], "same", is_reused=True))
    daemon.wait_for(ReturnLoan)
    assert open_memfds() == held + 1
    loan.return_()
    wait_until(lambda: open_memfds() == held - 1)


def test_memory_is_freed_only_when_the_return_is_acknowledged(client, daemon, wait_until, open_memfds):
    before = open_memfds()
    loan = client.lend(transformer())
    held = open_memfds()
    assert held > before
    answer = daemon.answers.pop(ReturnLoan)
    with pytest.raises(DeadlineExceeded, match="return of state_dict"):
        loan.return_(deadline_s=0.1)
    assert open_memfds() == held
    daemon.send(answer(daemon.requests(ReturnLoan)[0])[0])
    wait_until(lambda: open_memfds() < held)


def test_a_refused_loan_frees_its_memory(client, daemon, wait_until, open_memfds):
    client.lend(transformer())  # the memory check's block stays
    before = open_memfds()
    daemon.answers[Lend] = lambda request: [
        Failed(request_id=request.request_id, code="bad_checkpoint", detail="missing tensors: img_in.weight")
    ]
    with pytest.raises(BadCheckpoint, match=r"missing tensors: img_in\.weight"):
        client.lend(transformer())
    wait_until(lambda: open_memfds() == before)


def test_a_lend_that_succeeds_too_late_is_returned(client, daemon, wait_until, open_memfds):
    client.lend(transformer())
    before = open_memfds()
    del daemon.answers[Lend]
    with pytest.raises(DeadlineExceeded, match="lending late"):
        client.lend(transformer(), label="late", deadline_s=0.1)
    late = daemon.requests(Lend)[-1]
    assert daemon.wait_for(Cancel).target_request_id == late.request_id
    daemon.send(daemon.lent(late, "c-late"))
    assert daemon.wait_for(ReturnLoan).component_id == "c-late"
    wait_until(lambda: open_memfds() == before)


def test_leaving_sends_goodbye_and_frees_everything(daemon, folder, open_memfds):
    gc.collect()
    before = open_memfds()
    with Client(folder) as client:
        client.lend(transformer())
    assert len(daemon.requests(Goodbye)) == 1
    assert open_memfds() == before
    with pytest.raises(Closed, match="this client is closed"):
        client.status()


def test_a_client_finds_the_next_daemon_but_not_the_old_loans(client, daemon):
    loan = client.lend(transformer())
    lose(client)
    with pytest.raises(LeaseLost, match=r"its loan ended with daemon \d+; lend it again"):
        client.call(loan, {"hidden_states": torch.zeros(1, 4, 64)})
    again = client.lend(transformer())
    assert again.is_live
    assert len(daemon.requests(CheckMemory)) == 2
    loan.return_()  # nothing to return, and no error


def test_threads_lend_in_parallel(client, daemon):
    loans = []
    threads = [threading.Thread(target=lambda: loans.append(client.lend(transformer()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert len({loan.component_id for loan in loans}) == 4
    assert len(daemon.requests(CheckMemory)) == 1


def test_client_finds_the_folder_by_the_variable(daemon, folder, monkeypatch):
    monkeypatch.setenv("XDITD_RUNTIME_DIR", str(folder))
    with Client() as client:
        assert client.daemon_pid == os.getpid()


def test_client_that_waits_too_long_names_the_reason(folder):
    began = time.monotonic()
    with pytest.raises(DaemonUnreachable, match="no such socket"):
        Client(folder, wait_s=0.3)
    assert time.monotonic() - began >= 0.3


@pytest.mark.parametrize("name", ["wait_s", "deadline_s"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "5"])
def test_client_refuses_an_invalid_wait_time(folder, name, value):
    with pytest.raises(BadRequest, match=f"{name}: {value!r} is not a number of seconds, 0 or more"):
        Client(folder, **{name: value})


def test_a_loan_whose_daemon_has_exited_raises_daemon_unreachable(client, daemon):
    loan = client.lend(transformer())
    lose(client)
    daemon.close()
    for use in (lambda: client.decode(loan, torch.zeros(1, 16, 4, 4)), loan.adopt, client.status):
        with pytest.raises(DaemonUnreachable, match="connection refused; the daemon that made it has exited"):
            use()
    loan.return_()  # nothing to return, and no error


def test_everything_of_a_closed_client_says_that_it_is_closed(daemon, folder):
    client = Client(folder)
    loan = client.lend(transformer())
    latents = torch.zeros(1, 16, 4, 4)
    job = client.generate(loan, TEXT, height=32, width=32, steps=2)
    client.close()
    client.close()
    uses = {
        "status": client.status,
        "logs": client.logs,
        "stop": client.stop,
        "daemon_pid": lambda: client.daemon_pid,
        "lend": lambda: client.lend(transformer()),
        "adopt": lambda: client.adopt("c1"),
        "revoke": lambda: client.revoke("c1"),
        "check_memory": client.check_memory,
        "generate": lambda: client.generate("c1", TEXT, height=32, width=32),
        "generate with a loan": lambda: client.generate(loan, TEXT, height=32, width=32),
        "call": lambda: client.call("c1", {"hidden_states": torch.zeros(1, 4, 64)}),
        "decode": lambda: client.decode("c2", latents),
        "encode": lambda: client.encode("c2", torch.zeros(1, 3, 32, 32)),
        "encode_text": lambda: client.encode_text("c3", [[1, 2]]),
        "loan.adopt": loan.adopt,
        "job.result": job.result,
        "with": lambda: client.__enter__().status(),
    }
    for name, use in uses.items():
        with pytest.raises(Closed, match="this client is closed") as caught:
            use()
        assert (name, caught.value.retryable) == (name, False)
    assert not loan.is_live
    loan.return_()  # nothing to return, and no error
    job.cancel()


def test_the_repr_of_a_client_is_one_line(daemon, folder):
    client = Client(folder)
    loan = client.lend(transformer(), label="tiny")
    job = client.generate(loan, TEXT, height=32, width=32, steps=2)
    assert repr(client) == f"<Client of {folder}, daemon {client.daemon_pid}>"
    assert repr(loan) == "<Loan tiny c1 flux1 host_shm 48 bytes, live>"
    assert repr(job) == f"<GenerationJob {job.request_id}, 2 steps, under way>"
    kept = client.keep(torch.zeros(1, 2, 4))
    assert repr(kept) == f"<KeptTensor {kept.kept_id} (1, 2, 4) float32 on cpu>"
    assert repr(RowsOf([(kept, 2)])) == f"<RowsOf {kept!r} x 2>"
    client.close()
    assert repr(client) == f"<Client of {folder}, closed>"
    assert repr(loan).endswith("ended>")


def test_a_path_to_lend_takes_a_tilde(client, daemon, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.setenv("HOME", str(tmp_path))
    save_file(transformer(), tmp_path / "t.safetensors")
    assert client.lend("~/t.safetensors").tiers == (Tier.FILE,)
    with pytest.raises(BadRequest, match=rf"{tmp_path}/no\.safetensors: no such file"):
        client.lend("~/no.safetensors")


def test_the_runtime_folder_takes_a_tilde(daemon, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    with Client(f"~/{folder.name}") as client:
        assert repr(client).startswith(f"<Client of {folder}, ")
