"""``xditd comfyui``: put the node pack into a ComfyUI, look whether it is sound, take it out."""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from xditd.client.cli import exits, flags
from xditd.ipc.errors import BadRequest

SUMMARY = "install the node pack into a ComfyUI, check it, uninstall it"
DESCRIPTION = """\
Write a small folder custom_nodes/xditd into a ComfyUI. It imports the xditd that is installed in ComfyUI's Python
(pip install 'xditd[cuda]'), and holds the help pages, translations and example workflows of the nodes."""
EXAMPLES = """\
examples:
  xditd comfyui install ~/ComfyUI
  xditd comfyui check ~/ComfyUI
  xditd comfyui uninstall ~/ComfyUI
"""

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
    parser.add_argument("action", choices=("install", "check", "uninstall"), help="what to do")
    parser.add_argument("path", type=Path, metavar="PATH", help="ComfyUI's folder, the one with main.py")
    flags.add_json(parser)


def run(parsed: argparse.Namespace) -> int:
    folder = pack_folder(parsed.path)
    faults: list[str] = []
    if parsed.action == "install":
        install(folder)
        said = f"installed {folder}"
    elif parsed.action == "uninstall":
        uninstall(folder)
        said = f"removed {folder}"
    else:
        faults = list(faults_of(folder, parsed.path))
        said = "\n".join(faults) or f"{folder} is complete and current"
    print(json.dumps({"folder": str(folder), "faults": faults}) if parsed.json else said)
    return exits.FAILED if faults else exits.DONE


def pack_folder(comfyui: Path) -> Path:
    """Name the pack's folder in a ComfyUI.

    Raises:
        BadRequest: there is no ComfyUI.
    """
    if not (comfyui / "main.py").is_file() or not (comfyui / "comfy").is_dir():
        raise BadRequest(f"{comfyui}: no ComfyUI here; give the folder that holds its main.py")
    return comfyui / "custom_nodes" / FOLDER


def install(folder: Path) -> None:
    """Write the folder, over an older one of ours.

    Raises:
        BadRequest: something else has that name.
    """
    if folder.is_symlink() or folder.exists():
        uninstall(folder)
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(ENTRY)
    for name in DATA:
        shutil.copytree(_PACK / name, folder / name)


def uninstall(folder: Path) -> None:
    """Remove the folder.

    Raises:
        BadRequest: it is not there, or not ours.
    """
    entry = folder / "__init__.py"
    if not folder.exists():
        raise BadRequest(f"{folder}: not there; nothing to remove")
    if folder.is_symlink() or not entry.is_file() or MARK not in entry.read_text(errors="replace"):
        raise BadRequest(f"{folder}: not {MARK}; move it away yourself")
    shutil.rmtree(folder)


def faults_of(folder: Path, comfyui: Path) -> Iterator[str]:
    """Name what is wrong with an installed pack, each with its remedy."""
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
    if python is not None and not _imports_xditd(python):
        yield f"{python}: cannot import xditd; run {python} -m pip install 'xditd[cuda]'"


def _imports_xditd(python: Path) -> bool:
    command = [str(python), "-c", "import xditd.client.comfyui"]
    done = subprocess.run(command, capture_output=True, timeout=_IMPORT_DEADLINE_S, check=False)
    return done.returncode == 0
