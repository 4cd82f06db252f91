"""Hostile bytes for the message decoder, for the safetensors header, and through the daemon's real socket.

    python benchmarks/fuzz.py                    # 12 million bytes through the socket, then both parsers
    python benchmarks/fuzz.py --coverage 60      # and 60 s of each parser under atheris (pip install atheris)

Through the socket: messages of the real protocol, spoilt at random, random bytes, and the worst that the limits allow.
Meanwhile another client asks for the status; its slowest answer and the daemon's memory are the figures. Exit status 1
when the daemon ends, a client waits for more than a second, or memory grows beyond its bound.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import zmq
from machine import describe_machine

from xditd.client import Client, XditdError
from xditd.ipc import codec, limits
from xditd.ipc.addresses import RuntimeDir, endpoint
from xditd.ipc.codec import encode, reply_decoder, request_decoder
from xditd.ipc.errors import BadCheckpoint, BadMessage
from xditd.ipc.protocol import PROTOCOL_VERSION
from xditd.ipc.requests import GetLogs, Hello
from xditd.ipc.transports import safetensors_header

SLOWEST_S = 1.0
GROWTH_BYTES = 160 * 2**20
"""The worst message within the limits costs 90 MiB while it is decoded; what waits in ZeroMQ comes on top."""

IDLE_WORKER = [sys.executable, "-c", "import signal; signal.pause()"]

ENDING = {"hello", "goodbye", "stop"}
"""Requests that, sound by chance, would leave nothing to be fuzzed; and the one whose record says another version."""
RECORD = Path(__file__).parents[1] / "tests" / "ipc" / "data" / f"protocol_{PROTOCOL_VERSION}.json"
HELLO = encode(Hello(request_id="r1", protocol_version=PROTOCOL_VERSION, package_version="1", client_name="fuzz"))
SOUND = [
    HELLO,
    encode(GetLogs(request_id="r1", after_line=3)),
    *(bytes.fromhex(text) for op, text in json.loads(RECORD.read_text())["request"].items() if op not in ENDING),
]
"""One of each request, to be spoilt."""
HEADER = json.dumps(
    {f"t{n}": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16 * n, 16 * n + 16]} for n in range(4)}
).encode()


def spoil(payload: bytes, rng: random.Random) -> bytes:
    """Change, drop, repeat and insert bytes."""
    spoilt = bytearray(payload)
    for _ in range(rng.randint(1, 6)):
        where = rng.randrange(len(spoilt) + 1)
        deed = rng.randrange(4)
        if deed == 0 and where < len(spoilt):
            spoilt[where] = rng.randrange(256)
        elif deed == 1:
            del spoilt[where : where + rng.randint(1, 16)]
        elif deed == 2:
            spoilt[where:where] = spoilt[where : where + rng.randint(1, 64)] * rng.randint(1, 8)
        else:
            spoilt[where:where] = rng.randbytes(rng.randint(1, 16))
    return bytes(spoilt)


def worst_messages() -> list[bytes]:
    """As much as the limits let pass, of what costs most."""
    rows = (limits.MAX_MESSAGE_BYTES - 3) // (3 + 0x7FFF * 3)
    row = b"\xdc\x7f\xff"
    texts = b"\xdc" + struct.pack(">H", rows) + (row + b"\xa2ab" * 0x7FFF) * rows
    rows = (limits.MAX_MESSAGE_BYTES - 3) // (3 + 0x7FFF)
    many = [b"\xdc" + struct.pack(">H", rows) + (row + item * 0x7FFF) * rows for item in (b"\x80", b"\x90", b"\xc0")]
    deep = b"\x91" * 100_000
    wide = msgpack.packb({"op": "hello", **{f"k{n}": n for n in range(200)}})
    return [texts, *many, deep, wide, b"\xdd\x00\x98\x96\x80" + b"\xc0" * (limits.MAX_MESSAGE_BYTES - 5)]


def hostile_messages(total_bytes: int, rng: random.Random) -> Iterator[bytes]:
    """A session, the worst messages once, and then many small ones until they have ``total_bytes`` together."""
    yield HELLO
    yield from worst_messages()
    sent = 0
    while sent < total_bytes:
        message = rng.randbytes(rng.randint(0, 20_000)) if rng.randrange(20) == 0 else spoil(rng.choice(SOUND), rng)
        sent += len(message)
        yield message


class Daemon:
    """A daemon whose worker group never comes up: nothing else takes the cores."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        (self.folder / "xditd.toml").write_text(f"[workers]\ncommand = {json.dumps(IDLE_WORKER)}\n")
        self.runtime = RuntimeDir(self.folder / "run")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("XDITD_")}
        flags = ["--config", str(self.folder / "xditd.toml"), "--runtime-dir", str(self.runtime.path)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "xditd.daemon", *flags], stderr=subprocess.DEVNULL, env=environment
        )
        self.client = self._connect()

    def _connect(self) -> Client:
        ends = time.monotonic() + 30
        while True:
            try:
                return Client(self.runtime.path, name="bystander")
            except XditdError:
                if time.monotonic() > ends or self.process.poll() is not None:
                    raise
                time.sleep(0.05)

    def memory(self, field: str) -> int:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.partition(f"{field}:")[2].split()[0]) * 1024

    def close(self) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait(timeout=30)


class Bystander:
    """Asks for the status all the while; ``slowest_s`` is what others' bytes cost it."""

    def __init__(self, client: Client) -> None:
        self.slowest_s = 0.0
        self.answers = 0
        self.failures: list[str] = []
        self._client = client
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        while not self._is_over.is_set():
            began = time.monotonic()
            try:
                self._client.status(deadline_s=10.0)
            except XditdError as error:
                self.failures.append(str(error))
                return
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            self.answers += 1
            self._is_over.wait(0.01)

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()


def fuzz_socket(total_bytes: int, seed: int) -> dict[str, Any]:
    """Send hostile bytes to a live daemon, and read every answer."""
    rng = random.Random(seed)
    daemon = Daemon()
    before = daemon.memory("VmRSS")
    bystander = Bystander(daemon.client)
    answers: Counter[str] = Counter()
    sent_bytes = sent = 0
    began = time.monotonic()
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.setsockopt(zmq.LINGER, 0)
        peer.connect(endpoint(daemon.runtime.client_socket))
        for message in hostile_messages(total_bytes, rng):
            peer.send(message)
            sent_bytes += len(message)
            sent += 1
            if not peer.poll(10_000):
                answers["none"] += 1
                break
            reply = reply_decoder.decode(peer.recv())
            answers[getattr(reply, "code", type(reply).__name__)] += 1
    took_s = time.monotonic() - began
    bystander.stop()
    is_alive = daemon.process.poll() is None
    found = {
        "bytes through the socket": sent_bytes,
        "messages": sent,
        "answers": dict(answers.most_common()),
        "seconds": round(took_s, 1),
        "daemon alive": is_alive,
        "another client's answers": bystander.answers,
        "its slowest answer (ms)": round(bystander.slowest_s * 1000),
        "its failures": bystander.failures,
        "daemon RSS before (MiB)": round(before / 2**20, 1),
        "daemon RSS after (MiB)": round(daemon.memory("VmRSS") / 2**20, 1) if is_alive else None,
        "daemon RSS peak (MiB)": round(daemon.memory("VmHWM") / 2**20, 1) if is_alive else None,
    }
    daemon.close()
    return found


def decode_request(data: bytes) -> None:
    """One input for the decoder: a message that is read must survive the round trip."""
    try:
        message = request_decoder.decode(data)
    except BadMessage:
        return
    if request_decoder.decode(encode(message)) != message:
        raise AssertionError("a message changed on its way")


def parse_header(data: bytes) -> None:
    """One input for the header's parser, as the start of a file."""
    descriptor = os.memfd_create("fuzz")
    try:
        os.write(descriptor, data)
        safetensors_header.read_header(descriptor, "fuzz")
    except BadCheckpoint:
        pass
    finally:
        os.close(descriptor)


def whole_file(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(64)


def fuzz_parsers(total_bytes: int, seed: int) -> dict[str, Any]:
    """Spoilt input for both parsers in this process; anything but the typed refusal ends the run."""
    rng = random.Random(seed)
    figures: dict[str, Any] = {}
    for name, parse, seeds in (
        ("decoder", decode_request, SOUND),
        ("safetensors header", parse_header, [whole_file(HEADER)]),
    ):
        fed = count = 0
        while fed < total_bytes:
            data = spoil(rng.choice(seeds), rng)
            if parse is parse_header and rng.random() < 0.7:
                data = whole_file(spoil(HEADER, rng))
            parse(data)
            fed += len(data)
            count += 1
        figures[f"{name}: bytes, inputs"] = [fed, count]
    return figures


COVERAGE = {"decoder": decode_request, "header": parse_header}


def fuzz_with_coverage(target: str, seconds: int) -> None:
    """Run one parser under atheris in this process, which it ends."""
    import atheris

    for module in (codec, safetensors_header):
        # By the function: instrumenting at import would need atheris before everything else.
        for name, value in list(vars(module).items()):
            if inspect.isfunction(value) and value.__module__ == module.__name__:
                setattr(module, name, atheris.instrument_func(value))
    parse = COVERAGE[target]
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(SOUND if target == "decoder" else [whole_file(HEADER)]):
            Path(corpus, str(number)).write_bytes(seed)
        atheris.Setup(
            [sys.argv[0], f"-max_total_time={seconds}", "-max_len=8192", "-print_final_stats=1", corpus], parse
        )
        atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=12_000_000, help="through the socket")
    parser.add_argument("--parser-bytes", type=int, default=10_000_000, help="for each parser")
    parser.add_argument("--coverage", type=int, default=0, metavar="SECONDS", help="for each parser, under atheris")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--target", choices=sorted(COVERAGE), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.target:
        fuzz_with_coverage(options.target, options.coverage)
    figures = fuzz_socket(options.bytes, options.seed)
    figures.update(fuzz_parsers(options.parser_bytes, options.seed))
    for target in sorted(COVERAGE) if options.coverage else ():
        words = [sys.executable, __file__, "--target", target, "--coverage", str(options.coverage)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        stats = [line for line in done.stderr.splitlines() if line.startswith("stat::number_of_executed_units")]
        figures[f"atheris {target}: status, inputs"] = [done.returncode, stats[-1].split()[-1] if stats else "?"]
    grown = (figures["daemon RSS peak (MiB)"] or 0) - figures["daemon RSS before (MiB)"]
    faults = [
        *([] if figures["daemon alive"] else ["the daemon ended"]),
        *(["an unanswered message"] if "none" in figures["answers"] else []),
        *(["another client was not served"] if figures["its failures"] else []),
        *(["another client waited"] if figures["its slowest answer (ms)"] > SLOWEST_S * 1000 else []),
        *(["memory"] if grown * 2**20 > GROWTH_BYTES else []),
        *(name for name, value in figures.items() if name.startswith("atheris") and value[0] != 0),
    ]
    if options.json:
        print(json.dumps({**figures, "failed": faults, "machine": describe_machine()}, indent=1))
    else:
        for name, value in figures.items():
            print(f"{name:<32}  {value}")
        print(f"FAILED: {'; '.join(faults)}" if faults else "passed")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
