"""Call a FLUX.1 transformer with the arguments that diffusers' ``FluxPipeline`` passes.

For examples, benchmarks and tests: the library itself passes arguments on unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

from xditd.client.client import Client
from xditd.client.families.flux1 import PATCH, image_positions, pack, text_positions, unpack
from xditd.client.jobs.arguments import KeptTensor, RowsOf
from xditd.client.loans import Loan
from xditd.ipc.errors import BadRequest
from xditd.ipc.transports.tensor_views import torch_dtype

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Prompt:
    """Text conditioning: ``prompt_embeds`` (rows, tokens, context), ``pooled_prompt_embeds`` (rows, pooled), guidance.

    One row is used for all images of the prompt. Kept tensors are sent once, in the dtype of the weights.
    """

    prompt_embeds: torch.Tensor | KeptTensor
    pooled_prompt_embeds: torch.Tensor | KeptTensor
    guidance: float = 3.5

    @property
    def tokens(self) -> int:
        return self.prompt_embeds.shape[1]


class Flux1Calls:
    """Predicts velocities with one transformer, for unpacked latents (batch, channels, height, width)."""

    def __init__(self, client: Client, transformer: Loan) -> None:
        self._client = client
        self._transformer = transformer
        facts = client.facts(transformer)
        self._dtype = torch_dtype(facts.dtype)
        self._has_guidance = facts.transformer is not None and facts.transformer.guidance == "embedded"

    def keep(self, prompt_embeds: torch.Tensor, pooled_prompt_embeds: torch.Tensor, guidance: float = 3.5) -> Prompt:
        """Make a prompt whose tensors are kept in the workers."""
        kept = [self._client.keep(each.to(self._dtype)) for each in (prompt_embeds, pooled_prompt_embeds)]
        return Prompt(kept[0], kept[1], guidance)

    def predict(
        self,
        latents: torch.Tensor,
        sigma: float,
        prompts: Prompt | Sequence[Prompt],
        *,
        sigmas: Sequence[float] = (),
        variant: str = "class",
        deadline_s: float | None = None,
    ) -> torch.Tensor:
        """Run one forward; returns the velocity, with shape, dtype and device of ``latents``.

        The batch is divided evenly among the prompts, in order. Consecutive prompts of one length run as one batch,
        others as parts of one request. ``sigmas`` are all sigmas of the sampling, if they are known.

        Raises:
            BadRequest: the batch cannot be divided evenly.
        """
        import torch

        shared = [prompts] if isinstance(prompts, Prompt) else list(prompts)
        if not shared or not len(latents) or len(latents) % len(shared):
            raise BadRequest(
                f"prompts: {len(shared)} for {len(latents)} latents; give a number of prompts that divides the batch"
            )
        share = len(latents) // len(shared)
        parts: list[dict[str, Any]] = []
        start = 0
        for _, group in groupby(shared, key=lambda prompt: prompt.tokens):
            members = list(group)
            end = start + share * len(members)
            parts.append(self.arguments(latents[start:end], sigma, members))
            start = end
        results = self._client.call_parts(
            self._transformer,
            parts,
            foreseen={"timestep": torch.tensor(sigmas)} if sigmas else None,
            variant=variant,
            deadline_s=deadline_s,
        )
        height, width = latents.shape[2:]
        return torch.cat([unpack(packed, height, width) for (packed,) in results]).to(latents.dtype)

    def arguments(self, latents: torch.Tensor, sigma: float, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Make the arguments of ``FluxTransformer2DModel.forward``."""
        import torch

        batch, _, height, width = latents.shape
        share = batch // len(prompts)
        given: dict[str, Any] = {
            "hidden_states": pack(latents.to(self._dtype)),
            "encoder_hidden_states": self._rows([prompt.prompt_embeds for prompt in prompts], share),
            "pooled_projections": self._rows([prompt.pooled_prompt_embeds for prompt in prompts], share),
            "timestep": torch.full((batch,), sigma),
            "img_ids": image_ids(height, width),
            "txt_ids": text_ids(prompts[0].tokens),
        }
        if self._has_guidance:
            given["guidance"] = torch.tensor([prompt.guidance for prompt in prompts for _ in range(share)])
        return given

    def _rows(self, given: Sequence[torch.Tensor | KeptTensor], share: int) -> torch.Tensor | KeptTensor | RowsOf:
        """Join conditioning to one row for each image: a tensor with one row is repeated for its share of them."""
        tensors = [each if isinstance(each, KeptTensor) else each.to(self._dtype) for each in given]
        if len(tensors) == 1 and tensors[0].shape[0] == share:
            return tensors[0]
        return RowsOf([(tensor, share if tensor.shape[0] == 1 else 1) for tensor in tensors])


@lru_cache(maxsize=16)
def image_ids(height: int, width: int) -> KeptTensor:
    """The positions of the image tokens for latents of this size, as a kept tensor."""
    return KeptTensor(image_positions(height // PATCH, width // PATCH))


@lru_cache(maxsize=16)
def text_ids(tokens: int) -> KeptTensor:
    """The positions of text tokens, as a kept tensor."""
    return KeptTensor(text_positions(tokens))
