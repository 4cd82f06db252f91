"""``xditd generate``: where its files go, before the work and after it."""

import contextlib
import json
import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402

from xditd.client.cli import exits  # noqa: E402
from xditd.client.cli.main import build_parser, main  # noqa: E402
from xditd.ipc.replies import Generated, StepDone  # noqa: E402
from xditd.ipc.requests import Cancel, Generate, Hello, Lend  # noqa: E402


@pytest.fixture
def files(tmp_path):
    """A transformer, a VAE and embeddings, as far as the client looks at them."""
    folder = tmp_path / "models"
    folder.mkdir()
    save_file({"double_blocks.0.weight": torch.zeros(4)}, folder / "t.safetensors")
    save_file({"decoder.conv_in.weight": torch.zeros(4)}, folder / "v.safetensors")
    save_file(
        {"prompt_embeds": torch.zeros(1, 4, 8), "pooled_prompt_embeds": torch.zeros(1, 4)}, folder / "e.safetensors"
    )
    return folder


@pytest.fixture
def generate(daemon, folder, files):
    """Run the verb with files that are there."""
    daemon.answers[Generate] = lambda request: [Generated(request_id=request.request_id, timings_ms={})]

    def run(*more):
        named = [f"--{flag}={files / name}.safetensors" for flag, name in
                 (("transformer", "t"), ("vae", "v"), ("embeds", "e"))]  # fmt: skip
        return main(["generate", "--runtime-dir", str(folder), "--size", "32x32", "--steps", "1", *named, *more])

    return run


@pytest.mark.parametrize(
    ("flag", "name", "code", "says"),
    [
        ("--out", "out", exits.MISUSE, "has no suffix"),
        ("--out", "out.pgn", exits.MISUSE, "did you mean .png?"),
        ("--out", "folder.png", exits.MISUSE, "is a folder"),
        ("--out", "file/out.png", exits.FAILED, "Not a directory"),
        ("--save-latents", "file/out.safetensors", exits.FAILED, "Not a directory"),
        ("--save-latents", "models/t.safetensors", exits.MISUSE, "is also read here"),
        ("--save-latents", "out.png", exits.MISUSE, "written twice"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_lent(
    generate, daemon, tmp_path, capsys, monkeypatch, flag, name, code, says
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    before = (tmp_path / "models" / "t.safetensors").read_bytes()
    assert generate(flag, name) == code
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err
    assert daemon.requests(Hello) == daemon.requests(Lend) == []
    assert (tmp_path / "models" / "t.safetensors").read_bytes() == before


def test_an_image_that_cannot_be_written_after_all_is_kept_and_named(generate, daemon, tmp_path, capsys, monkeypatch):
    out, spare = tmp_path / "out", tmp_path / "spare"
    out.mkdir()
    spare.mkdir()
    monkeypatch.setenv("TMPDIR", str(spare))

    def answer(request):
        os.rename(out, tmp_path / "gone")  # while the job runs, the folder goes away, and its name is taken
        out.write_text("")
        return [Generated(request_id=request.request_id, timings_ms={})]

    daemon.answers[Generate] = answer
    latents = tmp_path / "latents.safetensors"
    assert generate("--out", str(out / "a.png"), "--save-latents", str(latents), "--json") == exits.FAILED
    captured = capsys.readouterr()
    found = json.loads(captured.out)["error"]
    assert (found["code"], found["retryable"]) == ("output_failed", False)
    (kept,) = map(Path, found["kept"])
    assert kept.parent == spare
    assert kept.read_bytes().startswith(b"\x89PNG")
    assert f"kept as {kept}" in captured.err
    assert latents.is_file()


def test_files_are_written_with_tildes_and_new_folders(generate, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert generate("--out", "~/new/a.png", "--save-latents", "~/l.safetensors", "--transformer",
                    "~/models/t.safetensors", "--json") == exits.DONE  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert found["image"] == str(tmp_path / "new" / "a.png")
    assert found["latents"] == str(tmp_path / "l.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["l.safetensors", "models", "new"]


def test_the_help_says_where_embeddings_come_from(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = capsys.readouterr().out
    assert "takes no prompt and runs no text encoders" in text
    assert "encode_prompt" in text


def test_an_interrupt_cancels_the_job(generate, daemon, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tqdm.tqdm.update", interrupt)
    daemon.answers[Generate] = lambda request: [
        StepDone(request_id=request.request_id, step=1, total_steps=request.sampling.steps, elapsed_s=0.1)
    ]
    assert generate("--out", str(tmp_path / "a.png"), "--json") == exits.INTERRUPTED
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["code"] == "cancelled"
    assert "Traceback" not in captured.err
    assert daemon.wait_for(Cancel).target_request_id == daemon.requests(Generate)[0].request_id
    assert not (tmp_path / "a.png").exists()


def test_a_bar_that_cannot_be_drawn_ends_no_job(generate, tmp_path, monkeypatch, capsys):
    with open("/dev/full", "w", buffering=1) as full, contextlib.suppress(OSError):
        monkeypatch.setattr("sys.stderr", full)
        assert generate("--out", str(tmp_path / "a.png"), "--log-level", "error") == exits.DONE
    assert (tmp_path / "a.png").is_file()
    assert "a.png: seed" in capsys.readouterr().out


def test_an_empty_variable_is_none(monkeypatch):
    monkeypatch.setenv("XDITD_RUNTIME_DIR", "")
    monkeypatch.setenv("XDITD_OUT", "")
    parsed = build_parser().parse_args(["generate"])
    assert (parsed.runtime_dir, parsed.out) == (None, Path("out.png"))
