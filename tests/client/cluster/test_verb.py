"""``xditd cluster`` before it starts anything."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from xditd.client.cli.main import main
from xditd.client.cluster import joining
from xditd.client.metadata.file_hashes import describe
from xditd.client.metadata.reading import read_record
from xditd.client.metadata.record import InputsRecord, ModelRecord, Record
from xditd.ipc.errors import BadRequest


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    for name in ("RAY_USE_TLS", "XDITD_CLUSTER"):
        monkeypatch.delenv(name, raising=False)


SUBMIT = ("submit", "--address", "127.0.0.1:1", "--transformer", "t", "--embeds", "e")


def join(tmp_path: Path, *flags: str) -> list[str]:
    return ["cluster", "join", "--address", "127.0.0.1:6379", "--search-path", str(tmp_path), *flags]


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[joining.Membership]:
    """What would have been joined."""
    found: list[joining.Membership] = []
    monkeypatch.setattr(joining, "require_ray", lambda: None)
    monkeypatch.setattr(joining, "join", lambda membership: found.append(membership) or True)
    return found


def test_joining_asks_for_consent(tmp_path, joined, capsys):
    with pytest.raises(SystemExit) as ended:
        main(join(tmp_path))
    assert ended.value.code == 2
    assert "can run any code as this user" in capsys.readouterr().err
    assert joined == []
    assert main(join(tmp_path, "--accept-remote-code", "--name", "a")) == 0
    assert "can run any code as this user" in capsys.readouterr().err
    (membership,) = joined
    assert (membership.name, membership.node_ip, membership.is_head) == ("a", "127.0.0.1", False)


def test_joining_asks_for_a_token_and_tls(tmp_path, joined, capsys, monkeypatch):
    flags = ["--accept-remote-code", "--head", "--address", "10.1.2.3:6379", "--json"]
    assert main(join(tmp_path, *flags)) == 1
    assert "RAY_USE_TLS" in json.loads(capsys.readouterr().out)["error"]["message"]
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert main(join(tmp_path, "--accept-remote-code")) == 1
    assert "RAY_AUTH_MODE" in capsys.readouterr().err
    assert joined == []


def test_what_ray_prints_is_no_part_of_the_output(tmp_path, joined, capsys, monkeypatch):
    """It prints errors of the cluster from a thread of its own."""

    def join_beside_errors(_: joining.Membership) -> bool:
        print("(raylet) Raylet is terminated.")
        return True

    monkeypatch.setattr(joining, "join", join_beside_errors)
    assert main(join(tmp_path, "--accept-remote-code", "--name", "a", "--json")) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"host": "a", "has_left": True}
    assert "(raylet) Raylet is terminated." in printed.err


def test_hash_prints_the_content_hash_of_a_file(tmp_path, capsys):
    file = tmp_path / "a"
    file.write_bytes(b"1")
    assert main(["cluster", "hash", str(file), "--json"]) == 0
    digest = "blake2b:" + hashlib.blake2b(b"1", digest_size=32).hexdigest()
    assert json.loads(capsys.readouterr().out) == {"file": str(file), "content": digest}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["status"], "--address IP:PORT is needed"),
        (["hash"], "hash FILE is needed"),
        (["status", "file"], "status takes no FILE"),
        (["joni"], "did you mean"),
        (["join", "--address", "127.0.0.1:1"], "--search-path"),
        (["submit", "--address", "127.0.0.1:1"], "submit: --transformer is needed"),
        ([*SUBMIT], "submit: --vae or --save-latents is needed"),
        ([*SUBMIT, "--vae", "v", "--lora", "style.safetensors=0.8"], "--lora is for `xditd generate` on one host"),
        ([*SUBMIT, "--vae", "v", "--fps", "16"], "submit: --fps is of a video; give --frames COUNT"),
        ([*SUBMIT, "--vae", "v", "--device", "cuda"], "--device is for `xditd generate` on one host"),
    ],
)
def test_misuse_is_named(arguments, text, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["cluster", *arguments])
    assert ended.value.code == 2
    assert text in capsys.readouterr().err


def test_a_video_of_two_transformers_is_submitted(tmp_path, monkeypatch, capsys):
    """All flags of a video reach the cluster's client, and its result is written as a video."""
    from xditd.client.cluster import client as cluster_client

    given = {}

    class Cluster:
        def __init__(self, address):
            given["address"] = address

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def generate(self, transformer, conditioning, **more):
            given.update(more, transformer=transformer, conditioning=conditioning)
            return self

        def result(self):
            return cluster_client.ClusterResult(
                torch.zeros(1, 16, 2, 2, 2), torch.zeros(1, 3, 5, 16, 16), {}, 5, 0, "there", 1,
                record=Record(
                    version="1", seed=5, width=16, height=16, frames=5, steps=4, guidance=3.5,
                    model=ModelRecord(family="wan"), inputs=InputsRecord(conditioning=True),
                ),
            )  # fmt: skip

    monkeypatch.setattr(joining, "require_ray", lambda: None)
    monkeypatch.setattr(cluster_client, "ClusterClient", Cluster)
    embeds, out = tmp_path / "e.safetensors", tmp_path / "clip"
    save_file({"prompt_embeds": torch.zeros(1, 4, 8)}, embeds)
    flags = ["--embeds", str(embeds), "--transformer", "high", "--transformer-2", "low", "--vae", "v", "--frames", "5"]
    command = ["cluster", "submit", "--address", "127.0.0.1:1", *flags, "--size", "16x16", "-o", str(out), "--json"]
    assert main(command) == 0
    assert (given["transformer"], given["transformer_2"], given["vae"], given["frames"]) == ("high", "low", "v", 5)
    assert json.loads(capsys.readouterr().out)["videos"] == [str(out)]
    assert len(list(out.iterdir())) == 5
    found = read_record(out / "frame_00003.png")
    assert (found.seed, found.steps, found.guidance, found.frames) == (5, 4, 3.5, 5)
    files = {role: [each.name for each in files] for role, files in found.model.files.items()}
    assert files == {"transformer": ["high"], "transformer_2": ["low"], "vae": ["v"]}
    assert (found.model.family, found.inputs.conditioning) == ("wan", False)
    assert found.inputs.embeds == describe(embeds)
    assert main([*command, "--no-metadata"]) == 0
    with pytest.raises(BadRequest, match=r"frame_00003\.png"):
        read_record(out / "frame_00003.png")


def test_a_name_is_joined_once_on_a_host_until_that_join_ends():
    refused = pytest.raises(BadRequest, match="name 'a': another `xditd cluster join` on this host has it")
    with joining._claim("a"), joining._claim("b" * 300), refused:
        joining._claim("a")
    joining._claim("a").close()


def test_a_search_path_has_existing_folders(tmp_path):
    assert joining.folders(f"{tmp_path}:{tmp_path}") == (tmp_path, tmp_path)
    with pytest.raises(BadRequest, match="does not exist on this host"):
        joining.folders(f"{tmp_path}/none")
