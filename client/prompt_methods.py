"""The methods of ``Client`` that encode words, and token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from xditd.client.argument_names import names_unknown
from xditd.client.jobs.component import Component
from xditd.client.loans import Loan, LoanWithLoras
from xditd.ipc.errors import BadRequest
from xditd.ipc.replies import TextEncoded
from xditd.ipc.tensors import ComponentKind

if TYPE_CHECKING:
    import torch

    from xditd.client.conditioning import Conditioning
    from xditd.client.jobs.prompt_requests import Texts
    from xditd.client.jobs.runner import Runner
    from xditd.client.results import TextEncoding


class PromptMethods:
    """A base of ``Client``, which sets ``_runner``, and finds components by ``_component``."""

    _runner: Runner
    _component: Callable[[Loan | LoanWithLoras | str, ComponentKind], Component]

    @names_unknown("Client.encode_prompt")
    def encode_prompt(
        self,
        transformer: Loan | LoanWithLoras | str,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        images: Sequence[Any] = (),
        encoders: Mapping[str, Loan | LoanWithLoras | str],
        tokenizers: Mapping[str, Loan | str],
        weights: bool = False,
        options: Mapping[str, bool | int | float] | None = None,
        device: torch.device | str | None = None,
        deadline_s: float | None = None,
    ) -> Conditioning:
        """Encode prompts to the conditioning of :meth:`generate`; the workers tokenize. The caller owns the tensors.

        ``encoders`` and ``tokenizers`` are loans by the roles in ``facts.transformer.prompt``, which are diffusers'
        names: for FLUX.1 ``text_encoder`` (CLIP-L) and ``text_encoder_2`` (T5), with ``tokenizer`` and ``tokenizer_2``
        of :meth:`lend_tokenizer`. Encoders may have LoRAs. Lengths, padding, templates and layers are those of
        diffusers' pipeline of the transformer's family. Floating tensors have the dtype of the transformer's weights;
        encoders compute in float32.

        ``negative_prompt`` is one for all prompts, or one for each; without it there is no negative conditioning.
        ``images`` go with every prompt of a family that takes them: PIL images in RGB, or (height, width, 3) of uint8.
        ``options`` are those of the facts, such as ``max_sequence_length``. Weights in prompts, ``(cat:1.2)``, are
        text; ``weights=True`` is refused by a family that has none. ``device`` is that of the tensors, by default the
        CPU.

        Raises:
            BadRequest: a role without its component, or with one of another family or class; a text that is too long.
            Unsupported: negative prompts, images or weights for a family that takes none.
            LeaseLost: a loan has ended.
        """
        if isinstance(encoders, Mapping) and not encoders:
            raise BadRequest("encoders: none is given; name the text encoders by role, or use tokenize for ids alone")
        found: Conditioning = self._encode(
            transformer, prompt, negative_prompt, images, encoders, tokenizers, weights, options, device, deadline_s
        )
        return found

    def tokenize(
        self,
        transformer: Loan | LoanWithLoras | str,
        prompt: str | Sequence[str],
        *,
        images: Sequence[Any] = (),
        tokenizers: Mapping[str, Loan | str],
        options: Mapping[str, bool | int | float] | None = None,
        deadline_s: float | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Return the tokens that :meth:`encode_prompt` gives to each encoder, by its role.

        Each has ``token_ids`` (prompts, tokens), int64, and if the encoder takes one a ``mask`` of the same shape, 0
        for padding; with pictures, ``images``, as :meth:`encode_text` takes them.

        Raises:
            BadRequest, Unsupported, LeaseLost: as :meth:`encode_prompt`.
        """
        found: dict[str, dict[str, Any]] = self._encode(
            transformer, prompt, None, images, {}, tokenizers, False, options, None, deadline_s
        )
        return found

    def encode_text(
        self,
        encoder: Loan | LoanWithLoras | str,
        token_ids: torch.Tensor | Sequence[Sequence[int]],
        *,
        pooled: bool = False,
        mask: torch.Tensor | Sequence[Sequence[int]] | None = None,
        layers: Sequence[int] = (),
        images: Mapping[str, torch.Tensor] | None = None,
        deadline_s: float | None = None,
    ) -> TextEncoding:
        """Encode token ids (batch, tokens) with a text encoder, in float32, whatever the dtype of its weights.

        The encoder's facts say how many tokens it takes. ``pooled`` adds the pooled state. Encoders with ``layers`` in
        their facts take a ``mask`` (batch, tokens), 0 for padding, which others do not mask, and ``layers``: the states
        after these, one beside the other (batch, tokens, layers * width), in place of those after the final norm.
        Encoders with ``images`` in their facts take images in texts: the tensors of these names that the processor of
        their class in transformers makes beside the token ids, of all texts in order.

        Raises:
            BadRequest: an unknown token id, too many tokens, a mask, layers or images that the encoder does not take,
                images that do not fit the token ids, or an encoder without a pooled state.
        """
        from xditd.client.jobs.text_requests import encode_text_request
        from xditd.client.results import TextEncoding

        component = self._component(encoder, ComponentKind.TEXT_ENCODER)
        job = encode_text_request(component, token_ids, pooled=pooled, mask=mask, layers=layers, images=images)
        found = self._runner.run(job, TextEncoded, deadline_s)
        return TextEncoding(found["hidden_states"], found.get("pooled"))

    def _encode(
        self,
        transformer: Loan | LoanWithLoras | str,
        prompt: Texts,
        negative_prompt: Texts | None,
        images: Sequence[Any],
        encoders: Mapping[str, Loan | LoanWithLoras | str],
        tokenizers: Mapping[str, Loan | str],
        weights: bool,
        options: Mapping[str, bool | int | float] | None,
        device: torch.device | str | None,
        deadline_s: float | None,
    ) -> Any:
        from xditd.client.jobs.arguments import check_text
        from xditd.client.jobs.prompt_requests import prompt_request

        for name, roles in (("encoders", encoders), ("tokenizers", tokenizers)):
            if not isinstance(roles, Mapping):
                raise BadRequest(f"{name}: {roles!r:.100} is of type {type(roles).__name__}, use a dict by role")
            for role in roles:
                check_text(f"{name}: role", role)
        request = partial(
            prompt_request,
            self._component(transformer, ComponentKind.TRANSFORMER),
            prompt,
            negative_prompt=negative_prompt,
            images=images,
            encoders={role: self._component(each, ComponentKind.TEXT_ENCODER) for role, each in encoders.items()},
            tokenizers={role: self._component(each, ComponentKind.TOKENIZER) for role, each in tokenizers.items()},
            weights=weights,
            options=options,
            device=device,
        )
        return self._runner.encode_prompt(request, deadline_s)
