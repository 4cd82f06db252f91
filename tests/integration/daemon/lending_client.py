"""A client process that tests kill: it lends a memfd, starts an endless job if asked to, and waits."""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
from pathlib import Path

import zmq

from xditd import __version__
from xditd.ipc.addresses import RuntimeDir, endpoint
from xditd.ipc.codec import encode, reply_decoder
from xditd.ipc.job_parts import Sampling
from xditd.ipc.protocol import PROTOCOL_VERSION
from xditd.ipc.replies import Lent, StepDone, Welcome
from xditd.ipc.requests import Generate, Hello, Lend
from xditd.ipc.tensors import ComponentKind, Fingerprint, HostShmBlock, IoTensor, Manifest, TensorSpec


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runtime_dir", type=Path)
    parser.add_argument("--runs", action="store_true")
    options = parser.parse_args()
    descriptor = os.memfd_create("client")
    os.truncate(descriptor, 4096)
    block = HostShmBlock(
        fd=descriptor,
        inode=os.fstat(descriptor).st_ino,
        size_bytes=4096,
        fingerprint=Fingerprint(length_bytes=0, digest=hashlib.blake2b(b"", digest_size=16).digest()),
    )
    socket = zmq.Context().socket(zmq.DEALER)
    socket.connect(endpoint(RuntimeDir(options.runtime_dir).client_socket))
    socket.send(
        encode(
            Hello(
                request_id="1",
                protocol_version=PROTOCOL_VERSION,
                package_version=__version__,
                client_name="to be killed",
            )
        )
    )
    assert isinstance(reply_decoder.decode(socket.recv()), Welcome)
    tensors = (TensorSpec("weight", "float32", (4, 4), 0, 0),)
    manifest = Manifest(kind=ComponentKind.TRANSFORMER, label="mortal", blocks=(block,), tensors=tensors)
    socket.send(encode(Lend(request_id="2", manifest=manifest)))
    lent = None
    while not isinstance(lent, Lent):
        lent = reply_decoder.decode(socket.recv())
    if options.runs:
        io = IoTensor(offset_bytes=0, dtype="float32", shape=(1, 4))
        socket.send(
            encode(
                Generate(
                    request_id="3",
                    components={"transformer": lent.component_id},
                    io=block,
                    conditioning={},
                    sampling=Sampling(height=64, width=64, steps=1000),
                    out_latents=io,
                )
            )
        )
        while not isinstance(reply_decoder.decode(socket.recv()), StepDone):
            pass
    print(lent.component_id, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
