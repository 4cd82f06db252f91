"""Tokenizers of lent files: what is built, and hostile folders, which are refused by name and leave nothing behind."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import tokenizer_folders

from xditd.gpu_workers.models.tokenizer_building import build_tokenizer, refuse_foreign_errors
from xditd.ipc.errors import BadCheckpoint, Unsupported, XditdError

Files = dict[str, bytes]
PICKLE = b"\x80\x04cos\nsystem\n(S'id'\ntR."
"""What pickle would run as ``os.system("id")``."""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, which has to be empty again after each test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tokenizer_folders.save(tokenizer_folders.t5_tokenizer(), tmp_path_factory.mktemp("t5"))
    return {each.name: each.read_bytes() for each in folder.iterdir()}


def changed(files: Files, name: str, **keys: object) -> Files:
    return {**files, name: json.dumps({**json.loads(files.get(name, b"{}")), **keys}).encode()}


def test_ids_are_those_of_the_class_itself(t5: Files, temporary: Path, tmp_path: Path) -> None:
    from transformers import T5Tokenizer

    built = build_tokenizer(t5, "t5")
    for name, content in t5.items():
        (tmp_path / name).write_bytes(content)
    own = T5Tokenizer.from_pretrained(tmp_path)
    for text in tokenizer_folders.PROMPTS:
        assert built.tokenizer(text).input_ids == own(text).input_ids
    assert (built.class_name, built.vocabulary) == ("T5Tokenizer", len(own))
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("template", ["of the processor", "of the old file", None])
def test_the_chat_template_is_that_of_the_processor(template: str | None, tmp_path: Path) -> None:
    """Processors prefer other files than their tokenizers."""
    from transformers import ProcessorMixin

    folder = tokenizer_folders.save(tokenizer_folders.mistral_tokenizer(), tmp_path / "tokenizer")
    (folder / "chat_template.jinja").write_text("of both")
    given: dict[str, str] = {"processor_class": "PixtralProcessor"}
    if template is not None:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": "of the old file"}))
    if template == "of the processor":
        given["chat_template"] = template
    (folder / "processor_config.json").write_text(json.dumps(given))
    built = build_tokenizer({each.name: each.read_bytes() for each in folder.iterdir()}, "mine")
    own, _ = ProcessorMixin.get_processor_dict(folder)
    assert built.class_name == "PixtralProcessor"
    assert built.tokenizer.chat_template == own["chat_template"] == (template or "of both")


def test_paths_in_a_configuration_are_not_read(t5: Files, tmp_path: Path) -> None:
    other = tmp_path / "vocab.txt"
    other.write_text("stolen")
    paths = {"vocab_file": str(other), "tokenizer_file": str(other), "special_tokens_map_file": "/somewhere/map.json"}
    found = build_tokenizer(changed(t5, "tokenizer_config.json", name_or_path="/somewhere", **paths), "t5")
    assert found.tokenizer("a cat").input_ids == build_tokenizer(t5, "t5").tokenizer("a cat").input_ids


@pytest.mark.parametrize(
    ("error", "says", "change"),
    [
        (Unsupported, "names code of its own by auto_map",
         lambda t5: changed(t5, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})),
        (Unsupported, "names code of its own by trust_remote_code",
         lambda t5: changed(t5, "tokenizer_config.json", extra={"trust_remote_code": True})),
        (Unsupported, "sets gguf_file", lambda t5: changed(t5, "tokenizer_config.json", gguf_file="model.gguf")),
        (Unsupported, "names the class 'builtins.eval'",
         lambda t5: changed(t5, "tokenizer_config.json", tokenizer_class="builtins.eval")),
        (Unsupported, "processor_config.json names the class 'Pipeline'",
         lambda t5: changed(t5, "processor_config.json", processor_class="Pipeline")),
        (BadCheckpoint, "names no tokenizer_class",
         lambda t5: changed(t5, "tokenizer_config.json", tokenizer_class=None)),
        (BadCheckpoint, "lacks tokenizer_config.json", lambda t5: {"tokenizer.json": t5["tokenizer.json"]}),
        (BadCheckpoint, "lacks a vocabulary", lambda t5: {"tokenizer_config.json": t5["tokenizer_config.json"]}),
        (BadCheckpoint, "tokenizer.json is not JSON", lambda t5: {**t5, "tokenizer.json": b'{"model": '}),
        (BadCheckpoint, "tokenizer.json is not JSON", lambda t5: {**t5, "tokenizer.json": PICKLE}),
        (BadCheckpoint, "tokenizer_config.json is not JSON",
         lambda t5: {**t5, "tokenizer_config.json": b"[" * 200_000}),
        (BadCheckpoint, "tokenizer_config.json holds a list", lambda t5: {**t5, "tokenizer_config.json": b"[]"}),
        (BadCheckpoint, "chat_template.jinja is not a text", lambda t5: {**t5, "chat_template.jinja": b"\xff\xfe\x00"}),
        (BadCheckpoint, "levels",
         lambda t5: changed(t5, "tokenizer_config.json", deep=json.loads("[" * 90 + "]" * 90))),
        (BadCheckpoint, "transformers cannot make a T5Tokenizer", lambda t5: {**t5, "tokenizer.json": b"{}"}),
        (BadCheckpoint, "transformers cannot make a T5Tokenizer",
         lambda t5: changed(t5, "tokenizer.json", model={"type": "Unigram", "vocab": [], "unk_id": 7})),
        (BadCheckpoint, "transformers cannot make a T5Tokenizer",
         lambda t5: changed(t5, "tokenizer_config.json", extra_ids="many")),
    ],
)  # fmt: skip
def test_hostile_folders_are_refused_by_name(
    t5: Files, temporary: Path, error: type[XditdError], says: str, change: object
) -> None:
    with pytest.raises(error, match=f"^mine: .*{says}"):
        build_tokenizer(change(t5), "mine")  # type: ignore[operator]
    assert not list(temporary.iterdir())


def test_equal_files_are_built_once(t5: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    from xditd.gpu_workers.models import tokenizer_building

    built: list[str] = []

    def build(files: Files, label: str) -> object:
        built.append(label)
        return build_tokenizer(files, label)

    monkeypatch.setattr(tokenizer_building, "build_tokenizer", build)
    cache = tokenizer_building.TokenizerCache()
    first = cache.build(t5, "first")
    assert cache.build(dict(reversed(t5.items())), "second") is first
    assert cache.build(changed(t5, "tokenizer_config.json", model_max_length=7), "third") is not first
    assert built == ["first", "third"]
    for number in range(8):
        cache.build(changed(t5, "tokenizer_config.json", model_max_length=100 + number), "others")
    assert cache.build(t5, "again") is not first


def test_a_failing_template_is_named_without_the_prompt() -> None:
    named = pytest.raises(BadCheckpoint, match=r"^mine: transformers cannot tokenize: ValueError$")
    with named, refuse_foreign_errors("mine", "tokenize", has_prompts=True):
        raise ValueError("a secret cat")

    class PanicException(BaseException):
        """As Rust's code in tokenizers raises it."""

    named = pytest.raises(BadCheckpoint, match="mine: transformers cannot build: PanicException: index 7")
    with named, refuse_foreign_errors("mine", "build"):
        raise PanicException("index 7")
    with pytest.raises(KeyboardInterrupt), refuse_foreign_errors("mine", "build"):
        raise KeyboardInterrupt
