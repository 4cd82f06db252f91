"""Entry point of ``xditd``: parse the command line, run the verb, return the exit code."""

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
    cluster,
    comfyui,
    completion,
    demo,
    doctor,
    exits,
    flags,
    generate,
    install_service,
    logs,
    models,
    revoke,
    serve,
    status,
    stop,
    top,
    wait,
)
from xditd.client.cli.printing import flush_streams, prepare_streams, print_error, print_json_error, stdout_error
from xditd.ipc.command_line import Parser, unknown_variables
from xditd.ipc.errors import BadRequest, Cancelled, Internal, OutOfMemory, OutputFailed, XditdError
from xditd.ipc.inherited import reset_signals
from xditd.ipc.suggestions import did_you_mean

VERBS: dict[str, ModuleType] = {
    "serve": serve,
    "wait": wait,
    "status": status,
    "top": top,
    "generate": generate,
    "models": models,
    "demo": demo,
    "comfyui": comfyui,
    "cluster": cluster,
    "logs": logs,
    "adopt": adopt,
    "revoke": revoke,
    "stop": stop,
    "install-service": install_service,
    "doctor": doctor,
    "completion": completion,
}

_DESCRIPTION = "Lend model weights to warm multi-GPU xDiT workers, and generate images with them."

_EPILOG = f"""\
first steps:
  xditd demo --out out                 everything once, on a small model: out/demo.png
  xditd doctor                         check GPUs, driver, limits and folders, with remedies
  xditd serve                          keep workers warm (or: systemctl --user enable --now xditd)
  xditd wait                           until the workers are ready
  xditd status                         workers, lent components, queue
  xditd top                            GPUs, jobs and rates, again and again
  xditd models add flux ...            give a model's files a name
  xditd comfyui install ~/ComfyUI      the nodes for ComfyUI
  xditd generate --help                images from checkpoint files: an example for each model family

`xditd VERB --help` explains each verb. Flags can be set by the environment variables named in brackets.

{exits.HELP}
"""


class _Parser(Parser):
    """Also prints usage errors as JSON, if JSON was requested."""

    as_json = False

    def error(self, message: str) -> NoReturn:
        """Print the message, and exit with status 2."""
        if self.as_json:
            print_json_error(BadRequest(message))
        super().error(message)


def build_parser(*, as_json: bool = False) -> argparse.ArgumentParser:
    """Build the parser with a subparser for each verb. ``as_json`` also prints usage errors to stdout as JSON."""
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
        SystemExit: after help, the version, or a usage error.
    """
    if arguments is None:
        reset_signals()  # a parent may have ignored SIGCHLD, and waiting for child processes would then fail
        completion.answer(build_parser())
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["serve"]:
        return serve.replace_process(given[1:])  # the daemon parses its own flags, --help too
    prepare_streams()
    for warning in unknown_variables(os.environ):
        print_error(f"xditd: warning: {warning}")
    as_json = "--json" in given or flags.is_on(flags.JSON_VARIABLE) is True
    system_exit: SystemExit | None = None
    code = exits.DONE
    try:
        code = _run(_parse(given, as_json), as_json)
    except SystemExit as ended:
        system_exit = ended
    except KeyboardInterrupt:  # while the verb was parsed, or its error printed
        code = exits.INTERRUPTED
    stdout_failure = flush_streams()
    if isinstance(stdout_failure, BrokenPipeError):
        return code or exits.READER_LEFT  # the reader of stdout (head, less) has exited
    if stdout_failure is not None:
        print_error(f"xditd: {OutputFailed.code}: standard output: {stdout_failure.strerror}")
        return code or exits.FAILED
    if system_exit is not None:
        raise system_exit
    return code


def _parse(given: list[str], as_json: bool) -> argparse.Namespace:
    parser = build_parser(as_json=as_json)
    if given and not given[0].startswith("-") and given[0] not in VERBS:
        listed = ", ".join(VERBS)
        parser.error(f"VERB: invalid choice: {given[0]!r} (choose from {listed}){did_you_mean(given[0], VERBS)}")
    return parser.parse_args(given)


def _run(parsed: argparse.Namespace, as_json: bool) -> int:
    """Run the verb and print its error, if any; returns the exit code."""
    try:
        return int(parsed.run(parsed))
    except XditdError as error:
        return _failed(parsed.verb, error, as_json)
    except KeyboardInterrupt:
        if as_json:
            print_json_error(Cancelled(f"{parsed.verb}: interrupted"))
        return exits.INTERRUPTED
    except MemoryError:
        return _failed(parsed.verb, OutOfMemory("this process: out of memory; try a smaller size"), as_json)
    except OSError as error:
        if stdout_error() is not None:
            return exits.DONE  # main() handles errors of stdout
        return _failed(parsed.verb, _internal_error(error), as_json)
    except Exception as error:  # noqa: BLE001 - the outermost handler of this process
        return _failed(parsed.verb, _internal_error(error), as_json)


def _failed(verb: str, error: XditdError, as_json: bool) -> int:
    print_error(f"xditd {verb}: {error.code}: {error.detail}")
    if as_json:
        print_json_error(error)
    return exits.code_for(error)


def _internal_error(error: Exception) -> Internal:
    """Print the traceback of an unexpected exception, and return the error to report."""
    print_error("".join(traceback.format_exception(error)).rstrip())
    return Internal(f"{type(error).__name__}: {error}; this is a bug in xditd; please report it with the lines above")
