"""A manifest matched as the files of a tokenizer, and the lent tokenizer in the place of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from xditd.gpu_workers.models.entries import Bindings
from xditd.gpu_workers.models.tokenizer_building import BuiltTokenizer, TokenizerCache
from xditd.gpu_workers.weights.blocks import OpenBlock
from xditd.ipc.facts import ComponentFacts, TokenizerFacts
from xditd.ipc.packed import PackedWeight
from xditd.ipc.tensors import ComponentKind, Manifest


class LentTokenizer:
    """A tokenizer or a processor of transformers, built of lent files, which it does not need any more.

    Rank 0 alone has one: it makes all tokens.
    """

    scratch_bytes = 0

    def __init__(self, built: BuiltTokenizer | None) -> None:
        self._built = built
        self.owner: str | None = None

    @property
    def built(self) -> BuiltTokenizer:
        """The tokenizer; on rank 0 alone."""
        assert self._built is not None
        return self._built

    def plug(self, _: Bindings, owner: str = "", __: object = None) -> None:
        self.owner = owner

    def unplug(self) -> None:
        self.owner = None

    def release(self, *, is_lent: bool = False) -> None:
        """Nothing is reserved."""


@dataclass(frozen=True)
class _TokenizerAsFamily:
    """What the workers read of every component's ``Family``."""

    name: str = "tokenizer"
    kind: str = "tokenizer"

    def heads(self, _: object) -> int:
        """It is not run by several ranks."""
        return 0


@dataclass(frozen=True)
class TokenizerMatch:
    """A manifest matched as a tokenizer; see :class:`~xditd.gpu_workers.models.checkpoint_match.CheckpointMatch`."""

    model: LentTokenizer
    built: BuiltTokenizer | None
    """On rank 0."""
    files: tuple[str, ...]
    family: _TokenizerAsFamily = _TokenizerAsFamily()
    dtype: torch.dtype = torch.uint8
    read_names: frozenset[str] = frozenset()
    is_reused: bool = False
    config: None = None
    packed: Mapping[str, PackedWeight] = field(default_factory=dict)

    def reserve(self) -> int:
        return 0

    def bind(self, _: object) -> Bindings:
        return {}

    def by_canonical_name(self, _: object) -> Bindings:
        return {}

    def facts(self, manifest: Manifest) -> ComponentFacts:
        """Return the facts that clients get; those of rank 0 count."""
        built = self.built
        return ComponentFacts(
            family=self.family.name,
            class_name="tokenizer" if built is None else built.class_name,
            kind=ComponentKind.TOKENIZER,
            dtype="uint8",
            bytes_by_dtype=manifest.bytes_by_dtype,
            tokenizer=TokenizerFacts(
                vocabulary=0 if built is None else built.vocabulary,
                files=self.files,
                takes_images=built is not None and built.image_processor is not None,
                has_chat_template=built is not None and bool(built.tokenizer.chat_template),
            ),
        )


def match_tokenizer(
    manifest: Manifest, opened: Sequence[OpenBlock | None], cache: TokenizerCache | None
) -> TokenizerMatch:
    """Read the files of a manifest whose faults were checked, and build the tokenizer, if there is a ``cache``.

    ``opened`` are its blocks, which may be unmapped afterwards.

    Raises:
        BadCheckpoint, Unsupported, OutOfMemory: see :func:`build_tokenizer`.
        StaleSource: a file changed while it was read.
    """
    files = {spec.name: _content(opened[spec.block], spec.offset_bytes, spec.extent_bytes) for spec in manifest.tensors}
    for block in opened:
        if block is not None:
            block.check_unchanged()
    built = None if cache is None else cache.build(files, manifest.label)
    return TokenizerMatch(LentTokenizer(built), built, tuple(sorted(files)))


def _content(block: OpenBlock | None, offset_bytes: int, size_bytes: int) -> bytes:
    assert block is not None  # host memory is local to every rank
    return block.bytes[offset_bytes : offset_bytes + size_bytes].numpy().tobytes()
