"""The command line of ``python -m xditd.daemon``; ``xditd serve`` passes its flags through to it."""

from __future__ import annotations

import argparse

from xditd import __version__
from xditd.ipc.command_line import Parser
from xditd.ipc.settings.daemon import CONFIG_VARIABLE, SETTINGS

_EPILOG = """\
Each flag has an environment variable, named in brackets. A flag beats its variable, which beats the file, which beats
the default. The file has the sections [daemon] and [workers]; the example xditd.toml in xditd/systemd shows every key.

exit status: 0 stopped on request, 1 could not start or go on (see the log), 2 wrong flag, variable or file
"""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser. Values stay text: ``build_configuration`` checks them, whatever their source."""
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
