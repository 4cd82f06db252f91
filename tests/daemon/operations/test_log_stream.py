from __future__ import annotations

import contextlib
import fcntl
import io
import os
import threading

from xditd.daemon.operations.log_stream import LogStream


def test_a_pipe_that_nobody_reads_loses_lines_and_says_so() -> None:
    read_fd, write_fd = os.pipe()
    fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, 4096)
    with open(read_fd, encoding="utf-8") as reader, open(write_fd, "w", encoding="utf-8") as writer:
        stream = LogStream(writer)
        for _ in range(100):
            stream.write_line("x" * 200)
        taken = len(os.read(read_fd, 65536)) // 201
        stream.write_line("after")
        assert reader.readline() == (
            f"({100 - taken} lines were not written: nobody read them; xditd logs has the last ones)\n"
        )
        assert reader.readline() == "after\n"
        stream.write_line("\N{SNOWMAN}" * 10_000)  # longer than the pipe: what fits
        assert 0 < len(os.read(read_fd, 65536)) <= 4096


def test_letters_that_the_encoding_escapes_hold_nobody_either() -> None:
    read_fd, write_fd = os.pipe()
    fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, 4096)
    with open(write_fd, "w", encoding="ascii", errors="backslashreplace") as writer:
        written = threading.Thread(target=LogStream(writer).write_line, args=("\N{GRINNING FACE}" * 900,), daemon=True)
        written.start()
        written.join(10)
        is_over = not written.is_alive()
        os.set_blocking(read_fd, False)
        while written.is_alive():  # lets it go in any case
            with contextlib.suppress(BlockingIOError):
                os.read(read_fd, 65536)
        os.close(read_fd)
        assert is_over


def test_a_full_disk_and_a_stream_without_a_descriptor() -> None:
    with open("/dev/full", "wb", buffering=0) as disk:
        LogStream(io.TextIOWrapper(disk, write_through=True)).write_line("nowhere")
    memory = io.StringIO()
    LogStream(memory).write_line("x" * 5_000)
    assert memory.getvalue() == "x" * 5_000 + "\n"
