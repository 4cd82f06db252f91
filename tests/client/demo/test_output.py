"""Folders of the demo that cannot be written: a typed error with the path and the remedy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xditd.client.demo.output import writing_to
from xditd.ipc.errors import Busy, OutputFailed


def test_an_oserror_becomes_output_failed(tmp_path):
    no_room = r"^out: No space left on device; make room there.*\(--out\)$"
    with pytest.raises(OutputFailed, match=no_room), writing_to(Path("out"), "--out"):
        Path("/dev/full").write_bytes(b"x" * 100_000)
    with pytest.raises(OutputFailed, match=rf"^{tmp_path}/no/file: No such file"), writing_to(tmp_path, "--out"):
        (tmp_path / "no" / "file").write_text("")
    with pytest.raises(Busy), writing_to(tmp_path, "--out"):
        raise Busy("not ours")


def test_demo_into_a_folder_without_room(tmp_path, tmp_path_factory):
    mount = 'mount -t tmpfs -o "$1" tmpfs "$2" && shift 2 && exec "$@"'
    demo = [Path(sys.executable).with_name("xditd"), "demo", "--device", "cpu", "--out", tmp_path / "out"]
    temporary = tmp_path_factory.mktemp("temporary")
    word = ["unshare", "-rm", "sh", "-c", mount, "sh", "nr_inodes=2", str(tmp_path), *map(str, demo)]
    environ = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run(word, capture_output=True, text=True, timeout=120, check=False, env=environ)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("needs a mount namespace of its own")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"xditd demo: output_failed: output folder {tmp_path / 'out'}: No space left on device")
    assert "Traceback" not in done.stderr
    assert not list(temporary.iterdir())
