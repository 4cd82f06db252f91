"""Packages of classes whose code is not run give what they give in an ordinary program."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from xditd.gpu_workers.process.class_packages import ClassPackage
from xditd.gpu_workers.process.lazy_modules import defer_package

NAME = "package_of_classes.kinds"
MODULES = {
    "__init__": """
from typing import TYPE_CHECKING
def is_torch_available(): return True
def is_other_available(): return False
if TYPE_CHECKING:
    from .alpha import Typed
if is_torch_available():
    from .alpha import Alpha, Replaced, Same
    from .beta import Beta as Renamed
    from .inner.deep import Deep
    from .gamma import gamma
    from .alpha import Twice
    from .beta import Twice
if is_other_available():
    from .missing import Missing
try:
    from .missing import Optional
except ImportError:
    Optional = None
def make():
    from .alpha import Local
class Replaced:
    "In place of the other."
def __getattr__(name):
    if name == "Old":
        return Alpha
    raise AttributeError(name)
""",
    "alpha": """
class Alpha: ...
class Replaced: ...
class Same: ...
class Typed: ...
class Twice: ...
class Local: ...
""",
    "beta": """
class Beta: ...
class Twice: ...
""",
    "gamma": "def gamma(): ...",
    "missing": "import no_such_library",
    "unused": "class Unused: ...",
    "../star": "from .kinds import *",
    "inner/__init__": "",
    "inner/deep": "class Deep: ...",
}
EXPECTED = {
    "Alpha": f"{NAME}.alpha",
    "Same": f"{NAME}.alpha",
    "Deep": f"{NAME}.inner.deep",
    "Renamed": f"{NAME}.beta",
    "Replaced": NAME,
    "Twice": f"{NAME}.beta",
    "gamma": f"{NAME}.gamma",
    "make": NAME,
    "Old": f"{NAME}.alpha",
    "Optional": None,
    "TYPE_CHECKING": False,
    **dict.fromkeys(("alpha", "inner"), "module"),
    **dict.fromkeys(("Beta", "Typed", "Missing", "Local", "unused", "Nothing", "__all__", "__wrapped__"), "nothing"),
}
"""The module of what the package has by each name, or what else it is."""


@pytest.fixture(params=[False, True], ids=["at once", "deferred"])
def load(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], ModuleType]:
    for name, code in MODULES.items():
        path = tmp_path / NAME.replace(".", "/") / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])

    def load_anew() -> ModuleType:
        for name in [name for name in sys.modules if name.split(".")[0] == NAME.split(".")[0]]:
            monkeypatch.delitem(sys.modules, name)
        if request.param:
            defer_package(NAME, ClassPackage)
        return importlib.import_module(NAME)

    return load_anew


def place_of(package: ModuleType, name: str) -> object:
    value = getattr(package, name, "nothing")
    return "module" if inspect.ismodule(value) else getattr(value, "__module__", value)


@pytest.mark.parametrize("name", EXPECTED)
def test_each_name_is_what_the_code_of_the_package_makes_it(load: Callable[[], ModuleType], name: str) -> None:
    package = load()
    assert hasattr(package, name) == (EXPECTED[name] != "nothing")
    assert place_of(package, name) == EXPECTED[name]  # again: a module that was imported for it is an attribute, too


def test_listings_are_complete(load: Callable[[], ModuleType]) -> None:
    assert {"Alpha", "Renamed", "Optional", "gamma", "make"} <= set(dir(load()))
    classes = [name for name, _ in inspect.getmembers(load(), inspect.isclass)]
    assert classes == ["Alpha", "Deep", "Renamed", "Replaced", "Same", "Twice"]
    load()
    star = importlib.import_module("package_of_classes.star")
    assert {"Alpha", "Renamed", "Optional", "gamma", "make"} <= vars(star).keys()


def test_a_class_stays_the_same_when_the_package_is_reloaded(load: Callable[[], ModuleType]) -> None:
    package = load()
    first = package.Alpha
    assert importlib.reload(package) is package
    assert package.Alpha is first


def test_a_class_imports_its_own_module_alone(load: Callable[[], ModuleType]) -> None:
    package = load()
    assert package.Same.__module__ == f"{NAME}.alpha"
    is_deferred = isinstance(package, ClassPackage)
    assert (f"{NAME}.beta" not in sys.modules) == is_deferred
