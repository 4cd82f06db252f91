"""``shapes`` on every path: each picture shows what diffusers' pipeline draws of the same sentence, and differs little.

The errors are those of pictures in [-1, 1], by the norm of diffusers' float32 picture; ``pytest -rP`` shows them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lora_files
import pytest
import torch
from running_daemon import RunningDaemon
from shapes.draw import PIXELS
from shapes.judged_formats import start_drawing
from shapes.judged_lora import STRENGTHS, count_forms
from shapes.original import write_originals
from shapes.packed import write_packed
from shapes.samplers import GUIDANCE, daemon_sampler, open_pipeline, pipeline_sampler
from shapes.scenes import Scene, Thing
from shapes.words import Request
from shapes_files import SEED, STEPS, TEXTS, draw_plain, shapes_folder, shown, write_float32

from xditd.client import Client, GenerationJob, Pipeline, accelerate
from xditd.client.demo.shapes_model import SENTENCES, differs

EXACT = 1e-5
"""Of float32 on other ranks: sums in another order, through eight steps and the VAE."""

STEP_CACHE = 0.3
"""Threshold at which one of the eight steps or more is not computed."""

HALF_DRAWN = 1e-3
"""Of forms between filled and outline, which sums in another order move further than others."""

OUTLINED = (("circle", "blue"), ("heart", "purple"), ("square", "red"))
"""Forms with room for an outline, and their colours."""

Check = Callable[..., None]


@pytest.fixture(scope="module")
def folder() -> Path:
    return shapes_folder()


@pytest.fixture(scope="module")
def exact(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in float32."""
    return write_float32(folder, tmp_path_factory.mktemp("shapes") / "exact")


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The single files in original names, float32."""
    return write_originals(folder, tmp_path_factory.mktemp("originals"), torch.float32)


@pytest.fixture(scope="module")
def plain(exact: Path) -> Any:
    """diffusers' pipeline in this process."""
    return open_pipeline(exact)


@pytest.fixture(scope="module")
def pictures(plain: Any) -> list[torch.Tensor]:
    """What diffusers draws of each sentence."""
    return [draw_plain(plain, at) for at in range(len(TEXTS))]


@pytest.fixture
def check(pictures: list[torch.Tensor], record_property: Callable[[str, object], None]) -> Check:
    """Compare a picture with diffusers' own: what it shows, and its error."""

    def compare(image: torch.Tensor, bar: float, expected: torch.Tensor | None = None, *, at: int = 0) -> None:
        expected = pictures[at] if expected is None else expected
        error = float((image - expected).norm() / expected.norm())
        record_property("relative_error", error)
        print(f"relative error {error:.2g} of at most {bar:g}; shows {shown(image)}")
        assert shown(image) == shown(expected)
        assert error <= bar

    return compare


@pytest.fixture(scope="module")
def lent(daemon: RunningDaemon, files: Mapping[str, Path], exact: Path) -> Iterator[SimpleNamespace]:
    """A client with the single files on loan to two ranks, and the sentences' conditioning, made in the workers."""
    with daemon.connect() as client:
        transformer, vae = client.lend(files["transformer"]), client.lend(files["vae"])
        encoders = {name: client.lend(exact / name) for name in ("text_encoder", "text_encoder_2")}
        tokenizers = {name: client.lend_tokenizer(exact / name) for name in ("tokenizer", "tokenizer_2")}
        words = [
            client.encode_prompt(
                transformer, text, encoders=encoders, tokenizers=tokenizers, options={"max_sequence_length": 64}
            )
            for text in TEXTS
        ]
        yield SimpleNamespace(client=client, transformer=transformer, vae=vae, words=words)


def draw(client: Client, transformer: Any, vae: Any, words: Any) -> torch.Tensor:
    return start(client, transformer, vae, words).result().image[0].float().cpu()


def start(client: Client, transformer: Any, vae: Any, words: Any, **more: Any) -> GenerationJob:
    job: GenerationJob = start_drawing(
        client, transformer, words, vae, steps=STEPS, guidance=GUIDANCE, seed=SEED, **more
    )
    return job


def test_plain_pictures_show_what_is_asked_for(pictures: list[torch.Tensor]) -> None:
    for picture, sentence in zip(pictures, SENTENCES, strict=False):
        things, _, _ = shown(picture)
        read = {"things": [{"colour": colour, "form": form} for colour, form, _, _ in things]}
        assert not differs(sentence, read)


@pytest.mark.parametrize("at", range(len(TEXTS)))
def test_two_ranks(lent: SimpleNamespace, check: Check, at: int) -> None:
    check(draw(lent.client, lent.transformer, lent.vae, lent.words[at]), EXACT, at=at)


def test_one_rank(one_worker: RunningDaemon, lent: SimpleNamespace, files: Mapping[str, Path], check: Check) -> None:
    with one_worker.connect() as client:
        transformer, vae = client.lend(files["transformer"]), client.lend(files["vae"])
        check(draw(client, transformer, vae, lent.words[0]), EXACT)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("layout", ["ring=2", "ulysses=2,ring=2", "cfg=2,ulysses=2"])
def test_a_layout(
    start_daemon: Callable[..., RunningDaemon],
    lent: SimpleNamespace,
    files: Mapping[str, Path],
    check: Check,
    layout: str,
) -> None:
    daemon = start_daemon(2 ** layout.count("="), flags=["--layout", layout])
    daemon.wait_ready()
    with daemon.connect() as client:
        transformer, vae = client.lend(files["transformer"]), client.lend(files["vae"])
        check(draw(client, transformer, vae, lent.words[0]), EXACT)
    daemon.stop()


@pytest.mark.parametrize(("packed_format", "bar"), [("fp8", 0.04), ("int8", 0.01), ("q8_0", 0.01)])
def test_packed_weights(
    lent: SimpleNamespace, folder: Path, tmp_path: Path, check: Check, packed_format: str, bar: float
) -> None:
    path = write_packed(folder, tmp_path, packed_format, torch.float32)
    with lent.client.lend(path, compute_dtype="float32") as loan:
        assert loan.lent_bytes < lent.transformer.lent_bytes / 2
        check(draw(lent.client, loan, lent.vae, lent.words[0]), bar)


def test_a_lora_as_a_branch(lent: SimpleNamespace, exact: Path, pictures: list[torch.Tensor], check: Check) -> None:
    baked = open_pipeline(exact)
    shapes = lora_files.matrices(baked.transformer.state_dict(), "to_q", "to_out.0", "proj_mlp", "net.2")
    lora = lora_files.make(shapes, "diffusers", seed=5, size=0.05)
    lora.bake_into(baked.transformer, 0.8)
    expected = draw_plain(baked)
    assert (expected - pictures[0]).norm() > 100 * EXACT * expected.norm()
    with lent.client.lend_lora(lora.tensors) as loan:
        image = draw(lent.client, lent.transformer.with_loras([(loan, 0.8)]), lent.vae, lent.words[0])
        check(image, EXACT, expected)


def test_the_lora_of_outlines_at_several_strengths(
    lent: SimpleNamespace, folder: Path, exact: Path, record_property: Callable[[str, object], None]
) -> None:
    """The judge sees filled forms become outlines, in the same pictures as diffusers draws with the same file."""
    lora = folder / "loras" / "outlines.safetensors"
    things = [Thing(form, colour, "large", 4, 0.5, 0.5, 0.15) for form, colour in OUTLINED]
    texts = [f"a large {each.colour} {each.form} on a white background" for each in things]
    requests = [Request(text, "en", Scene((each,), "plain", "white")) for text, each in zip(texts, things, strict=True)]
    plain = open_pipeline(exact)
    plain.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name="outlines")
    counts = {}
    with Pipeline.open(exact, client=lent.client) as pipe, torch.no_grad():
        unchanged = daemon_sampler(pipe, steps=STEPS)(texts, SEED)
        for strength in STRENGTHS:
            plain.set_adapters("outlines", strength)
            expected = pipeline_sampler(plain, steps=STEPS)(texts, SEED)
            images = daemon_sampler(pipe, steps=STEPS, loras=[(lora, strength)])(texts, SEED)
            error = float((images - expected).norm() / expected.norm())
            record_property(f"relative_error_{strength}", error)
            assert error <= HALF_DRAWN
            assert torch.equal(images, unchanged) is (strength == 0)
            counts[strength] = count_forms(requests, images)
    assert counts[0.0] == {"objects": len(things), "filled": len(things), "outlines": 0}
    assert counts[1.0] == {"objects": len(things), "filled": 0, "outlines": len(things)}


def test_a_step_cache(lent: SimpleNamespace, check: Check) -> None:
    result = start(lent.client, lent.transformer, lent.vae, lent.words[0], step_cache=STEP_CACHE).result()
    assert result.reused_steps > 0
    check(result.image[0].float().cpu(), 0.08)


def test_words(lent: SimpleNamespace, exact: Path, plain: Any, check: Check) -> None:
    """In one call, with the folder's own scheduler and as many text tokens as ``FluxPipeline`` has."""
    with Pipeline.open(exact, client=lent.client) as pipe:
        result = pipe(TEXTS[1], steps=STEPS, guidance=GUIDANCE, height=PIXELS, width=PIXELS, seed=SEED)
    check(result.generation.image[0].float().cpu(), EXACT, draw_plain(plain, 1, text_tokens=512))


def test_the_folder_as_it_is_published(lent: SimpleNamespace, folder: Path, check: Check) -> None:
    """In bfloat16."""
    with Pipeline.open(folder, client=lent.client) as pipe:
        result = pipe(conditioning=lent.words[0], steps=STEPS, guidance=GUIDANCE, height=PIXELS, width=PIXELS,
                      seed=SEED)  # fmt: skip
    check(result.generation.image[0].float().cpu(), 0.03)


def test_accelerate(lent: SimpleNamespace, exact: Path, check: Check) -> None:
    pipe = open_pipeline(exact)
    with accelerate(pipe, client=lent.client) as fast:
        check(draw_plain(pipe), EXACT)
        assert fast.calls["transformer"] == STEPS


def test_the_judge_compares_formats_and_paths(daemon: RunningDaemon, folder: Path, tmp_path: Path) -> None:
    """Of the first sentences, each with one object."""
    command = [sys.executable, "-m", "shapes.judge", str(folder), "--formats", "q8_0", "step_cache", "eager"]
    ran = subprocess.run(
        [*command, "--sentences", "2", "--steps", str(STEPS), "--json", str(tmp_path / "formats.json")],
        env=os.environ | {"XDITD_RUNTIME_DIR": str(daemon.runtime_dir), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    rows = json.loads((tmp_path / "formats.json").read_text())
    assert list(rows) == ["diffusers", "q8_0", "step_cache", "eager"]
    assert {row["same_reading_percent"] for row in rows.values()} == {100.0}
    assert all(0 < row["relative_error"] < 0.1 for name, row in rows.items() if name != "diffusers")
    assert all(row["paths_so_far"] == [] for row in rows.values())  # no graphs, and nothing compiled, on CPUs
