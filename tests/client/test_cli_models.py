"""``xditd models``: add, list, check, rm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli_completion import completions

from xditd.client import models_file
from xditd.client.cli import exits
from xditd.client.cli.main import main


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files of parts, as the current one, and a configuration of its own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    for name in ("t", "v", "clip", "t5"):
        (tmp_path / f"{name}.safetensors").write_text("")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    (tmp_path / "tok").mkdir()
    return tmp_path


def test_what_is_added_is_listed_and_removed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = ["--transformer=t.safetensors", "--vae=v.safetensors", "--text-encoder=clip.safetensors",
             "--text-encoder=t5.safetensors", "--tokenizers=tok"]  # fmt: skip
    rest = ["--compute-dtype=float16", "--steps=8", "--guidance=2.5", "--size=64x48"]
    assert main(["models", "add", "flux", *parts, *rest]) == exits.DONE
    assert main(["models", "add", "qwen", "pipeline", "--variant", "fp16"]) == exits.DONE
    entry = models_file.find("flux")
    assert entry.text_encoders == (str(folder / "clip.safetensors"), str(folder / "t5.safetensors"))
    assert (entry.compute_dtype, entry.defaults.size, entry.defaults.guidance) == ("float16", (64, 48), 2.5)
    capsys.readouterr()
    assert main(["models", "list"]) == exits.DONE
    text = capsys.readouterr().out
    assert "transformer t.safetensors, vae v.safetensors" in text
    assert "steps 8, guidance 2.5, size 64x48" in text
    assert main(["models", "list", "--json"]) == exits.DONE
    found = json.loads(capsys.readouterr().out)
    assert found["models"]["qwen"] == {"folder": str(folder / "pipeline"), "variant": "fp16", "defaults": {}}
    assert main(["models", "rm", "flux", "gone"]) == exits.MISUSE
    assert models_file.names() == ("flux", "qwen")
    assert main(["models", "rm", "flux"]) == exits.DONE
    assert models_file.names() == ("qwen",)
    assert main(["models", "add", "flux", *parts]) == exits.DONE
    capsys.readouterr()
    assert main(["models", "rm", "flux", "qwen", "--json"]) == exits.DONE
    assert json.loads(capsys.readouterr().out)["removed"] == ["flux", "qwen"]
    assert models_file.names() == ()
    assert (folder / "t.safetensors").is_file()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["add", "x"], "names no model"),
        (["add", "x", "gone"], "gone: no such file or folder"),
        (["add", "x", "tok"], "has no model_index.json"),
        (["add", "x", "pipeline", "--vae", "v.safetensors"], "folder has all parts"),
        (["add", "a/b", "pipeline"], "a name has letters"),
        (["rm", "flx"], "did you mean flux?"),
        (["check", "flx"], "did you mean flux?"),
    ],
)
def test_misuse_changes_nothing(folder: Path, capsys: pytest.CaptureFixture[str], given: list[str], says: str) -> None:
    assert main(["models", "add", "flux", "pipeline"]) == exits.DONE
    before = models_file.models_path().read_text()
    capsys.readouterr()
    assert main(["models", *given, "--json"]) == exits.MISUSE
    said = capsys.readouterr()
    assert says in said.err
    assert says in json.loads(said.out)["error"]["message"]
    assert models_file.models_path().read_text() == before


def test_a_model_that_is_wrong_is_listed_with_its_fault(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "list"]) == exits.DONE
    assert "no models; add one by" in capsys.readouterr().out
    main(["models", "add", "flux", "pipeline"])
    with models_file.models_path().open("a") as file:
        file.write("[bad]\nfolder = 1\n")
    capsys.readouterr()
    assert main(["models", "list"]) == exits.FAILED
    said = capsys.readouterr()
    assert "flux" in said.out
    assert "[bad] folder = 1: use a path" in said.err


def test_a_quick_check_reads_headers_and_fails_for_faults(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["models", "add", "flux", "--transformer", "t.safetensors"])
    capsys.readouterr()
    assert main(["models", "check", "--quick"]) == exits.FAILED
    text = capsys.readouterr().out
    assert "transformer: " in text
    assert "an empty file" in text
    assert "not checked: " in text
    assert main(["models", "check", "flux", "--quick", "--json"]) == exits.FAILED
    found = json.loads(capsys.readouterr().out)["models"]["flux"]
    assert found["parts"][0]["path"] == str(folder / "t.safetensors")
    assert len(found["faults"]) == 1


def test_a_check_of_all_names_a_wrong_model_and_checks_the_others(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["models", "add", "flux", "--transformer", "t.safetensors"])
    with models_file.models_path().open("a") as file:
        file.write("\n[bad]\nfolder = 1\n")
    capsys.readouterr()
    assert main(["models", "check", "--quick"]) == exits.FAILED
    said = capsys.readouterr()
    assert "an empty file" in said.out
    assert "[bad] folder = 1: use a path" in said.err
    assert main(["models", "check", "--quick", "--json"]) == exits.FAILED
    found = json.loads(capsys.readouterr().out)
    assert (list(found["models"]), list(found["faults"])) == (["flux"], ["bad"])


def test_names_are_completed(folder: Path) -> None:
    main(["models", "add", "flux", "pipeline"])
    main(["models", "add", "qwen", "pipeline"])
    assert completions("xditd models check q", folder) == ["qwen"]
    assert {"flux", "qwen"} <= set(completions("xditd models rm ", folder))
    assert completions("xditd models ch", folder) == ["check"]
