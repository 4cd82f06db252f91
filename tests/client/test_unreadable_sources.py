"""Sources of weights whose reads fail: the error is typed, names the source, and has the first one as its cause."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from xditd.client import BadCheckpoint, BadRequest, Client  # noqa: E402
from xditd.client.jobs.generation import draw_seed  # noqa: E402
from xditd.client.tensor_files import read_tensors  # noqa: E402

NAME = "double_blocks.0.img_mlp.0.weight"
UNREADABLE = Path("/proc/self/mem")
"""A regular file whose first bytes cannot be read (EIO), as on a broken disk or a network that is away."""


class Source(Mapping[str, Any]):
    """A state dict that reads its tensors when they are asked for."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = read
        self.reads = 0

    def __getitem__(self, name: str) -> Any:
        self.reads += 1
        return self._read()

    def __iter__(self) -> Iterator[str]:
        return iter([NAME])

    def __len__(self) -> int:
        return 1


def failing(error: Exception) -> Callable[[], Any]:
    def read() -> Any:
        raise error

    return read


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyError("gone"), EOFError("the end")])
def test_a_state_dict_that_cannot_read_a_tensor(
    daemon: Any, folder: Path, error: Exception, open_fds: Callable[[], int]
) -> None:
    class Module:
        def state_dict(self) -> Any:
            raise error

    with Client(folder) as client:
        client.check_memory()  # which keeps a block
        before = open_fds()
        for use in (client.lend, client.prepare, client.lend_lora):
            with pytest.raises(BadRequest, match=f"source of type Source: tensor {NAME} cannot be read") as raised:
                use(Source(failing(error)))
            assert raised.value.__cause__ is error
            with pytest.raises(BadRequest, match=r"source of type Module: its names cannot be read: .*the path of"):
                use(Module())
        assert open_fds() == before


def test_a_state_dict_that_reads_its_tensors_is_read_once(daemon: Any, folder: Path) -> None:
    source = Source(lambda: torch.full((3, 4), float(draw_seed() % 100)))
    with Client(folder) as client:
        client.lend(source)
    assert source.reads == 1


def test_a_file_that_cannot_be_read(daemon: Any, folder: Path, open_fds: Callable[[], int]) -> None:
    with Client(folder) as client:
        client.check_memory()  # which keeps a block
        before = open_fds()
        for use in (client.lend, client.prepare, client.lend_lora):
            with pytest.raises(
                BadCheckpoint, match=r"/proc/self/mem: it cannot be read: Input/output error; look"
            ) as no:
                use(UNREADABLE)
            cause: BaseException | None = no.value
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__
            assert cause is not None
        with pytest.raises(BadCheckpoint, match=r"/proc/self/mem: it cannot be read"):
            read_tensors(UNREADABLE)
        assert open_fds() == before
