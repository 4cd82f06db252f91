"""Stress test: clients at work under random faults, and hostile bytes for every parser.

    .venv/bin/python tests/stress/run.py                        # both, ten minutes and one or two more
    .venv/bin/python tests/stress/run.py --only soak --minutes 2 --faults pause kill-rank
    .venv/bin/python tests/stress/run.py --without unlink-lock --seed 7 --json >found.json

soak  One daemon with two CPU workers (gloo). Four clients lend, generate, cancel, return loans and leave, while the
      faults below are injected at random. Each result is compared, bit for bit, with that of its checkpoint and seed
      before the first fault; each request has a deadline; descriptors, processes, shared memory and memory are
      counted before and after.
fuzz  Randomly mutated messages of the real protocol, random bytes, and the worst that the limits allow, through the
      daemon's socket, while another client asks for the status; then the decoder and the readers of headers alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from faults import all_faults, choose_faults
from findings import Findings, as_json, as_table
from fuzzing import fuzz
from soak import Soak

PARTS = ("soak", "fuzz")


def build_parser() -> argparse.ArgumentParser:
    width = max(len(fault.name) for fault in all_faults())
    lines = [f"  {fault.name:<{width}}  {fault.expects} ({fault.pace.value})" for fault in all_faults()]
    epilog = (
        "faults, and the expected outcome of each (heavy ones take turns, after some seconds of right results):\n"
        + "\n".join(lines)
        + "\n\nThe same --seed gives the same faults in the same order; their times depend on the machine."
        "\nexit status: 0 passed; 1 a result was wrong, a request hung, something leaked or a guarantee was broken; "
        "2 wrong arguments"
    )
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help="soak or fuzz")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the soak (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of all random choices (default: %(default)s)")
    parser.add_argument("--faults", nargs="+", metavar="NAME", help="only these of the faults below (default: all)")
    parser.add_argument("--without", nargs="+", metavar="NAME", default=[], help="all faults but these")
    parser.add_argument("--bytes", type=int, default=12_000_000, help="fuzz: through the socket")
    parser.add_argument("--parser-bytes", type=int, default=10_000_000, help="fuzz: for each parser alone")
    parser.add_argument(
        "--coverage", type=int, default=0, metavar="SECONDS", help="fuzz: each parser under atheris, if installed"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--log", type=Path, metavar="FILE", help="keep the log of the soak's daemons here")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        faults = choose_faults(options.faults, options.without)
    except ValueError as error:
        parser.error(str(error))
    parts: dict[str, Findings] = {}
    if "soak" in options.only:
        with Soak(faults, options.seed) as soak:
            parts["soak"] = soak.run(options.minutes)
            if options.log:
                soak.target.keep_log(options.log)
    if "fuzz" in options.only:
        parts["fuzz"] = fuzz(options.bytes, options.parser_bytes, options.coverage, options.seed)
    asked = {"minutes": options.minutes, "seed": options.seed, "faults": [fault.name for fault in faults]}
    print(as_json(parts, asked) if options.json else as_table(parts))
    return 1 if any(found.failures for found in parts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
