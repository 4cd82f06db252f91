"""An argument that a method does not take is refused by its name, with the name that is meant."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import pytest

from xditd.client import AsyncClient, BadRequest, Client, Pipeline
from xditd.client.argument_names import ELSEWHERE, unknown_argument
from xditd.client.pipeline.adapter import Adapter
from xditd.client.pipeline.calls import ARGUMENTS, OF_JOBS
from xditd.client.pipeline.folders import PIPELINES


def theirs_of(name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(getattr(diffusers, name).__call__).parameters


def parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self", "cls", "kwargs"}


@pytest.mark.parametrize("name", PIPELINES)
def test_every_argument_of_diffusers_has_a_name_here_or_a_reason(name: str) -> None:
    theirs = set(theirs_of(name)) - {"self"}
    assert not sorted(theirs - set(ARGUMENTS) - set(ELSEWHERE))
    assert theirs_of(name)["max_sequence_length"].default == Adapter.default_length


def test_every_name_that_is_told_is_one_of_a_method() -> None:
    known = {*ARGUMENTS, *OF_JOBS, *parameters(Pipeline.open), *parameters(Client.generate)}
    assert not [(name, each) for name, (names, _) in ELSEWHERE.items() for each in names if each not in known]
    assert all(names or hint for names, hint in ELSEWHERE.values())
    assert set(ARGUMENTS) == parameters(Pipeline.__call__)


CALLS = [
    ("num_inference_steps", "num_inference_steps: it is called steps here$"),
    ("guidance_scale", "guidance_scale: it is called guidance here: the scale that the model uses"),
    ("true_cfg_scale", "true_cfg_scale: it is called guidance here: of Qwen-Image"),
    ("num_images_per_prompt", "it is called num_images here$"),
    ("generator", "generator: it is called seed here: give seed=7 in place of torch.Generator"),
    ("prompt_embeds", "prompt_embeds: it is called conditioning here: .*conditioning={'prompt_embeds': ...}"),
    ("mask_image", "it is called mask here"),
    ("num_frames", "it is called frames here"),
    ("output_type", "output_type: no argument of Pipeline.*: the result has images"),
    ("stepz", "stepz: no argument of Pipeline.*; did you mean steps"),
    ("qqqqq", "qqqqq: no argument of Pipeline.*; it takes prompt, "),
]


@pytest.fixture
def pipe() -> Pipeline:
    """A pipeline that was never opened: names are checked before anything else."""
    found = object.__new__(Pipeline)
    found._is_closed = False
    return found


@pytest.mark.parametrize(("name", "says"), CALLS)
def test_calls_of_a_pipeline_in_any_way(pipe: Pipeline, name: str, says: str) -> None:
    given: dict[str, Any] = {name: 3}
    for call in (pipe, pipe.start, pipe.submit, lambda *one, **more: asyncio.run(pipe.run_async(*one, **more))):
        with pytest.raises(BadRequest, match=says):
            call("a cat", **given)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("torch_dtype", "torch_dtype: no argument of Pipeline.open: weights keep the dtype of their files"),
        ("text_encoder_2", "it is called text_encoders here: a list"),
        ("vea", "vea: no argument of Pipeline.open; did you mean vae"),
        ("cache_dir", "nothing is downloaded"),
    ],
)
def test_opening_a_pipeline(name: str, says: str) -> None:
    given: dict[str, Any] = {name: 3}
    with pytest.raises(BadRequest, match=says):
        Pipeline.open("folder", **given)


@pytest.mark.parametrize(
    ("method", "name", "says"),
    [
        (Client.generate, "num_inference_steps", "it is called steps here"),
        (Client.generate, "guidance", "guidance: no argument of Client.generate; did you mean guidance_scale"),
        (Client.generate, "prompt", "it is called conditioning here: words become tensors by encode_prompt"),
        (Client.lend, "lable", "lable: no argument of Client.lend; did you mean label"),
        (Client.encode_prompt, "encoder", "did you mean encoders"),
        (Client.__init__, "deadline", "deadline: no argument of Client; did you mean deadline_s"),
    ],
)
def test_methods_of_a_client(method: Callable[..., Any], name: str, says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        method(object.__new__(Client), **{name: 3})


def test_an_event_loop_gets_the_same_error() -> None:
    client = AsyncClient()
    client._client = object.__new__(Client)

    async def generate() -> None:
        await client.generate("t", {}, num_inference_steps=3)  # type: ignore[call-arg]

    with pytest.raises(BadRequest, match="num_inference_steps: it is called steps here"):
        asyncio.run(generate())
    client._threads.shutdown()


def test_a_name_that_a_method_has_itself_is_not_told_to_be_another() -> None:
    assert "called mask here" in unknown_argument("mask_image", ("mask",), "x").detail
    assert "called start_mask here" in unknown_argument("mask_image", ("start_mask",), "x").detail
    assert unknown_argument("mask_image", ("steps",), "x").detail == "mask_image: no argument of x; it takes steps"
