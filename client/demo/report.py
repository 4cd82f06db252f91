"""The demo's report: ``demo.json``, and a table for the terminal."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from xditd import __version__
from xditd.client.cli.generation_reports import describe_loan
from xditd.client.cli.printing import json_text
from xditd.client.cli.tables import copied_text, size_text, span_text, table
from xditd.client.demo.shapes_model import shown
from xditd.client.loans import Loan
from xditd.client.output_files import write_file
from xditd.ipc.protocol import PROTOCOL_VERSION

_PACKAGES = ("torch", "xfuser", "diffusers", "transformers", "safetensors", "pyzmq", "msgspec", "msgpack")

PHASES = {
    "daemon_start": "daemon start",
    "workers_ready": "workers ready",
    "lend": "lend",
    "first_image": "first image",
    "second_image": "second image",
    "third_image": "third image",
}


@dataclass(frozen=True)
class Picture:
    """An image of words: its file, its sentence, what was read in it, and how that differs from the sentence."""

    image: str
    sentence: str
    read: dict[str, Any] | None
    fault: str


@dataclass
class Report:
    """The results of the demo, filled by ``DemoRun``."""

    device_kind: str = ""
    workers: int = 0
    parallel: dict[str, int] = field(default_factory=dict)
    attention_backend: str = ""
    image: str = ""
    second_image: str = ""
    size: tuple[int, int] = (0, 0)
    steps: int = 0
    dtype: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    loans: list[Loan] = field(default_factory=list)
    outside_connections: list[str] = field(default_factory=list)
    parity: float = float("inf")
    parity_bar: float = 0.0
    kept_runtime_dir: str | None = None
    pictures: list[Picture] = field(default_factory=list)
    """The images with their sentences; empty with generated weights, which no words fit."""
    is_lent_once: bool = False
    """Whether the second image used the components lent for the first: no component was plugged in between."""

    def faults(self) -> list[str]:
        """The reasons why the demo failed."""
        found = []
        if not self.parity <= self.parity_bar:  # also for NaN
            found.append(f"parity {self.parity:.3g} is above its limit {self.parity_bar:g}")
        if not Path(self.image).is_file():
            found.append(f"image {self.image or '(none)'} was not written")
        if not self.is_lent_once:
            found.append("the components were plugged again for the second image")
        found += [f"a picture differs from its sentence: {each.fault}" for each in self.pictures if each.fault]
        if self.outside_connections:
            found.append(
                "connections to other hosts, so the bytes downloaded are unknown: "
                + "; ".join(self.outside_connections)
            )
        return found

    def as_json(self) -> dict[str, object]:
        """Return the content of ``demo.json``."""
        return {
            "workers": self.workers,
            "device_kind": self.device_kind,
            "parallel": self.parallel,
            "attention_backend": self.attention_backend,
            "image": self.image,
            "second_image": self.second_image,
            "pictures": [asdict(each) for each in self.pictures],
            "size": list(self.size),
            "steps": self.steps,
            "dtype": self.dtype,
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
            "components": [describe_loan(loan) for loan in self.loans],
            # Bytes are not counted: without a connection attempted or seen, none were downloaded.
            "bytes_downloaded": None if self.outside_connections else 0,
            "outside_connections": self.outside_connections,
            "parity": self.parity,
            "parity_bar": self.parity_bar,
            "kept_runtime_dir": self.kept_runtime_dir,
            "passed": not self.faults(),
            "versions": versions(),
        }

    def write(self, path: Path) -> None:
        write_file(path, json_text(self.as_json(), indent=2).encode() + b"\n")

    def summary(self) -> str:
        """Format the table that the demo prints at its end."""
        degrees = ", ".join(f"{name} {degree}" for name, degree in self.parallel.items() if degree > 1) or "none"
        rows: list[tuple[object, object]] = [("workers", f"{self.workers} on {self.device_kind}, parallel: {degrees}")]
        rows += [(text, span_text(self.seconds[name])) for name, text in PHASES.items() if name in self.seconds]
        for loan in self.loans:
            tiers = "+".join(tier.value for tier in loan.tiers)
            what = f"{size_text(loan.lent_bytes)} by {tiers}, copied: {copied_text(loan.copied)}"
            rows.append((f"lent {loan.kind.value}", what))
        rows += [
            ("downloaded", "unknown" if self.outside_connections else "0 bytes (no connection left this machine)"),
            ("parity", f"{self.parity:.2g} against plain diffusers (limit {self.parity_bar:g})"),
            ("image", f"{self.image}, {self.size[0]}x{self.size[1]}, {self.steps} steps"),
        ]
        for each in self.pictures:
            rows.append((Path(each.image).name, each.sentence))
            if each.read:
                rows.append(("", f"read: {shown(each.read)}"))
        if self.pictures:
            rows.append(("page", Path(self.image).with_name("demo.html")))
        if self.kept_runtime_dir:
            rows.append(("daemon kept", f"xditd status --runtime-dir {self.kept_runtime_dir}"))
        return table(("DEMO", ""), rows)


def versions() -> dict[str, str]:
    """Return the versions of the packages, without importing them."""
    found = {"xditd": __version__, "protocol": str(PROTOCOL_VERSION), "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
