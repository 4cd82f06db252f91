"""Entry point of ``xditd``: find the verb, run it, turn its end into an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from xditd import __version__
from xditd.client.cli import (
    adopt,
    comfyui,
    demo,
    doctor,
    exits,
    generate,
    install_service,
    logs,
    revoke,
    serve,
    status,
    stop,
    wait,
)
from xditd.ipc.errors import XditdError
from xditd.ipc.inherited import reset_signals

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
  xditd serve                          keep workers warm (or: systemctl --user enable --now xditd)
  xditd wait                           until the workers are ready
  xditd status                         workers, lent components, queue
  xditd comfyui install ~/ComfyUI      the nodes for ComfyUI
  xditd generate --transformer flux1-dev.safetensors --vae ae.safetensors --embeds prompt.safetensors -o out.png

`xditd VERB --help` explains each verb. Flags can be set by the environment variables named in brackets.

{exits.HELP}
"""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser with a subparser for each verb."""
    parser = argparse.ArgumentParser(
        prog="xditd",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
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
        verb.add_arguments(sub)
        sub.set_defaults(run=verb.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    if arguments is None:
        reset_signals()  # how daemons and probes end is told by SIGCHLD, which a parent may have had ignored
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["serve"]:
        return serve.replace_process(given[1:])  # the daemon knows its own flags, and its own help
    parsed = build_parser().parse_args(given)
    try:
        code = parsed.run(parsed)
        sys.stdout.flush()
    except XditdError as error:
        print(f"xditd {parsed.verb}: {error.code}: {error.detail}", file=sys.stderr)
        return exits.code_for(error)
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    except BrokenPipeError:
        # Whoever read stdout (head, less) has seen enough. Python would complain once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exits.FAILED
    return int(code)
