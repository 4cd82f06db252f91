"""Entry point of ``xditd``: find the verb, run it, turn its end into an exit code."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from xditd import __version__
from xditd.client.cli import (
    adopt,
    comfyui,
    demo,
    doctor,
    exits,
    flags,
    generate,
    install_service,
    logs,
    revoke,
    serve,
    status,
    stop,
    wait,
)
from xditd.client.cli.printing import finish, say_error, say_json_error, settle, stdout_loss
from xditd.ipc.command_line import Parser, unknown_variables
from xditd.ipc.errors import BadRequest, Cancelled, Internal, OutOfMemory, OutputFailed, XditdError
from xditd.ipc.inherited import reset_signals
from xditd.ipc.suggestions import did_you_mean

VERBS: dict[str, ModuleType] = {
    "serve": serve,
    "wait": wait,
    "status": status,
    "generate": generate,
    "demo": demo,
    "comfyui": comfyui,
    "logs": logs,
    "adopt": adopt,
    "revoke": revoke,
    "stop": stop,
    "install-service": install_service,
    "doctor": doctor,
}

_DESCRIPTION = "Lend model weights to warm multi-GPU xDiT workers, and get images back."

_EPILOG = f"""\
first steps:
  xditd demo --out out                 everything once, on small checkpoints made on the spot: out/demo.png
  xditd doctor                         GPUs, driver, limits, folders: what is wrong, and what to do about it
  xditd serve                          keep workers warm (or: systemctl --user enable --now xditd)
  xditd wait                           until the workers are ready
  xditd status                         workers, lent components, queue
  xditd comfyui install ~/ComfyUI      the nodes for ComfyUI
  xditd generate --help                images from checkpoint files: an example for each model family

`xditd VERB --help` explains each verb. Flags can be set by the environment variables named in brackets.

{exits.HELP}
"""


class _Parser(Parser):
    """Tells misuse to programs, too, if they asked for JSON."""

    as_json = False

    def error(self, message: str) -> NoReturn:
        """End with the usage, the message, and the status of misuse."""
        if self.as_json:
            say_json_error(BadRequest(message))
        super().error(message)


def build_parser(*, as_json: bool = False) -> argparse.ArgumentParser:
    """Build the parser with a subparser for each verb. ``as_json``: misuse is told on stdout, as JSON, as well."""
    parser = _Parser(
        prog="xditd",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.as_json = as_json
    parser.add_argument("--version", action="version", version=f"xditd {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        sub = verbs.add_parser(
            name,
            help=verb.SUMMARY,
            description=verb.DESCRIPTION,
            epilog=f"{verb.EXAMPLES}\n{exits.HELP}\n",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.as_json = as_json
        verb.add_arguments(sub)
        sub.set_defaults(run=verb.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code.

    Raises:
        SystemExit: after help, the version, or the message of a misuse.
    """
    if arguments is None:
        reset_signals()  # how daemons and probes end is told by SIGCHLD, which a parent may have had ignored
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["serve"]:
        return serve.replace_process(given[1:])  # the daemon knows its own flags, and its own help
    settle()
    for warning in unknown_variables(os.environ):
        say_error(f"xditd: warning: {warning}")
    as_json = "--json" in given or flags.is_on(flags.JSON_VARIABLE) is True
    left: SystemExit | None = None
    code = exits.DONE
    try:
        code = _run(_parse(given, as_json), as_json)
    except SystemExit as ended:
        left = ended
    lost = finish()
    if isinstance(lost, BrokenPipeError):
        return code or exits.READER_LEFT  # whoever read stdout (head, less) has seen enough
    if lost is not None:
        say_error(f"xditd: {OutputFailed.code}: standard output: {lost.strerror}")
        return code or exits.FAILED
    if left is not None:
        raise left
    return code


def _parse(given: list[str], as_json: bool) -> argparse.Namespace:
    parser = build_parser(as_json=as_json)
    if given and not given[0].startswith("-") and given[0] not in VERBS:
        listed = ", ".join(VERBS)
        parser.error(f"VERB: invalid choice: {given[0]!r} (choose from {listed}){did_you_mean(given[0], VERBS)}")
    return parser.parse_args(given)


def _run(parsed: argparse.Namespace, as_json: bool) -> int:
    """Run the verb, and tell how it ended if it failed."""
    try:
        return int(parsed.run(parsed))
    except XditdError as error:
        return _failed(parsed.verb, error, as_json)
    except KeyboardInterrupt:
        if as_json:
            say_json_error(Cancelled(f"{parsed.verb}: interrupted"))
        return exits.INTERRUPTED
    except MemoryError:
        return _failed(parsed.verb, OutOfMemory("this process: no memory left; try a smaller size"), as_json)
    except OSError as error:
        if stdout_loss() is not None:
            return exits.DONE  # but for its output: main() looks at that
        return _failed(parsed.verb, _defect(error), as_json)
    except Exception as error:  # noqa: BLE001 - the outermost loop: it tells and ends
        return _failed(parsed.verb, _defect(error), as_json)


def _failed(verb: str, error: XditdError, as_json: bool) -> int:
    say_error(f"xditd {verb}: {error.code}: {error.detail}")
    if as_json:
        say_json_error(error)
    return exits.code_for(error)


def _defect(error: Exception) -> Internal:
    """What nobody expected: where it happened goes to stderr, for the report."""
    say_error("".join(traceback.format_exception(error)).rstrip())
    return Internal(f"{type(error).__name__}: {error}; a defect of xditd; please report it with the lines above")
