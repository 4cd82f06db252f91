"""``xditd generate``: its output files, checked before the job and written after it."""

import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
import sample_facts  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from xditd.client.cli import exits  # noqa: E402
from xditd.client.cli.generations import Outputs  # noqa: E402
from xditd.client.cli.main import build_parser, main  # noqa: E402
from xditd.ipc.errors import BadRequest  # noqa: E402
from xditd.ipc.replies import Generated, StepDone  # noqa: E402
from xditd.ipc.requests import Cancel, Generate, Hello, Lend  # noqa: E402


@pytest.fixture
def files(tmp_path):
    """Files of a transformer, a VAE and embeddings, with only what the client reads."""
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
    """Run the verb with these files."""
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


@pytest.mark.parametrize(("more", "expected"), [((), None), (("--compute-dtype", "float16"), "float16")])
def test_the_compute_dtype_is_that_of_the_transformer_alone(generate, daemon, tmp_path, more, expected):
    generate("--out", str(tmp_path / "out.png"), *more)
    assert [request.manifest.compute_dtype for request in daemon.requests(Lend)] == [expected, None]


def test_an_image_that_cannot_be_written_after_all_is_kept_and_named(generate, daemon, tmp_path, capsys, monkeypatch):
    out, spare = tmp_path / "out", tmp_path / "spare"
    out.mkdir()
    spare.mkdir()
    monkeypatch.setenv("TMPDIR", str(spare))

    def answer(request):
        os.rename(out, tmp_path / "gone")  # while the job runs, the folder is moved away, and a file gets its name
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
    assert f"saved as {kept}" in captured.err
    assert latents.is_file()


def test_files_are_written_with_tildes_and_new_folders(generate, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert generate("--out", "~/new/a.png", "--save-latents", "~/l.safetensors", "--transformer",
                    "~/models/t.safetensors", "--json") == exits.DONE  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == [str(tmp_path / "new" / "a.png")]
    assert found["latents"] == str(tmp_path / "l.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["l.safetensors", "models", "new"]


def test_steps_guidance_and_names_are_those_of_the_model(daemon, folder, files, tmp_path, generate, capsys):
    known = ["generate", "--runtime-dir", str(folder), "--transformer", str(files / "t.safetensors"),
             "--save-latents", str(tmp_path / "l.safetensors")]  # fmt: skip
    assert main([*known, "--random-embeds", "1", "--text-tokens", "5", "--size", "32x48"]) == exits.DONE
    request = daemon.requests(Generate)[0]
    sampling = request.sampling
    assert (sampling.steps, sampling.guidance_scale, sampling.width, sampling.height) == (28, None, 32, 48)
    assert {name: leaf.shape for name, leaf in request.conditioning.items()} == {
        "prompt_embeds": (1, 5, 8),
        "pooled_prompt_embeds": (1, 4),
    }
    save_file({"prompt_embeds": torch.zeros(5, 8)}, files / "half.safetensors")
    for more, says in (
        (["--random-embeds", "1", "--size", "32x40"], "height: 40 is not a multiple of 16 pixels; 32 is near"),
        (["--embeds", str(files / "half.safetensors")], "lacks pooled_prompt_embeds; it holds prompt_embeds"),
    ):
        assert main([*known, *more]) == exits.MISUSE
        assert says in capsys.readouterr().err
    assert len(daemon.requests(Generate)) == 1


def test_the_help_has_examples_for_both_families(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = capsys.readouterr().out
    assert "Without a prompt, --embeds names" in text
    for family in ("flux1-dev.safetensors", "z_image_turbo_bf16.safetensors", "FluxPipeline", "ZImagePipeline"):
        assert family in text
    assert "prompt_embeds.0" in text
    assert text.count("encode_prompt") == 2


def test_options_reach_the_request_and_the_report_says_what_was_used(generate, daemon, tmp_path, capsys):
    out = str(tmp_path / "a.png")
    assert generate("--out", out, "--option", "shift=3", "--guidance", "2", "--json") == exits.DONE
    assert daemon.requests(Generate)[0].sampling.options == {"shift": 3}
    found = json.loads(capsys.readouterr().out)
    assert found["sampling"] == {
        "width": 32, "height": 32, "frames": 1, "steps": 1,
        "guidance_scale": 2.0, "step_cache": 0.0, "options": {"shift": 3},
    }  # fmt: skip
    assert found["conditioning"] == {"prompt_embeds": [1, 4, 8], "pooled_prompt_embeds": [1, 4]}
    assert generate("--out", out, "--json") == exits.DONE
    found = json.loads(capsys.readouterr().out)["sampling"]
    assert (found["guidance_scale"], found["options"]) == (3.5, {})


def test_an_option_that_the_model_does_not_have_is_named_with_the_nearest(generate, daemon, tmp_path, capsys):
    assert generate("--out", str(tmp_path / "a.png"), "--option", "shfit=3.5") == exits.MISUSE
    assert "options: shfit=3.5 is not known; give one of shift; did you mean shift?" in capsys.readouterr().err
    assert not daemon.requests(Generate)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["shift"], "'shift': use NAME=VALUE with a finite number, true or false"),
        (["shift=high"], "'shift=high': use NAME=VALUE"),
        (["shift=nan"], "'shift=nan': use NAME=VALUE"),
        (["shift=9223372036854775808"], "'shift=9223372036854775808': use NAME=VALUE"),
        (["=3"], "'=3': use NAME=VALUE"),
        (["shift=1,"], "'': use NAME=VALUE"),
        (["shift=1,shift=2"], "shift is given twice, as 1 and as 2; leave one out"),
        (["shift=1", "shift=2"], "shift is given twice, as 1 and as 2; leave one out"),
    ],
)
def test_options_that_cannot_be_read_are_refused(given, says, capsys):
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(["generate", *(part for each in given for part in ("--option", each))])
    assert ended.value.code == exits.MISUSE
    assert f"argument --option: {says}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["style.safetensors"], "'style.safetensors': use FILE=STRENGTH, such as style.safetensors=0.8"),
        (["a=true"], "'a=true': use FILE=STRENGTH"),
        (["a=nan"], "'a=nan': use FILE=STRENGTH"),
        (["a=1e30"], "'a=1e30': use FILE=STRENGTH, such as style.safetensors=0.8, with a number from -1e+06 to 1e+06"),
        (["=1"], "'=1': use FILE=STRENGTH"),
        (["a=0,0.5"], "'0.5': use FILE=STRENGTH"),
        ([""], "'': use FILE=STRENGTH"),
        (["a=1", "a=2"], "a is given twice, as 1 and as 2; leave one out"),
    ],
)
def test_strengths_of_loras_that_cannot_be_read_are_refused(given, says, capsys):
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(["generate", *(part for each in given for part in ("--lora", each))])
    assert ended.value.code == exits.MISUSE
    assert f"argument --lora: {says}" in capsys.readouterr().err


def test_files_of_loras_may_have_commas_and_equals_signs_in_their_names():
    given = ("--lora", "a,b=1.safetensors=0.8", "--lora", "~/c=d.safetensors=-1,e.safetensors=2")
    expected = {"a,b=1.safetensors": 0.8, "~/c=d.safetensors": -1, "e.safetensors": 2}
    assert build_parser().parse_args(["generate", *given]).lora == expected


def test_options_come_from_flags_or_else_from_the_variable(monkeypatch, capsys):
    def parsed(*given):
        return build_parser().parse_args(["generate", *given]).option

    assert parsed() is None
    assert parsed("--option", "a=1", "--option", "b=-0.5,c=TRUE") == {"a": 1, "b": -0.5, "c": True}
    monkeypatch.setenv("XDITD_OPTIONS", "a=2,d=1e-3")
    assert parsed() == {"a": 2, "d": 0.001}
    assert parsed("--option", "a=1") == {"a": 1}
    monkeypatch.setenv("XDITD_OPTIONS", "a")
    with pytest.raises(SystemExit):
        parsed()
    assert "argument --option: 'a': use NAME=VALUE" in capsys.readouterr().err


def test_several_images_are_numbered_and_checked_before_they_are_made(generate, daemon, files, tmp_path, capsys):
    save_file({"prompt_embeds": torch.zeros(2, 4, 8), "pooled_prompt_embeds": torch.zeros(2, 4)},
              files / "two.safetensors")  # fmt: skip
    two = ["--embeds", str(files / "two.safetensors"), "--out", str(tmp_path / "a.png"), "--json"]
    (tmp_path / "a-1.png").mkdir()
    assert generate(*two) == exits.MISUSE
    assert "a-1.png: is a folder" in capsys.readouterr().err
    assert not daemon.requests(Generate)
    (tmp_path / "a-1.png").rmdir()
    assert generate(*two) == exits.DONE
    names = [str(tmp_path / "a-0.png"), str(tmp_path / "a-1.png")]
    assert json.loads(capsys.readouterr().out)["images"] == names
    assert all(Path(name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert not (tmp_path / "a.png").exists()


def test_files_say_how_they_were_made(generate, files, tmp_path):
    from xditd.client.metadata.reading import read_record

    save_file({"prompt_embeds": torch.zeros(2, 4, 8), "pooled_prompt_embeds": torch.zeros(2, 4)},
              files / "two.safetensors")  # fmt: skip
    given = ["--embeds", str(files / "two.safetensors"), "--seed", "7", "--guidance", "2", "--option", "shift=3"]
    assert generate("--out", str(tmp_path / "a.png"), *given) == exits.DONE
    found = read_record(tmp_path / "a-1.png")
    assert (found.seed, found.index, found.num_images, found.steps, found.guidance) == (7, 1, 2, 1, 2.0)
    assert (found.width, found.height, found.options, found.prompt) == (32, 32, {"shift": 3}, None)
    (transformer,) = found.model.files["transformer"]
    assert transformer.name == "t.safetensors"
    assert transformer.sha256 == hashlib.sha256((files / "t.safetensors").read_bytes()).hexdigest()
    assert found.inputs.embeds.name == "two.safetensors"
    assert str(tmp_path).encode() not in (tmp_path / "a-1.png").read_bytes()
    assert generate("--out", str(tmp_path / "b.webp"), "--no-metadata") == exits.DONE
    with pytest.raises(BadRequest, match="has no record"):
        read_record(tmp_path / "b.webp")


def test_metadata_that_a_jpeg_cannot_hold_do_not_cost_the_picture(generate, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("xditd.client.metadata.containers.MAX_JPEG_BYTES", 10)
    assert generate("--out", str(tmp_path / "a.jpg")) == exits.DONE
    assert "a.jpg: written without metadata: " in capsys.readouterr().err
    assert (tmp_path / "a.jpg").is_file()


def test_a_folder_numbers_its_pictures(generate, tmp_path, capsys):
    out = f"{tmp_path}/new/cats/"
    for number in range(2):
        assert generate("--out", out, "--json") == exits.DONE
        assert json.loads(capsys.readouterr().out)["images"] == [f"{out}0000{number}.png"]
    (tmp_path / "new" / "cats" / "00041.jpg").write_text("")
    (tmp_path / "new" / "cats" / "other-99999.png").write_text("")
    assert generate("--out", str(tmp_path / "new" / "cats"), "--json") == exits.DONE
    assert json.loads(capsys.readouterr().out)["images"] == [f"{out}00042.png"]


def test_a_number_that_another_program_has_taken_meanwhile_is_left_to_it(generate, daemon, tmp_path, capsys):
    answer, out = daemon.answers[Generate], tmp_path / "cats"

    def answer_later(request):
        out.mkdir()
        (out / "00000.png").write_bytes(b"another's")
        return answer(request)

    daemon.answers[Generate] = answer_later
    assert generate("--out", f"{out}/", "--json") == exits.DONE
    assert json.loads(capsys.readouterr().out)["images"] == [f"{out}/00001.png"]
    assert (out / "00000.png").read_bytes() == b"another's"
    assert sorted(path.name for path in out.iterdir()) == ["00000.png", "00001.png"]


def test_strengths_may_follow_a_colon():
    given = ("--lora", "a.safetensors:0.8", "--lora", "~/b:c=d.safetensors:-1,e:0.5=2")
    expected = {"a.safetensors": 0.8, "~/b:c=d.safetensors": -1, "e:0.5": 2}
    assert build_parser().parse_args(["generate", *given]).lora == expected


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


def test_an_empty_variable_is_ignored(monkeypatch):
    monkeypatch.setenv("XDITD_RUNTIME_DIR", "")
    monkeypatch.setenv("XDITD_OUT", "")
    parsed = build_parser().parse_args(["generate"])
    assert (parsed.runtime_dir, parsed.out) == (None, None)


@pytest.fixture
def video_model(monkeypatch):
    """Let the daemon take the files for those of a model of videos."""
    monkeypatch.setattr(sample_facts, "TRANSFORMER", sample_facts.VIDEO)
    monkeypatch.setattr(sample_facts, "VAE", sample_facts.VIDEO_VAE)


def test_frames_become_a_folder_of_pngs_or_an_mp4(generate, daemon, files, tmp_path, capsys, video_model):
    out, low = tmp_path / "new" / "clip", str(files / "t.safetensors")
    assert generate("--frames", "5", "--out", str(out), "--transformer-2", low, "--json") == exits.DONE
    found = json.loads(capsys.readouterr().out)
    assert (found["videos"], found["sampling"]["frames"]) == ([str(out)], 5)
    assert sorted(os.listdir(out)) == [f"frame_0000{number}.png" for number in range(5)]
    (request,) = daemon.requests(Generate)
    assert request.sampling.frames == 5
    assert request.out_image.shape == (1, 3, 5, 32, 32)
    assert request.components == {"transformer": "c1", "transformer_2": "c2", "vae": "c3"}
    av = pytest.importorskip("av")
    latents = tmp_path / "l.safetensors"
    path = tmp_path / "clip.mp4"
    assert generate("--frames", "5", "--fps", "24", "--out", str(path), "--save-latents", str(latents)) == exits.DONE
    with av.open(path) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate) == (5, 24)
    assert load_file(latents)["latents"].shape == (1, 16, 2, 4, 4)


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (("--frames", "5", "--out", "out.png"), exits.MISUSE, ".png is not written; use .mp4, or a path without"),
        (("--frames", "5", "--out", "file"), exits.MISUSE, "is a file; name a folder"),
        (("--frames", "5", "--out", "file/clip"), exits.FAILED, "Not a directory"),
        (("--frames", "5", "--out", "long"), exits.MISUSE, "has frame_00007.png of a video of more than 5 frames"),
        (("--frames", "5", "--out", "clip.mp4"), exits.MISUSE, "PyAV is not installed; pip install 'xditd[video]'"),
        (
            (
                "--frames",
                "2000",
            ),
            exits.MISUSE,
            "use a whole number from 1 to 1025",
        ),
        (("--out", "clip.mp4"), exits.MISUSE, "a video has several frames; give --frames COUNT"),
        (("--fps", "24"), exits.MISUSE, "--fps is of a video; give --frames COUNT"),
    ],
)
def test_videos_that_cannot_be_written_are_refused_before_anything_is_lent(
    generate, daemon, tmp_path, capsys, monkeypatch, more, code, says
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "file").write_text("")
    (tmp_path / "long").mkdir()
    (tmp_path / "long" / "frame_00007.png").write_text("")
    try:
        status = generate(*more)
    except SystemExit as end:  # a value that the parser refuses
        status = end.code
    assert status == code
    assert says in capsys.readouterr().err
    assert daemon.requests(Hello) == []


def test_frames_that_the_model_cannot_have_are_refused(generate, daemon, tmp_path, capsys, video_model):
    assert generate("--frames", "6", "--out", str(tmp_path / "clip")) == exits.MISUSE
    assert "frames: 6 is not 1 more than a multiple of 4, up to 1025; 5 is near" in capsys.readouterr().err
    assert daemon.requests(Generate) == []


def test_frames_that_cannot_be_written_after_all_are_kept_and_named(
    generate, daemon, tmp_path, capsys, monkeypatch, video_model
):
    out, spare = tmp_path / "out", tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setenv("TMPDIR", str(spare))

    def answer(request):
        out.write_text("")  # while the job runs, a file gets the folder's name
        return [Generated(request_id=request.request_id, timings_ms={})]

    daemon.answers[Generate] = answer
    assert generate("--frames", "5", "--out", str(out), "--json") == exits.FAILED
    (kept,) = json.loads(capsys.readouterr().out)["error"]["kept"]
    assert len(os.listdir(kept)) == 5
    assert Path(kept).parent == spare


def test_an_earlier_picture_in_the_models_folder_is_replaced_and_a_file_of_it_is_not(tmp_path):
    for name in ("out.png", "model.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    given = ["generate", "a cat", "--model", str(tmp_path), "--size", "64x64", "-o", str(tmp_path / "out.png")]
    assert Outputs(build_parser().parse_args(given)).images == [tmp_path / "out.png"]
    given += ["--save-latents", str(tmp_path / "model.safetensors")]
    with pytest.raises(BadRequest, match=r"model\.safetensors: is also read here"):
        Outputs(build_parser().parse_args(given))


@pytest.mark.parametrize("given", [["a cat", "--model", "m"], ["--embeds", "e", "--transformer", "t", "--vae", "v"]])
def test_text_tokens_are_of_random_embeddings(capsys, given):
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--text-tokens", "9", *given])
    assert ended.value.code == exits.MISUSE
    assert "--text-tokens is of --random-embeds; leave it out" in capsys.readouterr().err
