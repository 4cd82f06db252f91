"""Import modules of diffusers without those of transformers: most of what they take to import.

diffusers' models and pipelines name classes of transformers, mostly in annotations. Text encoders import them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from importlib import metadata
from typing import Final

from xditd.gpu_workers.process.lazy_names import PlaceholderModule, with_placeholders

_TRANSFORMERS: Final = "transformers"


def without_transformers() -> AbstractContextManager[None]:
    """Let modules of diffusers be imported without the modules of transformers' models.

    What they import from transformers are placeholders, and the class itself is imported when its placeholder is used.
    Only one thread may do so at a time. Where transformers is not installed as a package, nothing is replaced.
    """
    return with_placeholders(_placeholder())


def _placeholder() -> Iterator[PlaceholderModule]:
    spec, version = None, ""
    with suppress(ValueError, metadata.PackageNotFoundError):  # imported without a spec, or a folder without a version
        spec, version = importlib.util.find_spec(_TRANSFORMERS), metadata.version(_TRANSFORMERS)
    if spec is not None:
        module = PlaceholderModule(_TRANSFORMERS)
        module.__spec__, module.__path__ = spec, list(spec.submodule_search_locations or ())
        vars(module)["__version__"] = version
        yield module
