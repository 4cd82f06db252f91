"""Every option of ``xditd generate`` with every family: it is an argument of the call, or it is refused by name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import family_tables
import pytest
from family_entries import FamilyEntry

from xditd.client.cli import generate_prompt
from xditd.client.cli.main import build_parser
from xditd.client.pipeline import pipeline
from xditd.client.pipeline.pipeline import Pipeline
from xditd.client.pipeline.sources import Source
from xditd.ipc.errors import BadRequest
from xditd.ipc.settings.generation import GenerateFlags
from xditd.ipc.settings.setting import settings_of

ENTRIES = family_tables.of_kind("transformer")
facts_of = family_tables.transformer_facts

OPTIONS: dict[str, tuple[tuple[str, ...], str, Any]] = {
    "negative_prompt": (("--negative-prompt", "a dog"), "negatives", ("a dog",)),
    "image": (("--image", "i.png"), "image", Path("i.png")),
    "mask": (("--mask", "m.png"), "mask", Path("m.png")),
    "last_image": (("--last-image", "l.png"), "last_image", Path("l.png")),
    "references": (("--reference", "a.png", "--reference", "b.png"), "references", (Path("a.png"), Path("b.png"))),
    "control_images": (("--control-image", "c.png"), "control", Path("c.png")),
    "strength": (("--strength", "0.5"), "strength", 0.5),
    "frames": (("--frames", "5"), "frames", 5),
    "steps": (("--steps", "3"), "steps", 3),
    "guidance": (("--guidance", "2.5"), "guidance", 2.5),
    "seed": (("--seed", "7"), "seed", 7),
    "num_images": (("-n", "3"), "num_images", 3),
    "option": (("--option", "shift=3"), "options", {"shift": 3}),
    "step_cache": (("--step-cache", "0.1"), "step_cache", 0.1),
    "size": (("--size", "64x32"), "width", 64),
    "lora": (("--lora", "x.safetensors:0.8"), "loras", (("x.safetensors", 0.8, "transformer"),)),
    "lora_2": (("--lora-2", "x.safetensors:0.8"), "loras", (("x.safetensors", 0.8, "transformer_2"),)),
    "prompt_2": (("--prompt-2", "a dog"), "prompts_2", ("a dog",)),
    "max_sequence_length": (("--max-sequence-length", "16"), "max_sequence_length", 16),
}
"""The flags, the field of the call that they set, and its value."""

ARGUMENT = {"option": "options", "control_images": "control"}
"""Arguments of the library that have another name than their setting."""

ELSEWHERE = {
    "runtime_dir", "json", "log_level", "verbose",
    "transformer", "transformer_2", "vae", "device", "compute_dtype", "model",
    "text_encoders", "tokenizers", "image_encoder", "scheduler", "variant",
    "embeds", "random_embeds", "text_tokens", "fps", "out", "save_latents", "no_metadata", "from_file",
}  # fmt: skip
"""Settings of how a model is opened, and of what is read and written."""


def test_the_table_has_every_option() -> None:
    assert set(OPTIONS) | ELSEWHERE == {each.name for each in settings_of(GenerateFlags)}
    assert not set(OPTIONS) & ELSEWHERE


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that reach the point where their pictures are read and their words encoded."""
    found: list[Any] = []

    class Runner:
        def __init__(self, *_: object) -> None: ...

        def start(self, call: Any, **_: object) -> object:
            found.append(call)
            return object()

    monkeypatch.setattr(pipeline, "Runner", Runner)
    return found


def opened(entry: FamilyEntry) -> Pipeline:
    """A pipeline with the facts of a family, and nothing lent."""
    facts = SimpleNamespace(family=entry.family, transformer=facts_of(entry))
    parts = {"transformer": SimpleNamespace(facts=facts)}
    loans = SimpleNamespace(lend=lambda: parts, check=lambda _parts: None, are_live=True)
    found = Pipeline(None, Source(name="x", parts={}), loans, owns_client=False)  # type: ignore[arg-type]
    found.load()
    return found


@pytest.mark.parametrize("name", sorted(OPTIONS))
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.family}-{entry.variant}")
def test_an_option_is_in_the_call_or_refused_by_name(entry: FamilyEntry, name: str, calls: list[Any]) -> None:
    flags, field, value = OPTIONS[name]
    parsed = build_parser().parse_args(["generate", "a cat", "--model", "x", *flags])
    pipe = opened(entry)
    argument = ARGUMENT.get(name, name)
    refusal = pipe.arguments.get(argument, "")
    arguments = generate_prompt.arguments_of(parsed, pipe)
    if refusal:
        with pytest.raises(BadRequest) as error:
            pipe.start(parsed.prompt, **arguments)
        assert f"cannot honour {argument}" in error.value.detail
        assert refusal in error.value.detail
        assert calls == []
        return
    pipe.start(parsed.prompt, **arguments)
    (call,) = calls
    assert call.prompts == ("a cat",)
    assert getattr(call, field) == value
    if name == "size":
        assert call.height == 32


def test_what_is_not_given_is_the_models_own(calls: list[Any]) -> None:
    pipe = opened(ENTRIES[0])
    parsed = build_parser().parse_args(["generate", "a cat", "--model", "x"])
    assert generate_prompt.arguments_of(parsed, pipe) == {}


def test_flags_of_opening_are_those_of_the_library() -> None:
    flags = ["--transformer=t", "--transformer-2=u", "--vae=v", "--text-encoder=c", "--text-encoder=d",
             "--tokenizers=k", "--image-encoder=i", "--scheduler=s", "--variant=fp16", "--compute-dtype=float16",
             "--device=cuda", "--runtime-dir=r"]  # fmt: skip
    found = generate_prompt.opening(build_parser().parse_args(["generate", "a cat", *flags]))
    assert found == {
        "source": None, "transformer": Path("t"), "transformer_2": Path("u"), "vae": Path("v"),
        "text_encoders": (Path("c"), Path("d")), "tokenizers": Path("k"), "image_encoder": Path("i"),
        "scheduler": Path("s"), "variant": "fp16", "compute_dtype": "float16", "device": "cuda",
        "runtime_dir": Path("r"),
    }  # fmt: skip
