"""Types of the programs' flags: what is wrong with one is said before the work begins."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path


def whole(least: int) -> Callable[[str], int]:
    """Make a type for whole numbers from ``least`` on."""

    def convert(text: str) -> int:
        if not text.strip().lstrip("-").isdecimal() or int(text) < least:
            raise ArgumentTypeError(f"{text!r}: use a whole number from {least} on")
        return int(text)

    return convert


def pipeline_folder(text: str) -> Path:
    """Take a pipeline's folder, by its ``model_index.json``."""
    folder = Path(text)
    if not (folder / "model_index.json").is_file():
        raise ArgumentTypeError(f"{text!r}: has no model_index.json; name a pipeline's folder, such as models/shapes")
    return folder


def safetensors_file(text: str) -> Path:
    """Take a safetensors file that is there."""
    path = Path(text)
    if path.suffix != ".safetensors" or not path.is_file():
        raise ArgumentTypeError(f"{text!r}: name a .safetensors file that is there")
    return path


def output_file(suffix: str) -> Callable[[str], Path]:
    """Make a type for files that will be written: their suffix, and a folder that can be written, which is made."""

    def convert(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() != suffix or path.is_dir():
            raise ArgumentTypeError(f"{text!r}: name a {suffix} file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not path.exists()
            path.open("ab").close()
            if is_new:
                path.unlink()
        except OSError as error:
            raise ArgumentTypeError(f"{text!r}: cannot be written: {error.strerror}") from error
        return path

    return convert
