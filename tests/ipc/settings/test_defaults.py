"""Each default is written once; flags, help and documents are derived from it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from xditd.client.cli.main import VERBS
from xditd.daemon.configuration import Configuration
from xditd.daemon.groups.leader import leader_command
from xditd.gpu_workers.process.options import parse
from xditd.ipc.settings.client import VERB_FLAGS
from xditd.ipc.settings.daemon import SETTINGS, WORKER_OPTIONS
from xditd.ipc.settings.document import markdown
from xditd.ipc.settings.setting import settings_of

ROOT = Path(__file__).resolve().parents[3]
DEFAULTS = {setting.name: setting.default for setting in SETTINGS}


def test_every_default_passes_its_own_checks() -> None:
    for setting in SETTINGS:
        assert setting.read(setting.default, setting.name) == setting.default
        assert setting.help


@pytest.mark.parametrize("verb", sorted(VERB_FLAGS))
def test_every_flag_of_a_verb_is_explained(verb: str) -> None:
    assert all(setting.help for setting in settings_of(VERB_FLAGS[verb]))


def test_every_verb_has_a_struct() -> None:
    assert set(VERB_FLAGS) == set(VERBS) - {"serve", "completion"}


def test_the_document_is_what_the_structs_say() -> None:
    remedy = "run: python -m xditd.ipc.settings.document > docs/settings.md"
    assert (ROOT / "docs" / "settings.md").read_text() == markdown(), remedy


def test_the_workers_read_what_the_daemon_hands_them() -> None:
    changed = Configuration(workers=4, device="cpu", layout="ulysses=2,ring=2", precision="fp8", log_level="debug")
    for configuration in (Configuration(), changed):
        command = leader_command(configuration, "token")
        options = parse(command[len(configuration.worker_command) :])
        assert options.runtime_dir == configuration.runtime
        assert all(getattr(options, each.name) == getattr(configuration, each.name) for each in WORKER_OPTIONS)
    assert options.degrees == {"ulysses": 2, "ring": 2}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kernels", "fussed"], "flag --kernels = 'fussed': use one of \"auto\", "),
        (["--kernels", "fussed"], "; did you mean fused?"),
        (["--kernel", "plain"], "did you mean --kernels?"),
        (["--workers", "0"], "flag --workers = '0': use \"auto\" or a whole number from 1 to 1024"),
    ],
)
def test_misspelt_worker_options_are_named(arguments, words, capsys) -> None:
    with pytest.raises(SystemExit):
        parse(["--runtime-dir", "/x", "--group-token", "t", *arguments])
    assert words in capsys.readouterr().err


def _defaults_elsewhere(path: Path) -> Iterator[str]:
    """Find fields and parameters that have a setting's name, and its default written as a literal."""
    for node in ast.walk(ast.parse(path.read_text())):
        pairs: list[tuple[str, ast.expr | None]] = []
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            pairs = [(node.target.id, node.value)]
        elif isinstance(node, ast.arguments):
            positional = [*node.posonlyargs, *node.args]
            named = [*positional[len(positional) - len(node.defaults) :], *node.kwonlyargs]
            pairs = [
                (each.arg, default) for each, default in zip(named, [*node.defaults, *node.kw_defaults], strict=True)
            ]
        for name, default in pairs:
            if name in DEFAULTS and isinstance(default, ast.Constant) and default.value == DEFAULTS[name]:
                yield f"{path.relative_to(ROOT)}:{default.lineno}: {name} = {default.value!r}"


def test_no_other_module_writes_a_default() -> None:
    modules = [path for room in ("client", "daemon", "gpu_workers", "ipc") for path in (ROOT / room).rglob("*.py")]
    assert len(modules) > 100
    found = [each for path in modules if path.parent != ROOT / "ipc" / "settings" for each in _defaults_elsewhere(path)]
    assert found == []
