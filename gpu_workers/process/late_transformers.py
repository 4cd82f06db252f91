"""Import modules of diffusers without those of transformers: most of what they take to import.

diffusers' models and pipelines name classes of transformers, mostly in annotations. Text encoders import them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from importlib import metadata
from typing import Final

from xditd.gpu_workers.process.late_names import LateModule, in_place

_TRANSFORMERS: Final = "transformers"


def without_transformers() -> AbstractContextManager[None]:
    """Let modules of diffusers be imported without the modules of transformers' models.

    What they import from transformers stands for its classes, which are imported when one is called, subclassed or
    asked for. For one thread. Where transformers is not installed as a package, they find what there is.
    """
    return in_place(_stand_in())


def _stand_in() -> Iterator[LateModule]:
    spec, version = None, ""
    with suppress(ValueError, metadata.PackageNotFoundError):  # imported without a spec, or a folder without a version
        spec, version = importlib.util.find_spec(_TRANSFORMERS), metadata.version(_TRANSFORMERS)
    if spec is not None:
        module = LateModule(_TRANSFORMERS)
        module.__spec__, module.__path__ = spec, list(spec.submodule_search_locations or ())
        vars(module)["__version__"] = version
        yield module
