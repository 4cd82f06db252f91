"""The messages of all four unions, for the tests of the codec and of the recorded protocol."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def _load(name: str) -> ModuleType:
    """Load a helper beside this file: test folders are no packages."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_messages = _load("messages")


@pytest.fixture(scope="session")
def messages() -> ModuleType:
    return _messages


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests that take ``union`` and ``message_class`` once for every class of every union."""
    if "message_class" in metafunc.fixturenames:
        pairs = [(name, cls) for name, union in _messages.UNIONS.items() for cls in _messages.classes(union)]
        metafunc.parametrize(("union", "message_class"), pairs, ids=[f"{name}-{cls.__name__}" for name, cls in pairs])
