"""Write ``docs/models.md``: the registered families, and the classes and pipelines that the tests run in the workers.

    python tests/models/support/record_models.py

``tests/models/test_models_page.py`` fails if the page is not what this writes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import diffusers

sys.path.append(str(Path(__file__).resolve().parents[2] / "checkpoints"))

import family_tables
from class_entries import ENTRIES
from pipeline_entries import PIPELINES
from pipeline_entry import Feature
from refusals import LOCAL_MODELS, REFUSED_CALLS, REFUSED_PIPELINES

from xditd.gpu_workers.models.token_plans import find_plan
from xditd.gpu_workers.plans import NOT_WRITTEN
from xditd.ipc.transports.module_walk import method_signature

TARGET = Path(__file__).resolve().parents[3] / "docs" / "models.md"
SHOWN_ARGUMENTS = 6

_HEAD = """\
# Models

Made by `python tests/models/support/record_models.py` with diffusers {version}; a test fails if it is out of date.
[`accelerate`](diffusers.md) and `client.lend(module, as_class=True)` run any model class of diffusers and transformers
as the class itself does. The tables list what the tests run, with tiny random weights in float32.

## Transformer classes

Each of the {classes} transformer classes that diffusers exports is lent to one worker on the CPU, and called with the
arguments that its own pipeline gives it (`tests/models/test_every_class.py`).

- *arguments*: those of `forward`, the first {shown} of them; those in italics need a value.
- *plan*: how several workers share a call ([layouts](layouts.md#modules-that-run-as-their-class)). `tokens`: they
  share the tokens of each row, or run whole rows, whichever leaves fewer of them idle. `rows`: they run whole rows, and
  the parts of a call; the reason why their tokens are not split is given where it is more than a missing plan. *Also of
  its cache*: calls with keys and values of earlier ones are split too, and each worker keeps
  [its share](token-plans.md#caches-of-keys-and-values) of these.
- *exactness*: "the same bits" are those of the class in the caller's process, with as many threads as the worker has.
  "Also" names further calls or configurations that are tested.

"""

_FAMILIES = """
## Families

A family has a denoising loop, and in some cases fused kernels. `client.lend` of a file, a state dict or an unchanged
module uses it, with [`generate` and `call`](client.md#jobs). `accelerate` does not: it runs every model as its class
does. Variants are those of the released sizes; a test finds each in the names and shapes of each layout
(`tests/models/test_family_entries.py`). All may be half precision, float32, or packed ([formats](formats.md)).

- *layouts of files*: whose names a file may have.
- *`generate` takes*: names of the conditioning, those that are needed in italics, then the family's `options`.
- *VAE* and *text encoders*: the families below whose latents and states it takes.
- *LoRAs*: as branches, in the names of seven programs ([LoRAs](lora.md)).
- *fused kernels*: on GPUs; the others run compiled and captured ([acceleration](acceleration.md)).

"""

_COMFYUI = """
[In ComfyUI](comfyui.md) the nodes run {titles}.

### VAEs

`decode` and `encode` are diffusers' in the pipelines of these models.

"""

_ENCODERS = """
### Text encoders

`encode_text` gives the states of transformers' classes, in float32.

"""

_CONTROLNETS = """
### ControlNets

`generate(controls=...)`, `call(controls=...)` and ComfyUI run them before a transformer of the family that is named
([FLUX.1's](flux1.md#controlnets)).

"""

_PIPELINES = """
## Pipelines

`tests/models/test_accelerate.py` runs each pipeline with the listed models in one worker, compared bit by bit with the
same pipeline in one process, and in two workers, within 1e-6 (half precision: 2.5e-2; nine pipelines that amplify the
last bits of their models: 2e-6 to 3e-5). No forward of these models runs in the caller's process.

"""


def render() -> str:
    """Return the page."""
    names = {entry.name for entry in ENTRIES.values()}
    head = _HEAD.format(version=diffusers.__version__, classes=len(names), shown=SHOWN_ARGUMENTS)
    titles = "; ".join(family_tables.in_comfyui())
    of_families = [
        _FAMILIES,
        _table(family_tables.transformers()),
        _COMFYUI.format(titles=titles),
        _table(family_tables.vaes()),
        _ENCODERS,
        _table(family_tables.encoders()),
        _CONTROLNETS,
        _table(family_tables.controlnets()),
    ]
    return head + _table(_classes()) + "".join(of_families) + _PIPELINES + _table(_pipelines())


def _table(rows: Iterator[tuple[str, ...]]) -> str:
    first = next(rows)
    lines = [first, ("---",) * len(first), *rows]
    return "".join(f"| {' | '.join(line)} |\n" if line[0] != "---" else f"|{'|'.join(line)}|\n" for line in lines)


def _classes() -> Iterator[tuple[str, ...]]:
    yield "class", "arguments", "plan", "exactness"
    variants: dict[str, list[str]] = {}
    for entry in ENTRIES.values():
        variants.setdefault(entry.name, []).append(entry.key)
    for name, keys in sorted(variants.items()):
        yield f"`{name}`", _arguments(name), _plan(name), _exactness(name, keys)


def _arguments(name: str) -> str:
    parameters = list(method_signature(getattr(diffusers, name).forward).parameters.values())[1:]
    shown = [f"*{each.name}*" if each.default is inspect.Parameter.empty else each.name for each in parameters]
    others = len(shown) - SHOWN_ARGUMENTS
    return ", ".join(shown[:SHOWN_ARGUMENTS]) + (f" and {others} more" if others > 0 else "")


def _plan(name: str) -> str:
    plan = find_plan(name)
    if not isinstance(plan, str):
        return "`tokens`" if plan.cache is None else "`tokens`, also of its cache"
    return "`rows`" if plan == NOT_WRITTEN else f"`rows`: {plan}"


def _exactness(name: str, keys: list[str]) -> str:
    kinds = [key.removeprefix(name).removeprefix("-") for key in keys if key not in REFUSED_CALLS and key != name]
    refused = [
        f"; {key.removeprefix(f'{name}-')} is refused: {REFUSED_CALLS[key].reason}"
        for key in keys
        if key in REFUSED_CALLS
    ]
    return "the same bits" + (f"; also {', '.join(kinds)}" if kinds else "") + "".join(refused)


def _pipelines() -> Iterator[tuple[str, ...]]:
    yield "feature", "pipeline", "in the workers", "result"
    for feature in get_args(Feature):
        for entry in PIPELINES.values():
            if entry.feature == feature:
                local = LOCAL_MODELS.get(entry.name, ())
                models = ", ".join(name for name in entry.components if name not in local)
                yield feature, f"`{type(entry.build()).__name__}` ({entry.name})", models, _result(entry.name, local)


def _result(name: str, local: Sequence[str]) -> str:
    if name in REFUSED_PIPELINES:
        return f"refused: {REFUSED_PIPELINES[name].reason}"
    return "the same bits" + "".join(f"; {each} stays with the caller: the pipeline hooks into it" for each in local)


def main() -> None:
    TARGET.write_text(render(), encoding="utf-8")
    print("wrote", TARGET)


if __name__ == "__main__":
    main()
