"""The command line of ``python -m xditd.daemon``; ``xditd serve`` passes its flags through to it."""

from __future__ import annotations

import argparse

from xditd import __version__
from xditd.ipc.command_line import Parser
from xditd.ipc.settings.daemon import CONFIG_VARIABLE, SETTINGS

_EPILOG = """\
Each flag has an environment variable, named in brackets. A flag beats its variable, which beats the file, which beats
the default. In the file, settings live in the sections [daemon] and [workers]; xditd.toml in xditd/systemd shows all.

exit status: 0 stopped on request, 1 could not start or go on (the log says why), 2 misuse
"""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser. Values stay text here: one place checks them, wherever they come from."""
    parser = Parser(
        prog="xditd serve",
        description="Keep xDiT workers warm and serve clients that lend them weights.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"xditd {__version__}")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"TOML file (default: $XDG_CONFIG_HOME/xditd/xditd.toml if there is one) [{CONFIG_VARIABLE}]",
    )
    for setting in filter(lambda each: each.flag, SETTINGS):
        parser.add_argument(
            setting.flag,
            dest=setting.name,
            metavar=setting.metavar,
            help=f"{setting.help} (default: {setting.shown_default}) [{setting.variable}]",
        )
    return parser
