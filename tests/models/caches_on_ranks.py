"""A program, not a test: ranks on the CPU run successive calls of classes that share one cache, as workers run them.

python caches_on_ranks.py FOLDER RANKS
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from class_entries import ENTRIES
from class_entry import ClassEntry, Random
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache
from plan_cases import PLAN_ENTRIES, tensors_of
from planned_ranks import fork_ranks

from xditd.gpu_workers.jobs.module_rows import ModulePart, ModuleRows
from xditd.gpu_workers.models.object_tensors import objects_of
from xditd.gpu_workers.models.planned_forward import PlannedModule
from xditd.gpu_workers.models.split_checks import SplitChecks
from xditd.gpu_workers.models.token_plans import TokenPlan
from xditd.gpu_workers.parallel.rank_sync import share_page
from xditd.gpu_workers.parallel.streams import Ranks
from xditd.gpu_workers.parallel.token_shares import TokenShares
from xditd.gpu_workers.plans import find
from xditd.ipc.job_parts import Numerics

TOLERANCE = 1e-6

Run = Callable[[dict[str, Any]], Any]
"""Runs a call of the class, with these arguments."""


class Worker:
    """One rank, which runs calls of a class as the ``Call`` job does."""

    def __init__(self, entry: ClassEntry, rank: int, ranks: int) -> None:
        self.module: Any = entry.build()
        plan = find(entry.name)
        assert isinstance(plan, TokenPlan)
        self.ranks = Ranks(None, rank, ranks)
        self.shares = TokenShares()
        self.plan = plan
        self.model: Any = SimpleNamespace(
            module=self.module,
            layout=SimpleNamespace(rank=rank, world_size=ranks),
            ranks=self.ranks,
            device=torch.device("cpu"),
            class_name=entry.name,
            planned=PlannedModule(self.module, plan),
            split_checks=SplitChecks(reports=rank == 0),
        )

    def run(self, arguments: dict[str, Any], model: Any = None) -> Any:
        assert self.plan.cache is not None
        given = arguments.get(self.plan.cache.argument)
        stateful = frozenset([self.plan.cache.argument] if given is not None else [])

        def call(taken: Mapping[str, Any]) -> Any:
            return self.module(**taken)

        rows = ModuleRows(model or self.model, "forward", Numerics(), call, self.shares)
        (result,) = rows.run([ModulePart(arguments, bool(stateful), stateful)])
        return result

    def run_whole(self, arguments: dict[str, Any]) -> Any:
        """Run a call as one of a class without a plan."""
        unplanned = {"planned": "it has no token plan", "split_checks": SplitChecks(reports=False)}
        return self.run(arguments, SimpleNamespace(**{**vars(self.model), **unplanned}))

    def whole(self, *values: Any) -> list[torch.Tensor]:
        return [self.shares.whole(each, self.ranks) for value in values for each in tensors_of(value)]

    def shared(self, cache: Any) -> bool:
        """Return whether this rank has shares of all tensors of a cache."""
        found = [each for each in tensors_of(cache) if each.ndim > 1]
        assert found
        return all(self.shares.find(each) is not None for each in found)


def check_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for mine, its in zip(found, expected, strict=True):
        assert mine.shape == its.shape, (mine.shape, its.shape)
        assert (mine - its).abs().max() <= TOLERANCE * its.abs().max(), (mine - its).abs().max() / its.abs().max()


def check_flow(worker: Worker, flow: Callable[[Run, Random], Any]) -> list[torch.Tensor]:
    """Run a flow of calls; compare what all give, and what is in the cache at the end, with the class itself."""
    found = worker.whole(flow(worker.run, Random(3)))
    check_same(found, list(tensors_of(flow(lambda arguments: worker.module(**arguments), Random(3)))))
    return found


def check_all(worker: Worker, flow: Callable[[Run, Random], Any]) -> None:
    """Run a flow with calls that are checked, with split ones twice, and with each call whole or split in turn."""
    for _ in range(4):  # a case whose cache has tokens of split calls is another one, which is checked as well
        check_flow(worker, flow)
    assert all(each.is_used for each in worker.model.split_checks.take_checks())
    first, again = check_flow(worker, flow), check_flow(worker, flow)
    assert all(torch.equal(mine, its) for mine, its in zip(first, again, strict=True))
    assert not worker.model.split_checks.take_checks()
    *_, cache = flow(worker.run, Random(3))
    assert worker.shared(cache)
    for remainder in (0, 1):
        calls = 0

        def in_turn(arguments: dict[str, Any], remainder: int = remainder) -> Any:
            nonlocal calls
            calls += 1
            return (worker.run if calls % 2 == remainder else worker.run_whole)(arguments)

        expected = flow(lambda arguments: worker.module(**arguments), Random(3))
        check_same(worker.whole(flow(in_turn, Random(3))), list(tensors_of(expected)))


def glm_image(run: Run, random: Random) -> Any:
    """Two images to edit for the first sample, of different sizes, and none for later ones; then two steps."""
    cache = GlmImageKVCache(num_layers=2)
    cache.set_mode("write")
    write = ENTRIES["GlmImageTransformer2DModel-kv_write"].arguments(random)
    found = [run(write | {"kv_caches": cache})]
    other = {
        "hidden_states": random.normal(1, 4, 6, 6),
        "prior_token_id": random.integers(0, 32, 9),
        "prior_token_drop": torch.zeros(9, dtype=torch.bool),
    }
    found.append(run(write | other | {"kv_caches": cache}))
    cache.next_sample()
    cache.set_mode("read")
    step = ENTRIES["GlmImageTransformer2DModel-kv_read"].arguments(random)
    found += [run(step | {"kv_caches": cache}) for _ in range(2)]
    cache.set_mode("skip")
    return [*found, run(step | {"kv_caches": cache}), cache]


def flux_2(run: Run, random: Random) -> Any:
    first = run(ENTRIES["Flux2Transformer2DModel-kv_extract"].arguments(random))
    cache = first.kv_cache
    assert cache.num_ref_tokens == 6
    step = ENTRIES["Flux2Transformer2DModel-kv_cached"].arguments(random)
    return [first, *(run(step | {"kv_cache": cache}) for _ in range(2)), cache]


def qwen_image_21(run: Run, random: Random) -> Any:
    cache = QwenImage21KVCache(2)
    first = run(ENTRIES["QwenImage21Transformer2DModel"].arguments(random) | {"kv_cache": cache})
    step = ENTRIES["QwenImage21Transformer2DModel-kv_cached"].arguments(random)
    return [first, *(run(step | {"kv_cache": cache}) for _ in range(2)), cache]


def sana_wm_refiner(run: Run, random: Random) -> Any:
    """The sink's frame, a step and the last pass over two frames, and a step of the next ones, as the pipeline does."""
    cache = SanaWMRefinerKVCache(2)
    given = ENTRIES["SanaWMLTX2RefinerTransformer3DModel"].arguments(random)
    sink_pe = given["kv_cache"].sink_pe
    given |= {"kv_cache": cache}
    first = {
        "hidden_states": random.normal(1, 6, 8),
        "timestep": torch.zeros(1, 6),
        "video_rotary_emb": tuple(each.clone() for each in sink_pe),
    }
    found = [run(given | first | {"kv_cache_mode": "capture_pre_rope"})]
    for layer in cache.layer_caches:
        layer.store_sink(*layer.get_captured_pre_rope())
    cache.sink_pe = sink_pe
    found.append(run(given | {"kv_cache_mode": "inject"}))
    found.append(run(given))
    for layer in cache.layer_caches:
        layer.store_history(*layer.get_captured_post_rope())
    return [*found, run(given | {"kv_cache_mode": "inject"}), cache]


FLOWS = {
    "GlmImageTransformer2DModel-kv_write": glm_image,
    "Flux2Transformer2DModel-kv_extract": flux_2,
    "QwenImage21Transformer2DModel-five_heads": qwen_image_21,
    "SanaWMLTX2RefinerTransformer3DModel": sana_wm_refiner,
}
"""By the entry of the model."""


def copied_caches_are_apart(worker: Worker) -> None:
    """A cache of which the caller has a copy from before stays what it was."""
    arguments = ENTRIES["GlmImageTransformer2DModel-kv_write"].arguments(Random(5))
    for _ in range(3):
        worker.run(arguments)
    before = copy.copy(arguments["kv_caches"].caches[0].k_caches)
    expected = worker.whole(before)
    worker.run(arguments)
    assert all(map(torch.equal, worker.whole(before), expected))
    assert len(list(objects_of(arguments["kv_caches"]))) == 3


@torch.no_grad()
def run_rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store{ranks}", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    share_page(store, "page", rank, ranks)
    for name, flow in FLOWS.items():
        check_all(Worker(PLAN_ENTRIES[name], rank, ranks), flow)
    copied_caches_are_apart(Worker(ENTRIES["GlmImageTransformer2DModel-kv_write"], rank, ranks))


def main(folder: str, ranks: str) -> None:
    torch.set_num_threads(1)
    fork_ranks(run_rank, int(ranks), int(ranks), folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
