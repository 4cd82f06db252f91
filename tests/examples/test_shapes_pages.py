"""What README and the pages show with ``models/shapes`` runs as it stands, in a checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from running_daemon import RunningDaemon
from shapes.draw import OUTLINE
from shapes.reading import read_file
from shapes_files import shapes_folder

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "models/shapes"
PAGES = {
    "README.md": 2,
    "docs/python.md": 1,
    "docs/client.md": 1,
    "docs/cli.md": 1,
    "docs/formats.md": 2,
    "docs/comfyui.md": 1,
    "docs/lora.md": 1,
    "models/shapes/README.md": 2,
}
"""Each with how many programs and command lines it shows."""

SHOWN = [("purple", "heart"), ("green", "circle"), ("blue", "star")]
"""Colours and forms that their sentences name."""

SEEDED = "xditd generate --seed 0 "
"""A seed for command lines that draw with one of their own each time: one picture in a hundred is wrong."""


def shown_on(page: str) -> list[list[str]]:
    """Return the command lines that run what a page shows with the folder."""
    text = (ROOT / page).read_text(encoding="utf-8")
    programs = [each for each in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if f'"{FOLDER}' in each]
    lines = re.findall(rf"^\$ (.*{FOLDER}.*)$", text, re.MULTILINE)
    return [*([sys.executable, "-c", each] for each in programs), *(["sh", "-c", each] for each in lines)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.long if page == "docs/formats.md" else ()) for page in PAGES]
)
def test_what_a_page_shows_draws(page: str, one_worker: RunningDaemon, tmp_path: Path) -> None:
    for name in ("tools", ".pkg"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "models").mkdir()
    (tmp_path / FOLDER).symlink_to(shapes_folder())
    commands = shown_on(page)
    assert len(commands) == PAGES[page]
    for command in commands:
        ran = subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ
            | {
                "XDITD_RUNTIME_DIR": str(one_worker.runtime_dir),
                "HOME": str(tmp_path),
                "PATH": os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"])),
            },
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert ran.returncode == 0, ran.stderr[-4000:]
        outline = OUTLINE if "outlines" in command[-1] else 0.0
        made = list(tmp_path.glob("*.png"))
        assert bool(made) is ("-m shapes." not in command[-1])
        for path in made:
            with Image.open(path) as image:
                assert image.size == (256, 256)
            read = [(each["colour"], each["form"]) for each in read_file(path, outline=outline)["things"]]
            assert read == [each for each in SHOWN if " ".join(each) in command[-1]]
            path.unlink()
