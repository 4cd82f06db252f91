"""Build a tokenizer or a processor of transformers from lent files: from JSON and text alone, and by named classes.

No code of a folder is run: a configuration that names any is refused, and so is a class that is not listed here. The
files are written to a folder of this process alone, mode 0700, which is removed once they are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from xditd.ipc.errors import BadCheckpoint, OutOfMemory, Unsupported, XditdError
from xditd.ipc.name_lists import listed
from xditd.ipc.tokenizer_files import CONFIG, PIECES, WHOLE

TOKENIZERS: Final = ("CLIPTokenizer", "T5Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast")
"""Classes of tokenizers, without the suffix of their old names."""

_IMAGE_PROCESSORS: Final = {
    "Qwen2VLProcessor": "Qwen2VLImageProcessor",
    "Qwen2_5_VLProcessor": "Qwen2VLImageProcessor",
    "PixtralProcessor": None,
}
PROCESSORS: Final = tuple(_IMAGE_PROCESSORS)
"""Classes of processors. Of one, its tokenizer and its image processor are made: the class itself needs torchvision for
videos, and gives texts and pictures to these two. Pixtral's is used for texts alone."""

_FAST: Final = "Fast"
_WHOLE_CLASSES: Final = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Other names of a listed class."""
_CODE: Final = frozenset({"auto_map", "custom_pipelines", "trust_remote_code"})
"""Keys of configurations that name code to import."""
_OBJECTS: Final = frozenset({"init_inputs", "tokenizer_object", "gguf_file", "backend_tokenizer"})
"""Keys that would replace what is read of the files."""
_OLD_TEMPLATE: Final = "chat_template.json"
"""Which processors read in place of ``chat_template.jinja``; tokenizers do not read it."""
_PROCESSOR_CONFIGS: Final = ("processor_config.json", "preprocessor_config.json")
_MAX_DEPTH: Final = 64
_MOST_BUILT: Final = 8


@dataclass(frozen=True, eq=False)
class BuiltTokenizer:
    """A tokenizer of transformers with the name of its class, or what a processor of that class is made of."""

    class_name: str
    tokenizer: Any
    image_processor: Any = None

    @property
    def vocabulary(self) -> int:
        """The largest id, and one: ids may have gaps."""
        return max(self.tokenizer.get_vocab().values(), default=-1) + 1


def build_tokenizer(files: Mapping[str, bytes], label: str) -> BuiltTokenizer:
    """Build what a folder of these files holds.

    Raises:
        BadCheckpoint: files are missing, or cannot be read; names the file.
        Unsupported: a class that is not listed, or a configuration that names code.
        OutOfMemory: there is no room for the files.
    """
    configs = _read_configs(files, label)
    processor = _processor_name(configs, label)
    name = "PreTrainedTokenizerFast" if processor == "PixtralProcessor" else _tokenizer_name(files, configs, label)
    of_images = _IMAGE_PROCESSORS.get(processor or "")
    _check_vocabulary(files, label)
    with (
        _written(files, configs) as folder,
        refuse_foreign_errors(label, f"make a {processor or name} of {listed(sorted(files))}"),
    ):
        tokenizer = _class(name).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if processor and (template := _processor_template(configs)):
            tokenizer.chat_template = template
        if of_images is None:
            return BuiltTokenizer(processor or name, tokenizer)
        return BuiltTokenizer(
            processor or name, tokenizer, _class(of_images).from_pretrained(folder, local_files_only=True)
        )


class TokenizerCache:
    """The tokenizers that were built last, by the content of their files: to build one takes up to seconds."""

    def __init__(self) -> None:
        self._built: OrderedDict[bytes, BuiltTokenizer] = OrderedDict()

    def build(self, files: Mapping[str, bytes], label: str) -> BuiltTokenizer:
        """Return the tokenizer of these files; raises as :func:`build_tokenizer`."""
        digest = hashlib.blake2b(digest_size=32)
        for name, content in sorted(files.items()):
            digest.update(f"{name} {len(content)} ".encode())
            digest.update(content)
        key = digest.digest()
        if key not in self._built:
            self._built[key] = build_tokenizer(files, label)
        self._built.move_to_end(key)
        while len(self._built) > _MOST_BUILT:
            self._built.popitem(last=False)
        return self._built[key]


def _class(name: str) -> Any:
    import transformers

    found = getattr(transformers, name, None)
    if found is None:
        raise Unsupported(f"{name} is no class of transformers {transformers.__version__}; upgrade it")
    return found


@contextlib.contextmanager
def refuse_foreign_errors(label: str, what: str, *, has_prompts: bool = False) -> Iterator[None]:
    """Refuse lent files if transformers' code fails on them.

    With ``has_prompts`` its message is left out, which may quote them: prompts are not logged.

    Raises:
        XditdError: as raised in the block.
        Unsupported: a package is missing.
        BadCheckpoint: any other error, or a panic of tokenizers' Rust code, which is a ``BaseException``.
    """
    try:
        yield
    except (XditdError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except ImportError as error:
        raise Unsupported(f"{label}: the workers lack a package to {what}: {_first_line(error)}") from error
    except BaseException as error:
        reason = "" if has_prompts else f": {_first_line(error)}"
        raise BadCheckpoint(f"{label}: transformers cannot {what}: {type(error).__name__}{reason}") from error


def _read_configs(files: Mapping[str, bytes], label: str) -> dict[str, dict[str, Any]]:
    """Parse every JSON file, and return those that are configurations.

    Raises:
        BadCheckpoint: one is no JSON object, or a text is not UTF-8.
        Unsupported: one names code.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, content in files.items():
        if name == PIECES:
            continue
        try:
            text = content.decode()
            value = json.loads(text) if name.endswith(".json") else None
        except (ValueError, RecursionError) as error:
            what = "JSON" if name.endswith(".json") else "a text in UTF-8"
            raise BadCheckpoint(f"{label}: {name} is not {what}: {_first_line(error)}; copy the folder again") from None
        if not name.endswith(".json"):
            continue
        if not isinstance(value, dict):
            raise BadCheckpoint(f"{label}: {name} holds a {type(value).__name__}, a JSON object is needed")
        if name.endswith("_config.json") or name == _OLD_TEMPLATE:
            _check_keys(value, name, label)
            found[name] = value
    return found


def _check_keys(value: Any, name: str, label: str, depth: int = 0) -> None:
    if depth > _MAX_DEPTH:
        raise BadCheckpoint(f"{label}: {name} has more than {_MAX_DEPTH} levels")
    if isinstance(value, dict):
        if code := sorted(_CODE & value.keys()):
            raise Unsupported(
                f"{label}: {name} names code of its own by {listed(code)}, and none is run here: lend a folder of "
                "transformers' own classes, or give token ids to encode_text"
            )
        if objects := sorted(key for key in _OBJECTS & value.keys() if value[key]):
            raise Unsupported(f"{label}: {name} sets {listed(objects)}, which no file of a tokenizer does; remove it")
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_keys(each, name, label, depth + 1)


def _processor_name(configs: Mapping[str, Mapping[str, Any]], label: str) -> str | None:
    """Return the class of the processor that the configurations name; ``None`` for a tokenizer alone."""
    for name in _PROCESSOR_CONFIGS:
        given = configs.get(name, {}).get("processor_class")
        if given is None:
            continue
        if given not in PROCESSORS:
            raise Unsupported(f"{label}: {name} names the class {given!r:.100}; known are {', '.join(PROCESSORS)}")
        return str(given)
    return None


def _processor_template(configs: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the chat template that a processor has before those that its tokenizer has, too."""
    for name in (_PROCESSOR_CONFIGS[0], _OLD_TEMPLATE):
        template = configs.get(name, {}).get("chat_template")
        if isinstance(template, str):
            return template
    return None


def _tokenizer_name(files: Mapping[str, bytes], configs: Mapping[str, Mapping[str, Any]], label: str) -> str:
    """Return the class of the tokenizer that the configuration names.

    Raises:
        BadCheckpoint: none is named.
        Unsupported: it is not one of those that are built.
    """
    if CONFIG not in configs:
        raise BadCheckpoint(f"{label}: it lacks {CONFIG}, which names the class; it has {listed(sorted(files))}")
    given = configs[CONFIG].get("tokenizer_class")
    if not isinstance(given, str):
        raise BadCheckpoint(f"{label}: {CONFIG} names no tokenizer_class")
    plain = _WHOLE_CLASSES.get(given, given)
    if plain not in TOKENIZERS:
        plain = plain.removesuffix(_FAST)
    if plain not in TOKENIZERS:
        raise Unsupported(
            f"{label}: {CONFIG} names the class {given!r:.100}; known are {', '.join(TOKENIZERS)}; with another "
            "tokenizer, give token ids to encode_text"
        )
    return plain


def _check_vocabulary(files: Mapping[str, bytes], label: str) -> None:
    """Refuse a folder without a vocabulary: transformers would make one of a few tokens."""
    if WHOLE in files or PIECES in files or {"vocab.json", "merges.txt"} <= files.keys():
        return
    raise BadCheckpoint(
        f"{label}: it lacks a vocabulary: {WHOLE}, {PIECES}, or vocab.json with merges.txt; it has "
        f"{listed(sorted(files)) or 'no files'}"
    )


@contextlib.contextmanager
def _written(files: Mapping[str, bytes], configs: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Write the files to a folder that only this process's user may enter, and remove it at the end.

    Paths in configurations are left out: what they name is not read.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="xditd-tokenizer-") as folder:
            for name, content in files.items():
                kept = content
                if name in configs:
                    kept = json.dumps(
                        {key: value for key, value in configs[name].items() if not _is_path(key)}
                    ).encode()
                Path(folder, name).write_bytes(kept)
            yield folder
    except OSError as error:
        raise OutOfMemory(f"files of a tokenizer cannot be written to {tempfile.gettempdir()}: {error}") from error


def _is_path(key: str) -> bool:
    return key == "name_or_path" or key.endswith(("_file", "_files"))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:300]
