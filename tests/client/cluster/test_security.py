"""A host does not join where strangers could."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from xditd.client.cluster.security import RAY_SETTINGS, check_access, own_address, split_address, tuned
from xditd.ipc.errors import BadRequest, NotPermitted

LOOPBACK, PRIVATE = ["127.0.0.1"], ["127.0.0.1", "10.0.0.1"]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """What passes everywhere."""
    found = {"RAY_AUTH_MODE": "token", "RAY_USE_TLS": "1"}
    for variable in ("RAY_AUTH_TOKEN_PATH", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"):
        path = tmp_path / variable
        path.write_text("0123456789abcdef" * 4)
        path.chmod(0o600)
        found[variable] = str(path)
    return found


def test_a_token_and_tls_pass(environ: dict[str, str]) -> None:
    check_access(environ, PRIVATE)


def test_loopback_needs_no_tls_but_a_token(environ: dict[str, str]) -> None:
    del environ["RAY_USE_TLS"]
    check_access(environ, LOOPBACK)
    del environ["RAY_AUTH_MODE"]
    with pytest.raises(NotPermitted, match="RAY_AUTH_MODE"):
        check_access(environ, LOOPBACK)


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("RAY_AUTH_MODE", "disabled", "RAY_AUTH_MODE: not 'token'"),
        ("RAY_AUTH_TOKEN_PATH", "/nonexistent/token", "No such file or directory; write a random token there"),
        ("RAY_AUTH_TOKEN", "short", "5 characters, which can be guessed"),
        ("RAY_USE_TLS", "0", r"RAY_USE_TLS: not 1, but 10\.0\.0\.1 is not loopback"),
        ("RAY_TLS_SERVER_CERT", "", "RAY_TLS_SERVER_CERT: not set"),
        ("RAY_TLS_CA_CERT", "/nonexistent/ca", "RAY_TLS_CA_CERT: /nonexistent/ca; name a readable file"),
    ],
)
def test_each_fault_is_named(environ: dict[str, str], variable: str, value: str, text: str) -> None:
    with pytest.raises(NotPermitted, match=text):
        check_access({**environ, variable: value}, PRIVATE)


@pytest.mark.parametrize("variable", ["RAY_AUTH_TOKEN_PATH", "RAY_TLS_SERVER_KEY"])
def test_secrets_that_others_may_read_are_refused(environ: dict[str, str], variable: str) -> None:
    os.chmod(environ[variable], 0o640)
    with pytest.raises(NotPermitted, match="others may read it"):
        check_access(environ, PRIVATE)


@pytest.mark.parametrize("address", ["", "host:6379", "10.0.0.1", "10.0.0.1:0", "10.0.0.1:70000", "10.0.0.1:x"])
def test_names_and_halves_are_no_address(address: str) -> None:
    with pytest.raises(BadRequest, match="IP address and port"):
        split_address(address)


def test_addresses() -> None:
    assert split_address("10.0.0.1:6379") == ("10.0.0.1", 6379)
    assert split_address("[::1]:6379") == ("::1", 6379)
    assert own_address("127.0.0.1:6379") == "127.0.0.1"


def test_health_checks_are_tuned_unless_the_user_has_tuned_them() -> None:
    assert tuned({})["RAY_health_check_period_ms"] == "1000"
    assert tuned({"RAY_health_check_period_ms": "5"})["RAY_health_check_period_ms"] == "5"
    noticed_ms = int(RAY_SETTINGS["RAY_health_check_failure_threshold"]) * int(
        RAY_SETTINGS["RAY_health_check_period_ms"]
    )
    assert noticed_ms + int(RAY_SETTINGS["RAY_health_check_timeout_ms"]) <= 5000
