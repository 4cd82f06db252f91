from __future__ import annotations

import sys
from pathlib import Path

import pytest

from xditd.daemon.arguments import build_parser
from xditd.daemon.configuration import build_configuration, default_file
from xditd.ipc.errors import BadRequest
from xditd.ipc.settings.daemon import SETTINGS


def written(folder: Path, text: str) -> str:
    path = folder / "xditd.toml"
    path.write_text(text)
    return str(path)


def test_defaults() -> None:
    configuration = build_configuration({}, {})
    assert configuration.queue_limit == 512
    assert configuration.workers == "auto"
    assert (configuration.start_deadline_s, configuration.hang_deadline_s) == (120.0, 300.0)
    assert configuration.max_restarts == 5
    assert configuration.worker_command == (sys.executable, "-m", "xditd.gpu_workers")


def test_flag_beats_variable_beats_file_beats_default(tmp_path: Path) -> None:
    config = written(tmp_path, "[daemon]\nqueue_limit = 1\nlog_level = 'error'\n[workers]\ncount = 1\n")
    environ = {"XDITD_QUEUE_LIMIT": "2", "XDITD_WORKERS": "2"}
    configuration = build_configuration({"config": config, "workers": "3"}, environ)
    assert (configuration.log_level, configuration.queue_limit, configuration.workers) == ("error", 2, 3)
    assert configuration.device == "auto"


def test_file_is_found_where_the_desktop_keeps_it(tmp_path: Path) -> None:
    environ = {"XDG_CONFIG_HOME": str(tmp_path)}
    assert build_configuration({}, environ).queue_limit == 512
    path = default_file(environ)
    path.parent.mkdir()
    path.write_text("[daemon]\nqueue_limit = 7\n")
    assert build_configuration({}, environ).queue_limit == 7
    assert default_file({"HOME": "/home/ada"}) == Path("/home/ada/.config/xditd/xditd.toml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[daemon]\nqueue_limt = 3", "[daemon] queue_limt = 3: no such key"),
        ("[workers]\nqueue_limit = 3", "[workers] queue_limit = 3: no such key"),
        ("[daemon]\n" + ".".join("a" * 60_000) + " = 1", "line 2, a.a.a"),
        ("[daemon]\nqueue_limit = " + "[" * 5_000, "too deep"),
        ("[client]\nx = 1", "unknown entry [client]"),
        ("queue_limit = 3", "unknown entry [queue_limit]"),
        ("daemon = 3", "unknown entry [daemon]"),
        ("[daemon]\nqueue_limit = 0", "queue_limit = 0: use a whole number from 1"),
        ("[daemon]\nqueue_limit = 3.5", "queue_limit = 3.5: use a whole number"),
        ("[daemon]\nqueue_limit = true", "queue_limit = True: use a whole number"),
        ("[daemon]\nqueue_limit = [1]", "queue_limit = [1]: use a whole number"),
        ("[daemon]\nlog_level = 'loud'", "log_level = 'loud': use one of"),
        ("[workers]\ndevice = ['cpu']", "device = ['cpu']: use one of"),
        ("[workers]\nprecision = 'fp4'", "precision = 'fp4': use one of"),
        ("[workers]\nhang_deadline_s = nan", "hang_deadline_s = nan: use seconds"),
        ("[workers]\nattention_backend = '--evil'", "attention_backend = '--evil': use"),
        ("[workers]\ncommand = 'python'", "command = 'python': use a list of words"),
        ("[workers]\ncommand = []", "command = []: use a list of words"),
        ("[daemon", "not TOML"),
    ],
)
def test_what_does_not_fit_is_named_with_its_remedy(tmp_path: Path, text: str, words: str) -> None:
    config = written(tmp_path, text)
    with pytest.raises(BadRequest) as caught:
        build_configuration({"config": config}, {})
    assert words in caught.value.detail
    assert config in caught.value.detail


def test_bad_variable_is_named() -> None:
    with pytest.raises(BadRequest, match="environment variable XDITD_LAYOUT = 'two': use \"auto\", or degrees"):
        build_configuration({}, {"XDITD_LAYOUT": "two"})


def test_bytes_that_are_no_text_are_not_toml(tmp_path: Path) -> None:
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BadRequest, match="not TOML"):
        build_configuration({"config": str(path)}, {})


def test_help_shows_every_flag_with_its_variable() -> None:
    text = build_parser().format_help()
    for setting in SETTINGS:
        assert setting.flag in text
        assert setting.flag == "" or f"[{setting.variable}]" in " ".join(text.split())


def test_relative_paths_count_from_the_folder_in_which_the_daemon_was_started(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text('[daemon]\nruntime_dir = "run"\n[workers]\ncommand = ["./python", "-m", "./x"]\n')
    configuration = build_configuration({"config": "my.toml"}, {}, tmp_path)
    assert configuration.runtime.path == tmp_path / "run"
    assert configuration.worker_command == (str(tmp_path / "python"), "-m", "./x")  # a program, not its arguments
    assert build_configuration({"runtime_dir": "r"}, {}, tmp_path).runtime.path == tmp_path / "r"
    with pytest.raises(BadRequest, match=r"path my.toml: .*use an absolute path"):
        build_configuration({"config": "my.toml"}, {})  # the folder was removed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[daemon]\nqueue_limt = 3", "did you mean queue_limit?"),
        ("[workers]\ncomand = ['x']", "did you mean command?"),
        ("[daemon]\nlog_level = 'inof'", "; did you mean info?"),
        ("[deamon]\nqueue_limit = 3", "unknown entry [deamon]; the sections are [daemon] and [workers]; did you mean"),
    ],
)
def test_a_misspelt_key_is_told_what_is_close_to_it(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        build_configuration({"config": written(tmp_path, text)}, {})
    assert words in caught.value.detail


def test_paths_take_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path, "[daemon]\nruntime_dir = '~/run'\n")
    assert build_configuration({"config": "~/xditd.toml"}, {}).runtime.path == tmp_path / "run"
    assert build_configuration({}, {"XDITD_CONFIG": "~/xditd.toml"}).runtime.path == tmp_path / "run"
    assert build_configuration({"runtime_dir": "~/other"}, {}).runtime.path == tmp_path / "other"
