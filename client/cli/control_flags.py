"""The flag ``--control`` of ``xditd generate``: ControlNets with their pictures."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from xditd.client.cli.flags import Extend
from xditd.client.cli.generations import size_of
from xditd.client.tensor_files import require_torch
from xditd.ipc.addresses import expand_home
from xditd.ipc.errors import BadRequest
from xditd.ipc.limits import MAX_CONTROL_MODES
from xditd.ipc.loras import MAX_SCALE
from xditd.ipc.settings.client import CONTROLS_VARIABLE

if TYPE_CHECKING:
    import torch

    from xditd.client.client import Client
    from xditd.client.jobs.controls import Control
    from xditd.client.loans import Loan

METAVAR: Final = "FILE=PICTURE[@SCALE][:start=SHARE][:end=SHARE][:mode=NUMBER]"
_HELP: Final = (
    "file of a ControlNet and its picture, such as canny.safetensors=edges.png@0.6; the share of the steps in which it "
    "runs, and for a union the kind of the picture, may follow: union.safetensors=map.png@0.6:end=0.5:mode=2; the VAE "
    "encodes pictures, which have the size of the result; may be repeated; the variable takes several, separated by "
    f"commas [{CONTROLS_VARIABLE}]"
)
_OPTIONS: Final = ("start", "end", "mode")


@dataclass(frozen=True)
class ControlFlag:
    """One ControlNet of a generation, as the flag names it."""

    file: str
    picture: str
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: int | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = os.environ.get(CONTROLS_VARIABLE) or None
    parser.add_argument(
        "--control", type=parse, action=Extend, default=default, metavar=METAVAR, help=_HELP.replace("%", "%%")
    )


def parse(text: str) -> list[ControlFlag]:
    """Parse comma-separated items; names of files may have commas, ``=``, ``@`` and ``:``."""
    items: list[str] = []
    for part in text.split(","):
        if items and "=" not in _without_options(part)[0]:
            items[-1] += f",{part}"  # a part of a name
        else:
            items.append(part)
    return [_parsed(each.strip()) for each in items]


def _parsed(item: str) -> ControlFlag:
    names, options = _without_options(item)
    scale: Any = 1.0
    before, at, word = names.rpartition("@")
    if at and (found := _number(word)) is not None:
        names, scale = before, found
    file, _, picture = (each.strip() for each in names.rpartition("="))
    if not file or not picture:
        raise argparse.ArgumentTypeError(f"{item!r}: use {METAVAR}")
    if abs(scale) > MAX_SCALE:
        raise argparse.ArgumentTypeError(f"{item!r}: the scale {scale:g} is not from {-MAX_SCALE:g} to {MAX_SCALE:g}")
    given: dict[str, Any] = {}
    for name, word in options:
        value = _number(word)
        if name in given:
            raise argparse.ArgumentTypeError(f"{item!r}: {name} is given twice; leave one out")
        if name == "mode":
            if value is None or value != int(value) or not 0 <= value < MAX_CONTROL_MODES:
                raise argparse.ArgumentTypeError(
                    f"{item!r}: mode={word} is not a whole number from 0 to {MAX_CONTROL_MODES - 1}"
                )
            value = int(value)
        elif value is None or not 0.0 <= value <= 1.0:
            raise argparse.ArgumentTypeError(f"{item!r}: {name}={word} is not a share of the steps, from 0 to 1")
        given[name] = value
    if given.get("start", 0.0) > given.get("end", 1.0):
        raise argparse.ArgumentTypeError(f"{item!r}: the start is after the end")
    return ControlFlag(expand_home(file), expand_home(picture), float(scale), **given)


def _without_options(item: str) -> tuple[str, list[tuple[str, str]]]:
    """Cut the options off the end."""
    found: list[tuple[str, str]] = []
    while True:
        names, colon, last = item.rpartition(":")
        name, equals, word = (each.strip() for each in last.partition("="))
        if not (colon and equals and name in _OPTIONS):
            return item, found
        found.insert(0, (name, word))
        item = names


def _number(word: str) -> float | None:
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def paths_of(parsed: argparse.Namespace) -> list[str]:
    """Return the files that the flag reads."""
    return [path for each in parsed.control or () for path in (each.file, each.picture)]


def read_pictures(parsed: argparse.Namespace) -> list[torch.Tensor]:
    """Read the pictures, (1, 3, height, width) in [-1, 1], before anything is lent.

    Raises:
        BadRequest: no picture, one of another size than the result, or no VAE to encode it.
    """
    if not parsed.control:
        return []
    if parsed.vae is None:
        raise BadRequest("--control: pictures of ControlNets are encoded by the VAE; give --vae FILE")
    return read_sized(parsed, size_of(parsed))


def read_sized(parsed: argparse.Namespace, size: tuple[int, int]) -> list[torch.Tensor]:
    """Read the pictures for a result of this size, (1, 3, height, width) in [-1, 1].

    Raises:
        BadRequest: no picture, or one of another size.
    """
    require_torch()
    return [_read(each.picture, size) for each in parsed.control]


def lend_controls(client: Client, parsed: argparse.Namespace, pictures: Sequence[torch.Tensor]) -> list[Control]:
    """Lend the ControlNets, each file once, and return them with their pictures.

    Raises:
        XditdError: as ``Client.lend`` does.
    """
    from xditd.client.jobs.controls import Control

    lent: dict[str, Loan] = {}
    for each in parsed.control or ():
        if each.file not in lent:
            lent[each.file] = client.lend(
                each.file, kind="controlnet", device=parsed.device, compute_dtype=parsed.compute_dtype
            )
    return [
        Control(lent[each.file], image=picture, scale=each.scale, start=each.start, end=each.end, mode=each.mode)
        for each, picture in zip(parsed.control or (), pictures, strict=True)
    ]


def loans_of(controls: Sequence[Control]) -> list[Loan | str]:
    """Return the ControlNets of a job, each once."""
    return list({id(each.controlnet): each.controlnet for each in controls}.values())


def _read(path: str, size: tuple[int, int]) -> torch.Tensor:
    from xditd.client.pipeline import pictures

    picture = pictures.rgb(pictures.opened(path, "--control"))
    if picture.size != tuple(size):
        width, height = picture.size
        raise BadRequest(
            f"--control: picture {path} has {width}x{height} pixels, and the result {size[0]}x{size[1]}; resize it, or "
            f"give --size {width}x{height}"
        )
    return pictures.pixels_of(picture).contiguous()
