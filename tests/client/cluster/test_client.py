"""``Client(cluster=...)`` before it reaches a cluster."""

from __future__ import annotations

import sys

import pytest

from xditd.client import Client
from xditd.client.cluster.client import ClusterClient
from xditd.ipc.errors import BadRequest, NotPermitted, Unsupported


def test_an_address_without_a_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(NotPermitted, match="RAY_AUTH_MODE"):
        Client(cluster="127.0.0.1:6379")
    with pytest.raises(BadRequest, match="IP address and port"):
        Client(cluster="somewhere")


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*sys.modules]:
        if name.startswith("xditd.client.cluster.") and name.rpartition(".")[2] in ("connection", "names"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(sys.modules["xditd.client.cluster"], "connection", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Unsupported, match=r"xditd\[cluster\]"):
        Client(cluster="127.0.0.1:6379")


def test_what_one_host_alone_offers_is_refused_by_name() -> None:
    cluster = object.__new__(ClusterClient)
    for name in ("lend", "call", "accelerate_nothing"):
        error = AttributeError if name == "accelerate_nothing" else Unsupported
        with pytest.raises(error, match=name):
            getattr(cluster, name)


def test_each_public_method_of_a_client_is_offered_or_refused_by_name() -> None:
    cluster = object.__new__(ClusterClient)
    for name in dir(Client):
        if not name.startswith("_") and name not in ("generate", "close", "check_canary"):
            with pytest.raises(Unsupported, match=name):
                getattr(cluster, name)
