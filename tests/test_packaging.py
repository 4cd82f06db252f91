"""What a user installs: the wheel, built through the source archive as a package registry would get it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("client", "daemon", "gpu_workers", "ipc")
HEAVY = {"torch", "xfuser", "diffusers", "transformers", "triton", "numpy", "cuda-bindings"}


def build(destination: Path, *options: str) -> None:
    """Build with the installed backend, so that nothing is fetched."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(destination), *options, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source archive."""
    destination = tmp_path_factory.mktemp("dist")
    build(destination)
    (archive,) = destination.glob("*.tar.gz")
    assert archive.name.startswith("xditd-")
    (built,) = destination.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content, as an install would lay it out."""
    destination = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(destination)
    return destination


def metadata(unpacked: Path) -> Message:
    (folder,) = unpacked.glob("xditd-*.dist-info")
    return Parser().parsestr((folder / "METADATA").read_text())


def distribution_name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def run_from(unpacked: Path, code: str) -> str:
    """Run code in a fresh interpreter that finds xditd in the unpacked wheel before anywhere else."""
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=unpacked)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_every_module_of_every_room(unpacked: Path) -> None:
    for room in ROOMS:
        here = {path.relative_to(ROOT) for path in (ROOT / room).rglob("*.py")}
        assert Path(room, "__init__.py") in here
        packed = {path.relative_to(unpacked / "xditd") for path in (unpacked / "xditd" / room).rglob("*.py")}
        assert packed == here


def test_wheel_holds_real_files_and_nothing_beside_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert not [info.filename for info in archive.infolist() if info.external_attr >> 28 == 0o12]
    assert len(names) == len(set(names))
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"xditd"}
    assert "xditd/py.typed" in names


def test_wheel_holds_the_systemd_data(unpacked: Path) -> None:
    names = [path.relative_to(ROOT / "systemd") for path in (ROOT / "systemd").rglob("*") if path.is_file()]
    assert {"xditd.service", "xditd@.service", "xditd.toml"} <= {str(name) for name in names}
    for name in names:
        assert (unpacked / "xditd" / "systemd" / name).read_bytes() == (ROOT / "systemd" / name).read_bytes()


def test_wheel_holds_the_licence_and_the_notice_of_what_it_may_run_beside(unpacked: Path) -> None:
    (folder,) = unpacked.glob("xditd-*.dist-info")
    for name in ("LICENSE", "NOTICE"):
        assert (folder / "licenses" / name).read_bytes() == (ROOT / name).read_bytes()
    requirements = metadata(unpacked).get_all("Requires-Dist", [])
    assert [line.endswith("extra == 'video'") for line in requirements if distribution_name(line) == "av"] == [True]


def test_wheel_from_the_source_archive_equals_the_wheel_from_the_tree(wheel: Path, tmp_path: Path) -> None:
    build(tmp_path, "--wheel")
    (direct,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(direct) as other:
        assert {i.filename: i.CRC for i in one.infolist()} == {i.filename: i.CRC for i in other.infolist()}


def test_base_install_has_no_torch(unpacked: Path) -> None:
    requirements = metadata(unpacked).get_all("Requires-Dist", [])
    base = {distribution_name(line) for line in requirements if "extra ==" not in line}
    assert {"msgpack", "msgspec", "pyzmq", "tqdm", "pillow"} <= base
    assert not base & HEAVY


def test_workers_extra_brings_the_pipeline(unpacked: Path) -> None:
    requirements = metadata(unpacked).get_all("Requires-Dist", [])
    workers = {distribution_name(line) for line in requirements if "extra == 'workers'" in line}
    assert {"torch", "xfuser", "diffusers", "transformers", "triton"} <= workers
    assert "torchvision" not in workers


def test_version_of_package_and_distribution_agree(unpacked: Path) -> None:
    assert run_from(unpacked, "import xditd; print(xditd.__version__)").strip() == metadata(unpacked)["Version"]


def test_importing_the_client_loads_no_heavy_library(unpacked: Path) -> None:
    code = "import json, sys, xditd.client; print(json.dumps([xditd.client.__file__, sorted(sys.modules)]))"
    origin, modules = json.loads(run_from(unpacked, code))
    assert Path(origin).is_relative_to(unpacked)
    assert not {"torch", "xfuser", "diffusers", "transformers", "numpy"} & set(modules)
    assert not [name for name in modules if name.startswith(("xditd.daemon", "xditd.gpu_workers"))]


def test_importing_the_daemon_loads_no_heavy_library(unpacked: Path) -> None:
    modules = json.loads(run_from(unpacked, "import json, sys, xditd.daemon; print(json.dumps(sorted(sys.modules)))"))
    assert not {"torch", "xfuser", "diffusers", "transformers", "numpy"} & set(modules)


def test_console_script_names_a_function_that_exists(unpacked: Path) -> None:
    (folder,) = unpacked.glob("xditd-*.dist-info")
    lines = (folder / "entry_points.txt").read_text().splitlines()
    (target,) = [line.partition("=")[2].strip() for line in lines if line.startswith("xditd")]
    module, function = target.split(":")
    assert run_from(unpacked, f"import {module} as m; print(callable(m.{function}))").strip() == "True"


@pytest.mark.parametrize("room", [*ROOMS, "systemd"])
def test_package_links_are_relative_links_to_the_top_folders(room: str) -> None:
    link = ROOT / ".pkg" / "xditd" / room
    if not link.is_symlink():
        pytest.skip("an unpacked source archive holds copies")
    assert os.readlink(link) == f"../../{room}"
    assert link.resolve() == ROOT / room
