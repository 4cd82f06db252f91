"""Changes of ``models.toml``: all else of the text stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from xditd.client import models_editing, models_file
from xditd.ipc.errors import BadRequest

USERS = '''# my models
# since 2024

[flux]  # the big one
folder = "flux"   # spelled my way

# why I have this
[flux.defaults]
steps = 4

# wan, for films
["wan2.2"]
folder = """
[flux]
"""

# the last
[z]
folder='z'
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = tmp_path / "xditd" / "models.toml"
    found.parent.mkdir()
    found.write_text(USERS)
    return found


def test_what_is_added_can_be_read_and_comments_stay(file: Path) -> None:
    table = {
        "transformer": 'a "quoted" \\ \t\x7f.safetensors',
        "text_encoders": ["clip.safetensors", "t5.safetensors"],
        "defaults": {"steps": 8, "guidance": 1.0, "size": "64x48"},
    }
    models_editing.add("qwen-2.5", table, file)
    text = file.read_text()
    assert text.startswith(USERS)
    assert models_file.parse(text, file)["qwen-2.5"] == table
    assert models_file.find("qwen-2.5", file).defaults.size == (64, 48)


def test_the_first_model_makes_the_file(tmp_path: Path) -> None:
    file = tmp_path / "new" / "models.toml"
    models_editing.add("flux", {"folder": "/flux"}, file)
    assert file.read_text() == '[flux]\nfolder = "/flux"\n'


def test_a_name_that_is_there_is_replaced_only_if_asked(file: Path) -> None:
    with pytest.raises(BadRequest, match=r"model z: is in .* already; replace it by --replace"):
        models_editing.add("z", {"folder": "/y"}, file)
    assert file.read_text() == USERS
    models_editing.add("z", {"folder": "/y"}, file, is_replaced=True)
    assert models_file.find("z", file).folder == "/y"
    assert "# the last" not in file.read_text()


def test_a_model_goes_with_the_comments_above_it_and_no_others(file: Path) -> None:
    models_editing.remove(file, "z")
    assert file.read_text() == USERS[: USERS.index("# the last")]
    models_editing.add("x", {"folder": "/x"}, file)
    models_editing.remove(file, "x")
    assert list(models_file.parse(file.read_text(), file)) == ["flux", "wan2.2"]


def test_several_go_at_once_or_none(file: Path) -> None:
    with pytest.raises(BadRequest, match=r"\[z\], \[flux\] is spelled so"):
        models_editing.remove(file, "z", "flux")
    assert file.read_text() == USERS
    models_editing.add("x", {"folder": "/x"}, file)
    models_editing.remove(file, "x", "z")
    assert list(models_file.parse(file.read_text(), file)) == ["flux", "wan2.2"]


def test_what_cannot_be_cut_out_safely_is_left_alone(file: Path) -> None:
    # A text in another model looks like the header of this one.
    with pytest.raises(BadRequest, match="edit the file"):
        models_editing.remove(file, "flux")
    assert file.read_text() == USERS
    file.write_text("flux.folder = 'x'\n")
    with pytest.raises(BadRequest, match="edit the file"):
        models_editing.remove(file, "flux")


def test_tables_of_one_model_go_together(file: Path) -> None:
    file.write_text(USERS.replace('"""\n[flux]\n"""', '"wan"'))
    models_editing.remove(file, "flux")
    text = file.read_text()
    assert list(models_file.parse(text, file)) == ["wan2.2", "z"]
    assert text.startswith("# my models\n# since 2024\n\n# wan, for films\n")


def test_names_and_files_that_cannot_be_are_refused(file: Path) -> None:
    with pytest.raises(BadRequest, match="a name has letters"):
        models_editing.add("a b", {"folder": "/x"}, file)
    file.write_text("[flux")
    with pytest.raises(BadRequest, match="not TOML"):
        models_editing.add("a", {"folder": "/x"}, file)
    assert file.read_text() == "[flux"


def test_a_path_that_is_no_utf8_is_refused(file: Path) -> None:
    before = file.read_bytes()
    path = os.fsdecode(b"/models/\xff.safetensors")
    with pytest.raises(BadRequest, match=r"\[odd\] has a path that is no UTF-8, .*udcff.*: rename it"):
        models_editing.add("odd", {"checkpoint": path}, file)
    assert file.read_bytes() == before
