"""The ``EncodePrompt`` job: texts to the conditioning of a transformer, by its family's recipe, on rank 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from xditd.gpu_workers.jobs.context import JobContext, PhaseClock
from xditd.gpu_workers.jobs.encode_text import check_images, check_token_ids
from xditd.gpu_workers.jobs.finished import Finished
from xditd.gpu_workers.jobs.prompt_checks import (
    check_encoders,
    check_prompts,
    check_tokens,
    check_vocabularies,
    find_recipe,
)
from xditd.gpu_workers.jobs.writing import ResultWriter
from xditd.gpu_workers.models.component import Component
from xditd.gpu_workers.models.lora_variants import LoraVariant
from xditd.gpu_workers.models.prompts import Conditioning, PromptInputs, PromptRecipe, Tokens
from xditd.gpu_workers.models.result_checks import FiniteCheck
from xditd.gpu_workers.models.tokenizer_building import BuiltTokenizer, refuse_foreign_errors
from xditd.gpu_workers.parallel.rank_sync import raise_on_all_ranks, using_all_cores
from xditd.ipc.job_parts import CutText, LoraUses
from xditd.ipc.requests import EncodePrompt

NEGATIVE = "negative_"
"""Before the names of the conditioning of negative prompts."""


def run(job: EncodePrompt, context: JobContext) -> Finished:
    """Tokenize and encode prompts; rank 0 does all of it, and writes the results. Without encoders it only tokenizes.

    Floating results are in the dtype of the transformer's weights, as diffusers' pipeline gives them to it.
    """
    clock = PhaseClock(context.device)
    results, cut = None, tuple[CutText, ...]()
    with raise_on_all_ranks():
        transformer = context.components.find(job.transformer_id, "transformer")
        recipe = find_recipe(transformer)
        facts = recipe.facts(transformer.match.config)
        check_prompts(job, facts, transformer)
        encoders = {role: context.components.get(each, "text_encoder") for role, each in job.encoders.items()}
        check_encoders(encoders, facts)
        loras = {role: context.components.variant(encoders[role], uses) for role, uses in job.loras.items()}
        clock.end_phase("plug")
        io = context.open_io()
        images = [io.read(f"images[{number}]", place) for number, place in enumerate(job.images)]
        if context.is_leader:
            tokenizers = {
                role: context.components.find(each, "tokenizer").tokenizer.built
                for role, each in job.tokenizers.items()
            }
            check_tokens(job, facts, tokenizers)
            _check_vocabularies(encoders, tokenizers)
            tokens = _tokenize(job, recipe, transformer, tokenizers, images)
            cut = _cut_texts(tokens)
            clock.end_phase("tokenize")
            if encoders:
                used = UsedEncoders(context, encoders, loras, job.loras, transformer)
                with using_all_cores(context.device), torch.no_grad():
                    tree: dict[str, Any] = {}
                    for before, each in tokens.items():
                        found = recipe.encode(transformer.match.config, each, used)
                        tree |= {before + name: value for name, value in _cast(found, transformer).items()}
            else:
                tree = {f"{before}{role}": _as_tree(each) for before, by in tokens.items() for role, each in by.items()}
            clock.end_phase("encode_text")
            for role, encoder in encoders.items():
                context.components.check_unchanged(encoder, job.loras.get(role, ()))
            results = ResultWriter(io, job.out_offset_bytes, job.out_size_bytes, context.provide).begin([tree])
            clock.end_phase("outputs")
    return Finished(clock.marks_ms, results=results, cut=cut)


def _tokenize(
    job: EncodePrompt,
    recipe: PromptRecipe[Any],
    transformer: Component,
    tokenizers: Mapping[str, BuiltTokenizer],
    images: Sequence[torch.Tensor],
) -> dict[str, Mapping[str, Tokens]]:
    """Return the tokens of the prompts under ``""``, and those of negative prompts under :data:`NEGATIVE`."""
    from PIL import Image

    pictures = [Image.fromarray(each.numpy()) for each in images]
    found = {}
    for before, texts, second in (("", job.prompts, job.prompts_2), (NEGATIVE, job.negative_prompts, ())):
        if texts:
            inputs = PromptInputs(texts, pictures, job.options, second)
            with refuse_foreign_errors(
                f"tokenizers of {transformer.manifest.label}", "tokenize these texts", has_prompts=True
            ):
                found[before] = recipe.tokenize(transformer.match.config, inputs, tokenizers)
    return found


def _cut_texts(tokens: Mapping[str, Mapping[str, Tokens]]) -> tuple[CutText, ...]:
    """Return the texts of which an encoder reads the first tokens alone. ``tokens`` are those of :func:`_tokenize`."""
    found = []
    for before, by_role in tokens.items():
        for role, each in by_role.items():
            read = each.token_ids.shape[1] - each.dropped if each.kept is None else each.kept
            for number, length in enumerate(each.lengths):
                if length - each.dropped > read:
                    is_negative = before == NEGATIVE
                    found.append(
                        CutText(
                            role=role, number=number, is_negative=is_negative, tokens=length - each.dropped, read=read
                        )
                    )
    return tuple(found)


def _check_vocabularies(encoders: Mapping[str, Component], tokenizers: Mapping[str, BuiltTokenizer]) -> None:
    """Check the ids of each encoder's tokenizer, whose role has the same number, as ``tokenizer_2`` has."""
    for role, encoder in encoders.items():
        number = role.removeprefix("text_encoder")
        for kind in ("tokenizer", "processor"):
            found = tokenizers.get(kind + number)
            if found is not None:
                vocabulary = encoder.model.operations_for("text_encoder").vocabulary(encoder.match.config)
                check_vocabularies(found.vocabulary, vocabulary, kind + number, encoder.match.family.name)


class UsedEncoders:
    """See :class:`~xditd.gpu_workers.models.prompts.PromptEncoders`."""

    def __init__(
        self,
        context: JobContext,
        encoders: Mapping[str, Component],
        loras: Mapping[str, LoraVariant],
        uses: Mapping[str, LoraUses],
        transformer: Component,
    ) -> None:
        self._context = context
        self._encoders = encoders
        self._loras = loras
        self._uses = uses
        self._transformer = transformer

    def layers(self, role: str) -> int:
        encoder = self._encoders[role]
        return int(encoder.model.operations_for("text_encoder").facts(encoder.match.config).layers)

    def states(
        self, role: str, tokens: Tokens, *, layers: Sequence[int] = (), pooled: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        encoder = self._encoders[role]
        operations, config = encoder.model.operations_for("text_encoder"), encoder.match.config
        facts, name = operations.facts(config), encoder.match.family.name
        check_token_ids(tokens.token_ids, name, facts.max_tokens, operations.vocabulary(config))
        check_images(tokens.images, name, facts)
        more: dict[str, Any] = {"mask": tokens.mask, "layers": tuple(layers)} if facts.layers else {}
        more |= {"images": tokens.images} if tokens.images else {}
        with ExitStack() as stack:
            if role in self._loras:
                stack.enter_context(self._loras[role].switched_on())
            hidden, state = operations.encode(encoder.model, tokens.token_ids, pooled=pooled, **more)
        dtype = self._transformer.model.dtype if encoder.match.packed else encoder.model.dtype
        finite = FiniteCheck()
        finite.note("hidden states", hidden)
        finite.fetch()
        into = dtype, self._transformer.model.dtype
        self._context.check_finite(finite, encoder, *into, loras=self._uses.get(role, ()))
        return hidden.to(dtype), None if state is None else state.to(dtype)


def _cast(conditioning: Conditioning, transformer: Component) -> dict[str, Any]:
    """Cast floating tensors to the dtype of the transformer's weights; others, such as masks, stay as they are."""
    dtype = transformer.model.dtype

    def cast(value: torch.Tensor) -> torch.Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    return {
        name: [*map(cast, value)] if isinstance(value, list) else cast(value) for name, value in conditioning.items()
    }


def _as_tree(tokens: Tokens) -> dict[str, Any]:
    tree = {"token_ids": tokens.token_ids, **({} if tokens.mask is None else {"mask": tokens.mask})}
    return tree | ({"images": dict(tokens.images)} if tokens.images else {})
