"""What a token plan may leave open, and what it refuses before ranks send anything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from class_entries import ENTRIES
from class_entry import Random

from xditd.gpu_workers.models.planned_forward import PlannedModule
from xditd.gpu_workers.models.token_plans import Exchange, PlanFault, Split, TokenPlan, is_given, matches
from xditd.gpu_workers.parallel.streams import Ranks
from xditd.gpu_workers.plans import find

ALONE = Ranks(group=None, rank=0, size=2)


def plan_of(name: str) -> TokenPlan:
    plan = find(name)
    assert isinstance(plan, TokenPlan)
    return plan


def test_the_last_of_a_list_is_named_by_its_own_name_alone() -> None:
    assert matches("blocks.-1", "blocks.-1")
    assert matches("blocks.*", "blocks.1")
    assert not matches("blocks.*", "blocks.-1")


def test_a_path_that_is_not_optional_has_to_be_there() -> None:
    entry = ENTRIES["SD3Transformer2DModel"]
    module = replace(entry, config={**entry.config, "dual_attention_layers": ()}).build()
    plan = plan_of(entry.name)
    PlannedModule(module, plan)
    with pytest.raises(PlanFault, match=r"names transformer_blocks\.\*\.attn2, which this module does not have"):
        PlannedModule(module, replace(plan, optional=()))


def test_an_argument_that_the_plan_does_not_cover_is_refused_before_the_forward() -> None:
    entry = ENTRIES["CogView4Transformer2DModel"]
    module = entry.build()
    arguments = entry.arguments(Random(1)) | {"attention_mask": torch.ones(2, 7)}
    called: list[bool] = []
    module.patch_embed.register_forward_hook(lambda *_: called.append(True))
    with pytest.raises(PlanFault, match="does not cover this value of attention_mask"):
        PlannedModule(module, plan_of(entry.name)).run(lambda: module(**arguments), ALONE)
    assert not called


def test_an_exchange_needs_its_projections_and_their_number_of_heads() -> None:
    module = ENTRIES["QwenImage21Transformer2DModel"].build()
    plan = plan_of("QwenImage21Transformer2DModel")
    path = "transformer_blocks.*.attn"
    for inputs, output in (({"to_q": "heads_of_keys"}, "to_out.0"), ({"to_q": "heads"}, "to_last")):
        wrong = replace(plan, exchanges={path: Exchange("joint", inputs, output)})
        with pytest.raises(PlanFault, match="an attention is not as the plan declares"):
            PlannedModule(module, wrong)


def test_heads_that_are_not_repeated_as_declared_are_refused() -> None:
    entry = ENTRIES["Krea2Transformer2DModel"]
    module, plan = entry.build(), plan_of(entry.name)
    path = "transformer_blocks.*.attn"
    wrong = replace(plan, attentions={path: replace(plan.attentions[path], repeats=("num_heads", "groups"))})
    with pytest.raises(PlanFault, match="4 heads of keys, which are not repeated as declared"):
        PlannedModule(module, wrong).run(lambda: module(**entry.arguments(Random(1))), ALONE)


def test_a_mask_of_this_ranks_queries_and_keys_alone_is_refused() -> None:
    entry = ENTRIES["ChromaTransformer2DModel"]
    module, plan = entry.build(), plan_of(entry.name)
    arguments = entry.arguments(Random(1))
    # Each block makes a mask of pairs of this argument: of this rank's tokens, where it has been split.
    splits = {**plan.splits, "transformer_blocks.*": {"attention_mask": Split("pairs")}}
    with pytest.raises(PlanFault, match="mask"):
        PlannedModule(module, replace(plan, splits=splits)).run(lambda: module(**arguments), ALONE)


def test_a_prefix_has_to_be_known_and_no_longer_than_the_tensor() -> None:
    entry = ENTRIES["HiDreamImageTransformer2DModel"]
    module, plan = entry.build(), plan_of(entry.name)
    splits = {path: split for path, split in plan.splits.items() if path != "x_embedder"}
    with pytest.raises(PlanFault, match="no tokens of image were split"):
        PlannedModule(module, replace(plan, splits=splits)).run(lambda: module(**entry.arguments(Random(1))), ALONE)


@pytest.mark.parametrize(("value", "expected"), [(None, False), (0, True), ("", True)])
def test_a_value_is_given_unless_it_is_none(value: object, expected: bool) -> None:
    assert is_given(value) is expected
