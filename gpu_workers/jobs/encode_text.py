"""The ``EncodeText`` job: token ids to hidden states, on rank 0, in float32 whatever the weights' dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from xditd.gpu_workers.jobs.context import JobContext, PhaseClock
from xditd.gpu_workers.jobs.finished import Finished
from xditd.gpu_workers.jobs.reading import check_names
from xditd.gpu_workers.models.finite import check_finite
from xditd.gpu_workers.models.job_checks import check_shape
from xditd.gpu_workers.models.result_checks import FiniteCheck
from xditd.gpu_workers.parallel.rank_sync import raise_on_all_ranks, using_all_cores
from xditd.ipc import limits
from xditd.ipc.errors import BadRequest
from xditd.ipc.facts import TextEncoderFacts
from xditd.ipc.requests import EncodeText
from xditd.ipc.transports.tensor_views import torch_dtype


def run(job: EncodeText, context: JobContext) -> Finished:
    """Encode token ids; write the hidden states after the final norm or those of layers, and the pooled state if asked.

    Padding is masked where a mask says so. The pooled state is that of the first end-of-text token, or of token 0 if
    there is none; it is not projected.
    """
    clock = PhaseClock(context.device)
    with raise_on_all_ranks():
        encoder = context.components.get(job.encoder_id, "text_encoder")
        match = encoder.match
        operations = encoder.model.operations_for("text_encoder")
        facts, name = operations.facts(match.config), match.family.name
        clock.end_phase("plug")
        io = context.open_io()
        token_ids = io.read("token_ids", job.token_ids)
        check_token_ids(token_ids, name, facts.max_tokens, operations.vocabulary(match.config))
        mask = None if job.mask is None else io.read("mask", job.mask)
        check_layers(job, mask, token_ids, name, facts)
        images = {each: io.read(f"images.{each}", place) for each, place in job.images.items()}
        check_images(images, name, facts)
        io.check("out", job.out, (*token_ids.shape, facts.width * max(1, len(job.layers))))
        if job.out_pooled is not None:
            if not facts.has_pooled:
                raise BadRequest(f"pooled: {name} has no pooled state; take its hidden states, or ask a CLIP")
            io.check("out_pooled", job.out_pooled, (token_ids.shape[0], facts.width))
        loras = context.components.variant(encoder, job.loras)
        if context.is_leader:
            clock.end_phase("inputs")
            with using_all_cores(context.device), loras.switched_on():
                more: dict[str, Any] = {"mask": mask, "layers": job.layers} if facts.layers else {}
                more |= {"images": images} if images else {}
                hidden, pooled = operations.encode(encoder.model, token_ids, pooled=job.out_pooled is not None, **more)
            finite = FiniteCheck()
            finite.note("hidden states", hidden)  # the pooled state is one of them
            finite.fetch()
            clock.end_phase("encode_text")
            places = [job.out, *([] if job.out_pooled is None else [job.out_pooled])]
            context.check_finite(finite, encoder, *(torch_dtype(where.dtype) for where in places), loras=job.loras)
            context.components.check_unchanged(encoder, job.loras)
            io.write("out", job.out, hidden)
            if job.out_pooled is not None and pooled is not None:
                io.write("out_pooled", job.out_pooled, pooled)
            clock.end_phase("outputs")
    return Finished(clock.marks_ms)


def check_layers(
    job: EncodeText, mask: torch.Tensor | None, token_ids: torch.Tensor, name: str, facts: TextEncoderFacts
) -> None:
    """Check the mask and the layers against the encoder.

    Raises:
        BadRequest: it takes none, or they do not fit; names the value and what is accepted.
    """
    if not facts.layers:
        given = [what for what, value in (("mask", mask is not None), ("layers", bool(job.layers))) if value]
        if given:
            raise BadRequest(f"{' and '.join(given)}: {name} takes none; leave it out")
    beyond = [each for each in job.layers if each > facts.layers]
    if beyond:
        raise BadRequest(f"layers: {beyond[0]} is not one of {name}, which has {facts.layers}; 0 are its embeddings")
    if mask is None:
        return
    if mask.shape != token_ids.shape or mask.dtype != torch.int64:
        raise BadRequest(
            f"mask: {list(mask.shape)} of {str(mask.dtype).removeprefix('torch.')}, use {list(token_ids.shape)} of "
            "int64, as token_ids"
        )
    if ((mask != 0) & (mask != 1)).any():
        raise BadRequest("mask: use 1 for tokens and 0 for padding")
    empty = (mask.sum(1) == 0).nonzero()
    if empty.numel():
        raise BadRequest(f"mask[{int(empty[0])}]: no token is left; give 1 for the tokens of the text")


def check_images(images: Mapping[str, torch.Tensor], name: str, facts: TextEncoderFacts) -> None:
    """Check names, ranks and values of the arguments of images; the encoder's family checks the rest.

    Raises:
        BadRequest: it takes none, or one of them is unknown, missing, of another shape or not finite; names it.
    """
    if not images:
        return
    if not facts.images:
        raise BadRequest(f"images: {name} takes texts alone; leave them out, or lend it with its vision tower")
    check_names(images, facts.images, "images")
    for each in facts.images:
        if each.name in images:
            shape = [side if isinstance(side, int) else None for side in each.shape]
            check_shape(f"images.{each.name}", images[each.name], shape)
    check_finite({f"images.{each}": value for each, value in images.items() if value.is_floating_point()})


def check_token_ids(token_ids: torch.Tensor, name: str, max_tokens: int, vocabulary: int) -> None:
    """Check token ids against the encoder.

    Raises:
        BadRequest: names the tensor, or the token and its position, and what is accepted.
    """
    if token_ids.dtype != torch.int64:
        raise BadRequest(f"token_ids: dtype is {token_ids.dtype}, use torch.int64")
    if token_ids.ndim != 2 or 0 in token_ids.shape or token_ids.shape[0] > limits.MAX_BATCH:
        raise BadRequest(
            f"token_ids are {list(token_ids.shape)}: use [batch, tokens], a batch up to {limits.MAX_BATCH}"
        )
    if token_ids.shape[1] > max_tokens:
        raise BadRequest(
            f"token_ids: {token_ids.shape[1]} tokens, but {name} takes up to {max_tokens}; "
            "split the text into chunks, and put them into the batch"
        )
    outside = (token_ids < 0) | (token_ids >= vocabulary)
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise BadRequest(
            f"token_ids[{row}][{column}]: {int(token_ids[row, column])} is not in the vocabulary of {name}, "
            f"which has {vocabulary} tokens, from 0; use the tokenizer of this encoder"
        )
