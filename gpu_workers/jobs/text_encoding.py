"""What an ``encode_text`` job does with a plugged skeleton: token ids in, hidden states out. No input or output."""

from __future__ import annotations

from typing import cast

import torch

from xditd.gpu_workers.families.clip_l import ClipLConfig
from xditd.gpu_workers.families.t5 import T5Config
from xditd.gpu_workers.models.skeletons import Skeleton
from xditd.ipc import limits
from xditd.ipc.errors import BadRequest


def check_token_ids(skeleton: Skeleton, token_ids: torch.Tensor) -> T5Config | ClipLConfig:
    """Check the token ids of a job against the encoder that shall read them; returns its configuration.

    Raises:
        BadRequest: names the tensor, or the token and its place, and what would do.
    """
    config = skeleton.config
    if not isinstance(config, (T5Config, ClipLConfig)):
        raise BadRequest(f"the job needs a text encoder, but the component is a {skeleton.family.kind}")
    name = skeleton.family.name
    if token_ids.dtype != torch.int64:
        raise BadRequest(f"token_ids: dtype is {token_ids.dtype}, use torch.int64")
    if token_ids.ndim != 2 or 0 in token_ids.shape or token_ids.shape[0] > limits.MAX_BATCH:
        raise BadRequest(
            f"token_ids are {list(token_ids.shape)}: use [batch, tokens], a batch up to {limits.MAX_BATCH}"
        )
    if token_ids.shape[1] > config.max_tokens:
        raise BadRequest(
            f"token_ids: {token_ids.shape[1]} tokens, but {name} takes up to {config.max_tokens}; "
            "split the text into chunks, and put them into the batch"
        )
    outside = (token_ids < 0) | (token_ids >= config.vocabulary)
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise BadRequest(
            f"token_ids[{row}][{column}]: {int(token_ids[row, column])} is not in the vocabulary of {name}, "
            f"which has {config.vocabulary} tokens, from 0; use the tokenizer of this encoder"
        )
    return config


@torch.inference_mode()
def encode_text(
    skeleton: Skeleton, token_ids: torch.Tensor, *, pooled: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Encode token ids (batch, tokens), int64, in float32; returns hidden states, and the pooled ones if asked for.

    Hidden states (batch, tokens, width) are the last layer after the final norm. Every token is attended to, padding
    too, as FLUX.1 was trained with; CLIP looks back only. Pooled (batch, width), CLIP only, is transformers'
    ``pooler_output``: the state at the first end-of-text token, or at token 0 where there is none; not projected.

    Raises:
        BadRequest: see :func:`check_token_ids`; or pooled states of an encoder that has none.
    """
    config = check_token_ids(skeleton, token_ids)
    if pooled and not isinstance(config, ClipLConfig):
        raise BadRequest(f"pooled: {skeleton.family.name} has no pooled state; take its hidden states, or ask a CLIP")
    encoded = skeleton.module(input_ids=token_ids.to(skeleton.device))
    return cast(torch.Tensor, encoded.last_hidden_state), encoded.pooler_output if pooled else None
