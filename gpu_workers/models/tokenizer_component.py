"""Make the component of a lent tokenizer, which holds no lent memory."""

from __future__ import annotations

from collections.abc import Sequence

from xditd.gpu_workers.models.clock import Clock
from xditd.gpu_workers.models.component import Component
from xditd.gpu_workers.models.lent_copies import LentCopies
from xditd.gpu_workers.models.tokenizer_building import TokenizerCache
from xditd.gpu_workers.models.tokenizer_match import match_tokenizer
from xditd.gpu_workers.weights.blocks import OpenBlock
from xditd.ipc.tensors import CopiedBytes, Manifest


def make_tokenizer(
    component_id: str,
    manifest: Manifest,
    opened: Sequence[OpenBlock | None],
    clock: Clock,
    cache: TokenizerCache | None,
) -> Component:
    """Read the files in ``opened``, the blocks of a checked manifest, which may then be unmapped.

    Only rank 0, which builds the tokenizer, has a ``cache``.

    Raises:
        BadCheckpoint, Unsupported, OutOfMemory, StaleSource: see ``match_tokenizer``.
    """
    clock.mark("map")
    match = match_tokenizer(manifest, opened, cache)
    clock.mark("build")
    return Component(
        component_id=component_id,
        match=match,
        bindings={},
        manifest=manifest,
        facts=match.facts(manifest),
        tensors={},
        checkpoint={},
        opened=[],
        lent_copies=LentCopies(),
        copies=[],
        copied=CopiedBytes(host_to_host=manifest.tensor_bytes),
        timings_ms=clock.marks_ms,
    )
