"""A program, not a test: run the programs beside tests, each in a process forked from this one, which imports xfuser.

Importing is most of what such a program costs. Each line of the input asks for one program, in JSON. Two lines answer
it: the process ID, and once the process has ended, its exit status.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
import traceback

from forked_ranks import import_xfuser


def main() -> None:
    import_xfuser()
    gc.freeze()  # a collection in a child would copy every page
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if not pid:
            become(**asked)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def become(command: list[str], folders: list[str], stdout: str, stderr: str) -> None:
    """Run a program in this process, with folders in front of the import path, to the end of the process."""
    os.setpgid(0, 0)  # with its ranks, it can be killed
    for descriptor, path in enumerate((os.devnull, stdout, stderr)):
        opened = os.open(path, os.O_RDWR)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = command
    sys.path[:0] = [os.path.dirname(command[0]), *folders]
    status = 1
    try:
        runpy.run_path(command[0], run_name="__main__")
        status = 0
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
    os._exit(0)  # the interpreter's own end visits all that was imported
