"""Fuzz the parsers of foreign bytes: anything but a result or a typed error is a defect.

python tests/stress/parsers.py decoder --seconds 60     # under atheris (pip install atheris)
"""

from __future__ import annotations

import argparse
import inspect
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from hostile_bytes import GGUF, HEADER, VALID_MESSAGES, hostile_file, hostile_gguf, mutate, whole_file

from xditd.ipc import codec
from xditd.ipc.codec import encode, request_decoder
from xditd.ipc.errors import BadCheckpoint, BadMessage
from xditd.ipc.transports import gguf_header, gguf_pairs, safetensors_header
from xditd.ipc.transports.stored_tensors import Header


def decode_request(data: bytes) -> None:
    """Decode one input; a valid message must be equal after encode and decode."""
    try:
        message = request_decoder.decode(data)
    except BadMessage:
        return
    if request_decoder.decode(encode(message)) != message:
        raise AssertionError("a message changed in encode and decode")


def parse_header(data: bytes) -> None:
    """Parse one input as the start of a safetensors file."""
    _parse_with(safetensors_header.read_header, data)


def parse_gguf(data: bytes) -> None:
    """Parse one input as a GGUF file."""
    _parse_with(gguf_header.read_header, data)


def _parse_with(read: Callable[[int, str], Header], data: bytes) -> None:
    descriptor = os.memfd_create("fuzz")
    try:
        os.write(descriptor, data)
        header = read(descriptor, "fuzz")
    except BadCheckpoint:
        return
    finally:
        os.close(descriptor)
    if any(stored.offset_bytes + stored.size_bytes > len(data) for stored in header.tensors):
        raise AssertionError("a tensor outside the file")


PARSERS = {"decoder": decode_request, "header": parse_header, "gguf": parse_gguf}
_HOSTILE: Mapping[str, Callable[[random.Random], bytes]] = {
    "decoder": lambda rng: mutate(rng.choice(VALID_MESSAGES), rng),
    "header": hostile_file,
    "gguf": hostile_gguf,
}
_SEEDS = {"decoder": VALID_MESSAGES, "header": [whole_file(HEADER)], "gguf": [GGUF]}


def fuzz_parser(name: str, total_bytes: int, seed: int) -> tuple[int, int]:
    """Run a parser on mutated input in this process; returns the numbers of bytes and of inputs."""
    rng = random.Random(seed)
    fed = count = 0
    while fed < total_bytes:
        data = _HOSTILE[name](rng)
        PARSERS[name](data)
        fed += len(data)
        count += 1
    return fed, count


def run_with_coverage(name: str, seconds: int) -> tuple[int, str]:
    """Run a parser under atheris in a process of its own; returns its exit status and its number of inputs."""
    command = [sys.executable, __file__, name, "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    stats = [line for line in done.stderr.splitlines() if line.startswith("stat::number_of_executed_units")]
    return done.returncode, stats[-1].split()[-1] if stats else "?"


def fuzz_with_coverage(name: str, seconds: int) -> None:
    """Run a parser under atheris, which ends this process."""
    import atheris

    for module in (codec, safetensors_header, gguf_header, gguf_pairs):
        # Single functions, because instrumentation at import would need atheris imported first.
        for attribute, value in list(vars(module).items()):
            if inspect.isfunction(value) and value.__module__ == module.__name__:
                setattr(module, attribute, atheris.instrument_func(value))
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(_SEEDS[name]):
            Path(corpus, str(number)).write_bytes(seed)
        command = [sys.argv[0], f"-max_total_time={seconds}", "-max_len=8192", "-print_final_stats=1", corpus]
        atheris.Setup(command, PARSERS[name])
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parser", choices=sorted(PARSERS))
    parser.add_argument("--seconds", type=int, default=60)
    options = parser.parse_args()
    fuzz_with_coverage(options.parser, options.seconds)


if __name__ == "__main__":
    main()
