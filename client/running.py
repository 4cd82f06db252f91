"""From a draft to its outputs: borrow a block, send the request, wait, read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from xditd.client.conditioning import Conditioning
from xditd.client.drafts import Draft, draft_denoise
from xditd.client.io_blocks import IoBlock, IoPool
from xditd.client.jobs import PendingJob
from xditd.client.mailboxes import Patience
from xditd.client.session import Session
from xditd.ipc.errors import UnknownConditioning
from xditd.ipc.protocol import Reply
from xditd.ipc.replies import Denoised

if TYPE_CHECKING:
    import torch


class Runner:
    """Runs drafts in the session that ``current`` names; ``silence_s`` bounds the wait for a sign of progress."""

    def __init__(self, pool: IoPool, current: Callable[[], Session], silence_s: float) -> None:
        self._pool = pool
        self._current = current
        self._silence_s = silence_s

    def start(self, draft: Draft, block: IoBlock, deadline_s: float | None) -> PendingJob:
        """Send a draft whose inputs are in ``block``, and do not wait. The job gives the block back."""
        try:
            connection = self._current().connection
            request = draft.write(connection.next_request_id(), block.describe())
        except BaseException:
            self._pool.give_back(block)
            raise
        patience = Patience(self._silence_s, deadline_s)
        purpose = f"{type(request).__name__.lower()} {request.request_id}"
        return PendingJob(connection, self._pool, request, block, patience, purpose)

    def run(
        self, draft: Draft, reply_type: type[Reply], deadline_s: float | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run a draft, wait for it, and read its outputs."""
        block = draft.fill(self._pool)
        with self.start(draft, block, deadline_s) as pending:
            pending.wait(reply_type)
            second = None if draft.second is None else block.read(draft.second, draft.device)
            return block.read(draft.output, draft.device), second

    def forward(
        self,
        transformer_id: str,
        latents: torch.Tensor,
        timestep: float | Sequence[float] | torch.Tensor,
        conditionings: Sequence[Conditioning],
        guidance: float | None,
        sigmas: Sequence[float] | torch.Tensor | None,
        variant: str,
        deadline_s: float | None,
    ) -> torch.Tensor:
        """Run one forward. What the workers keep goes by its name, and again with tensors if they lost it."""
        session = self._current()

        def run(is_kept: Callable[[Conditioning], bool]) -> torch.Tensor:
            draft = draft_denoise(transformer_id, latents, timestep, conditionings, guidance, sigmas, variant, is_kept)
            return self.run(draft, Denoised, deadline_s)[0]

        try:
            prediction = run(lambda each: each.is_kept_by(session))
        except UnknownConditioning:
            # Pushed out by others, or lost with workers that were killed: nothing that the caller needs to know.
            prediction = run(lambda _: False)
        for each in conditionings:
            each.note_kept_by(session)
        return prediction
