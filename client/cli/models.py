"""``xditd models``: the names of models, each a folder or files, which ``xditd generate --model`` takes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xditd.client import models_editing, models_file
from xditd.client.cli import exits, flags
from xditd.client.cli.printing import json_text, print_error
from xditd.client.cli.tables import size_text, table
from xditd.client.models_file import ModelEntry
from xditd.ipc import limits
from xditd.ipc.addresses import check_is_there, expand_home
from xditd.ipc.errors import BadRequest
from xditd.ipc.settings.flags import JsonFlags

if TYPE_CHECKING:
    from xditd.client.models_check import ModelCheck

SUMMARY = "give models names: list, add, check, rm"
DESCRIPTION = """\
Give the files of a model a name, for `xditd generate --model NAME` and Pipeline.open("NAME"). A model is

  a folder       of a pipeline that diffusers has saved, with a model_index.json
  a checkpoint   an all-in-one safetensors file; other parts beside it replace its own
  its parts      a transformer, a VAE, text encoders, and a folder with their tokenizers

The names are in ~/.config/xditd/models.toml (with XDG_CONFIG_HOME set, below that), which you may also edit: comments
and order stay. Relative paths in it are of its folder. Files are neither copied nor moved."""
EXAMPLES = """\
examples:
  xditd models add qwen ~/models/Qwen-Image
  xditd models add flux --transformer flux1-dev.safetensors --vae ae.safetensors \\
      --text-encoder clip_l.safetensors --text-encoder t5xxl_fp16.safetensors --tokenizers ~/ComfyUI --steps 28
  xditd models list
  xditd models check flux        that every file is there, known, and fits the others; needs no daemon and no GPU
  xditd models rm flux qwen      forget the names; the files stay
  xditd generate "a cat" --model flux -o cat.png
"""

_ADD = """\
Add a model: a folder of a pipeline or an all-in-one checkpoint as SOURCE, or its parts by flags. Paths that are not
there are refused. --steps, --guidance and --size are used where a generation says nothing else."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_settings(parser, JsonFlags)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = _action(actions, parser, "list", "list the names, and what they stand for")
    listing.set_defaults(act=_list)
    adding = _action(actions, parser, "add", "add a name for a folder, a checkpoint or parts", _ADD)
    _add_flags(adding)
    adding.set_defaults(act=_add, refuse=adding.error)
    checking = _action(
        actions, parser, "check", "check files, headers, families and whether parts fit, without a daemon or a GPU"
    )
    _names(checking, "check these (default: all)", nargs="*")
    checking.add_argument("--quick", action="store_true", help="only open the files and read their headers")
    checking.set_defaults(act=_check)
    removing = _action(actions, parser, "rm", "remove names; files stay")
    _names(removing, "the names to remove", nargs="+")
    removing.set_defaults(act=_remove)


def _action(
    actions: Any, parser: argparse.ArgumentParser, name: str, summary: str, description: str = ""
) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = actions.add_parser(
        name,
        help=summary,
        description=description or f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"{exits.HELP}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.as_json = getattr(parser, "as_json", False)  # type: ignore[attr-defined]
    # Also after the action; there it must not reset what was given before it.
    made.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON on stdout")
    return made


def _names(parser: argparse.ArgumentParser, help: str, nargs: str) -> None:
    parser.add_argument("names", metavar="NAME", help=help, nargs=nargs).completer = complete_names  # type: ignore[attr-defined]


def complete_names(**_: object) -> tuple[str, ...]:
    """Return the names of models, for a shell that completes one."""
    return models_file.names()


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="letters, digits, and any of . _ + -")
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="a pipeline's folder, or an all-in-one checkpoint")
    for flag, what in (
        ("--transformer", "transformer checkpoint, safetensors or GGUF"),
        ("--transformer-2", "second transformer, for the steps at low noise"),
        ("--vae", "VAE checkpoint"),
    ):
        parser.add_argument(flag, metavar="FILE", help=what)
    parser.add_argument(
        "--text-encoder", metavar="FILE", action="append", dest="text_encoders",
        help="text encoder checkpoint; may be repeated",
    )  # fmt: skip
    parser.add_argument("--tokenizers", metavar="DIR", help="folder with the tokenizers, or that of a ComfyUI")
    parser.add_argument("--image-encoder", metavar="FILE", help="CLIP vision checkpoint, of Wan 2.1 from images")
    parser.add_argument("--scheduler", metavar="FILE", help="scheduler_config.json in place of the model's own")
    parser.add_argument("--variant", metavar="NAME", help="variant of a folder's weights, such as fp16")
    for flag in models_file.CHOICES:
        choices = models_file.CHOICES[flag]
        name = f"--{flag.replace('_', '-')}"
        action = parser.add_argument(name, metavar="NAME", type=flags.one_of(*choices), help=", ".join(choices))
        flags.complete(action, choices)
    parser.add_argument("--steps", metavar="COUNT", type=flags.whole(1, limits.MAX_STEPS), help="default steps")
    parser.add_argument("--guidance", metavar="SCALE", type=flags.number(0, limits.MAX_GUIDANCE),
                        help="default guidance scale")  # fmt: skip
    parser.add_argument("--size", metavar="WIDTHxHEIGHT", type=flags.size(), help="default size in pixels")
    parser.add_argument("--replace", action="store_true", help="replace the model of this name, if there is one")


def run(parsed: argparse.Namespace) -> int:
    return int(parsed.act(parsed))


def _all(path: Path) -> tuple[dict[str, ModelEntry], dict[str, str]]:
    """Return the models of a file, and what is wrong with the others."""
    found: dict[str, ModelEntry] = {}
    faults: dict[str, str] = {}
    for name, entry in models_file.parse(models_file.read_text(path), path).items():
        try:
            found[name] = models_file.check_entry(name, entry, path)
        except BadRequest as error:
            faults[name] = error.detail
    return found, faults


def _list(parsed: argparse.Namespace) -> int:
    path = models_file.models_path()
    found, faults = _all(path)
    if parsed.json:
        models = {name: describe_entry(entry) for name, entry in found.items()}
        print(json_text({"file": str(path), "models": models, "faults": faults}, indent=2))
    elif found or faults:
        rows = [(name, *_summary(entry)) for name, entry in found.items()]
        print(table(("NAME", "IS", "DEFAULTS"), [*rows, *((name, "wrong, see below", "-") for name in faults)]))
    else:
        print(f"no models; add one by `xditd models add NAME ...`, or in {path}")
    for fault in faults.values():
        print_error(f"xditd models: {fault}")
    return exits.FAILED if faults else exits.DONE


def describe_entry(entry: ModelEntry) -> dict[str, object]:
    """Describe a model for JSON, as the file has it but with whole paths."""
    found: dict[str, object] = {}
    for key in (*models_file.PATH_KEYS, "variant", *models_file.CHOICES):
        value = getattr(entry, key)
        if value is not None and value != ():
            found[key] = list(value) if isinstance(value, tuple) else value
    defaults = {key: value for key in models_file.DEFAULT_KEYS if (value := getattr(entry.defaults, key)) is not None}
    return {**found, "defaults": defaults}


def _summary(entry: ModelEntry) -> tuple[str, str]:
    if entry.folder is not None:
        what = f"folder {entry.folder}"
    else:
        what = ", ".join(f"{key} {os.path.basename(path)}" for key, path in entry.paths)
    defaults = entry.defaults
    size = None if defaults.size is None else "x".join(map(str, defaults.size))
    given = (("steps", defaults.steps), ("guidance", defaults.guidance), ("size", size))
    return what, ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
                           for key, value in given if value is not None) or "-"  # fmt: skip


def _add(parsed: argparse.Namespace) -> int:
    parts = {key: getattr(parsed, key) for key in models_file.PART_KEYS if getattr(parsed, key) is not None}
    found: dict[str, Any] = {}
    if parsed.source is not None:
        found["folder" if os.path.isdir(expand_home(parsed.source)) else "checkpoint"] = parsed.source
    found.update(parts)
    for key, value in found.items():
        found[key] = [_present(each) for each in value] if isinstance(value, list) else _present(value)
    if "folder" in found and not os.path.isfile(os.path.join(found["folder"], "model_index.json")):
        raise BadRequest(
            f"{found['folder']}: has no model_index.json; SOURCE is the folder of a pipeline that diffusers has saved, "
            "and other files are named by --transformer, --vae and --text-encoder"
        )
    for key in ("variant", *models_file.CHOICES):
        if getattr(parsed, key) is not None:
            found[key] = getattr(parsed, key)
    defaults = {key: value for key in models_file.DEFAULT_KEYS if (value := getattr(parsed, key)) is not None}
    if "size" in defaults:
        defaults["size"] = "x".join(map(str, defaults["size"]))
    if defaults:
        found["defaults"] = defaults
    path = models_file.models_path()
    models_file.check_entry(models_file.check_name(parsed.name), found, path)
    models_editing.add(parsed.name, found, path, is_replaced=parsed.replace)
    entry = models_file.find(parsed.name, path)
    if parsed.json:
        print(json_text({"file": str(path), "name": parsed.name, "model": describe_entry(entry)}, indent=2))
    else:
        print(f"{parsed.name}: added to {path}; `xditd models check {parsed.name}` looks into its files")
    return exits.DONE


def _present(path: str) -> str:
    """Return the absolute path of something that is there.

    Raises:
        BadRequest: it is not.
    """
    found = os.path.abspath(expand_home(path))
    check_is_there(found)
    return found


def _check(parsed: argparse.Namespace) -> int:
    faults: dict[str, str] = {}
    if parsed.names:
        entries = {name: models_file.find(name) for name in parsed.names}
    else:
        entries, faults = _all(models_file.models_path())
    from xditd.client.models_check import check_models

    checks = check_models(entries, asks_workers=not parsed.quick)
    if parsed.json:
        models = {check.name: _describe_check(check) for check in checks}
        print(json_text({"models": models, "faults": faults}, indent=2))
    elif not checks and not faults:
        print("no models; add one by `xditd models add NAME ...`")
    elif checks:
        print("\n\n".join(map(_check_text, checks)))
    for fault in faults.values():
        print_error(f"xditd models: {fault}")
    return exits.FAILED if faults or any(check.faults for check in checks) else exits.DONE


def _describe_check(check: ModelCheck) -> dict[str, object]:
    parts = [
        {
            "part": part.part,
            "path": part.path,
            "files": list(part.files),
            "bytes": part.size_bytes,
            "family": part.facts and part.facts.family,
            "class": part.facts and part.facts.class_name,
            "dtype": part.facts and part.facts.dtype,
        }
        for part in check.parts
    ]
    return {"parts": parts, "faults": check.faults, "unchecked": check.unchecked}


def _check_text(check: ModelCheck) -> str:
    rows = [
        (part.part, part.facts.family if part.facts else "-", part.facts.dtype if part.facts else "-",
         size_text(part.size_bytes) if part.files else "-", part.path)
        for part in check.parts
    ]  # fmt: skip
    state = "faults:" if check.faults else "no fault was found"
    lines = [f"{check.name}: {state}", *(f"  {fault}" for fault in check.faults)]
    if rows:
        lines.append(table(("PART", "FAMILY", "DTYPE", "SIZE", "PATH"), rows))
    lines.append(f"not checked: {'; '.join(check.unchecked)}")
    return "\n".join(lines)


def _remove(parsed: argparse.Namespace) -> int:
    path = models_file.models_path()
    tables = models_file.parse(models_file.read_text(path), path)
    names = tuple(dict.fromkeys(parsed.names))
    for name in names:  # all of them, before one is removed
        models_file.check_known(name, tables, path)
    models_editing.remove(path, *names)
    if parsed.json:
        print(json_text({"file": str(path), "removed": names}))
    else:
        print("\n".join(f"{name}: removed from {path}; its files stay" for name in names))
    return exits.DONE
