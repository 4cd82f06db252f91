"""One rank gives the bits of diffusers' own class and pipelines, and every refusal is by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flux2_models
import lora_files
import pytest
import torch
from interpreted_graphs import InterpretedGraphs
from taped_forward import TapedForward

from xditd.client.loras.lending import describe_lora
from xditd.gpu_workers.families.flux2.config import Flux2Config
from xditd.gpu_workers.models import path_choice
from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.lora_binding import LentLora
from xditd.gpu_workers.models.lora_variants import LoraCounters, prepare_variant
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.models.operations import CallOptions, Inputs
from xditd.gpu_workers.models.process_resources import ProcessResources
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.job_parts import LoraUse

State = dict[str, torch.Tensor]
Plugger = Callable[[ModelCache, State], CheckpointMatch]

DEV, KLEIN = flux2_models.DEV, flux2_models.KLEIN
CONFIGS = {"dev": DEV, "klein": KLEIN, "dev in diffusers' names": dataclasses.replace(DEV, is_original=False)}

CALLS: dict[str, tuple[int, int, tuple[int, int]]] = {
    "one row": (1, 32, (8, 8)),
    "odd text, odd sides": (1, 7, (5, 9)),
    "two rows": (2, 40, (4, 6)),
    "three rows, more text than image": (3, 33, (2, 3)),
}


@pytest.fixture(params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> Flux2Config:
    return CONFIGS[request.param]


def plugged(cache: ModelCache, plug: Plugger, config: Flux2Config, **given: Any) -> tuple[CachedModel, Any]:
    state = flux2_models.state_dict(0, config, **given)
    return plug(cache, state).model, flux2_models.reference(state, config)


def run(model: CachedModel, given: Mapping[str, Any], **more: Any) -> torch.Tensor:
    import direct_jobs  # not before the group is started

    ((result,),) = direct_jobs.call(model, [Inputs(given)], **more)
    return result


@pytest.mark.parametrize("case", list(CALLS))
def test_a_call_gives_the_bits_of_the_class(
    shared_cache: ModelCache, plug: Plugger, config: Flux2Config, case: str
) -> None:
    model, reference = plugged(shared_cache, plug, config)
    given = flux2_models.inputs(*CALLS[case], config)
    with torch.no_grad():
        expected = reference(**given, return_dict=False)[0]
    assert torch.equal(run(model, given), expected)


def test_references_are_tokens_after_the_image(shared_cache: ModelCache, plug: Plugger) -> None:
    model, reference = plugged(shared_cache, plug, DEV)
    given = flux2_models.inputs(1, 9, (4, 6), references=((3, 5), (2, 2)))
    with torch.no_grad():
        expected = reference(**given, return_dict=False)[0]
    assert torch.equal(run(model, given), expected)


def test_guidance_of_klein_is_not_read(shared_cache: ModelCache, plug: Plugger) -> None:
    model, _ = plugged(shared_cache, plug, KLEIN)
    given = flux2_models.inputs(1, 9, (4, 6), KLEIN)
    assert torch.equal(run(model, given), run(model, {**given, "guidance": torch.ones(1)}))


def test_the_variant_with_time_in_float32(shared_cache: ModelCache, plug: Plugger) -> None:
    from diffusers.models.transformers.transformer_flux2 import Flux2TimestepGuidanceEmbeddings

    model, reference = plugged(shared_cache, plug, DEV, dtype=torch.bfloat16)
    given = flux2_models.inputs(2, 9, (4, 6))
    given |= {name: given[name].bfloat16() for name in ("hidden_states", "encoder_hidden_states")}
    given["timestep"] = torch.tensor([0.7231, 0.2018])
    plain = run(model, given)
    with torch.no_grad():
        assert torch.equal(plain, reference(**given, return_dict=False)[0])

    class Exact(Flux2TimestepGuidanceEmbeddings):
        def forward(self, timestep: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
            of_time = self.timestep_embedder(self.time_proj(given["timestep"] * 1000).to(torch.bfloat16))
            return of_time + self.guidance_embedder(self.time_proj(guidance).to(torch.bfloat16))

    reference.time_guidance_embed.__class__ = Exact
    set_epsilon(reference)
    with torch.no_grad():
        expected = reference(**given, return_dict=False)[0]
    found = run(model, given, variant="float32_time")
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)
    assert torch.equal(run(model, given), plain)


def set_epsilon(reference: torch.nn.Module) -> None:
    """Give query and key norms the epsilon that ComfyUI's have, torch's default."""
    for block in (*reference.transformer_blocks, *reference.single_transformer_blocks):  # type: ignore[union-attr]
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            if hasattr(block.attn, name):
                getattr(block.attn, name).eps = None


def test_comfyuis_variant_has_its_epsilon_in_float32_too(shared_cache: ModelCache, plug: Plugger) -> None:
    model, reference = plugged(shared_cache, plug, DEV)
    given = flux2_models.inputs(2, 9, (4, 6))
    plain = run(model, given)
    set_epsilon(reference)
    with torch.no_grad():
        expected = reference(**given, return_dict=False)[0]
    assert torch.equal(run(model, given, variant="float32_time"), expected)
    assert 0 < flux2_models.relative_error(plain, expected) < 1e-5
    assert torch.equal(run(model, given), plain)


def test_compiled_blocks_of_each_variant_are_its_own(layout: ParallelLayout, plug: Plugger) -> None:
    """A graph has the epsilon as a constant. The layers before the norms are small, so that it counts."""
    state = {
        name: each * 1e-3 if "qkv" in name or "linear1" in name else each
        for name, each in flux2_models.state_dict(0, DEV).items()
    }
    model = plug(ModelCache(dataclasses.replace(layout, acceleration="compiled")), state).model
    model.planned.resources = ProcessResources(lambda: InterpretedGraphs())  # type: ignore[arg-type,return-value]
    given, reference = flux2_models.inputs(2, 9, (4, 6)), flux2_models.reference(state, DEV)
    expected = {}
    for variant in ("class", "float32_time"):
        with torch.no_grad():
            expected[variant] = reference(**given, return_dict=False)[0]
        set_epsilon(reference)
    assert flux2_models.relative_error(*expected.values()) > 1e-5
    assert model.paths is not None
    paths = []
    for variant in ("class", "float32_time", "class", "float32_time"):
        for _ in range(6):
            assert flux2_models.relative_error(run(model, given, variant=variant), expected[variant]) <= 1e-6
            model.paths.decide()
            paths += [(each.path, each.detail) for each in model.paths.take_reports()]
    assert paths.count(("compiled", "")) == 2, paths


def test_compiled_blocks_are_those_of_the_class(
    layout: ParallelLayout, plug: Plugger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recorded block runs in place of the class's once it has been compared."""
    model, reference = plugged(ModelCache(dataclasses.replace(layout, acceleration="compiled")), plug, DEV)
    model.planned.resources = ProcessResources(lambda: InterpretedGraphs())  # type: ignore[arg-type,return-value]
    given = flux2_models.inputs(2, 9, (4, 6))
    with torch.no_grad():
        expected = reference(**given, return_dict=False)[0]
    assert model.paths is not None
    paths = []
    for _ in range(6):
        assert flux2_models.relative_error(run(model, given), expected) <= 1e-6
        model.paths.decide()
        paths += [(each.class_name, each.path, each.detail) for each in model.paths.take_reports()]
    assert paths[-1] == ("Flux2Transformer2DModel", "compiled", "")
    assert not model.lora_detail.startswith("fused")


def test_loras_of_one_layout_share_a_graph(
    layout: ParallelLayout, plug: Plugger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU a graph is a tape of torch's operators (``taped_forward``)."""
    cache = ModelCache(dataclasses.replace(layout, acceleration="captured"))
    state = flux2_models.state_dict(0, DEV)
    model = plug(cache, state).model
    monkeypatch.setattr(path_choice, "CapturedForward", TapedForward)
    assert model.paths is not None
    assert model.lora_memory is not None
    model.paths._chooser.captures = True
    given, counts, counters = flux2_models.inputs(1, 9, (4, 6)), model.lora_memory.counts, LoraCounters()
    lent: dict[str, LentLora] = {}
    made = {str(seed): lora_files.make(lora_files.matrices(state), "comfyui", seed) for seed in (1, 2)}
    for name, lora in made.items():
        offer = describe_lora(lora.tensors)
        lent[name] = LentLora(name, offer.manifest.lora)
        lent[name].plug(dict(lora.tensors), name)
        offer.close()

    def with_lora(name: str, strength: float) -> torch.Tensor:
        uses = [LoraUse(component_id=name, strength=strength)]
        variant = prepare_variant(model, uses, lent.__getitem__, counters)
        with variant.switched_on(), torch.no_grad():
            found = model.operations.run(model, Inputs(given), CallOptions(loras=variant.begin_step()))
        model.paths.decide()
        return found

    for name, strength in (("1", 0.5), ("1", 0.5), ("1", -0.2), ("2", 0.4), ("1", 0.5)):
        reference = flux2_models.reference(made[name].baked_into(state, strength), DEV)
        with torch.no_grad():
            expected = reference(**given, return_dict=False)[0]
        assert flux2_models.relative_error(with_lora(name, strength), expected) <= 1e-6
    assert (counts.forwards, counts.launched, counts.layouts, counts.refusal) == (5, 3, 1, "")
    report = counters.report([model.lora_memory])
    assert (report.launched, report.memory_bytes) == (3, model.lora_memory.nbytes)
    assert report.memory_bytes > 0
    for each in lent.values():
        each.unplug()
    assert model.lora_memory.nbytes == 0


def test_rows_are_taken_as_views(shared_cache: ModelCache, plug: Plugger) -> None:
    model, _ = plugged(shared_cache, plug, DEV)
    given = flux2_models.inputs(3, 9, (4, 6))
    whole = run(model, given)
    taken = model.operations.take_rows(Inputs(given, {"timestep": (0.7, 0.45, 0.2)}), slice(1, 3))
    assert taken.known == {"timestep": (0.45, 0.2)}
    assert taken.arguments["timestep"].data_ptr() == given["timestep"][1:].data_ptr()
    assert taken.arguments["img_ids"] is given["img_ids"]
    rows = model.operations.run(model, taken, CallOptions())
    assert flux2_models.relative_error(rows, whole[1:]) <= 1e-6


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_states": torch.ones(1, 24, 64)}, r"hidden_states: shape is \[1, 24, 64\], use \[any, any, 128\]"),
        ({"hidden_states": torch.ones(1, 24, 128, dtype=torch.bfloat16)}, "dtype is bfloat16, use float32"),
        ({"hidden_states": torch.ones(1, 23, 128)}, r"img_ids: shape is \[24, 4\], use \[23, 4\]"),
        (
            {"encoder_hidden_states": torch.ones(2, 9, 96)},
            r"encoder_hidden_states: shape is \[2, 9, 96\], use \[1, any",
        ),
        ({"encoder_hidden_states": torch.ones(1, 9, 95)}, r"use \[1, any, 96\]"),
        ({"txt_ids": torch.ones(9, 3)}, r"txt_ids: shape is \[9, 3\], use \[9, 4\]"),
        ({"img_ids": torch.ones(1, 24, 4)}, r"img_ids: shape is \[1, 24, 4\], use \[24, 4\]"),
        ({"timestep": torch.ones(2)}, r"timestep: shape is \[2\], use \[1\]"),
        ({"guidance": None}, "guidance: NoneType where a tensor is needed"),
    ],
)
def test_arguments_that_cannot_run_are_refused(
    shared_cache: ModelCache, plug: Plugger, changes: dict[str, Any], says: str
) -> None:
    model, _ = plugged(shared_cache, plug, DEV)
    with pytest.raises(BadRequest, match=says):
        model.operations.check(model, Inputs({**flux2_models.inputs(1, 9, (4, 6)), **changes}))


def test_timesteps_of_a_scheduler_are_refused(shared_cache: ModelCache, plug: Plugger) -> None:
    model, _ = plugged(shared_cache, plug, DEV)
    with pytest.raises(BadRequest, match=r"timestep: 700 is not a number from 0 to 1; give sigmas"):
        model.operations.check(model, Inputs(flux2_models.inputs(1, 9, (4, 6)), {"timestep": (700.0,)}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"precision": "fp8"}, "precision 'fp8': FLUX.2 has no products in eight bits"),
        ({"requested_kernels": "fused"}, "kernels 'fused': FLUX.2 has none; start the daemon with kernels auto"),
    ],
)
def test_kernels_that_are_not_there_are_refused(layout: ParallelLayout, changes: dict[str, str], says: str) -> None:
    cache = ModelCache(dataclasses.replace(layout, **changes))
    with pytest.raises(Unsupported, match=says):
        cache.match({name: TensorInfo.of(tensor) for name, tensor in flux2_models.state_dict(0).items()})


def test_an_attention_backend_that_was_asked_for_runs(layout: ParallelLayout, plug: Plugger) -> None:
    asked_for = dataclasses.replace(layout, requested_attention="SDPA_MATH", attention_backend="SDPA_MATH")
    model, reference = plugged(ModelCache(asked_for), plug, DEV)
    given = flux2_models.inputs(2, 40, (4, 6))
    with torch.no_grad():
        expected = reference(**given, return_dict=False)[0]
    found = run(model, given)
    assert not torch.equal(found, expected)
    assert flux2_models.relative_error(found, expected) <= 1e-6
