"""``xditd generate --from FILE``: take from a file's metadata what the command line does not say."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xditd import __version__
from xditd.client import models_file
from xditd.client.cli.printing import print_error
from xditd.client.metadata.file_hashes import is_same
from xditd.client.metadata.reading import read_record
from xditd.client.metadata.record import FileRecord, LoraRecord, Record
from xditd.client.pipeline.sources import SECOND
from xditd.ipc.errors import BadRequest
from xditd.ipc.name_lists import listed

if TYPE_CHECKING:
    from xditd.client.pipeline.settings import RunSettings
    from xditd.ipc.facts import ComponentFacts

_INPUTS: Final = {
    "image": ("image", "--image FILE"),
    "mask": ("mask", "--mask FILE"),
    "last_image": ("last_image", "--last-image FILE"),
    "references": ("references", "--reference FILE"),
    "control": ("control_images", "--control-image FILE (or --control, with its ControlNet)"),
}
"""Pictures that a record counts and does not hold: the argument, and the flag that gives them again."""

_SHOWN_DIGITS: Final = 10
_LORA_REMEDY: Final = "give LoRAs by --lora and --lora-2 FILE=STRENGTH; they replace all those of the picture"


@dataclass(frozen=True)
class Repeated:
    """A record that is repeated. ``index`` is the picture to write of those that are made; ``None``: all.

    ``checks_model`` says whether the model was chosen by its name in the record, and has to have the same files.
    """

    where: str
    record: Record
    index: int | None
    checks_model: bool

    def check_model(self, made: RunSettings) -> None:
        """Compare the files of the model, and the values of its scheduler, with those of the record.

        Raises:
            BadRequest: a file of a role is another one; names it.
        """
        from xditd.client.metadata.of_runs import files_of

        if not self.checks_model:
            return
        found = files_of(made)
        for role, files in self.record.model.files.items():
            known = {each.sample for each in found.get(role, ())}
            other = [each for each in files if each.sample is not None and each.sample not in known]
            if other:
                has = listed(map(_shown, found.get(role, ()))) or "none"
                raise BadRequest(
                    f"{self.where}: made with the {role} {_shown(other[0])}, and the model {made.model} has {has}; "
                    f"give --model {made.model} to use it all the same"
                )

    def of_each_row(self, conditioning: Mapping[str, Any], facts: ComponentFacts) -> int:
        """Return how many pictures each row of text embeddings has to give for as many as there were.

        Raises:
            BadRequest: no whole number does.
        """
        from xditd.client.jobs.checks import check_conditioning

        assert facts.transformer is not None
        rows = check_conditioning(conditioning, facts.transformer.conditioning)
        if self.record.num_images % rows:
            raise BadRequest(
                f"{self.where}: made with {self.record.num_images} pictures at once, which {rows} rows of embeddings "
                "do not give; give those that it was made from, or -n COUNT for others"
            )
        return self.record.num_images // rows

    def check_rows(self, conditioning: Mapping[str, Any], facts: ComponentFacts) -> None:
        """Check that single files, which make one picture of each row, make as many as there were.

        Raises:
            BadRequest: they do not.
        """
        if (each := self.of_each_row(conditioning, facts)) != 1:
            raise BadRequest(f"{self.where}: made with {each} pictures of each row of embeddings; give -n {each}")


def apply_record(parsed: argparse.Namespace) -> None:
    """Fill in what the command line leaves open. Sets ``parsed.repeated``.

    Raises:
        BadRequest: the file has no record, or what it was made from is neither in the record nor given.
    """
    where = str(parsed.from_file)
    record = read_record(parsed.from_file)
    if record.version != __version__:
        print_error(f"xditd generate: {where}: made by xditd {record.version}; {__version__} may give other bits")
    _check_inputs(parsed, record, where)
    has_other_text = any(getattr(parsed, name) is not None for name in ("prompt", "embeds", "random_embeds"))
    if not has_other_text:
        parsed.prompt, parsed.random_embeds = record.prompt, record.random_embeds
        if parsed.prompt_2 is None:
            parsed.prompt_2 = record.prompt_2
        if parsed.text_tokens is None:
            parsed.text_tokens = record.text_tokens
    if parsed.negative_prompt is None and parsed.embeds is None:
        parsed.negative_prompt = _negative_prompt(record, parsed.guidance, where)
    checks_model = _choose_model(parsed, record, where)
    index = None
    if parsed.num_images is None and record.num_images > 1:
        index = record.index
        if parsed.embeds is None:  # whose file has some rows, each for one picture or more
            parsed.num_images = record.num_images
    simple = {
        "max_sequence_length": record.max_sequence_length if parsed.embeds is None else None,
        "seed": record.seed,
        "size": (record.width, record.height),
        "steps": record.steps,
        "guidance": record.guidance,
        "strength": record.strength,
        "step_cache": record.step_cache or None,
        "frames": record.frames if record.frames > 1 else None,
        "fps": record.fps,
        "compute_dtype": record.compute_dtype,
    }
    for name, value in simple.items():
        if getattr(parsed, name) is None:
            setattr(parsed, name, value)
    if record.options:
        parsed.option = {**record.options, **(parsed.option or {})}
    if parsed.lora is None and parsed.lora_2 is None and record.loras:
        parsed.lora = _strengths([each for each in record.loras if SECOND not in each.roles], where)
        parsed.lora_2 = _strengths([each for each in record.loras if SECOND in each.roles], where)
    parsed.repeated = Repeated(where, record, index, checks_model)


def _negative_prompt(record: Record, guidance: float | None, where: str) -> str | None:
    """Return the negative prompt of a record; ``None`` where it would be refused, and nobody could leave it out.

    So it is with the negative prompt that guided calls of the family have without one, and with ``guidance``, a scale
    that was asked for, which is too small to guide.
    """
    from xditd.client.pipeline.adapter import Adapter
    from xditd.client.pipeline.families import ADAPTERS

    adapter, negative = ADAPTERS.get(record.model.family or "", Adapter), record.negative_prompt
    if negative is None or negative == adapter.empty_negative:
        return None
    if guidance is not None and guidance <= adapter.guides_above:
        print_error(
            f"xditd generate: {where}: its negative prompt has no effect with --guidance {guidance:g}, and is left out"
        )
        return None
    return negative


def _check_inputs(parsed: argparse.Namespace, record: Record, where: str) -> None:
    """Refuse what cannot be repeated by this command, and ask for pictures that only the caller has."""
    inputs = record.inputs
    for is_there, what in (
        (inputs.noise, "noise of its own"),
        (inputs.sigmas, "a schedule of its own (sigmas)"),
        (record.variant is not None and inputs.conditioning, f"the variant {record.variant}"),
    ):
        if is_there:
            raise BadRequest(f"{where}: made by a program with {what}, which `xditd generate` does not take")
    has_text = any(getattr(parsed, name) is not None for name in ("prompt", "embeds", "random_embeds"))
    if inputs.conditioning and not has_text:
        raise BadRequest(
            f"{where}: made by a program from text embeddings, which its metadata do not hold; give a prompt, or them "
            "by --embeds FILE"
        )
    if inputs.embeds is not None and not has_text:
        raise BadRequest(f"{where}: made with the text embeddings {_shown(inputs.embeds)}; give them by --embeds FILE")
    if inputs.embeds is not None and parsed.embeds is not None and is_same(inputs.embeds, parsed.embeds) is False:
        print_error(f"xditd generate: {parsed.embeds}: not the text embeddings of {where}, {_shown(inputs.embeds)}")
    missing = [
        f"{flag} ({count} of them)" if count > 1 else flag
        for name, (argument, flag) in _INPUTS.items()
        if (count := getattr(inputs, name))
        and getattr(parsed, argument) is None
        and not (name == "control" and parsed.control)
    ]
    if missing:
        raise BadRequest(f"{where}: made from pictures, which its metadata do not hold; give {', '.join(missing)}")


def _choose_model(parsed: argparse.Namespace, record: Record, where: str) -> bool:
    """Choose the model by its name, unless one is given. Returns whether its files have to be those of the record."""
    if parsed.model is not None or parsed.transformer is not None:
        return False
    name = record.model.name
    if name is not None and name in models_file.names():
        parsed.model = name
        return True
    files = [f"{role} {_shown(each)}" for role, found in record.model.files.items() for each in found]
    named = f" {name!r}" if name is not None else ""
    raise BadRequest(
        f"{where}: made with the model{named} ({listed(files) or 'of unknown files'}), which is no name in "
        f"{models_file.models_path()}; give it by --model, or its parts by --transformer, --vae and so on"
    )


def _strengths(loras: Sequence[LoraRecord], where: str) -> dict[str, Any] | None:
    """Return the strengths of LoRAs by their paths, as flags have them.

    Raises:
        BadRequest: as :func:`_found`; or a program has used one twice, which flags do not say.
    """
    found: dict[str, Any] = {}
    for each in loras:
        path = str(_found(each.file, where))
        if path in found:
            raise BadRequest(f"{where}: made with the LoRA {_shown(each.file)} twice; {_LORA_REMEDY}")
        found[path] = each.strength
    return found or None


def _found(file: FileRecord, where: str) -> Path:
    """Return the path of a LoRA: of this name, and with these bytes, in the current folder or in that of the picture.

    Raises:
        BadRequest: there is none, or another one.
    """
    folders = [Path(), Path(os.path.abspath(where)).parent]
    for folder in folders:
        path = folder / file.name
        if os.path.isfile(path):
            if is_same(file, path) is False:
                raise BadRequest(
                    f"{where}: made with the LoRA {_shown(file)}, and {path} is another file; {_LORA_REMEDY}"
                )
            return path
    raise BadRequest(
        f"{where}: made with the LoRA {_shown(file)}, which is neither in the current folder nor beside it; "
        f"{_LORA_REMEDY}"
    )


def _shown(file: FileRecord) -> str:
    """Return the name of a file and the first digits of its hash."""
    digest: Any = file.sha256 or file.sample
    return f"{file.name} ({digest[:_SHOWN_DIGITS]})" if digest else file.name
