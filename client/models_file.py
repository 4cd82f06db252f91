"""``models.toml``: the models that a user has given names, each a folder or the files of its parts.

```toml
[qwen]
folder = "~/models/Qwen-Image"                # a pipeline that diffusers has saved

["wan2.2"]                                    # a name with a dot has quotes
transformer = "wan2.2_t2v_high_noise_14B_fp16.safetensors"
transformer_2 = "wan2.2_t2v_low_noise_14B_fp16.safetensors"
vae = "wan_2.1_vae.safetensors"
text_encoders = ["umt5_xxl_fp16.safetensors"]
tokenizers = "~/ComfyUI"
defaults = { steps = 20, guidance = 4.0, size = "1280x720" }
```

The file is ``$XDG_CONFIG_HOME/xditd/models.toml``, else ``~/.config/xditd/models.toml``. Relative paths are of
its folder.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, get_args

from xditd.ipc import limits
from xditd.ipc.addresses import expand_home
from xditd.ipc.errors import BadRequest
from xditd.ipc.name_lists import listed
from xditd.ipc.suggestions import did_you_mean
from xditd.ipc.tensors import Acceleration, ComputeDType
from xditd.ipc.toml_text import parse_toml

PATH_KEYS: Final = (
    "folder",
    "checkpoint",
    "transformer",
    "transformer_2",
    "vae",
    "text_encoders",
    "tokenizers",
    "image_encoder",
    "scheduler",
)
"""Keys of paths; ``text_encoders`` has a list of them, or one."""
PART_KEYS: Final = PATH_KEYS[2:]
"""Those of parts, which stand beside a ``checkpoint`` or alone, and not beside a ``folder``."""
CHOICES: Final = {"compute_dtype": get_args(ComputeDType), "acceleration": get_args(Acceleration)}
KEYS: Final = (*PATH_KEYS, "variant", *CHOICES, "defaults")
DEFAULT_KEYS: Final = ("steps", "guidance", "size")

_MAX_BYTES: Final = 2**20
_MAX_ENCODERS: Final = 8
_NAME: Final = re.compile(r"[^\W_][\w.+-]{0,99}")
_SIZE: Final = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")


@dataclass(frozen=True, kw_only=True)
class ModelDefaults:
    """What a generation takes where the caller says nothing, in place of the model's own. ``size``: width, height."""

    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One model of the file. Paths are absolute, and need not exist.

    Either ``folder`` is set, or ``checkpoint`` (an all-in-one file, whose parts others replace), or ``transformer``.
    """

    name: str
    file: Path
    folder: str | None = None
    checkpoint: str | None = None
    variant: str | None = None
    transformer: str | None = None
    transformer_2: str | None = None
    vae: str | None = None
    text_encoders: tuple[str, ...] = ()
    tokenizers: str | None = None
    image_encoder: str | None = None
    scheduler: str | None = None
    compute_dtype: ComputeDType | None = None
    acceleration: Acceleration | None = None
    defaults: ModelDefaults = field(default_factory=ModelDefaults)

    @property
    def paths(self) -> tuple[tuple[str, str], ...]:
        """Every path with its key, in the order of :data:`PATH_KEYS`."""
        found = []
        for key in PATH_KEYS:
            value = getattr(self, key)
            found += [(key, path) for path in (value if isinstance(value, tuple) else (value,)) if path is not None]
        return tuple(found)


def models_path() -> Path:
    """Return the path of ``models.toml``, whether or not it is there."""
    base = os.environ.get("XDG_CONFIG_HOME") or expand_home("~/.config")
    return Path(base) / "xditd" / "models.toml"


def find(name: str, path: Path | None = None) -> ModelEntry:
    """Return the model of a name.

    Raises:
        BadRequest: the file cannot be read, is no TOML, or has no such model, with the names that it has; or the model
            is wrong, as :func:`check_entry`. Other models of the file may be wrong.
    """
    path = models_path() if path is None else path
    tables = parse(read_text(path), path)
    check_known(name, tables, path)
    return check_entry(name, tables[name], path)


def check_known(name: str, tables: Mapping[str, Any], path: Path) -> None:
    """Check that a name is one of the file's.

    Raises:
        BadRequest: it is not; the message has the names that are, and the closest one.
    """
    if name not in tables:
        known = f"it has {listed(tables)}" if tables else "it has none" if path.exists() else "there is no such file"
        raise BadRequest(
            f"model {name!r:.200}: not in {path}: {known}{did_you_mean(name, tables)}; "
            "add it by `xditd models add NAME ...`, or give a folder or files"
        )


def names(path: Path | None = None) -> tuple[str, ...]:
    """Return the names in the file without checking the models; none if it cannot be read, as for completions."""
    path = models_path() if path is None else path
    try:
        return tuple(parse(read_text(path), path))
    except BadRequest:
        return ()


def check_name(name: str) -> str:
    """Return a name that a model may have: letters, digits and ``._+-``, a letter or a digit first.

    Raises:
        BadRequest: another one.
    """
    if _NAME.fullmatch(name) is None:
        raise BadRequest(
            f"model {name!r:.200}: a name has letters, digits and any of . _ + - after the first, 100 at most"
        )
    return name


def read_text(path: Path) -> str:
    """Return the text of the file; empty if there is none.

    Raises:
        BadRequest: it cannot be read, is no regular file, larger than 1 MiB, or no UTF-8.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:  # a FIFO must not block
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadRequest(f"file {path}: not a regular file; mend it, or set XDG_CONFIG_HOME")
            found = file.read(_MAX_BYTES + 1)
        if len(found) > _MAX_BYTES:
            raise BadRequest(f"file {path}: more than {_MAX_BYTES} bytes; a file of models has less")
        return found.decode("utf-8")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise BadRequest(f"file {path}: {error.strerror}; mend it, or set XDG_CONFIG_HOME") from error
    except UnicodeDecodeError as error:
        raise BadRequest(f"file {path}: not UTF-8 at byte {error.start}: save it as UTF-8") from error


def parse(text: str, path: Path) -> dict[str, dict[str, Any]]:
    """Return the table of each model, unchecked but for its name.

    Raises:
        BadRequest: no TOML, with the line; or an entry that is no table of a model.
    """
    try:
        tables = parse_toml(text)
    except ValueError as error:
        raise BadRequest(f"file {path}: not TOML: {error}") from error
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise BadRequest(
                f"file {path}, {name:.100} = {table!r:.100}: outside of a model; put it below a line such as [flux]"
            )
        try:
            check_name(name)
        except BadRequest as error:
            raise BadRequest(f"file {path}, {error.detail}") from None
    return tables


def check_entry(name: str, table: dict[str, Any], path: Path) -> ModelEntry:
    """Return the model of a table in the file at ``path``.

    Raises:
        BadRequest: an unknown key, or a value that cannot be; the message names file, model, key and remedy.
    """
    where = f"file {path}, [{name}]"
    for key, value in table.items():
        if key not in KEYS:
            remedy = f"remove it, or use one of {', '.join(KEYS)}{did_you_mean(key, KEYS)}"
            if isinstance(value, dict):
                remedy = f'if this is a name with a dot, write ["{name}.{key:.100}"]; else {remedy}'
            raise BadRequest(f"{where} {key:.100}: no such key; {remedy}")
    found: dict[str, Any] = {}
    for key in PATH_KEYS:
        if key in table:
            found[key] = _paths(table[key], f"{where} {key}", path.parent, is_list=key == "text_encoders")
    for key, choices in CHOICES.items():
        if key in table:
            value = table[key]
            if value not in choices:
                hint = did_you_mean(value, choices) if isinstance(value, str) else ""
                raise BadRequest(f"{where} {key} = {value!r:.100}: use one of {', '.join(choices)}{hint}")
            found[key] = value
    if "variant" in table:
        found["variant"] = _text(table["variant"], f"{where} variant", "the variant of a folder's weights")
    if "defaults" in table:
        found["defaults"] = _defaults(table["defaults"], f"{where} defaults")
    _check_keys(found, where)
    return ModelEntry(name=name, file=path, **found)


def _check_keys(found: dict[str, Any], where: str) -> None:
    """Check which keys stand beside one another.

    Raises:
        BadRequest: no model, or keys that exclude one another.
    """
    if not {"folder", "checkpoint", "transformer"} & found.keys():
        raise BadRequest(f"{where}: names no model; it needs a folder, a checkpoint or a transformer")
    others = [key for key in ("checkpoint", *PART_KEYS) if key in found]
    if "folder" in found and others:
        raise BadRequest(f"{where}: folder has all parts of a model; remove it, or {', '.join(others)}")
    if "variant" in found and "folder" not in found:
        raise BadRequest(f"{where} variant: selects among the weights of a folder, and this model has none; remove it")
    if "transformer_2" in found and "transformer" not in found:
        raise BadRequest(f"{where} transformer_2: is beside a transformer; name that, too")


def _paths(value: object, where: str, folder: Path, *, is_list: bool) -> Any:
    if is_list and isinstance(value, list):
        if not 1 <= len(value) <= _MAX_ENCODERS:
            raise BadRequest(f"{where}: {len(value)} paths; from 1 to {_MAX_ENCODERS}")
        return tuple(_path(each, where, folder) for each in value)
    found = _path(value, where, folder, "a path, or a list of paths" if is_list else "a path")
    return (found,) if is_list else found


def _path(value: object, where: str, folder: Path, what: str = "a path") -> str:
    text = expand_home(_text(value, where, what))
    return os.path.normpath(os.path.join(os.path.abspath(folder), text))


def _text(value: object, where: str, what: str) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise BadRequest(f"{where} = {value!r:.100}: use {what}, a text in quotes")
    return value


def _defaults(table: object, where: str) -> ModelDefaults:
    if not isinstance(table, dict):
        raise BadRequest(f"{where} = {table!r:.100}: use a table, such as {{ steps = 20, guidance = 4.0 }}")
    found: dict[str, Any] = {}
    for key, value in table.items():
        source = f"{where}.{key:.100} = {value!r:.100}"
        if key == "steps":
            if type(value) is not int or not 1 <= value <= limits.MAX_STEPS:
                raise BadRequest(f"{source}: use a whole number from 1 to {limits.MAX_STEPS}")
            found[key] = value
        elif key == "guidance":
            if type(value) not in (int, float) or not 0 <= value <= limits.MAX_GUIDANCE:
                raise BadRequest(f"{source}: use a number from 0 to {limits.MAX_GUIDANCE:g}")
            found[key] = float(value)
        elif key == "size":
            found[key] = _size(value, source)
        else:
            known = f"remove it, or use one of {', '.join(DEFAULT_KEYS)}{did_you_mean(key, DEFAULT_KEYS)}"
            raise BadRequest(f"{where}.{key:.100}: no such key; {known}")
    return ModelDefaults(**found)


def _size(value: object, source: str) -> tuple[int, int]:
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    sides = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(0 < side <= limits.MAX_SIDE_PIXELS for side in sides):
        raise BadRequest(
            f'{source}: use "WIDTHxHEIGHT" in pixels, such as "1024x768", with sides up to {limits.MAX_SIDE_PIXELS}'
        )
    return sides
