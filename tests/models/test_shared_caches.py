"""Ranks share the tensors of caches of keys and values, which calls with split tokens and whole ones use in turn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
import torch
from class_entries import ENTRIES
from class_entry import Random
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from forked_programs import ProgramServer

from xditd.gpu_workers.models.object_tensors import change_tensors, copy_objects
from xditd.gpu_workers.models.planned_forward import PlannedModule
from xditd.gpu_workers.models.token_plans import PlanFault
from xditd.gpu_workers.parallel.streams import Ranks, Stream
from xditd.gpu_workers.parallel.token_shares import Cut, TokenShares
from xditd.gpu_workers.plans.cog_view import GLM_IMAGE as PLAN

ENTRY: Final = ENTRIES["GlmImageTransformer2DModel-kv_write"]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("ranks", [2, *(pytest.param(each, marks=pytest.mark.long) for each in (3, 4))])
def test_successive_calls_with_one_cache_give_what_the_class_gives(
    tmp_path: Path, fork_program: ProgramServer, ranks: int
) -> None:
    program = Path(__file__).with_name("caches_on_ranks.py")
    done = fork_program(program, tmp_path, ranks, folders=[program.with_name("support")], timeout_s=380)
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_share_keeps_its_own_memory_alone() -> None:
    shares, whole = TokenShares(), torch.arange(10.0).reshape(1, 5, 2)
    own = shares.take(whole, -2, Stream((3, 2)), 1)
    assert own.untyped_storage().nbytes() == own.nbytes
    assert own.tolist() == whole[:, 3:].tolist()
    assert shares.shape_of(own) == (1, 5, 2)
    assert shares.find(own) == Cut(1, (Stream((3, 2)),))
    assert shares.find(own.clone()) is None


def test_shares_are_forgotten_with_their_tensors() -> None:
    shares = TokenShares()
    own = shares.take(torch.zeros(1, 4), 1, Stream((2, 2)), 0)
    assert shares
    del own
    assert not shares


def test_tensors_without_a_share_are_whole_and_need_no_other_rank() -> None:
    tensor = torch.zeros(2, 3)
    assert TokenShares().whole(tensor, Ranks(None, 0, 2)) is tensor


Make = Callable[..., GlmImageKVCache]


@pytest.fixture
def make_cache() -> Make:
    def make(tokens: int = 5) -> GlmImageKVCache:
        cache = GlmImageKVCache(num_layers=2)
        for layer in cache.caches:
            layer.store(torch.zeros(1, tokens, 2, 16), torch.zeros(1, tokens, 2, 16))
        cache.set_mode("write")
        return cache

    return make


def test_a_copy_of_objects_has_the_same_tensors(make_cache: Make) -> None:
    cache = make_cache()
    copied = copy_objects({"cache": cache})["cache"]
    assert copied is not cache
    for mine, its in zip(copied.caches, cache.caches, strict=True):
        assert mine is not its
        assert mine.k_caches is not its.k_caches
        assert mine.k_caches[0] is its.k_caches[0]


def test_tensors_in_tuples_of_objects_are_changed(make_cache: Make) -> None:
    cache = make_cache()
    cache.table = (torch.zeros(1), (torch.zeros(2),))
    change_tensors(cache, lambda path, name, tensor: tensor + 1 if name == "table" else tensor)
    assert cache.table[1][0].tolist() == [1, 1]


def test_a_cache_with_fewer_tokens_than_ranks_is_refused(make_cache: Make) -> None:
    module = ENTRY.build()
    arguments = ENTRY.arguments(Random(1)) | {"kv_caches": make_cache(tokens=1)}
    with pytest.raises(PlanFault, match="1 tokens of k_caches are fewer than 2 workers"):
        PlannedModule(module, PLAN).run(lambda: module(**arguments), Ranks(None, 0, 2))


def test_tensors_that_the_plan_does_not_declare_are_refused(make_cache: Make) -> None:
    module, cache = ENTRY.build(), make_cache()
    cache.masks = torch.zeros(3)
    arguments = ENTRY.arguments(Random(1)) | {"kv_caches": cache}
    with pytest.raises(PlanFault, match="does not declare the tensors masks of kv_caches"):
        PlannedModule(module, PLAN).run(lambda: module(**arguments), Ranks(None, 0, 2))
