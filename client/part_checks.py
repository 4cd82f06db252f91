"""Whether the parts of a model fit one another, by their facts: VAE, second transformer, text encoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from xditd.ipc.errors import BadRequest
from xditd.ipc.facts import ComponentFacts, PromptFacts, TextEncoderFacts, TransformerFacts
from xditd.ipc.name_lists import listed
from xditd.ipc.tensors import ComponentKind

Encoder = tuple[str, ComponentFacts]
"""The role, or another name, of a text encoder, and its facts."""


def misfits(
    parts: Mapping[str, ComponentFacts], encoders: Sequence[Encoder], *, may_lack: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield the names of the parts that do not fit, each with what is wrong and the remedy.

    ``parts`` are ``transformer``, ``transformer_2`` and ``vae``, as far as they are there. If there are text encoders,
    none of those that prompts need may be missing, unless ``may_lack``.
    """
    vae, main, second = (parts.get(name) for name in ("vae", "transformer", "transformer_2"))
    for name, each in (("transformer", main), ("transformer_2", second)):
        if each is not None and each.transformer is not None and vae is not None and vae.vae is not None:
            try:
                each.transformer.latents.check_vae(vae.vae.latents)
            except BadRequest as error:
                yield f"{name} and vae", error.detail.removeprefix("vae: ")
    if main is None or main.transformer is None:
        return
    if second is not None and main.family != second.family:
        yield "transformer_2", f"is of {second.family}, and the transformer of {main.family}; both are of one model"
    elif second is not None and main.transformer.stages < 2:
        yield "transformer_2", f"{main.family} runs one transformer; remove it"
    prompt = main.transformer.prompt
    if prompt is not None:
        yield from _encoder_misfits(main.family, main.transformer, prompt, encoders, may_lack)
        return
    for name, _ in encoders:
        yield name, f"workers encode no words for {main.family}; remove it, and give text embeddings (conditioning)"


def kind_fault(facts: ComponentFacts, kind: ComponentKind) -> str:
    """Say why a part is not of the kind that a pipeline needs in its place; empty if it is."""
    if facts.kind is kind:
        return ""
    what = f"a {facts.kind.value}"
    if facts.kind is ComponentKind.MODULE:
        why = f" ({facts.family_reason})" if facts.family_reason else ""
        what = f"a {facts.class_name} that no family runs{why}"
    return (
        f"{what}, and a pipeline needs a {kind.value} of a family (docs/models.md lists them); accelerate(pipe) runs "
        "any pipeline of diffusers"
    )


def assigned(needed: Mapping[str, Sequence[str]], encoders: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Return for each role of ``needed``, which has families, the place of its text encoder, or nothing without one.

    ``encoders`` are names and families: one whose name is the role comes first, then the first of its families.
    """
    found: dict[str, int] = {}
    for role, families in needed.items():
        fitting = [place for place, (_, family) in enumerate(encoders) if family in families]
        own = [place for place in fitting if encoders[place][0] == role]
        if fitting:
            found[role] = (own or fitting)[0]
    return found


def _encoder_misfits(
    family: str, transformer: TransformerFacts, prompt: PromptFacts, encoders: Sequence[Encoder], may_lack: bool
) -> Iterator[tuple[str, str]]:
    roles = assigned(prompt.encoders, [(name, each.family) for name, each in encoders])
    given = ", ".join(each.family for _, each in encoders)
    for role, families in prompt.encoders.items():
        if encoders and role not in roles and not may_lack:
            yield role, f"missing; prompts need one of {', '.join(families)} beside {given}"
    for place, (name, each) in enumerate(encoders):
        if place not in roles.values():
            taken = [role for role, families in prompt.encoders.items() if each.family in families]
            reads = listed(f"{role} ({' or '.join(families)})" for role, families in prompt.encoders.items())
            why = f"there is another {each.family}" if taken else f"prompts of {family} are read by {reads}"
            yield name, f"a {each.family if each.text_encoder else each.class_name}, and {why}; remove it"
        elif each.text_encoder is not None and not _gives(each.text_encoder, transformer):
            takes = " and ".join(map(str, sorted(_widths(transformer))))
            yield (
                name,
                f"{each.family} gives states of width {each.text_encoder.width}, and the transformer takes {takes}; "
                "name the text encoders of this model",
            )


def _widths(transformer: TransformerFacts) -> set[int]:
    """Return the widths of what a transformer takes of texts; references and masks have no fixed last side."""
    return {
        argument.shape[-1]
        for argument in transformer.conditioning
        if argument.shape and isinstance(argument.shape[-1], int)
    }


def _gives(encoder: TextEncoderFacts, transformer: TransformerFacts) -> bool:
    """Return whether states of an encoder, or those of several layers side by side, are what the transformer takes."""
    return any(
        each == encoder.width or (encoder.layers > 0 and each % encoder.width == 0) for each in _widths(transformer)
    )
