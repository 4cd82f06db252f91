"""Token plans that do not fit a module or a call are refused, and a forward leaves nothing behind.

One process stands for one of two ranks: all that is refused here is refused before ranks wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional

from xditd.gpu_workers.models.forward_state import ForwardState
from xditd.gpu_workers.models.planned_forward import PlannedModule
from xditd.gpu_workers.models.token_plans import Attention, Length, PlanFault, Split, TokenPlan
from xditd.gpu_workers.parallel.streams import Ranks

RANKS = Ranks(None, 0, 2)
SIZE = 8


class Attending(torch.nn.Module):
    """Attention of four heads to a context, by a function that is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.compute: Callable[..., torch.Tensor] = functional_attention
        self.processor = None

    def forward(self, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        query, key = (each.unflatten(-1, (4, -1)) for each in (x, context))
        return self.compute(query, key, mask).flatten(2)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attending()

    def forward(self, hidden: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return hidden + self.attn(hidden, context, mask)


class Model(torch.nn.Module):
    """Tokens of an image that attend to a text which is not split, so that ranks never wait for each other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.rope = torch.nn.Identity()

    def forward(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        residual: torch.Tensor | list[torch.Tensor] | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        for block in self.blocks:
            image = block(image, text, mask)
        return image


def functional_attention(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    q, k = (each.transpose(1, 2) for each in (query, key))
    return functional.scaled_dot_product_attention(q, k, k, mask).transpose(1, 2)


def plain_softmax(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    weights = torch.einsum("bqhd,bkhd->bhqk", query, key).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, key)


def causal_attention(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    q, k = (each.transpose(1, 2) for each in (query, key))
    return functional.scaled_dot_product_attention(q, k, k, is_causal=True).transpose(1, 2)


def dispatched_attention(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    from diffusers.models import transformers  # noqa: F401 - a module that imports the function by name
    from diffusers.models.transformers import transformer_flux

    return transformer_flux.dispatch_attention_fn(query, key, key, mask)


TO_TEXT = Attention(queries=("image",), keys=())


def plan(**changed: Any) -> TokenPlan:
    """Return the plan of the model, with parts of it changed."""
    parts: dict[str, Any] = {
        "splits": {"": {"image": Split("image"), "residual": Split("image")}},
        "gathers": {},
        "attentions": {"blocks.*.attn": TO_TEXT},
    }
    return TokenPlan(**(parts | changed))


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def run(model: torch.nn.Module, declared: TokenPlan, ranks: Ranks = RANKS, **changed: Any) -> Any:
    arguments = {"image": numbers(1, 5, SIZE), "text": numbers(1, 3, SIZE)} | changed
    return PlannedModule(model, declared).run(lambda: model(**arguments), ranks)


def test_a_rank_computes_its_tokens() -> None:
    model = Model()
    whole = model(numbers(1, 5, SIZE), numbers(1, 3, SIZE))
    for rank, own in ((0, whole[:, :3]), (1, whole[:, 3:])):
        torch.testing.assert_close(run(model, plan(), Ranks(None, rank, 2)), own, rtol=1e-6, atol=1e-6)


def test_arguments_by_place_are_split() -> None:
    model = Model()
    arguments = numbers(1, 5, SIZE), numbers(1, 3, SIZE)
    found = PlannedModule(model, plan()).run(lambda: model(*arguments), RANKS)
    torch.testing.assert_close(found, model(*arguments)[:, :3], rtol=1e-6, atol=1e-6)


# At load.


def test_an_attention_that_is_not_declared_is_refused_at_load() -> None:
    with pytest.raises(PlanFault, match=r"does not declare the attention of blocks\.1\.attn$"):
        PlannedModule(Model(), plan(attentions={"blocks.0.attn": TO_TEXT}))


def test_a_multihead_attention_is_one() -> None:
    model = Model()
    model.extra = torch.nn.MultiheadAttention(SIZE, 2)
    with pytest.raises(PlanFault, match="does not declare the attention of extra"):
        PlannedModule(model, plan())


def test_a_whole_attention_is_declared() -> None:
    PlannedModule(Model(), plan(attentions={"blocks.0.attn": TO_TEXT}, whole=("blocks.1.attn",)))


@pytest.mark.parametrize(
    "changed",
    [
        {"splits": {"layers.*": {"hidden": Split("image")}}},
        {"gathers": {"proj_out": {0: Split("image")}}},
        {"attentions": {"blocks.*.attn": TO_TEXT, "blocks.*.attn2": TO_TEXT}},
        {"whole": ("refiner.attn",)},
    ],
)
def test_paths_that_the_module_lacks_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(PlanFault, match=r"names .*, which this module does not have"):
        PlannedModule(Model(), plan(**changed))


def test_an_argument_that_the_module_does_not_take_is_refused() -> None:
    with pytest.raises(PlanFault, match=r"names encoder_states, which blocks\.\* does not take"):
        PlannedModule(Model(), plan(splits={"blocks.*": {"hidden": Split("image"), "encoder_states": Split("text")}}))
    with pytest.raises(PlanFault, match="names latents, which the module does not take"):
        PlannedModule(Model(), plan(splits={"": {"latents": Split("image")}}))


# In a call.


def test_an_attention_that_is_not_declared_is_refused_in_a_call() -> None:
    model = Model()
    declared = PlannedModule(model, plan())
    model.blocks[1].forward = lambda hidden, context, mask: functional_attention(  # type: ignore[method-assign]
        hidden[:, :, None], context[:, :, None], mask
    )
    with pytest.raises(PlanFault, match="outside of the submodules"):
        declared.run(lambda: model(numbers(1, 5, SIZE), numbers(1, 3, SIZE)), RANKS)


def test_more_attentions_than_are_declared_are_refused() -> None:
    model = Model()
    model.blocks[0].attn.compute = lambda q, k, mask: functional_attention(functional_attention(q, k, mask), k, mask)
    with pytest.raises(PlanFault, match="1 declared calls computes more"):
        run(model, plan())
    run(model, plan(attentions={"blocks.*.attn": Attention(("image",), (), others=(TO_TEXT,))}))


def test_an_unknown_function_is_refused() -> None:
    model = Model()
    model.blocks[1].attn.compute = plain_softmax
    with pytest.raises(PlanFault, match="not computed by a function that is known"):
        run(model, plan())
    run(model, plan(attentions={"blocks.0.attn": TO_TEXT}, whole=("blocks.1.attn",)))


def test_an_unknown_function_is_refused_while_another_error_is_handled() -> None:
    """A call may be made where the error of an earlier one is handled."""
    model = Model()
    model.blocks[1].attn.compute = plain_softmax
    try:
        raise ValueError("an earlier call failed")
    except ValueError:
        with pytest.raises(PlanFault, match="not computed by a function that is known"):
            run(model, plan())


def test_causal_attention_is_refused() -> None:
    model = Model()
    model.blocks[0].attn.compute = causal_attention
    with pytest.raises(PlanFault, match="causal"):
        run(model, plan())


@pytest.mark.parametrize(("tokens", "ranks"), [(2, 3), (3, 4)])
def test_fewer_tokens_than_ranks_are_refused(tokens: int, ranks: int) -> None:
    with pytest.raises(PlanFault, match=f"{tokens} tokens of image are fewer than {ranks} workers"):
        run(Model(), plan(), Ranks(None, 0, ranks), image=numbers(1, tokens, SIZE))


def test_a_stream_may_have_no_tokens_but_not_an_attention() -> None:
    forward = ForwardState(Ranks(None, 1, 2))
    assert forward.split(numbers(1, 0, SIZE), Split("text"), "text").shape == (1, 0, SIZE)
    assert forward.streams["text"].counts == (0, 0)
    with pytest.raises(PlanFault, match="a rank has no tokens of an attention"):
        run(Model(), plan(), image=numbers(1, 0, SIZE))


def test_a_tensor_of_two_streams_is_split_stream_by_stream() -> None:
    forward = ForwardState(Ranks(None, 1, 2))
    assert forward.split(3, Length("reference"), "num_ref_tokens") == 1
    joined = torch.arange(8)[None]
    split = Split("image", after="reference")
    assert forward.split(joined, split, "hidden_states").tolist() == [[2, 6, 7]]
    with pytest.raises(PlanFault, match="has 3 tokens, reference alone has 3"):
        forward.split(joined[:, :3], split, "hidden_states")


@pytest.mark.parametrize("value", [0, None])
def test_a_stream_without_a_length_is_not_in_the_call(value: int | None) -> None:
    forward = ForwardState(Ranks(None, 0, 2))
    assert forward.split(value, Length("reference"), "num_ref_tokens") == value
    assert forward.split(torch.arange(8)[None], Split("image", after="reference"), "x").tolist() == [[0, 1, 2, 3]]


def test_a_single_token_is_no_stream() -> None:
    """One entry stands for all tokens, as in a condition that is the same for each."""
    with pytest.raises(PlanFault, match="no tokens of image were split"):
        run(Model(), plan(), image=numbers(1, 1, SIZE))


@pytest.mark.parametrize("residual", [numbers(1, 7, SIZE), [numbers(1, 5, SIZE), numbers(1, 7, SIZE)]])
def test_streams_of_differing_lengths_are_refused(residual: Any) -> None:
    with pytest.raises(PlanFault, match="residual has 7 tokens, others of image have 5"):
        run(Model(), plan(), residual=residual)


def test_a_dimension_that_is_not_there_is_refused() -> None:
    with pytest.raises(PlanFault, match=r"residual has the shape \[5\], its tokens are in dimension 1"):
        run(Model(), plan(), residual=numbers(5))
    splits = {"": {"image": Split("image"), "residual": Split("image", ndim=3)}}
    run(Model(), plan(splits=splits), residual=numbers(7))


def test_queries_and_keys_of_other_tokens_are_refused() -> None:
    with pytest.raises(PlanFault, match=r"queries of the shape \[1, 5, 4, 2\], its streams 2 tokens"):
        run(Model(), plan(splits={"": {"text": Split("image")}}))
    splits = {"": {"image": Split("image"), "text": Split("text")}}
    with pytest.raises(PlanFault, match=r"keys of the shape \[1, 2, 4, 2\], its streams 3 tokens"):
        run(Model(), plan(splits=splits, attentions={"blocks.*.attn": Attention(("image",), ("image",))}))
    with pytest.raises(PlanFault, match="no tokens of text were split"):
        run(Model(), plan(attentions={"blocks.*.attn": Attention(("text",), ())}))


@pytest.mark.parametrize("part", ["splits", "gathers"])
def test_results_that_are_not_there_are_refused(part: str) -> None:
    model = Model()
    model.blocks[0].register_forward_hook(lambda module, args, result: model.rope(result))
    numbered = {"rope": {1: Split("image")}}
    changed: dict[str, Any] = {part: plan().splits | numbered if part == "splits" else numbered}
    with pytest.raises(PlanFault, match="returns 1 results, the plan names"):
        run(model, plan(**changed))


def test_a_mask_of_other_tokens_is_refused() -> None:
    with pytest.raises(PlanFault, match="not one of 3 or 5 tokens"):
        run(Model(), plan(), mask=torch.ones(1, 1, 4, 3, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(5, 3), (5, 1, 1, 3), (5, 1, 5, 3), (3,)])
def test_a_mask_of_rows_is_not_one_of_queries(shape: tuple[int, ...]) -> None:
    """diffusers takes a mask of two dimensions as one of keys for each row; here there are as many rows as queries."""
    model = Model()
    for block in model.blocks:
        block.attn.compute = dispatched_attention
    mask = numbers(*shape) > 0
    mask[..., 0] = True
    if mask.ndim == 1:
        mask = mask[None, None, None]
    arguments = {"image": numbers(5, 5, SIZE), "text": numbers(5, 3, SIZE), "mask": mask}
    whole = model(**arguments)
    for rank, own in ((0, whole[:, :3]), (1, whole[:, 3:])):
        torch.testing.assert_close(run(model, plan(), Ranks(None, rank, 2), **arguments), own, rtol=1e-6, atol=1e-6)


# After a call.


def hooks_of(model: torch.nn.Module) -> list[Any]:
    return [
        hook
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._forward_hooks_always_called)
        for hook in hooks
    ]


@pytest.fixture
def functions() -> Iterator[None]:
    """Check that torch's and diffusers' functions are the same after a test."""
    from diffusers.models import attention_dispatch
    from diffusers.models.transformers import transformer_flux

    before = functional.scaled_dot_product_attention, transformer_flux.dispatch_attention_fn
    yield
    after = functional.scaled_dot_product_attention, transformer_flux.dispatch_attention_fn
    assert after == before
    assert before[1] is attention_dispatch.dispatch_attention_fn


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize("error", [ValueError, PlanFault, KeyboardInterrupt])
def test_an_error_in_the_forward_leaves_nothing_behind(error: type[BaseException]) -> None:
    def fails(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        raise error("as the class says")

    model = Model()
    model.blocks[1].attn.compute = fails
    with pytest.raises(error, match="as the class says"):
        run(model, plan())
    assert not hooks_of(model)
    model.blocks[1].attn.compute = functional_attention
    whole = model(numbers(1, 5, SIZE), numbers(1, 3, SIZE))
    torch.testing.assert_close(run(model, plan()), whole[:, :3], rtol=1e-6, atol=1e-6)
    assert not hooks_of(model)


@pytest.mark.usefixtures("functions")
def test_an_error_in_an_attention_backend_leaves_nothing_behind() -> None:
    model = Model()
    for block in model.blocks:
        block.attn.compute = dispatched_attention
    with pytest.raises(RuntimeError):
        run(model, plan(), text=numbers(1, 3, 2 * SIZE))
    assert not hooks_of(model)
    run(model, plan())


@pytest.mark.usefixtures("functions")
def test_functions_are_those_of_torch_and_diffusers_while_nothing_runs() -> None:
    before = functional.scaled_dot_product_attention
    planned = PlannedModule(Model(), plan())
    assert functional.scaled_dot_product_attention is before
    assert not hooks_of(planned._module)
