"""A fake systemd for socket activation: listen, and start the service when a client connects.

    python socket_manager.py SOCKET COMMAND...

Named ``systemd``, since clients check the name of the listening process.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys

FIRST_FD = 3


def start(listener: socket.socket, command: list[str]) -> int:
    child = os.fork()
    if child:
        return child
    os.dup2(listener.fileno(), FIRST_FD)
    os.set_inheritable(FIRST_FD, True)  # dup2 onto itself would leave it closed on exec
    os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES="xditd.socket")
    os.execv(command[0], command)


def main() -> int:
    path, *command = sys.argv[1:]
    with open("/proc/self/comm", "w") as name:
        name.write("systemd")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("listening", flush=True)
        while True:
            select.select([listener], [], [])
            child = start(listener, command)
            try:
                os.waitpid(child, 0)
            except SystemExit:
                os.kill(child, signal.SIGTERM)
                os.waitpid(child, 0)
                raise


if __name__ == "__main__":
    sys.exit(main())
