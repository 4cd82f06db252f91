"""One rank gives the bits of diffusers' own class, and every refusal is by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import qwen_image_models
import torch
from interpreted_graphs import InterpretedGraphs

from xditd.gpu_workers.families.qwen_image.config import QwenImageConfig
from xditd.gpu_workers.families.qwen_image.module import MAX_KEPT
from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.operations import CallOptions, Inputs
from xditd.gpu_workers.models.process_resources import ProcessResources
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.errors import BadRequest, Unsupported

State = dict[str, torch.Tensor]
Plugger = Callable[[ModelCache, State], CheckpointMatch]

BASE, EDIT_2511 = qwen_image_models.BASE, qwen_image_models.EDIT_2511

CALLS: dict[str, tuple[Any, ...]] = {
    "one row": (1, 32, (8, 8)),
    "odd text, odd sides": (1, 7, (5, 9)),
    "two rows": (2, 40, (4, 6)),
    "two texts, one padded": (2, 33, (4, 6), (), (33, 12)),
    "all texts padded": (3, 9, (2, 3), (), (3, 8, 1)),
    "no token of a text counts": (1, 9, (4, 6), (), (0,)),
    "no token of one text of two counts": (2, 9, (4, 6), (), (0, 9)),
    "one reference": (1, 20, (4, 6), ((3, 5),)),
    "two references, larger than the image, two rows, one text padded": (2, 9, (4, 6), ((7, 9), (2, 2)), (9, 4)),
}


def plugged(cache: ModelCache, plug: Plugger, config: QwenImageConfig = BASE, **given: Any) -> tuple[CachedModel, Any]:
    state = qwen_image_models.state_dict(0, config, **given)
    return plug(cache, state).model, qwen_image_models.reference(state, config)


def run(model: CachedModel, given: Mapping[str, Any], **more: Any) -> torch.Tensor:
    import direct_jobs  # not before the group is started

    ((result,),) = direct_jobs.call(model, [Inputs(given)], **more)
    return result


def of_class(reference: Any, given: Mapping[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = reference(**given, return_dict=False)[0]
    return found


@pytest.mark.parametrize("config", [BASE, EDIT_2511], ids=["base", "2511"])
@pytest.mark.parametrize("case", list(CALLS))
def test_a_call_gives_the_bits_of_the_class(
    shared_cache: ModelCache, plug: Plugger, config: QwenImageConfig, case: str
) -> None:
    model, reference = plugged(shared_cache, plug, config)
    given = qwen_image_models.inputs(*CALLS[case])
    assert torch.equal(run(model, given), of_class(reference, given))


def test_a_text_s_padding_is_not_seen(shared_cache: ModelCache, plug: Plugger) -> None:
    model, _ = plugged(shared_cache, plug)
    given = qwen_image_models.inputs(1, 9, (4, 6), (), (5,))
    found = run(model, given)
    other = given["encoder_hidden_states"].clone()
    other[:, 5:] = 3.0
    assert torch.equal(run(model, {**given, "encoder_hidden_states": other}), found)
    assert qwen_image_models.relative_error(run(model, {**given, "encoder_hidden_states_mask": None}), found) > 1e-3


def test_masks_of_numbers_are_masks(shared_cache: ModelCache, plug: Plugger) -> None:
    model, _ = plugged(shared_cache, plug)
    given = qwen_image_models.inputs(2, 9, (4, 6), (), (5, 9))
    found = run(model, given)
    for dtype in (torch.int64, torch.float32):
        as_numbers = given["encoder_hidden_states_mask"].to(dtype)
        assert torch.equal(run(model, {**given, "encoder_hidden_states_mask": as_numbers}), found)


def test_sizes_may_be_lists(shared_cache: ModelCache, plug: Plugger) -> None:
    model, reference = plugged(shared_cache, plug)
    given = qwen_image_models.inputs(1, 9, (4, 6), ((3, 5),))
    sizes = [[list(size) for size in images] for images in given["img_shapes"]]
    assert torch.equal(run(model, {**given, "img_shapes": sizes}), of_class(reference, given))


def test_timestep_zero_for_references_of_a_file_without_marker(shared_cache: ModelCache, plug: Plugger) -> None:
    model, plain = plugged(shared_cache, plug)
    changed = qwen_image_models.reference(qwen_image_models.state_dict(0), zero_cond_t=True)
    given = qwen_image_models.inputs(2, 9, (4, 6), ((3, 5), (2, 2)))
    for _ in range(2):
        assert torch.equal(run(model, given, variant="zero_cond_t"), of_class(changed, given))
        assert torch.equal(run(model, given), of_class(plain, given))
    assert qwen_image_models.relative_error(of_class(changed, given), of_class(plain, given)) > 1e-3


@pytest.mark.parametrize("config", [BASE, EDIT_2511], ids=["base", "2511"])
def test_the_variant_of_comfyui_does_not_round_time(
    shared_cache: ModelCache, plug: Plugger, config: QwenImageConfig
) -> None:
    """With even sides, and no reference larger than the image, its positions are those of the class."""
    model, reference = plugged(shared_cache, plug, config, dtype=torch.bfloat16)
    given = qwen_image_models.inputs(2, 9, (4, 6), ((2, 4),))
    given |= {name: given[name].bfloat16() for name in ("hidden_states", "encoder_hidden_states")}
    given["timestep"] = torch.tensor([0.7231, 0.2018])
    plain = run(model, given)
    assert torch.equal(plain, of_class(reference, given))
    embedder = type(reference.time_text_embed)

    class Exact(embedder):  # type: ignore[misc,valid-type]
        def forward(self, timestep: torch.Tensor, hidden_states: torch.Tensor, _: Any = None) -> torch.Tensor:
            exact = given["timestep"]
            return super().forward(torch.cat([exact, exact * 0])[: len(timestep)], hidden_states)

    reference.time_text_embed.__class__ = Exact
    found = run(model, given, variant="comfyui")
    assert torch.equal(found, of_class(reference, given))
    assert not torch.equal(found, plain)
    assert torch.equal(run(model, given), plain)


@contextmanager
def counted_host_data(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Count the tensors that are made of numbers of the host, which a GPU would wait to copy."""
    found: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("tensor", "as_tensor", "from_numpy", "asarray"):
            patch.setattr(torch, name, partial(_noted, found, name, getattr(torch, name)))
        yield found


def _noted(found: list[str], name: str, make: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    found.append(name)
    return make(*args, **kwargs)


@pytest.mark.parametrize("config", [BASE, EDIT_2511], ids=["base", "2511"])
@pytest.mark.parametrize("variant", ["class", "comfyui", "zero_cond_t"])
def test_a_forward_makes_no_tensor_of_numbers_of_the_host(
    shared_cache: ModelCache, plug: Plugger, config: QwenImageConfig, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The class makes two with a mask and references at timestep zero: one of the tokens, one of the text's length."""
    model, _ = plugged(shared_cache, plug, config)
    reference = qwen_image_models.reference(qwen_image_models.state_dict(0), zero_cond_t=True)
    given = qwen_image_models.inputs(2, 9, (4, 6), ((3, 5),), (9, 4))
    with counted_host_data(monkeypatch) as made:
        of_class(reference, given)
    assert sorted(made) == ["as_tensor", "tensor"]
    run(model, given, variant=variant)
    operations: Any = model.operations
    with counted_host_data(monkeypatch) as made, torch.no_grad():
        operations.run(model, Inputs(given), CallOptions(variant=variant))
    assert made == []


def test_which_tokens_are_references_is_kept_by_size(shared_cache: ModelCache, plug: Plugger) -> None:
    """Other sizes of as many tokens, and more sizes than are kept."""
    model, reference = plugged(shared_cache, plug, EDIT_2511)
    sizes = [
        ((4, 6), ((3, 4),)),
        ((3, 4), ((4, 6),)),
        ((6, 4), ((2, 6),)),
        *(((2, n), ((2, 2),)) for n in range(1, 20)),
    ]
    for image, others in (*sizes, *sizes[:3]):
        for rows in (1, 2):
            given = qwen_image_models.inputs(rows, 9, image, others)
            assert torch.equal(run(model, given), of_class(reference, given))
    module: Any = model.module
    assert len(module._references) == MAX_KEPT


def test_compiled_blocks_are_those_of_the_class(layout: ParallelLayout, plug: Plugger) -> None:
    """A recorded block runs in place of the class's once it has been compared."""
    model, reference = plugged(ModelCache(dataclasses.replace(layout, acceleration="compiled")), plug)
    model.planned.resources = ProcessResources(lambda: InterpretedGraphs())  # type: ignore[arg-type,return-value]
    given = qwen_image_models.inputs(2, 9, (4, 6), (), (9, 4))
    expected = of_class(reference, given)
    assert model.paths is not None
    paths = []
    for _ in range(6):
        assert qwen_image_models.relative_error(run(model, given), expected) <= 1e-6
        model.paths.decide()
        paths += [(each.class_name, each.path, each.detail) for each in model.paths.take_reports()]
    assert paths[-1] == ("QwenImageTransformer2DModel", "compiled", "")


def test_rows_are_taken_as_views(shared_cache: ModelCache, plug: Plugger) -> None:
    model, _ = plugged(shared_cache, plug)
    given = qwen_image_models.inputs(3, 9, (4, 6), (), (9, 5, 7))
    whole = run(model, given)
    taken = model.operations.take_rows(Inputs(given, {"timestep": (0.7, 0.45, 0.2)}), slice(1, 3))
    assert taken.known == {"timestep": (0.45, 0.2)}
    assert taken.arguments["timestep"].data_ptr() == given["timestep"][1:].data_ptr()
    assert len(taken.arguments["img_shapes"]) == 2
    rows = model.operations.run(model, taken, CallOptions())
    assert qwen_image_models.relative_error(rows, whole[1:]) <= 1e-6


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_states": torch.ones(1, 24, 128)}, r"hidden_states: shape is \[1, 24, 128\], use \[any, any, 64\]"),
        ({"hidden_states": torch.ones(1, 24, 64, dtype=torch.bfloat16)}, "dtype is bfloat16, use float32"),
        ({"hidden_states": torch.ones(1, 23, 64)}, r"img_shapes: \[\(1, 4, 6\)\] is 24 tokens, hidden_states have 23"),
        ({"hidden_states": torch.ones(2, 24, 64)}, r"encoder_hidden_states: shape is \[1, 9, 96\], use \[2, any, 96\]"),
        ({"encoder_hidden_states": torch.ones(1, 9, 95)}, r"use \[1, any, 96\]"),
        ({"encoder_hidden_states_mask": torch.ones(1, 8)}, r"mask: shape is \[1, 8\], use \[1, 9\]"),
        ({"encoder_hidden_states_mask": [True]}, "mask: list where a tensor is needed"),
        ({"timestep": torch.ones(2)}, r"timestep: shape is \[2\], use \[1\]"),
        ({"img_shapes": [(1, 4, 6)]}, r"img_shapes\[0\]: \(1, 4, 6\): use a list of 1, of each row a list"),
        ({"img_shapes": [[(1, 4, 6)]] * 2}, "use a list of 1"),
        ({"img_shapes": [[(1, 4, -6)]]}, r"img_shapes\[0\]: \[\(1, 4, -6\)\]: use a list"),
        ({"img_shapes": [[]]}, r"img_shapes\[0\]: \[\]: use a list"),
        ({"encoder_hidden_states": torch.ones(1, 4096, 96)}, "the model has positions for 4093 tokens"),
    ],
)
def test_arguments_that_cannot_run_are_refused(
    shared_cache: ModelCache, plug: Plugger, changes: dict[str, Any], says: str
) -> None:
    model, _ = plugged(shared_cache, plug)
    with pytest.raises(BadRequest, match=says):
        model.operations.check(model, Inputs({**qwen_image_models.inputs(1, 9, (4, 6)), **changes}))


def test_rows_of_unequal_images_are_refused(shared_cache: ModelCache, plug: Plugger) -> None:
    """The class would compute the positions of all rows from the first one, with a warning."""
    model, _ = plugged(shared_cache, plug)
    given = {**qwen_image_models.inputs(2, 9, (4, 6)), "img_shapes": [[(1, 4, 6)], [(1, 6, 4)]]}
    with pytest.raises(BadRequest, match=r"img_shapes\[1\]: .* all rows have images of equal sizes"):
        model.operations.check(model, Inputs(given))


def test_timesteps_of_a_scheduler_are_refused(shared_cache: ModelCache, plug: Plugger) -> None:
    model, _ = plugged(shared_cache, plug)
    with pytest.raises(BadRequest, match=r"timestep: 700 is not a number from 0 to 1; give sigmas"):
        model.operations.check(model, Inputs(qwen_image_models.inputs(1, 9, (4, 6)), {"timestep": (700.0,)}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"precision": "fp8"}, "precision 'fp8': Qwen-Image has no products in eight bits"),
        ({"requested_kernels": "fused"}, "kernels 'fused': Qwen-Image has none; start the daemon with kernels auto"),
    ],
)
def test_kernels_that_are_not_there_are_refused(layout: ParallelLayout, changes: dict[str, str], says: str) -> None:
    cache = ModelCache(dataclasses.replace(layout, **changes))
    with pytest.raises(Unsupported, match=says):
        cache.match({name: TensorInfo.of(tensor) for name, tensor in qwen_image_models.state_dict(0).items()})
