"""A program, not a test: two gloo ranks map lent files that change, and write the error of each.

    python watching_ranks.py OUT_FOLDER

The changes fall between two steps of a lend, or after it. The mtime is set back each time: the ctime alone tells.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch

CASES = ("opened", "read here and not there", "no room there", "used")
DEADLINE_S = 60.0


def overwrite(path: Path) -> None:
    """Write other bytes over the last ones, and set the mtime back."""
    old = path.stat()
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\1" * 64)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))


def run_rank(rank: int, ranks: int, folder: str, prepares: dict[str, bytes]) -> None:
    from xditd.gpu_workers.process import xfuser_start
    from xditd.ipc.codec import command_decoder
    from xditd.ipc.errors import OutOfMemory, XditdError

    torch.set_num_threads(1)
    layout = xfuser_start.start(rank, ranks, f"{folder}/store", torch.device("cpu"))
    from xditd.gpu_workers.models.components import Components
    from xditd.gpu_workers.models.own_buffer import OwnBuffer
    from xditd.gpu_workers.parallel.rank_sync import agree, raise_on_all_ranks

    components = Components(layout, "", ("",) * ranks)
    facts: dict[str, object] = {}

    def said(call: Callable[[], object]) -> str:
        try:
            call()
        except XditdError as error:
            return f"{error.code}: {error.detail}"
        return "fine"

    def prepare(case: str) -> Any:
        command = command_decoder.decode(prepares[case])
        return components.prepare(case, command.manifest, command.exporter)

    def note(case: str) -> None:
        facts[case] = said(lambda: prepare(case))
        facts[f"{case}: blocks left"] = len(components.blocks)

    def overwritten_once_opened() -> None:
        acquire = components.blocks.acquire

        def acquire_and_overwrite(*given: Any) -> Any:
            opened = acquire(*given)
            agree(True)
            if rank == 0:
                overwrite(Path(folder, "opened.safetensors"))
            agree(True)
            return opened

        components.blocks.acquire = acquire_and_overwrite
        note("opened")
        components.blocks.acquire = acquire

    def copied_on_the_first_rank_before(case: str, change: Callable[[], None]) -> None:
        """The first rank has read and checked the file, and waits for the other one to come as far."""
        copy = OwnBuffer.fill

        def copy_first(*given: Any) -> Generator[None, None, None]:
            yield from copy(*given)
            Path(folder, f"{case}.done").touch()

        def copy_last(*given: Any) -> Generator[None, None, None]:
            ends = time.monotonic() + DEADLINE_S
            while not Path(folder, f"{case}.done").exists():
                assert time.monotonic() < ends
                time.sleep(1e-3)  # between two looks
            change()
            yield from copy(*given)

        OwnBuffer.fill = copy_last if rank else copy_first
        note(case)
        OwnBuffer.fill = copy

    def fail() -> None:
        raise OutOfMemory("no room")

    def used() -> None:
        """As a job does: every rank asks for the component, and all go on together or not at all."""

        def get() -> None:
            with raise_on_all_ranks():
                components.get("used", "transformer")

        def change_and_get(change: Callable[[], None]) -> str:
            agree(True)
            if rank == 0:
                change()
            agree(True)
            return said(get)

        path = Path(folder, "used.safetensors")
        prepare("used")
        components.plug("used")
        facts["used"] = [
            said(get),
            change_and_get(lambda: path.chmod(0o400)),
            change_and_get(lambda: os.link(path, path.with_suffix(".link"))),
            change_and_get(lambda: path.chmod(0o600)),
            change_and_get(lambda: overwrite(path)),
            said(lambda: components.copy_component("used")),
        ]
        facts["used: digests"] = {
            name: [found.digest.hex() for found in digests] for name, digests in components.files.take_digests().items()
        }
        components.unmap("used")
        facts["used: blocks left"] = len(components.blocks)

    overwritten_once_opened()
    copied_on_the_first_rank_before(
        "read here and not there", lambda: overwrite(Path(folder, "read here and not there.safetensors"))
    )
    copied_on_the_first_rank_before("no room there", fail)
    used()
    components.close()
    Path(folder, f"rank{rank}.json").write_text(json.dumps(facts))
    xfuser_start.stop()


def main(folder: str) -> None:
    sys.path.append(str(Path(__file__).parents[1] / "support"))
    from forked_ranks import fork_ranks
    from safetensors.torch import save_file

    from xditd.client.demo import checkpoints
    from xditd.client.lending import describe
    from xditd.ipc.codec import encode
    from xditd.ipc.processes import identify
    from xditd.ipc.transports.tensor_views import VIEW_ALIGNMENT_BYTES
    from xditd.ipc.worker_messages import Prepare

    state = checkpoints.flux1_state_dict(1, double_blocks=1, single_blocks=1, context_dim=64, pooled_dim=32)
    offers, prepares = [], {}
    for case in CASES:
        path = Path(folder, f"{case}.safetensors")
        save_file(state, path, metadata={"padding": 16 * "x"})
        header_bytes = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert header_bytes % VIEW_ALIGNMENT_BYTES  # so that ranks copy all tensors, and do not view them
        offers.append(describe(path))  # it holds the file open, for the ranks to open it in turn
        prepares[case] = encode(
            Prepare(op_number=1, component_id=case, manifest=offers[-1].manifest, exporter=identify(os.getpid()))
        )
    fork_ranks(run_rank, 2, 2, folder, prepares)


if __name__ == "__main__":
    main(sys.argv[1])
