"""Error codes and classes correspond one to one, and errors keep class and detail across processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from xditd.ipc import errors
from xditd.ipc.errors import BY_CODE, Internal, PeerError, RequestError, XditdError, error_for

CODED = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, XditdError) and value is not XditdError and "code" in vars(value)
]


def descendants(root: type[XditdError]) -> Iterator[type[XditdError]]:
    for cls in root.__subclasses__():
        yield cls
        yield from descendants(cls)


def test_every_class_with_a_code_is_listed_once() -> None:
    assert len({cls.code for cls in CODED}) == len(CODED) > 20
    assert {cls.code: cls for cls in CODED} == BY_CODE


def test_only_groups_have_no_code_of_their_own() -> None:
    uncoded = {cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, XditdError)}
    assert uncoded - set(CODED) == {XditdError, RequestError, PeerError}


def test_transports_define_no_code_that_a_client_does_not_know() -> None:
    import xditd.ipc.transports.cuda_ipc
    import xditd.ipc.transports.file  # noqa: F401 - both only so that their classes exist

    assert {cls.code for cls in descendants(XditdError) if cls.__module__.startswith("xditd.ipc")} == set(BY_CODE)


@pytest.mark.parametrize("cls", CODED)
def test_round_trip(cls: type[XditdError]) -> None:
    back = error_for(cls.code, cls("it broke; mend it").detail)
    assert type(back) is cls
    assert back.detail == str(back) == "it broke; mend it"


def test_an_unknown_code_is_named() -> None:
    back = error_for("from_the_future", "it broke")
    assert type(back) is Internal
    assert "from_the_future" in back.detail
    assert "it broke" in back.detail


def test_an_error_without_text_has_an_empty_detail() -> None:
    assert Internal().detail == ""


def test_only_errors_that_may_pass_are_retryable() -> None:
    assert not any(cls.retryable for cls in CODED if issubclass(cls, RequestError))
    assert {cls.code for cls in CODED if issubclass(cls, PeerError) and not cls.retryable} == {
        "already_running",
        "lease_lost",
        "session_lost",
        "workers_unavailable",
    }
