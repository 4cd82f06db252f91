"""The command line that the daemon starts a worker group with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from xditd.ipc.addresses import RuntimeDir
from xditd.ipc.command_line import Parser
from xditd.ipc.degrees import parse_layout
from xditd.ipc.errors import BadRequest
from xditd.ipc.settings.daemon import WORKER_OPTIONS, WorkerOptions


class Options(WorkerOptions, frozen=True, kw_only=True):
    """The options of the workers, the daemon's folder and the group's token."""

    runtime_dir: RuntimeDir
    group_token: str

    @property
    def degrees(self) -> Mapping[str, int]:
        """The degrees that the option ``layout`` names."""
        return parse_layout(self.layout)


def parse(arguments: Sequence[str]) -> Options:
    """Parse the command line; misuse exits with status 2."""
    parser = Parser(
        prog="python -m xditd.gpu_workers",
        description="Run a group of xDiT workers, one process for each GPU.",
        allow_abbrev=False,
    )
    parser.add_argument("--runtime-dir", type=Path, required=True, help="the daemon's private folder")
    parser.add_argument("--group-token", required=True, help="proves that reports belong to this group")
    for option in WORKER_OPTIONS:
        parser.add_argument(
            option.flag, metavar=option.metavar, help=f"{option.help} (default: {option.shown_default})"
        )
    given = vars(parser.parse_args(arguments))
    try:
        read = {
            option.name: option.read(given[option.name], f"flag {option.flag}")
            for option in WORKER_OPTIONS
            if given[option.name] is not None
        }
    except BadRequest as error:
        parser.error(error.detail)
    return Options(runtime_dir=RuntimeDir(given["runtime_dir"]), group_token=given["group_token"], **read)
