"""``shapes``, the small FLUX.1 of a source checkout, which draws what the words say; an installed wheel has none.

The demo lends it if its folder is there, and generated weights otherwise.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xditd.client.demo.checkpoints import save_aligned
from xditd.client.demo.original_names import transformer_tensors, vae_tensors
from xditd.client.tensor_files import read_tensors
from xditd.ipc.errors import BadCheckpoint, OutputFailed, RequestError
from xditd.ipc.transports.file import LentFile
from xditd.ipc.transports.safetensors_header import read_header

if TYPE_CHECKING:
    import torch

ENCODERS: Final = ("text_encoder", "text_encoder_2")
TOKENIZERS: Final = ("tokenizer", "tokenizer_2")
_WEIGHTS: Final = "diffusion_pytorch_model.safetensors"
_INDEX: Final = "model_index.json"
_READ: Final = (
    f"transformer/{_WEIGHTS}",
    f"vae/{_WEIGHTS}",
    *(f"{encoder}/{name}" for encoder in ENCODERS for name in ("config.json", "model.safetensors")),
    *(f"tokenizer/{name}" for name in ("vocab.json", "merges.txt", "tokenizer_config.json")),
    *(f"tokenizer_2/{name}" for name in ("tokenizer.json", "tokenizer_config.json")),
)
"""The files that the demo needs of the folder."""
_SHIFT: Final = 0.5
"""FLUX.1's for 256 image tokens."""


@dataclass(frozen=True)
class Sentence:
    """What the demo asks for, and the colours and forms that a right picture shows."""

    text: str
    shows: frozenset[tuple[str, str]]


SENTENCES: Final = (
    Sentence(
        "A large purple heart to the left of a small blue star, on a light green background.",
        frozenset({("purple", "heart"), ("blue", "star")}),
    ),
    Sentence("一个大的绿色圆形，米色条纹背景。", frozenset({("green", "circle")})),
    Sentence(
        "A red crescent in the upper left corner and an orange arrow at the bottom, on a white background.",
        frozenset({("red", "crescent"), ("orange", "arrow")}),
    ),
)
"""Each with a combination of colour and form that training never saw."""


def find_shapes() -> Path | None:
    """Return the folder of the model in the checkout that this file lies in, if it is there; it may be damaged."""
    folder = _checkout() / "models" / "shapes"
    return folder if any((folder / name).is_file() for name in (_INDEX, f"transformer/{_WEIGHTS}")) else None


def check_shapes(folder: Path) -> None:
    """Check that the files that the demo needs are there, whole as far as their heads say.

    Raises:
        BadCheckpoint: a file is missing, truncated, unreadable, or no safetensors or JSON file.
    """
    with of_checkout(folder):
        for name in _READ:
            path = folder / name
            if not path.is_file():
                raise BadCheckpoint(f"{path}: is missing")
            try:
                _check_file(path)
            except (OSError, ValueError) as error:
                raise BadCheckpoint(f"{path}: cannot be read: {error}") from error


def _check_file(path: Path) -> None:
    if path.suffix == ".safetensors":
        file = LentFile(str(path))
        try:
            read_header(file.fd, file.path)
        finally:
            file.close()
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    else:
        path.read_text(encoding="utf-8")


@contextmanager
def of_checkout(folder: Path) -> Iterator[None]:
    """Convert what is wrong with a file of the folder, which no flag names, to ``BadCheckpoint`` with the remedy."""
    try:
        yield
    except RequestError as error:
        if str(folder) not in error.detail:
            raise
        raise BadCheckpoint(
            f"{error.detail}; restore the checkout's files (git -C {folder.parents[1]} checkout -- models/shapes), "
            f"or remove {folder}: the demo then runs with random weights"
        ) from error


def _checkout() -> Path:
    return Path(__file__).resolve().parents[2]


def write_originals(folder: Path, transformer: Path, vae: Path, dtype: torch.dtype) -> None:
    """Write transformer and VAE of a pipeline's folder as published files have them, in ``dtype``.

    Raises:
        BadCheckpoint: a file of the folder is no safetensors file, or lacks tensors.
        OutputFailed: a file cannot be written.
    """
    for part, path, rename in (("transformer", transformer, transformer_tensors), ("vae", vae, vae_tensors)):
        with of_checkout(folder):
            tensors = rename(read_tensors(folder / part / _WEIGHTS))
        save_aligned({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, path)


def shifted_sigmas(steps: int) -> tuple[float, ...]:
    """Return the sigmas of FLUX.1's schedule for 256 image tokens, without the last one, 0.

    Source: diffusers, ``FlowMatchEulerDiscreteScheduler``, ``time_shift``.
    """
    import math

    shift = math.exp(_SHIFT)
    return tuple(shift * sigma / (1 + (shift - 1) * sigma) for sigma in (1 - step / steps for step in range(steps)))


def read_pictures(images: Sequence[Path]) -> list[dict[str, Any]] | None:
    """Read pictures back with the checkout's ``tools/shapes/reading.py``; ``None`` where there is none.

    Each has ``things`` (form, colour, place and size), ``pattern`` and ``background``. The module is imported into this
    process, whose torch is there already: a process of its own would take seconds to import it.

    Raises:
        OutputFailed: a file is no picture, or is gone.
    """
    tools = _checkout() / "tools"
    if not (tools / "shapes" / "reading.py").is_file():
        return None
    sys.path.insert(0, str(tools))
    try:
        reading = importlib.import_module("shapes.reading")
    finally:
        sys.path.remove(str(tools))
    found: list[dict[str, Any]] = []
    for image in images:
        try:
            found.append(reading.read_file(image))
        except OSError as error:
            raise OutputFailed(
                f"{image}: cannot be read back: {error}; does another program write to its folder?"
            ) from error
    return found


def differs(sentence: Sentence, read: Mapping[str, Any]) -> str:
    """Say how a picture differs from its sentence; "" is a right one."""
    seen = [(each["colour"] or "unclear", each["form"] or "something") for each in read["things"]]
    if len(seen) == len(sentence.shows) and set(seen) == sentence.shows:
        return ""
    return f"{sentence.text!r} shows {shown(read)}"


def shown(read: Mapping[str, Any]) -> str:
    """Name the objects that were read in a picture, such as "blue star, purple heart"."""
    seen = sorted((each["colour"] or "unclear", each["form"] or "something") for each in read["things"])
    return ", ".join(" ".join(each) for each in seen) or "nothing"
