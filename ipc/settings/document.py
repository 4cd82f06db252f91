"""``python -m xditd.ipc.settings.document > docs/settings.md``: write the tables of settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from xditd.ipc.settings.client import VERB_FLAGS
from xditd.ipc.settings.daemon import CONFIG_VARIABLE, SECTIONS, SETTINGS
from xditd.ipc.settings.setting import Setting, settings_of

_HEAD = f"""\
# Settings

Made by `python -m xditd.ipc.settings.document` from the structs in `ipc/settings/`; edit those.

A flag beats its environment variable, which beats the file, which beats the default. A misspelt key or flag is refused;
a misspelt variable is warned of, since another version may read it. Each message names the nearest right one. A value
that does not fit is refused, with what does.

## Of the daemon

Flags of `xditd serve`. The file is `~/.config/xditd/xditd.toml`, or `--config FILE`, or `{CONFIG_VARIABLE}`;
[the example](../systemd/xditd.toml) explains every key. A reload ([operations](operations.md#configure)) applies what
is marked with *; the rest needs a restart.
"""


def markdown() -> str:
    """Make the text of ``docs/settings.md``."""
    lines = [_HEAD]
    for section in SECTIONS:
        settings = [each for each in SETTINGS if each.section == section]
        lines += [f"### [{section}]\n", "| key | values | default | flag | variable | |", "|---|---|---|---|---|---|"]
        lines += [
            _row(
                f"`{each.key}`{' *' if each.is_reloaded else ''}",
                each.values,
                each.shown_default,
                *(_code(name) for name in (each.flag, each.variable)),
                each.help,
            )
            for each in settings
        ]
        lines.append("")
    lines += ["## Of the other verbs\n", "| verb | flag | variable | default | |", "|---|---|---|---|---|"]
    lines += [row for verb, struct in VERB_FLAGS.items() for row in _rows_of_verb(verb, settings_of(struct))]
    return "\n".join(lines) + "\n"


def _rows_of_verb(verb: str, settings: Iterable[Setting]) -> Iterator[str]:
    for each in settings:
        default = "" if each.default is False else each.shown_default
        yield _row(f"`{verb}`", ", ".join(f"`{name}`" for name in each.flags), f"`{each.variable}`", default, each.help)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |".replace("<uid>", "UID")


if __name__ == "__main__":
    print(markdown(), end="")
