"""``--control`` of ``xditd generate``: how it is read, and what is refused before anything is lent."""

import argparse

import pytest

torch = pytest.importorskip("torch")
from PIL import Image  # noqa: E402

from xditd.client.cli import control_flags, exits  # noqa: E402
from xditd.client.cli.control_flags import ControlFlag, parse  # noqa: E402
from xditd.client.cli.main import build_parser, main  # noqa: E402
from xditd.ipc.errors import BadRequest  # noqa: E402
from xditd.ipc.requests import Hello  # noqa: E402


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n.safetensors=p.png", [ControlFlag("n.safetensors", "p.png")]),
        ("n.safetensors=p.png@0.6", [ControlFlag("n.safetensors", "p.png", 0.6)]),
        ("n=p.png@-0.5:start=0.1:end=0.8:mode=2", [ControlFlag("n", "p.png", -0.5, 0.1, 0.8, 2)]),
        ("n=p.png:mode=0", [ControlFlag("n", "p.png", mode=0)]),
        ("n=p.png,m=q.png@2:end=0.5", [ControlFlag("n", "p.png"), ControlFlag("m", "q.png", 2.0, end=0.5)]),
        ("a=b/n=a@2.png", [ControlFlag("a=b/n", "a@2.png")]),  # names of files with these signs
        ("n=a,b.png@0.6:mode=1,m=q:2.png", [ControlFlag("n", "a,b.png", 0.6, mode=1), ControlFlag("m", "q:2.png")]),
    ],
)
def test_files_and_options_are_told_apart(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("n.safetensors", "use FILE=PICTURE"),
        ("=p.png", "use FILE=PICTURE"),
        ("n=@0.5", "use FILE=PICTURE"),
        ("n=p.png@1e9", "the scale 1e[+]09 is not from"),
        ("n=p.png:start=1.5", "start=1.5 is not a share of the steps, from 0 to 1"),
        ("n=p.png:end=nan", "end=nan is not a share"),
        ("n=p.png:start=0.8:end=0.2", "the start is after the end"),
        ("n=p.png:mode=1.5", "mode=1.5 is not a whole number"),
        ("n=p.png:mode=-1", "mode=-1 is not a whole number"),
        ("n=p.png:mode=1:mode=2", "mode is given twice"),
    ],
)
def test_what_cannot_be_is_named(text, says):
    with pytest.raises(argparse.ArgumentTypeError, match=says):
        parse(text)


def test_it_may_be_repeated_and_has_a_variable(monkeypatch):
    monkeypatch.setenv("XDITD_CONTROLS", "n=p.png,m=q.png")
    both = build_parser().parse_args(["generate"]).control
    assert both == [ControlFlag("n", "p.png"), ControlFlag("m", "q.png")]
    given = build_parser().parse_args(["generate", "--control", "a=b.png", "--control", "c=d.png@0.5"]).control
    assert given == [ControlFlag("a", "b.png"), ControlFlag("c", "d.png", 0.5)]
    monkeypatch.delenv("XDITD_CONTROLS")
    assert build_parser().parse_args(["generate"]).control is None


def test_a_picture_has_the_numbers_of_diffusers_image_processor(tmp_path):
    from diffusers.image_processor import VaeImageProcessor

    path = tmp_path / "p.png"
    pixels = torch.randint(0, 256, (32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    picture = Image.frombytes("RGB", (48, 32), bytes(pixels.flatten().tolist()))
    picture.save(path)
    parsed = argparse.Namespace(control=[ControlFlag("n", str(path))], vae="v", size=(48, 32))
    (found,) = control_flags.read_pictures(parsed)
    assert torch.equal(found, VaeImageProcessor().preprocess(picture))


@pytest.mark.parametrize(
    ("picture", "more", "says"),
    [
        ("none.png", (), "--control: none.png: no such file or folder"),
        ("text.png", (), "--control: text.png: no picture that can be read"),
        ("depth.png", (), "--control: depth.png: pixels of Pillow's mode I;16, which have no 256 levels to convert"),
        ("small.png", (), "has 16x16 pixels, and the result 32x32; resize it, or give --size 16x16"),
        ("good.png", ("--out", "good.png"), "good.png: is also read here"),
    ],
)
def test_pictures_are_checked_before_anything_is_lent(
    daemon, folder, tmp_path, monkeypatch, capsys, picture, more, says
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    for name, side in (("small.png", 16), ("good.png", 32)):
        Image.new("RGB", (side, side)).save(tmp_path / name)
    Image.new("I;16", (32, 32), 40_000).save(tmp_path / "depth.png")  # 16 bits, which Pillow would cut at 255
    flags = ["--transformer", "t", "--vae", "v", "--random-embeds", "1", "--size", "32x32", "--out", "out.png"]
    command = ["generate", "--runtime-dir", str(folder), *flags, "--control", f"n={picture}", *more]
    assert main(command) == exits.MISUSE
    assert says in capsys.readouterr().err
    assert daemon.requests(Hello) == []


def test_it_needs_a_vae():
    parsed = argparse.Namespace(control=[ControlFlag("n", "p")], vae=None, size=(8, 8))
    with pytest.raises(BadRequest, match="are encoded by the VAE; give --vae FILE"):
        control_flags.read_pictures(parsed)
