"""Suggestions for misspelt flags and variables."""

import argparse
import re

import pytest

from xditd.client.cli.main import VERBS, main
from xditd.daemon.arguments import build_parser as build_daemon_parser
from xditd.ipc.command_line import Parser, known_variables, unknown_variables
from xditd.ipc.suggestions import did_you_mean


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("statsu", "; did you mean status?"),
        ("--Stop", "; did you mean stop?"),
        ("paint", ""),
        ("", ""),
    ],
)
def test_close_words_are_offered(word, expected):
    assert did_you_mean(word, ("status", "stop", "serve")) == expected


def test_an_unknown_flag_is_refused_by_the_parser_that_got_it(capsys):
    parser = Parser(prog="x", allow_abbrev=False)
    verbs = parser.add_subparsers()
    verbs.add_parser("paint", allow_abbrev=False).add_argument("--colour")
    with pytest.raises(SystemExit):
        parser.parse_args(["paint", "--color=red"])
    assert "x paint: error: unrecognized arguments: --color=red; did you mean --colour?" in capsys.readouterr().err
    assert parser.parse_args(["paint", "--colour", "red"]) == argparse.Namespace(colour="red")


def test_variables_that_nothing_reads_are_named():
    environ = {"XDITD_QUEUE_LIMT": "3", "XDITD_STEPS": "3", "HOME": "/", "XDITD_ZZZ": "1"}
    assert unknown_variables(environ) == [
        "environment variable XDITD_QUEUE_LIMT: nothing reads it; did you mean XDITD_QUEUE_LIMIT?",
        "environment variable XDITD_ZZZ: nothing reads it",
    ]


def test_every_variable_that_help_names_is_known_and_no_other(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    for verb in sorted(set(VERBS) - {"serve"}):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
    text = build_daemon_parser().format_help() + capsys.readouterr().out
    assert set(re.findall(r"\[(XDITD_[A-Z_0-9]+)\]", text)) == known_variables()
