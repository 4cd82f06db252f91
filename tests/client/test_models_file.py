"""``models.toml``: what it may say, and what an error says of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from xditd.client import models_file
from xditd.client.models_file import ModelDefaults, ModelEntry
from xditd.client.pipeline.named import entry_of
from xditd.ipc.errors import BadRequest

WHOLE = """
# a comment
[qwen]
folder = "~/models/Qwen-Image"
variant = "fp16"

["wan2.2"]
transformer = "high.safetensors"
transformer_2 = "/data/low.safetensors"
vae = "../vae.safetensors"
text_encoders = ["umt5.safetensors"]
tokenizers = "~/ComfyUI"
compute_dtype = "float16"
acceleration = "eager"
defaults = { steps = 20, guidance = 4, size = "1280x720" }

[sdxl]
checkpoint = "all.safetensors"
text_encoders = "clip.safetensors"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "models.toml"


def load(file: Path) -> dict[str, ModelEntry]:
    """Read all models of a file, as ``xditd models list`` does."""
    tables = models_file.parse(models_file.read_text(file), file)
    return {name: models_file.check_entry(name, table, file) for name, table in tables.items()}


def test_paths_are_of_the_files_folder_and_of_home(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/cat")
    file.write_text(WHOLE)
    qwen, wan, sdxl = load(file).values()
    assert (qwen.folder, qwen.variant) == ("/home/cat/models/Qwen-Image", "fp16")
    assert wan.name == "wan2.2"
    assert wan.transformer == str(tmp_path / "high.safetensors")
    assert wan.transformer_2 == "/data/low.safetensors"
    assert wan.vae == str(tmp_path.parent / "vae.safetensors")
    assert wan.text_encoders == (str(tmp_path / "umt5.safetensors"),)
    assert wan.tokenizers == "/home/cat/ComfyUI"
    assert (wan.compute_dtype, wan.acceleration) == ("float16", "eager")
    assert wan.defaults == ModelDefaults(steps=20, guidance=4.0, size=(1280, 720))
    assert [key for key, _ in wan.paths] == ["transformer", "transformer_2", "vae", "text_encoders", "tokenizers"]
    assert sdxl.text_encoders == (str(tmp_path / "clip.safetensors"),)


def test_the_file_is_in_the_users_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert models_file.models_path() == tmp_path / "xditd" / "models.toml"
    assert load(models_file.models_path()) == {}
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", "/home/cat")
    assert models_file.models_path() == Path("/home/cat/.config/xditd/models.toml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[flux]\nvaee = 'x'", ("[flux] vaee: no such key", "did you mean vae?")),
        ("[wan2.2]\nfolder = 'x'", ('write ["wan2.2"]',)),
        ("folder = 'x'", ("folder = 'x': outside of a model", "[flux]")),
        ("[flux]\nvae = 'x'", ("names no model",)),
        ("[flux]\nfolder = 'x'\nvae = 'y'", ("remove it, or vae",)),
        ("[flux]\ntransformer = 'x'\nvariant = 'fp16'", ("variant: selects among the weights of a folder",)),
        ("[flux]\ncheckpoint = 'x'\ntransformer_2 = 'y'", ("transformer_2: is beside a transformer",)),
        ("[flux]\nfolder = 3", ("[flux] folder = 3: use a path",)),
        ("[flux]\nfolder = ''", ("folder = '': use a path",)),
        ("[flux]\ntransformer = 'x'\ntext_encoders = []", ("0 paths; from 1 to 8",)),
        ("[flux]\ntransformer = 'x'\ntext_encoders = [1]", ("text_encoders = 1: use a path",)),
        ("[flux]\nfolder = 'x'\ncompute_dtype = 'bfloat'", ("one of bfloat16", "did you mean bfloat16?")),
        ("[flux]\nfolder = 'x'\ncompute_dtype = []", ("one of bfloat16",)),
        ("[flux]\nfolder = 'x'\ndefaults = 4", ("use a table",)),
        ("[flux]\nfolder = 'x'\ndefaults = {step = 4}", ("defaults.step: no such key", "did you mean steps?")),
        ("[flux]\nfolder = 'x'\ndefaults = {steps = 0}", ("defaults.steps = 0: use a whole number from 1 to",)),
        ("[flux]\nfolder = 'x'\ndefaults = {steps = true}", ("steps = True: use a whole number",)),
        ("[flux]\nfolder = 'x'\ndefaults = {guidance = nan}", ("guidance = nan: use a number from 0",)),
        ("[flux]\nfolder = 'x'\ndefaults = {size = '1024'}", ('use "WIDTHxHEIGHT"',)),
        ("[flux]\nfolder = 'x'\ndefaults = {size = '0x999999'}", ("with sides up to",)),
        ("[flux\nfolder = 'x'", ("not TOML", "line 1")),
        ("[flux]\nfolder = 'x'\n[flux]\n", ("not TOML", "line 3")),
        ("['a/b']\nfolder = 'x'", ("model 'a/b': a name has letters",)),
        ("['-x']\nfolder = 'x'", ("a name has letters",)),
    ],
)
def test_what_is_wrong_is_named_with_its_place_and_the_remedy(file: Path, text: str, says: tuple[str, ...]) -> None:
    file.write_text(text)
    with pytest.raises(BadRequest) as error:
        load(file)
    assert f"file {file}" in error.value.detail
    for part in says:
        assert part in error.value.detail


def test_an_unknown_name_gets_the_closest_and_all_names(file: Path) -> None:
    file.write_text(WHOLE)
    with pytest.raises(BadRequest, match=r"model 'qwn': not in .*: it has qwen, wan2\.2, sdxl; did you mean qwen\?"):
        models_file.find("qwn", file)
    with pytest.raises(BadRequest, match="there is no such file"):
        models_file.find("flux", file.with_name("other.toml"))


def test_a_wrong_model_does_not_hide_the_others(file: Path) -> None:
    file.write_text("[good]\nfolder = 'x'\n[bad]\nfolder = 1\n")
    assert models_file.find("good", file).folder == str(file.parent / "x")
    assert models_file.names(file) == ("good", "bad")


def test_files_that_are_none_are_refused(file: Path) -> None:
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(BadRequest, match="not UTF-8 at byte 0"):
        load(file)
    file.write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(BadRequest, match="more than 1048576 bytes"):
        load(file)
    file.unlink()
    file.mkdir()
    with pytest.raises(BadRequest, match="Is a directory"):
        load(file)
    assert models_file.names(file) == ()


def test_a_name_that_is_also_another_path_here_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = tmp_path / "models"
    for folder in (tmp_path / "config" / "xditd", models / "flux", tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "config" / "xditd" / "models.toml").write_text(f'[flux]\nfolder = "{models}/flux"\n')
    monkeypatch.chdir(tmp_path)
    assert entry_of("flux")["source"] == f"{models}/flux"
    monkeypatch.chdir(models)
    assert entry_of("flux")["source"] == f"{models}/flux"  # the entry's own folder
    (tmp_path / "elsewhere" / "flux").mkdir()
    (tmp_path / "elsewhere" / "other").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(BadRequest, match=r"model 'flux': .*models.toml has one of this name.*'\./flux' for that here"):
        entry_of("flux")
    assert entry_of("./flux") == entry_of("other") == {}
    with pytest.raises(BadRequest, match="not in"):
        entry_of("absent")


@pytest.mark.parametrize("number", ["9" * 5000, "0x" + "f" * 5000])
def test_a_number_without_end_is_refused(file: Path, number: str) -> None:
    file.write_text(f"[flux]\nfolder = 'x'\ndefaults = {{steps = {number}}}\n")
    with pytest.raises(BadRequest, match=f"file {file}"):
        load(file)


def test_a_key_of_many_parts_or_letters_is_refused_in_a_short_line(file: Path) -> None:
    for key, says in ((".".join("a" * 60_000), "59999 dots"), ("a" * 60_000, "no such key")):
        file.write_text(f"[flux]\n{key} = 1\n")
        with pytest.raises(BadRequest, match=says) as error:
            load(file)
        assert len(error.value.detail) < 500


def test_a_fifo_is_not_waited_for(file: Path) -> None:
    os.mkfifo(file)
    with pytest.raises(BadRequest, match="not a regular file"):
        load(file)
    assert models_file.names(file) == ()
