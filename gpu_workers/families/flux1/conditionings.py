"""Text conditioning that clients sent once and name from then on, on this rank's device."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch

from xditd.gpu_workers.families.flux1.config import Flux1Config
from xditd.gpu_workers.models.job_checks import check_shape
from xditd.ipc import limits
from xditd.ipc.errors import BadRequest, UnknownConditioning
from xditd.ipc.processes import ProcessIdentity


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """Checked, on the device and in the dtype of the model that it is for; one row, or one for each image.

    ``prompt_embeds`` is (rows, text tokens, context), ``pooled`` (rows, pooled). Nobody writes to them.
    """

    prompt_embeds: torch.Tensor
    pooled: torch.Tensor

    @property
    def size_bytes(self) -> int:
        return self.prompt_embeds.nbytes + self.pooled.nbytes

    def repeated(self, rows: int) -> Conditioning:
        """The same for ``rows`` images, as views."""
        return Conditioning(self.prompt_embeds.expand(rows, -1, -1), self.pooled.expand(rows, -1))


Key = tuple[str, torch.dtype]


class KeptConditionings:
    """What each client may name, bounded by count and bytes; least recently used first out.

    A model of another dtype needs the conditioning again: it was checked for one. Every rank gets the same jobs in
    the same order, so all keep the same.
    """

    def __init__(
        self,
        max_count: int = limits.MAX_KEPT_CONDITIONINGS,
        max_bytes: int = limits.MAX_KEPT_CONDITIONING_BYTES,
    ) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._by_client: dict[ProcessIdentity, OrderedDict[Key, Conditioning]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_client.values()))

    def find(self, client: ProcessIdentity, conditioning_id: str, dtype: torch.dtype) -> Conditioning:
        """Return what a client sent under this id.

        Raises:
            UnknownConditioning: never sent, pushed out, or sent for a model of another dtype.
        """
        kept = self._by_client.get(client, OrderedDict())
        found = kept.get((conditioning_id, dtype))
        if found is None:
            raise UnknownConditioning(
                f"conditioning {conditioning_id}: not kept for a model in {dtype}; send its tensors again"
            )
        kept.move_to_end((conditioning_id, dtype))
        return found

    def keep(self, client: ProcessIdentity, conditioning_id: str, dtype: torch.dtype, new: Conditioning) -> None:
        """Keep a conditioning, in place of an older one of its id; one that is larger than the bound is not kept."""
        kept = self._by_client.setdefault(client, OrderedDict())
        kept.pop((conditioning_id, dtype), None)
        kept[conditioning_id, dtype] = new
        total = sum(each.size_bytes for each in kept.values())
        while len(kept) > self._max_count or total > self._max_bytes:
            total -= kept.popitem(last=False)[1].size_bytes

    def forget(self, client: ProcessIdentity) -> None:
        """Free what a client that is gone had sent."""
        self._by_client.pop(client, None)


def check_conditioning(config: Flux1Config, prompt_embeds: torch.Tensor, pooled: torch.Tensor) -> int:
    """Check embeddings against the model, and return the batch size."""
    if prompt_embeds.ndim != 3 or 0 in prompt_embeds.shape or prompt_embeds.shape[2] != config.context_channels:
        raise BadRequest(
            f"prompt_embeds are {list(prompt_embeds.shape)}: use [batch, tokens, {config.context_channels}]"
        )
    batch = prompt_embeds.shape[0]
    if batch > limits.MAX_BATCH:
        raise BadRequest(f"prompt_embeds are {list(prompt_embeds.shape)}: use a batch up to {limits.MAX_BATCH}")
    check_shape("pooled_prompt_embeds", pooled, (batch, config.pooled_channels))
    return batch
