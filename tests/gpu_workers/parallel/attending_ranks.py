"""A program, not a test: ranks attend with split tokens, and compare the results with attention on one rank.

python attending_ranks.py FOLDER RANKS [cuda]

On GPUs, ranks store into each other's memory. It writes ``ranks<N>.json``: for each scenario, what was wrong on each
rank.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from xditd.gpu_workers.parallel.streams import Ranks, Stream, exchange, gather, take
from xditd.gpu_workers.parallel.token_attention import TokenMismatch, Tokens, attend

HEAD = 8
STREAMS = ((8,), (7,), (12, 8), (7, 9), (5, 6, 11))
"""Tokens of the streams that are joined: counts that divide, and that do not."""
HEADS = ((12, 12), (5, 5), (24, 12), (24, 6), (6, 2), (2, 1))
"""Heads of queries and of keys: some divide by 2, 3 and 4 ranks."""


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Attention of one rank, with grouped heads."""
    q, k, v = (each.transpose(1, 2) for each in (query, key, value))
    if query.is_cuda:  # whose other kernels take no mask of odd strides, and heads of few sizes
        with sdpa_kernel(SDPBackend.MATH):
            return functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)
    return functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)


class Joined:
    """A sequence of joined streams, of which this rank has its share."""

    def __init__(self, counts: Sequence[int], on: Ranks) -> None:
        self.streams = [Stream.of(count, on.size) for count in counts]
        self.tokens = Tokens(tuple(self.streams))
        self.on = on

    def own(self, whole: torch.Tensor, dim: int) -> torch.Tensor:
        """Return this rank's tokens as a class has them: of each stream its share, then joined."""
        parts = whole.split([each.tokens for each in self.streams], dim)
        return torch.cat(
            [take(part, dim, each, self.on.rank) for part, each in zip(parts, self.streams, strict=True)], dim
        )


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return made.to(torch.get_default_device())


def check(mine: torch.Tensor, its: torch.Tensor, what: str) -> None:
    assert (mine.shape, mine.dtype) == (its.shape, its.dtype), f"{what}: {list(mine.shape)}"
    error = float((mine - its).abs().max() / its.abs().max())
    bar = 1e-2 if its.dtype != torch.float32 else 1e-6 if its.device.type == "cpu" else 1e-5
    assert error <= bar, f"{what}: {error}"


def compare(
    on: Ranks,
    queries: Sequence[int] | None,
    keys: Sequence[int] | None,
    heads: tuple[int, int],
    masks: Sequence[str] = ("none",),
    rows: int = 1,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Attend with split tokens and whole; of ``None``, every rank has all of a sequence of nine tokens."""
    of_queries, of_keys = (None if counts is None else Joined(counts, on) for counts in (queries, keys))
    query = numbers(rows, sum(queries or (9,)), heads[0], HEAD, seed=1).to(dtype)
    key, value = (numbers(rows, sum(keys or (9,)), heads[1], HEAD, seed=seed).to(dtype) for seed in (2, 3))
    for kind in masks:
        whole, own = mask_of(kind, query, key, of_queries, of_keys)
        expected = attention(query, key, value, whole)
        found = attend(
            query if of_queries is None else of_queries.own(query, 1),
            key if of_keys is None else of_keys.own(key, 1),
            value if of_keys is None else of_keys.own(value, 1),
            own,
            None if of_queries is None else of_queries.tokens,
            None if of_keys is None else of_keys.tokens,
            on,
            attention,
        )
        what = f"queries {queries}, keys {keys}, heads {heads}, mask {kind}, {rows} rows of {dtype}"
        check(found, expected if of_queries is None else of_queries.own(expected, 1), what)


MASKS = (
    "none",
    "keys",
    "own keys",
    "rows and keys",
    "rows and keys, two dimensions",
    "rows and keys, three dimensions",
    "rows and own keys",
    "own rows and keys",
    "rows",
    "keys per head",
    "own keys per head",
    "rows and keys per head",
    "own rows and keys per head",
)
"""What a mask holds: of all tokens, or of this rank's own; each boolean and additive."""


def mask_of(
    kind: str, query: torch.Tensor, key: torch.Tensor, queries: Joined | None, keys: Joined | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return a mask for one rank alone, and the same one as this rank gets it."""
    kind, _, values = kind.partition(" of ")
    if kind == "none":
        return None, None
    heads = query.shape[2] if "per head" in kind else 1
    has_keys = "keys" in kind
    shape = [
        query.shape[0],
        heads,
        query.shape[1] if "rows" in kind else 1,
        key.shape[1] if has_keys else 1,
    ]
    dimensions = {"one": 1, "two": 2, "three": 3}.get(kind.partition(", ")[2].partition(" ")[0], 4)
    if dimensions == 3:
        shape[1] = 1
    whole = numbers(*shape[4 - dimensions :] if dimensions != 3 else shape[1:], seed=4)
    if values == "booleans":
        whole = whole > 0
        whole[..., 0] = True  # no query without keys
    else:
        whole = whole.to(query.dtype)
    own = whole
    if "own rows" in kind and queries is not None:
        own = queries.own(own, own.ndim - 2)
    if "own keys" in kind and keys is not None:
        own = keys.own(own, own.ndim - 1)
    return whole, own


def of_both(kinds: Sequence[str]) -> list[str]:
    """Return each kind of masks with booleans, and additive."""
    return [kind if kind == "none" else f"{kind} of {values}" for kind in kinds for values in ("booleans", "numbers")]


def self_attention_of_any_counts_and_heads(on: Ranks) -> None:
    for counts in STREAMS:
        for heads in HEADS:
            compare(on, counts, counts, heads)


def masks_of_every_kind(on: Ranks) -> None:
    for counts in ((7,), (7, 9), (8, 12)):
        for heads in ((12, 12), (5, 5), (24, 12)):
            compare(on, counts, counts, heads, of_both(MASKS), rows=3)
            compare(on, counts, counts, heads, of_both(MASKS))


def rows_and_dtypes(on: Ranks) -> None:
    for rows in (1, 3):
        for dtype in (torch.float32, torch.bfloat16):
            for heads in ((12, 12), (5, 5), (24, 12)):
                compare(on, (7, 9), (7, 9), heads, of_both(("none", "own keys", "rows and keys")), rows, dtype)


def queries_and_keys_of_other_streams(on: Ranks) -> None:
    kinds = of_both(MASKS)
    for heads in ((12, 12), (5, 5), (24, 12)):
        compare(on, (7,), (10, 6), heads, kinds, rows=3)
        compare(on, (7,), (6, 7), heads, kinds)
        compare(on, (9, 6), (6, 9), heads, kinds)
        compare(on, (7,), (8,), heads, kinds)


def whole_queries_of_split_keys(on: Ranks) -> None:
    for heads in ((12, 12), (5, 5)):
        compare(on, None, (7, 9), heads, of_both(each for each in MASKS if "own rows" not in each), rows=3)


def split_queries_of_whole_keys(on: Ranks) -> None:
    for heads in ((12, 12), (5, 5)):
        compare(on, (7, 9), None, heads, of_both(each for each in MASKS if "own keys" not in each), rows=3)


def ranks_with_a_single_token(on: Ranks) -> None:
    """A mask of one key is that of a rank's only key, or of all: ranks with more than one token know, others not."""
    masks = of_both(MASKS)
    for counts in ((on.size,), (on.size + 1,), (2 * on.size - 1,), (2 * on.size,)):
        for heads in ((12, 12), (5, 5)):
            compare(on, counts, counts, heads, masks, rows=2)
            compare(on, None, counts, heads, [each for each in masks if "own rows" not in each])
            compare(on, (7,), counts, heads, masks)


def values_of_another_head_size(on: Ranks) -> None:
    joined = Joined((7, 9), on)
    for heads in (12, 5):
        query, key = (numbers(2, 16, heads, HEAD, seed=seed) for seed in (1, 2))
        value = numbers(2, 16, heads, HEAD // 2, seed=3)
        owns = (joined.own(each, 1) for each in (query, key, value))
        found = attend(*owns, None, joined.tokens, joined.tokens, on, attention)
        check(found, joined.own(attention(query, key, value, None), 1), f"{heads} heads")


def every_run_has_the_same_bits(on: Ranks) -> None:
    joined = Joined((7, 9), on)
    for heads in (12, 5):
        query, key, value = (joined.own(numbers(2, 16, heads, HEAD, seed=seed), 1) for seed in (1, 2, 3))
        runs = [attend(query, key, value, None, joined.tokens, joined.tokens, on, attention) for _ in range(2)]
        assert torch.equal(*runs)


def refused(on: Ranks, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, tokens: Tokens) -> None:
    """Check that all ranks refuse, before they wait for each other."""
    try:
        attend(query, key, key, mask, tokens, tokens, on, attention)
    except TokenMismatch:
        return
    raise AssertionError(f"queries of {list(query.shape)} are not refused")


def empty_dimensions_are_refused(on: Ranks) -> None:
    tokens = Joined((7,), on).tokens
    own = tokens.counts[on.rank]
    refused(on, torch.empty(0, own, 12, HEAD), torch.empty(0, own, 12, HEAD), None, tokens)
    refused(on, torch.empty(1, own, 0, HEAD), torch.empty(1, own, 0, HEAD), None, tokens)
    few = Joined((on.size - 1,), on).tokens
    own = few.counts[on.rank]
    refused(on, torch.empty(1, own, 12, HEAD), torch.empty(1, own, 12, HEAD), None, few)
    joined = Joined((7, on.size - 1), on).tokens  # its second stream alone has too few
    assert min(joined.counts) > 0


def masks_of_other_sizes_are_refused(on: Ranks) -> None:
    tokens = Joined((9, 11), on).tokens
    own = tokens.counts[on.rank]
    for heads in (12, 5):
        query = numbers(1, own, heads, HEAD)
        for size in (2, 12, 30):
            refused(on, query, query, torch.ones(1, 1, 1, size, dtype=torch.bool), tokens)
        refused(on, query, query, torch.ones(1, 1, 3, 20, dtype=torch.bool), tokens)
        refused(on, query, query, torch.ones(1, 1, own, own, dtype=torch.bool), tokens)
        refused(on, query, query, torch.ones(1, 1, own, 1, dtype=torch.bool), tokens)


def tokens_of_any_count_are_gathered(on: Ranks) -> None:
    for tokens in (on.size, 7, 8, 12, 13):
        stream = Stream.of(tokens, on.size)
        for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.float8_e4m3fn):
            whole = (numbers(2, tokens, 3) * 4).to(dtype)
            for dim in (1, -2):
                found = gather(take(whole, dim, stream, on.rank), dim, stream.counts, on)
                assert torch.equal(found.view(torch.uint8), whole.view(torch.uint8)), f"{tokens} of {dtype}"
                assert found.is_contiguous(), "a class may view a result as another shape"
        whole = numbers(tokens)
        assert torch.equal(gather(take(whole, 0, stream, on.rank), 0, stream.counts, on), whole)
        last = numbers(3, 2, tokens)
        assert torch.equal(gather(take(last, -1, stream, on.rank), -1, stream.counts, on), last)
    counts = tuple(range(on.size))  # a rank may have none
    own = torch.full((counts[on.rank], 2), on.rank)
    assert gather(own, 0, counts, on)[:, 0].tolist() == [rank for rank in range(on.size) for _ in range(rank)]


def tensors_of_any_size_are_exchanged(on: Ranks) -> None:
    sent, received = [3 * to for to in range(on.size)], [3 * on.rank] * on.size
    for dtype in (torch.float32, torch.bfloat16):
        packed = torch.cat([torch.full((size,), 10 * on.rank + to, dtype=dtype) for to, size in enumerate(sent)])
        found = exchange(packed, sent, received, on, "all to all")
        expected = [torch.full((3 * on.rank,), 10 * source + on.rank, dtype=dtype) for source in range(on.size)]
        assert torch.equal(found, torch.cat(expected))


def attentions_one_after_the_other(on: Ranks) -> None:
    """The host runs ahead of attentions of several sizes, some of them too large for the memory of peers."""
    of_counts = ((40,), (33, 7), (5,), (300,))
    found, expected = [], []
    for number in range(60):
        joined = Joined(of_counts[number % len(of_counts)], on)
        q, k, v = (numbers(2, joined.tokens.total, 12, 64, seed=3 * number + each) for each in range(3))
        own = [joined.own(each, 1) for each in (q, k, v)]
        found.append(attend(*own, None, joined.tokens, joined.tokens, on, attention))
        expected.append(joined.own(attention(q, k, v, None), 1))
    for number, (mine, its) in enumerate(zip(found, expected, strict=True)):
        check(mine, its, f"attention {number}")


SCENARIOS: tuple[Callable[[Ranks], None], ...] = (
    self_attention_of_any_counts_and_heads,
    masks_of_every_kind,
    rows_and_dtypes,
    queries_and_keys_of_other_streams,
    whole_queries_of_split_keys,
    split_queries_of_whole_keys,
    ranks_with_a_single_token,
    values_of_another_head_size,
    every_run_has_the_same_bits,
    empty_dimensions_are_refused,
    masks_of_other_sizes_are_refused,
    tokens_of_any_count_are_gathered,
    tensors_of_any_size_are_exchanged,
    attentions_one_after_the_other,
)


def run_rank(rank: int, ranks: int, folder: str, device_type: str) -> None:
    from datetime import timedelta

    torch.set_num_threads(1)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    store = dist.FileStore(f"{folder}/store{ranks}", ranks)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    if device_type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    peers = open_peers(store, device, rank, ranks) if device_type == "cuda" else None
    found = {}
    for scenario in SCENARIOS:
        # A group each: what one scenario leaves behind is not the next one's fault.
        group = dist.new_group(timeout=timedelta(seconds=20))
        try:
            with device:
                scenario(Ranks(group, rank, ranks, peers=peers))
        except Exception:  # noqa: BLE001 - whatever it is, the test shows it
            found[scenario.__name__] = traceback.format_exc(limit=-3)
        dist.destroy_process_group(group)
    if peers is not None:
        found |= peers_faults(peers)
    Path(folder, f"ranks{ranks}-{rank}.json").write_text(json.dumps(found))
    dist.barrier()


def open_peers(store: dist.Store, device: torch.device, rank: int, ranks: int) -> Any:
    from xditd.gpu_workers.parallel import peer_exchange, rank_sync

    rank_sync.share_page(store, "flags", rank, ranks)
    peer_exchange.HEADS_BYTES = (2**16, 2**19)  # type: ignore[misc]
    return peer_exchange.PeerExchange(device, rank, ranks)


def peers_faults(peers: Any) -> dict[str, str]:
    """Return a fault unless memory of both sizes was used."""
    sizes = sorted(size for size, memory in peers._memory.items() if memory is not None)
    return {} if sizes == [2**16, 2**19] else {"peers": f"memory of {sizes} bytes"}


def main(folder: str, ranks: int, device_type: str = "cpu") -> None:
    method = "fork" if device_type == "cpu" else "spawn"
    torch.multiprocessing.start_processes(run_rank, (ranks, folder, device_type), nprocs=ranks, start_method=method)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
