"""FLUX.1's forward as ``Call`` runs it: refusals, some rows alone, and foreseen timesteps."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from xditd.client.demo.checkpoints import flux1_state_dict
from xditd.gpu_workers.families.flux1.config import Flux1Config
from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.operations import CallOptions, Inputs
from xditd.ipc.errors import BadRequest

State = dict[str, torch.Tensor]
Plugger = Callable[[ModelCache, State], CheckpointMatch]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def inputs(transformer: CachedModel, direct: ModuleType) -> Inputs:
    """A sound forward of three rows; every row has a sigma of its own."""
    found: Inputs = direct.flux1_inputs(
        transformer,
        latents=random(3, 16, 4, 6),
        timestep=torch.tensor([0.75, 0.5, 0.25]),
        prompt_embeds=random(3, 5, 4096, seed=1),
        pooled=random(3, 768, seed=2),
        guidance=torch.tensor([3.5, 2.0, 1.0]),
    )
    return found


def changed(inputs: Inputs, name: str, value: Any) -> Inputs:
    """The same forward with another argument, of which the host knows nothing."""
    known = {other: values for other, values in inputs.known.items() if other != name}
    return Inputs({**inputs.arguments, name: value}, known)


def test_a_sound_forward_passes(transformer: CachedModel, inputs: Inputs) -> None:
    operations: Any = transformer.operations
    operations.check(transformer, inputs)
    for name in ("timestep", "guidance", "img_ids", "txt_ids"):  # which the class casts itself
        operations.check(transformer, changed(inputs, name, inputs.arguments[name].bfloat16()))


@pytest.mark.parametrize(
    ("name", "shape", "use"),
    [
        ("hidden_states", (3, 6, 16), "[any, any, 64]"),
        ("hidden_states", (3, 64), "[any, any, 64]"),
        ("hidden_states", (0, 6, 64), "[any, any, 64]"),
        ("hidden_states", (3, 0, 64), "[any, any, 64]"),
        ("encoder_hidden_states", (3, 5, 4095), "[3, any, 4096]"),
        ("encoder_hidden_states", (2, 5, 4096), "[3, any, 4096]"),
        ("encoder_hidden_states", (3, 0, 4096), "[3, any, 4096]"),
        ("pooled_projections", (3, 769), "[3, 768]"),
        ("pooled_projections", (1, 768), "[3, 768]"),
        ("timestep", (2,), "[3]"),
        ("timestep", (), "[3]"),
        ("img_ids", (5, 3), "[6, 3]"),
        ("img_ids", (3, 6, 3), "[6, 3]"),
        ("txt_ids", (6, 3), "[5, 3]"),
        ("txt_ids", (5, 2), "[5, 3]"),
        ("guidance", (1,), "[3]"),
    ],
)
def test_a_wrong_shape_is_refused_with_the_one_to_use(
    transformer: CachedModel, inputs: Inputs, name: str, shape: tuple[int, ...], use: str
) -> None:
    operations: Any = transformer.operations
    with pytest.raises(BadRequest) as caught:
        operations.check(transformer, changed(inputs, name, torch.zeros(shape)))
    assert caught.value.detail == f"{name}: shape is {list(shape)}, use {use}"


@pytest.mark.parametrize("name", ["hidden_states", "encoder_hidden_states", "pooled_projections"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64], ids=str)
def test_another_dtype_than_that_of_the_weights_is_refused(
    transformer: CachedModel, inputs: Inputs, name: str, dtype: torch.dtype
) -> None:
    operations: Any = transformer.operations
    other = str(dtype).removeprefix("torch.")
    with pytest.raises(BadRequest, match=f"{name}: dtype is {other}, use float32, that of the weights"):
        operations.check(transformer, changed(inputs, name, inputs.arguments[name].to(dtype)))


@pytest.mark.parametrize("name", ["timestep", "guidance", "img_ids", "txt_ids"])
def test_whole_numbers_are_refused(transformer: CachedModel, inputs: Inputs, name: str) -> None:
    operations: Any = transformer.operations
    with pytest.raises(BadRequest, match=f"{name}: dtype is int64, use a floating dtype"):
        operations.check(transformer, changed(inputs, name, inputs.arguments[name].long()))


@pytest.mark.parametrize(
    ("value", "kind"), [(None, "NoneType"), (0.5, "float"), ([torch.zeros(3)], "list")], ids=["None", "number", "list"]
)
@pytest.mark.parametrize("name", ["hidden_states", "encoder_hidden_states", "timestep", "img_ids"])
def test_what_is_no_tensor_is_refused(
    transformer: CachedModel, inputs: Inputs, name: str, value: Any, kind: str
) -> None:
    operations: Any = transformer.operations
    with pytest.raises(BadRequest, match=f"{name}: {kind} where a tensor is needed"):
        operations.check(transformer, changed(inputs, name, value))


@pytest.mark.parametrize("value", [900.0, 1.0001, -0.5])
def test_a_timestep_that_the_host_knows_to_be_no_sigma_is_refused_with_the_remedy(
    transformer: CachedModel, inputs: Inputs, value: float
) -> None:
    operations: Any = transformer.operations
    wrong = Inputs(inputs.arguments, {**inputs.known, "timestep": (0.5, value, 0.5)})
    with pytest.raises(
        BadRequest, match=f"timestep: {value:g} is not a number from 0 to 1; give sigmas, not the 0 to 1000 of a sched"
    ):
        operations.check(transformer, wrong)


def test_a_model_with_guidance_needs_it_and_one_without_ignores_it(
    transformer: CachedModel, cache: ModelCache, plug: Plugger, direct: ModuleType, inputs: Inputs
) -> None:
    schnell = plug(cache, flux1_state_dict(0, guidance=False)).model
    without = Inputs({name: each for name, each in inputs.arguments.items() if name != "guidance"}, inputs.known)
    as_none, other = changed(inputs, "guidance", None), changed(inputs, "guidance", torch.full((3,), 9.0))
    operations: Any = transformer.operations
    with pytest.raises(BadRequest, match="guidance: NoneType where a tensor is needed"):
        operations.check(transformer, as_none)
    results = [direct.call(schnell, [each])[0][0] for each in (inputs, without, as_none, other)]
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_rows_are_taken_as_views(transformer: CachedModel, inputs: Inputs) -> None:
    operations: Any = transformer.operations
    assert operations.rows(inputs) == ((6, 64),) * 3
    some = operations.take_rows(inputs, slice(1, 3))
    assert operations.rows(some) == ((6, 64),) * 2
    assert some.known == {"timestep": (0.5, 0.25), "guidance": (2.0, 1.0)}
    operations.check(transformer, some)
    for name, each in some.arguments.items():
        whole = inputs.arguments[name]
        assert each.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        assert torch.equal(each, whole if name in ("img_ids", "txt_ids") else whole[1:3])
    none = operations.take_rows(changed(inputs, "guidance", None), slice(0, 1))
    assert none.arguments["guidance"] is None


def test_rows_alone_are_those_of_the_whole(transformer: CachedModel, direct: ModuleType, inputs: Inputs) -> None:
    operations: Any = transformer.operations
    ((whole,),) = direct.call(transformer, [inputs])
    for row in range(3):
        ((alone,),) = direct.call(transformer, [operations.take_rows(inputs, slice(row, row + 1))])
        assert torch.allclose(alone[0], whole[row], atol=1e-5)


def test_a_result_is_the_tuple_of_the_class(transformer: CachedModel) -> None:
    operations: Any = transformer.operations
    rows = random(2, 6, 64)
    (as_tensor,) = operations.tree(rows)
    (as_list,) = operations.tree(list(rows))
    assert as_tensor is rows
    assert torch.equal(as_list, rows)


def alike(inputs: Inputs, sigma: float = 0.5) -> Inputs:
    """The same forward at one sigma, with one guidance."""
    timestep, guidance = torch.full((3,), sigma), torch.full((3,), 3.5)
    known = {"timestep": (sigma,) * 3, "guidance": (3.5,) * 3}
    return Inputs({**inputs.arguments, "timestep": timestep, "guidance": guidance}, known)


def test_what_is_foreseen_changes_no_bit(transformer: CachedModel, direct: ModuleType, inputs: Inputs) -> None:
    for part in (inputs, alike(inputs)):
        ((expected,),) = direct.call(transformer, [part])
        for foreseen in ({"timestep": (1.0, 0.5, 0.25)}, {"timestep": (0.1,)}, {"others": (900.0,)}):
            ((found,),) = direct.call(transformer, [part], foreseen=foreseen)
            assert torch.equal(found, expected)


@pytest.mark.usefixtures("layout")
def test_times_are_known_where_all_rows_are_alike_and_others_are_foreseen(inputs: Inputs) -> None:
    from xditd.gpu_workers.families.flux1.modulations import Times
    from xditd.gpu_workers.families.flux1.operations import _times

    foreseen = CallOptions(foreseen={"timestep": (0.7, 0.5)})
    one = alike(inputs)
    float32 = tuple(torch.tensor([0.7, 0.5]).tolist())
    assert _times(one, foreseen) == Times(0.5, 3.5, float32)
    assert _times(one, CallOptions()) is None
    assert _times(one, CallOptions(foreseen={"guidance": (3.5,)})) is None
    assert _times(inputs, foreseen) is None  # rows at several sigmas
    assert _times(Inputs(one.arguments, {"timestep": (0.5,) * 3}), foreseen) is None  # guidance is on a device
    assert _times(Inputs(one.arguments, {"guidance": (3.5,) * 3}), foreseen) is None  # and so is the sigma
    several = Inputs(one.arguments, {**one.known, "guidance": (3.5, 3.5, 1.0)})
    assert _times(several, foreseen) is None
    without = {name: each for name, each in one.arguments.items() if name != "guidance"}
    assert _times(Inputs(without, {"timestep": (0.5,) * 3}), foreseen) == Times(0.5, None, float32)


@pytest.mark.usefixtures("layout")
def test_foreseen_sigmas_are_rounded_as_timesteps_are(inputs: Inputs) -> None:
    """Else one that the client has in another dtype would never be found among them."""
    from xditd.gpu_workers.families.flux1.operations import _times

    one = alike(inputs)
    half = {**one.arguments, "timestep": one.arguments["timestep"].bfloat16()}
    times = _times(Inputs(half, one.known), CallOptions(foreseen={"timestep": (0.7, 0.5)}))
    assert times is not None
    assert times.sigmas == tuple(torch.tensor([0.7, 0.5]).bfloat16().tolist())


def test_the_facts_name_the_heads_and_how_they_are_shared_out(transformer: CachedModel) -> None:
    operations: Any = transformer.operations
    config = transformer.config
    assert isinstance(config, Flux1Config)
    facts = operations.facts(config, transformer.layout)
    assert (facts.heads, facts.ulysses, facts.ring) == (config.heads, 1, 1)
    assert facts.conditioning[0].shape[-1] == config.context_channels
