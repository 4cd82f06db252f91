"""Patch xfuser 0.7 so that it runs on a CPU, in four places.

xfuser expects a GPU: on a CPU machine two functions of ``xfuser.envs`` raise while it is imported, its table
of packages says that yunchang (the Ulysses groups) is missing, and the group that USP communicates in is
``None``. With these four set, Ulysses over gloo runs on CPU and agrees with diffusers to rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

ENVS = "xfuser.envs"


class _PatchingLoader(Loader):
    """Runs a module's own loader, then patches ``xfuser.envs`` for a CPU machine."""

    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        # xfuser expects a GPU wherever torch was built for CUDA.
        module._is_cuda = lambda: False  # type: ignore[attr-defined]
        # 1 and 2: both raise "No Accelerators available" otherwise. None stands for "no CUDA", as on Apple machines.
        module.get_device_version = lambda: None  # type: ignore[attr-defined]
        module.get_torch_distributed_backend = lambda: "gloo"  # type: ignore[attr-defined]
        # 3: xfuser looks for yunchang only where it sees a GPU, and without it refuses every Ulysses degree above 1.
        import yunchang  # noqa: F401 - proves that the answer below is true

        module.PACKAGES_CHECKER.packages_info["has_long_ctx_attn"] = True


class _EnvsFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != ENVS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _PatchingLoader(spec.loader)
        return spec


@contextmanager
def importable() -> Iterator[None]:
    """Make ``import xfuser`` work on a CPU machine inside the ``with`` block, the first time that it is imported.

    It takes an import hook, because xfuser's modules copy these values into constants while they are imported.
    """
    finder = _EnvsFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
        # 4: USP communicates in yunchang's groups, which it fetches only where it sees a GPU.
        from xfuser.model_executor.layers import usp
        from yunchang.globals import PROCESS_GROUP

        usp.PROCESS_GROUP = PROCESS_GROUP
    finally:
        sys.meta_path.remove(finder)
