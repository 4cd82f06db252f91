"""``xditd comfyui``: install the node pack into a ComfyUI, check it, uninstall it."""

from __future__ import annotations

import argparse
import filecmp
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from xditd.client.cli import exits, flags
from xditd.client.cli.printing import json_text
from xditd.ipc.addresses import user_path
from xditd.ipc.errors import BadRequest, OutputFailed
from xditd.ipc.settings.flags import JsonFlags

SUMMARY = "install the node pack into a ComfyUI, check it, uninstall it"
DESCRIPTION = """\
Write a small folder custom_nodes/xditd into a ComfyUI. It imports the xditd that is installed in ComfyUI's Python
(pip install 'xditd[cuda]'), and contains the help pages, translations and example workflows of the nodes."""
EXAMPLES = """\
examples:
  xditd comfyui install ~/ComfyUI
  xditd comfyui check ~/ComfyUI
  xditd comfyui uninstall ~/ComfyUI
"""

_ACTIONS = ("install", "check", "uninstall")
FOLDER = "xditd"
DATA = ("example_workflows", "locales", "web")
MARK = "written by `xditd comfyui install`"
ENTRY = f'''\
"""xDiT for ComfyUI, {MARK}; `xditd comfyui uninstall` removes it."""

try:
    from xditd.client.comfyui import WEB_DIRECTORY, comfy_entrypoint
except ModuleNotFoundError as error:
    raise ImportError(
        f"{{error}}: ComfyUI's Python lacks it; run pip install 'xditd[cuda]' there, then start ComfyUI again"
    ) from error

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
'''
_PACK = Path(__file__).resolve().parent.parent / "comfyui"
_PYTHONS = (".venv/bin/python", "venv/bin/python", "../.venv/bin/python", "../venv/bin/python")
_IMPORT_DEADLINE_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    action = parser.add_argument("action", type=flags.one_of(*_ACTIONS), metavar="ACTION",
                                 help="install, check or uninstall")  # fmt: skip
    flags.complete(action, _ACTIONS)
    parser.add_argument("path", type=user_path, metavar="PATH", help="ComfyUI's folder, the one with main.py")
    flags.add_settings(parser, JsonFlags)


def run(parsed: argparse.Namespace) -> int:
    folder = pack_folder(parsed.path)
    faults: list[str] = []
    if parsed.action == "install":
        install(folder)
        text = f"installed {folder}"
    elif parsed.action == "uninstall":
        uninstall(folder)
        text = f"removed {folder}"
    else:
        faults = list(faults_of(folder, parsed.path))
        text = "\n".join(faults) or f"{folder} is complete and current"
    print(json_text({"folder": str(folder), "faults": faults}) if parsed.json else text)
    return exits.FAILED if faults else exits.DONE


def pack_folder(comfyui: Path) -> Path:
    """Return the pack's folder in a ComfyUI.

    Raises:
        BadRequest: the folder is not a ComfyUI.
    """
    if not (comfyui / "main.py").is_file() or not (comfyui / "comfy").is_dir():
        raise BadRequest(f"{comfyui}: no ComfyUI here; give the folder that holds its main.py")
    return comfyui / "custom_nodes" / FOLDER


def install(folder: Path) -> None:
    """Write the folder atomically, and replace an earlier installation.

    Raises:
        BadRequest: a folder of this name exists that `xditd comfyui install` did not write.
        OutputFailed: it cannot be written; an earlier installation is unchanged.
    """
    if folder.is_symlink() or folder.exists():
        _refuse_others(folder)
    try:
        folder.parent.mkdir(exist_ok=True)
        # ComfyUI ignores folders with this suffix, in case it starts during the installation.
        new = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{FOLDER}-", suffix=".disabled"))
        try:
            new.chmod(0o755)
            (new / "__init__.py").write_text(ENTRY)
            for name in DATA:
                shutil.copytree(_PACK / name, new / name)
            if folder.exists():
                shutil.rmtree(folder)
            new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise OutputFailed(
            f"{folder}: {error.strerror or error}; make the folder writable, and free disk space"
        ) from error


def uninstall(folder: Path) -> None:
    """Remove the folder.

    Raises:
        BadRequest: it does not exist, or `xditd comfyui install` did not write it.
        OutputFailed: it cannot be removed.
    """
    if not folder.exists():
        raise BadRequest(f"{folder}: does not exist; nothing to remove")
    _refuse_others(folder)
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise OutputFailed(f"{folder}: {error.strerror or error}; it could not be removed completely") from error


def _refuse_others(folder: Path) -> None:
    entry = folder / "__init__.py"
    if folder.is_symlink() or not entry.is_file() or MARK not in entry.read_text(errors="replace"):
        raise BadRequest(f"{folder}: not {MARK}; move it away yourself")


def faults_of(folder: Path, comfyui: Path) -> Iterator[str]:
    """List the faults of an installed pack, each with its remedy."""
    again = f"run xditd comfyui install {comfyui}"
    if not (folder / "__init__.py").is_file():
        yield f"{folder}: not installed; {again}"
        return
    if (folder / "__init__.py").read_text(errors="replace") != ENTRY:
        yield f"{folder / '__init__.py'}: of another version, or edited; {again}"
    for name in DATA:
        for source in sorted((_PACK / name).rglob("*")):
            target = folder / name / source.relative_to(_PACK / name)
            if source.is_file() and not (target.is_file() and filecmp.cmp(source, target, shallow=False)):
                yield f"{target}: missing, of another version, or edited; {again}"
    python = next((path for name in _PYTHONS if (path := comfyui / name).is_file()), None)
    fault = _import_fault(python) if python is not None else ""
    if fault:
        yield f"{python}: cannot import xditd ({fault}); run {python} -m pip install 'xditd[cuda]'"


def _import_fault(python: Path) -> str:
    """Return why a Python cannot import the nodes, or an empty string."""
    command = [str(python), "-c", "import xditd.client.comfyui"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_DEADLINE_S, check=False)
    except subprocess.TimeoutExpired:
        return f"did not finish within {_IMPORT_DEADLINE_S:.0f} s"
    except OSError as error:
        return error.strerror or str(error)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
