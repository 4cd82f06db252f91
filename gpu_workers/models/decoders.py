"""Encode texts, and images in them, by decoders of transformers: masks, states of layers, features in place of tokens.

A family's operations inherit from :class:`DecoderOperations`. One whose model takes images lists their arguments in its
facts and says in ``place_images`` what becomes of them; all else is shared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch

from xditd.gpu_workers.models.operations import Model
from xditd.ipc import limits
from xditd.ipc.errors import BadRequest
from xditd.ipc.facts import ArgumentFacts, TextEncoderFacts


class DecoderSizes(Protocol):
    """What the configuration of any decoder has."""

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""

    @property
    def width(self) -> int:
        """Channels of a state."""

    @property
    def layers(self) -> int:
        """Number of layers."""


class DecoderOperations:
    """The operations of decoders whose module has ``embed_tokens`` and takes ``inputs_embeds``, but ``build``.

    See :class:`~xditd.gpu_workers.models.operations.TextEncoderOperations`.
    """

    def fuse(self, *_: object) -> None:
        """There are no fused kernels."""

    def facts(self, config: DecoderSizes) -> TextEncoderFacts:
        return TextEncoderFacts(
            width=config.width,
            max_tokens=limits.MAX_TEXT_TOKENS,
            has_pooled=False,
            layers=config.layers,
            images=self.image_facts(config),
        )

    def vocabulary(self, config: DecoderSizes) -> int:
        return config.vocabulary

    def image_facts(self, config: Any) -> tuple[ArgumentFacts, ...]:
        """Return the arguments of images in texts; none if the model takes texts alone."""
        return ()

    def place_images(
        self,
        model: Model[Any],
        token_ids: torch.Tensor,
        states: torch.Tensor,
        mask: torch.Tensor | None,
        images: Mapping[str, torch.Tensor],
    ) -> tuple[torch.Tensor, Mapping[str, Any]]:
        """Return the embeddings (batch, tokens, width) with those of images, and further arguments of the decoder.

        ``token_ids``, ``mask`` and ``images`` are on the host, ``states`` on the model's device.

        Raises:
            BadRequest: images that do not fit each other or the tokens.
        """
        raise NotImplementedError

    @torch.inference_mode()
    def encode(
        self,
        model: Model[Any],
        token_ids: torch.Tensor,
        *,
        pooled: bool,
        mask: torch.Tensor | None = None,
        layers: Sequence[int] = (),
        images: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        module = cast(Any, model.module)
        states = module.embed_tokens(token_ids.to(model.device))
        more: Mapping[str, Any] = {}
        if images:
            states, more = self.place_images(model, token_ids, states, mask, images)
        with _inputs_of(module.norm) as before_norm:
            found = module(
                inputs_embeds=states,
                attention_mask=None if mask is None else mask.to(model.device),
                output_hidden_states=bool(layers),
                **more,
            )
        if not layers:
            return cast(torch.Tensor, found.last_hidden_state), None
        # The class normalises the last of its hidden states.
        after = [*found.hidden_states[:-1], before_norm[-1]]
        return torch.cat([after[number] for number in layers], dim=-1), None


@contextmanager
def _inputs_of(module: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Note what a module is called with."""
    noted: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, given: noted.append(given[0]))
    try:
        yield noted
    finally:
        handle.remove()


def place_features(states: torch.Tensor, is_feature: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Return embeddings (batch, tokens, width) with ``features`` (tokens of images, width), in order, where
    ``is_feature`` (batch, tokens)."""
    return states.masked_scatter(is_feature[..., None].to(states.device), features.to(states))


def check_image_tokens(is_feature: torch.Tensor, features: int, token: int) -> None:
    """Raise ``BadRequest`` unless texts have as many tokens of images as the images have features."""
    found = int(is_feature.sum())
    if found != features:
        raise BadRequest(
            f"images: they are {features} tokens, but token_ids have {found} of images (id {token}): give the token "
            "ids that the encoder's processor makes for these images"
        )
