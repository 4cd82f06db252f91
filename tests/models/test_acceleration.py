"""Compiled blocks in daemons: chosen after a comparison with the eager forward, for one worker and for two."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from class_entries import ENTRIES
from class_entry import Random
from running_daemon import RunningDaemon

from xditd.client import Client, accelerate
from xditd.client.cli.main import main
from xditd.ipc.errors import BadRequest
from xditd.ipc.status import ForwardPath

pytestmark = [
    pytest.mark.long,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("as_many_threads_as_the_worker"),
]

FLUX = "FluxTransformer2DModel"
COMPILED = (FLUX, "WanTransformer3DModel")
MADE_WITHIN_S = 800.0
"""A compiler has a low priority: on a machine with other work it takes ten times as long as on a quiet one."""


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module", params=[1, 2])
def daemon(
    request: pytest.FixtureRequest, start_daemon: Callable[..., RunningDaemon], caches: Path
) -> Iterator[RunningDaemon]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(caches))
        started = start_daemon(request.param, flags=("--acceleration", "compiled"))
    started.wait_ready()
    yield started
    started.stop()


def paths(client: Client, class_name: str) -> list[ForwardPath]:
    return [each for each in client.status().forward_paths if each.class_name == class_name]


def check_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("key", COMPILED)
def test_blocks_are_compiled_and_stay_so_when_weights_are_swapped(daemon: RunningDaemon, key: str) -> None:
    entry = ENTRIES[key]
    modules = [entry.build(seed) for seed in (0, 1)]
    given = entry.arguments(Random(3))
    expected = [module(**given)[0] for module in modules]
    assert not torch.equal(*expected)
    with daemon.connect() as client, accelerate(modules[0], client=client):
        end = time.monotonic() + MADE_WITHIN_S
        while not (found := paths(client, key)) or not found[-1].path.startswith("compiled"):
            assert time.monotonic() < end, found
            check_close(modules[0](**given)[0], expected[0])
            time.sleep(0.5)
        assert found[-1].error is not None
        assert found[-1].error <= 1e-6
        check_close(modules[0](**given)[0], expected[0])
        with accelerate(modules[1], client=client):
            for _ in range(3):
                for module, right in zip(modules, expected, strict=True):
                    check_close(module(**given)[0], right)
        assert [each.path for each in paths(client, key)][-1] == "compiled"


@torch.no_grad()
def test_a_loan_can_be_eager(daemon: RunningDaemon) -> None:
    entry = ENTRIES["SD3Transformer2DModel"]
    module, given = entry.build(), entry.arguments(Random(3))
    expected = module(**given)[0]
    with daemon.connect() as client:
        with accelerate(module, client=client, acceleration="eager"):
            for _ in range(4):
                check_close(module(**given)[0], expected)
        assert not paths(client, "SD3Transformer2DModel")
        with pytest.raises(BadRequest, match="'eager'"):
            accelerate(module, client=client, acceleration="fast")  # type: ignore[arg-type]
        with pytest.raises(BadRequest, match="as_class"):
            client.lend({"weight": torch.zeros(2)}, acceleration="eager")


def test_the_status_has_a_table_of_paths(daemon: RunningDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    entry = ENTRIES[FLUX]
    module, given = entry.build(), entry.arguments(Random(3))
    with daemon.connect() as client, torch.no_grad(), accelerate(module, client=client):
        end = time.monotonic() + MADE_WITHIN_S
        while not paths(client, FLUX):
            assert time.monotonic() < end
            module(**given)
    assert main(["status", "--runtime-dir", str(daemon.runtime_dir)]) == 0
    assert "FORWARDS OF" in capsys.readouterr().out
