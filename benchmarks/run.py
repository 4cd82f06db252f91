"""Run the benchmarks of xditd: each is a part with its own arguments.

    python benchmarks/run.py --list                                  # the parts, and what each needs
    python benchmarks/run.py control_plane --json FILE               # one part; PART --help names its arguments
    python benchmarks/run.py ceilings plugging --json FILE           # several, each with these arguments

Every part prints the machine, the versions and a table, and with ``--json`` writes the same to FILE after each step.
Exit status: 0 done, 1 failed or a limit was missed, 2 wrong arguments, 77 skipped, as the part's needs are not met.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import describe_machine
from measuring import Report, print_machine

PARTS = Path(__file__).resolve().parent / "parts"


def names() -> list[str]:
    return sorted(path.stem for path in PARTS.glob("*.py"))


def describe(part: str) -> tuple[str, str]:
    """Return what a part measures and what it needs, from its docstring, without importing it."""
    doc = ast.get_docstring(ast.parse((PARTS / f"{part}.py").read_text())) or ""
    needs = next((line.removeprefix("Needs: ") for line in doc.splitlines() if line.startswith("Needs: ")), "")
    return doc.splitlines()[0], needs


def run(part: str, arguments: list[str]) -> int:
    """Run one part in this process and return its exit status."""
    module = importlib.import_module(f"parts.{part}")
    parser = argparse.ArgumentParser(
        prog=f"run.py {part}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to FILE after each step")
    module.add_arguments(parser)
    given = parser.parse_args(arguments)
    if not getattr(module, "SHOWS_MACHINE", False):
        print_machine(describe_machine())
    return module.run(given, Report(given.json)) or 0


def run_several(parts: list[str], arguments: list[str]) -> int:
    """Run each part in a process of its own; ``--json`` gets their results by name. Returns the worst exit status."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--json", type=Path)
    given, others = parser.parse_known_args(arguments)
    report, worst = Report(given.json), 0
    with tempfile.TemporaryDirectory(prefix="xditd-run-") as folder:
        for part in parts:
            print(f"\n--- {part}", flush=True)
            out = Path(folder, f"{part}.json")
            status = subprocess.run([sys.executable, __file__, part, *others, "--json", str(out)]).returncode
            worst = max(worst, status, key=lambda each: (each not in (0, 77), each))
            report.add(**{part: json.loads(out.read_text()) if out.exists() else {"status": status}})
    return worst


def main() -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"
    arguments = sys.argv[1:]
    parts: list[str] = []
    while arguments and not arguments[0].startswith("-") and (not parts or arguments[0] in names()):
        parts.append(arguments.pop(0))
    if parts and all(part in names() for part in parts):
        return run(parts[0], arguments) if len(parts) == 1 else run_several(parts, arguments)
    parser = argparse.ArgumentParser(
        usage="run.py PART... [arguments]\n       run.py PART --help\n       run.py --list",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="name the parts, what each measures and what it needs")
    if parts:
        parser.error(f"{parts[0]}: there is no such part; the parts are {', '.join(names())}")
    parser.parse_args(arguments or ["--help"])
    for part in names():
        what, needs = describe(part)
        print(f"{part:16} {what}\n{'':16} Needs: {needs}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
