"""Check a request for prompts against what the transformer's family takes, before anything is encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xditd.gpu_workers.models.component import Component
from xditd.gpu_workers.models.prompts import PromptRecipe, TakesPrompts
from xditd.gpu_workers.models.tokenizer_building import BuiltTokenizer
from xditd.ipc import limits
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.facts import PromptFacts
from xditd.ipc.name_lists import listed
from xditd.ipc.requests import EncodePrompt

_PICTURE = 3
"""Dimensions, and channels, of a picture."""


def find_recipe(transformer: Component) -> PromptRecipe[Any]:
    """Return how a transformer's family makes conditioning of texts.

    Raises:
        Unsupported: it does not.
    """
    operations = transformer.model.operations_for("transformer")
    if not isinstance(operations, TakesPrompts):
        name = transformer.match.family.name
        raise Unsupported(f"{name}: its family encodes no prompts; encode token ids by encode_text, and give tensors")
    return operations.prompt


def check_prompts(job: EncodePrompt, facts: PromptFacts, transformer: Component) -> None:
    """Check counts, roles, families of encoders, and options.

    Raises:
        BadRequest: one does not fit; names it, and what is accepted.
        Unsupported: negative prompts or pictures that this family's prompts do not take.
    """
    name = transformer.match.family.name
    if not job.prompts:
        raise BadRequest("prompts: none is given; an empty prompt is the text ''")
    if job.negative_prompts and len(job.negative_prompts) != len(job.prompts):
        raise BadRequest(
            f"negative_prompts: {len(job.negative_prompts)} for {len(job.prompts)} prompts; give as many, or none"
        )
    if job.prompts_2 and len(job.prompts_2) != len(job.prompts):
        raise BadRequest(f"prompts_2: {len(job.prompts_2)} for {len(job.prompts)} prompts; give as many, or none")
    if job.prompts_2 and not facts.takes_second:
        raise Unsupported(f"prompt_2: {name} has one text for all of its encoders; leave it out")
    chars = sum(map(len, (*job.prompts, *job.negative_prompts, *job.prompts_2)))
    if chars > limits.MAX_PROMPTS_CHARS:
        raise BadRequest(
            f"prompts: {chars} characters in all, at most {limits.MAX_PROMPTS_CHARS}; send fewer at a time"
        )
    if job.negative_prompts and not facts.takes_negative:
        raise Unsupported(f"negative_prompt: {name} has no second prediction to weight against; leave it out")
    if len(job.images) > facts.max_images:
        takes = f"up to {facts.max_images}" if facts.max_images else "none"
        raise Unsupported(f"images: {len(job.images)} with a prompt, and {name}'s prompts take {takes}; leave them out")
    for number, image in enumerate(job.images):
        if image.dtype != "uint8" or len(image.shape) != _PICTURE or image.shape[-1] != _PICTURE or 0 in image.shape:
            raise BadRequest(f"images[{number}]: {list(image.shape)} of {image.dtype}; use (height, width, 3) of uint8")
        if max(image.shape) > limits.MAX_SIDE_PIXELS:
            raise BadRequest(f"images[{number}]: {list(image.shape)}, sides of at most {limits.MAX_SIDE_PIXELS} pixels")
    if unknown := sorted(set(job.options) - set(facts.options)):
        takes = ", ".join(facts.options) or "none"
        raise BadRequest(f"options: {listed(unknown)} is not known to {name}'s prompts; they take {takes}")
    if job.encoders:
        _check_roles("encoders", job.encoders, facts.encoders, name)
    _check_roles("tokenizers", job.tokenizers, _tokenizers(job, facts), name)


def check_encoders(encoders: Mapping[str, Component], facts: PromptFacts) -> None:
    """Check the families of encoders, and that no two roles share a model.

    Raises:
        BadRequest: one is of another family than its role takes.
    """
    for role, encoder in encoders.items():
        _check_one("encoders", role, encoder.match.family.name, facts.encoders[role])
    models = [encoder.model for encoder in encoders.values()]
    if len({id(model) for model in models}) < len(models) and len({e.component_id for e in encoders.values()}) > 1:
        raise BadRequest("encoders: two roles name components of one architecture, whose weights replace each other")


def check_tokens(job: EncodePrompt, facts: PromptFacts, tokenizers: Mapping[str, BuiltTokenizer]) -> None:
    """Check the classes of tokenizers, which rank 0 knows.

    Raises:
        BadRequest: one is of another class than its role takes.
    """
    for role, tokenizer in tokenizers.items():
        _check_one("tokenizers", role, tokenizer.class_name, _tokenizers(job, facts)[role])


def check_vocabularies(tokens: int, vocabulary: int, role: str, family: str) -> None:
    """Check that a tokenizer is that of an encoder: its ids fit, and are not of a far smaller vocabulary.

    Embeddings have some more rows than their tokenizers have ids, but never twice as many.

    Raises:
        BadRequest: it is of another encoder.
    """
    if tokens > vocabulary or 2 * tokens < vocabulary:
        raise BadRequest(
            f"tokenizers: that of {role} has {tokens} ids, and the {family} that is lent has a vocabulary of "
            f"{vocabulary}: lend the tokenizer of this encoder"
        )


def _tokenizers(job: EncodePrompt, facts: PromptFacts) -> Mapping[str, Sequence[str]]:
    return facts.image_tokenizers if job.images else facts.tokenizers


def _check_roles(what: str, given: Mapping[str, str], needed: Mapping[str, Sequence[str]], name: str) -> None:
    if given.keys() != needed.keys():
        roles = ", ".join(f"{role} ({' or '.join(kinds)})" for role, kinds in needed.items())
        have = listed(sorted(given)) or "none"
        raise BadRequest(f"{what}: given are {have}; {name} needs {roles}")


def _check_one(what: str, role: str, found: str, wanted: Sequence[str]) -> None:
    if found not in wanted:
        raise BadRequest(f"{what}: {role} is a {found}; a {' or '.join(wanted)} is needed")
