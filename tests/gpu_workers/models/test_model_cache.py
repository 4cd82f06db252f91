"""The model cache: models are built once, plugged without a copy, unplugged, and correct after a swap."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from text_checkpoints import clip_l_state_dict, t5_state_dict

from xditd.client.demo.checkpoints import flux1_state_dict, flux_vae_state_dict
from xditd.gpu_workers.families.flux1.checkpoint import Flux1, Flux1Config
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.entries import TensorInfo
from xditd.gpu_workers.models.model_cache import ModelCache
from xditd.gpu_workers.parallel import component_layouts
from xditd.gpu_workers.parallel.layouts import ParallelLayout
from xditd.ipc.degrees import Degrees
from xditd.ipc.errors import BadCheckpoint, BadRequest, Internal, RequestError, Unsupported

State = dict[str, torch.Tensor]
Plugger = Callable[[ModelCache, State], CheckpointMatch]
Describer = Callable[[State], dict[str, TensorInfo]]
SMALL = {"heads": 1, "double_blocks": 1, "single_blocks": 1, "context_dim": 64, "pooled_dim": 32}


def prediction(match: CheckpointMatch) -> torch.Tensor:
    import direct_jobs

    config = match.config
    assert isinstance(config, Flux1Config)
    generator = torch.Generator().manual_seed(0)
    return direct_jobs.denoise(
        match.model,
        latents=torch.randn(1, 16, 4, 4, generator=generator),
        timestep=torch.tensor([0.5]),
        prompt_embeds=torch.randn(1, 3, config.context_channels, generator=generator),
        pooled=torch.randn(1, config.pooled_channels, generator=generator),
        guidance=torch.tensor([3.5]),
    )


def test_every_parameter_is_a_view_of_what_was_lent(
    shared_cache: ModelCache, demo_transformer: State, demo_vae: State, plug: Plugger
) -> None:
    for state in (demo_transformer, demo_vae):
        lent = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in state.values()]
        module = plug(shared_cache, state).model.module
        parameters = list(module.parameters())
        assert sum(p.numel() for p in parameters) == sum(t.numel() for t in state.values())
        for parameter in parameters:
            assert any(start <= parameter.data_ptr() < stop for start, stop in lent)
            assert not parameter.requires_grad


def test_a_write_by_the_owner_is_seen_by_the_model(cache: ModelCache, plug: Plugger) -> None:
    state = flux1_state_dict(0, **SMALL)
    match = plug(cache, state)
    before = prediction(match)
    state["final_layer.linear.bias"].add_(1.0)
    assert torch.allclose(prediction(match), before + 1.0, atol=1e-5)


def test_unplugging_lets_go_of_lent_memory(cache: ModelCache, describe: Describer) -> None:
    state = flux1_state_dict(0, **SMALL)
    match = cache.match(describe(state))
    bindings = match.bind(state)
    match.model.plug(bindings, owner="component-1")
    assert match.model.owner == "component-1"
    prediction(match)
    watched = [weakref.ref(tensor.untyped_storage()) for tensor in state.values()]
    match.model.unplug()
    assert match.model.owner is None
    assert all(parameter.is_meta for parameter in match.model.module.parameters())
    del state, bindings
    gc.collect()
    assert not any(ref() for ref in watched)


def test_a_second_checkpoint_reuses_the_model_and_a_swap_is_correct(cache: ModelCache, describe: Describer) -> None:
    states = [flux1_state_dict(seed, **SMALL) for seed in (0, 1)]
    matches = [cache.match(describe(state)) for state in states]
    assert matches[0].model is matches[1].model
    assert [match.is_reused for match in matches] == [False, True]
    assert (cache.built, cache.reused) == (1, 1)
    bindings = [match.bind(state) for match, state in zip(matches, states, strict=True)]
    results = []
    for number in (0, 1, 0):
        matches[number].model.plug(bindings[number])
        results.append(prediction(matches[number]))
    assert torch.equal(results[0], results[2])
    assert not torch.allclose(results[0], results[1], rtol=0.1)
    fresh = ModelCache(cache.layout).match(describe(states[1]))
    fresh.model.plug(fresh.bind(states[1]))
    assert torch.equal(prediction(fresh), results[1])


def test_spelling_does_not_matter_but_architecture_and_dtype_do(cache: ModelCache, describe: Describer) -> None:
    models = [
        cache.match(describe(flux1_state_dict(0, **{**SMALL, **changes}))).model
        for changes in (
            {},
            {"prefix": "model.diffusion_model.", "norm_suffix": "weight"},
            {"dtype": torch.bfloat16},
            {"single_blocks": 2},
            {"guidance": False},
        )
    ]
    assert models[0] is models[1]
    assert len(set(map(id, models))) == 4
    assert (cache.built, cache.reused) == (4, 1)
    assert {p.dtype for p in models[2].module.parameters()} == {torch.bfloat16}


def test_a_checkpoint_that_does_not_fit_builds_nothing(cache: ModelCache, describe: Describer) -> None:
    infos = describe(flux1_state_dict(0, **SMALL))
    del infos["img_in.bias"]
    for _ in range(2):
        with pytest.raises(BadCheckpoint, match=r"1 missing: img_in\.bias"):
            cache.match(infos)
    assert (cache.built, cache.reused) == (0, 0)


def test_a_kind_picks_one_component_of_a_file_that_holds_several(cache: ModelCache, describe: Describer) -> None:
    transformer, vae = describe(flux1_state_dict(0, **SMALL)), describe(flux_vae_state_dict(0))
    clip, t5 = describe(clip_l_state_dict(0)), describe(t5_state_dict(0))
    whole = {f"model.diffusion_model.{name}": info for name, info in transformer.items()}
    whole |= {f"vae.{name}": info for name, info in vae.items()}
    whole |= {f"text_encoders.clip_l.transformer.{name}": info for name, info in clip.items()}
    for kind, family, count in (("transformer", "flux1", transformer), ("vae", "flux_vae", vae)):
        match = cache.match(whole, kind)
        assert (match.family.name, len(match.sources)) == (family, len(count))
    assert cache.match(whole, "text_encoder").family.name == "clip_l"
    with pytest.raises(Unsupported, match=r"2 of the kind text_encoder in one file \(clip_l, t5\): lend one at a time"):
        cache.match(
            whole | {f"text_encoders.t5xxl.transformer.{name}": info for name, info in t5.items()}, "text_encoder"
        )
    with pytest.raises(BadRequest, match="lent as vae, but its tensors are those of flux1, a transformer"):
        cache.match(transformer, "vae")
    strange = {**whole, "model.diffusion_model.more": TensorInfo("float32", (1,))}
    with pytest.raises(BadCheckpoint, match=r"1 unexpected: model\.diffusion_model\.more "):
        cache.match(strange, "transformer")


def test_a_checkpoint_that_is_known_and_does_not_fit_is_named(cache: ModelCache, describe: Describer) -> None:
    infos = describe(flux1_state_dict(0, **SMALL))
    packed = {name: TensorInfo("uint8", (99, 1)) if len(info.shape) == 2 else info for name, info in infos.items()}
    packed["double_blocks.0.img_mlp.0.weight.quant_state.bitsandbytes__nf4"] = TensorInfo("uint8", (90,))
    whole = {f"model.diffusion_model.{name}": info for name, info in infos.items()}
    for refused, says in (
        (packed, r"^FLUX\.1 with NF4 \(bitsandbytes\) weights cannot be run: lend its bfloat16"),
        (
            {**whole, "vae.decoder.conv_in.weight": TensorInfo("float32", (64, 16, 3, 3))},
            "^an all-in-one checkpoint of FLUX",
        ),
        (
            {
                name: TensorInfo("bfloat16", (9, 9))
                for name in ("double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.in_proj.weight")
            },
            r"^Chroma cannot be run: lend FLUX\.1 \(flux1-dev\.safetensors\), ",
        ),
    ):
        with pytest.raises(RequestError, match=says) as caught:
            cache.match(refused)
        assert len(caught.value.detail) < 1_000
    assert cache.built == 0


def test_skipped_tensors_are_logged_once(
    cache: ModelCache, describe: Describer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    infos = {**describe(flux1_state_dict(0, **SMALL)), "scaled_fp8": TensorInfo("float8_e4m3fn", (2,))}
    for _ in range(2):
        match = cache.match(infos)
    assert "scaled_fp8" not in match.sources.values()
    assert [record.message for record in caplog.records if "skipped" in record.message] == [
        "tensors skipped, no job reads them: family=flux1 count=1 names=scaled_fp8"
    ]


def test_a_ring_that_the_attention_asked_for_cannot_do_builds_nothing(
    layout: ParallelLayout, describe: Describer
) -> None:
    two = ModelCache(dataclasses.replace(layout, degrees=Degrees(ulysses=2), requested_attention="SDPA_MATH"))
    with pytest.raises(Unsupported) as refused:
        two.match(describe(flux1_state_dict(0, **SMALL)))
    assert refused.value.detail == (
        "flux1: 1 attention heads need the layout ring=2, and attention backend 'SDPA_MATH' with ring attention: "
        "returns no log-sum-exp; use SDPA; or start the daemon with --workers 1"
    )
    assert two.built == 0


def test_a_rank_that_could_not_build_meets_the_others_once_all_the_same(
    cache: ModelCache, describe: Describer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xditd.gpu_workers.families.flux1.operations import Flux1Operations

    met: list[str] = []
    choose, build = component_layouts.choose, Flux1Operations.build

    def meet(layout: ParallelLayout, family: str, heads: int, dtype: torch.dtype) -> ParallelLayout:
        met.append(family)
        return choose(layout, family, heads, dtype)

    def run_out_of_memory(*_: object) -> torch.nn.Module:
        raise torch.OutOfMemoryError("no room for buffers")

    monkeypatch.setattr(component_layouts, "choose", meet)
    monkeypatch.setattr(Flux1Operations, "build", run_out_of_memory)
    infos = describe(flux1_state_dict(0, **SMALL))
    with pytest.raises(torch.OutOfMemoryError):
        cache.match(infos)
    monkeypatch.setattr(Flux1Operations, "build", build)
    cache.match(infos)
    assert met == ["flux1"]


def test_what_is_not_split_over_tokens_has_the_degrees_of_the_group(
    layout: ParallelLayout, demo_vae: State, describe: Describer
) -> None:
    four = ModelCache(dataclasses.replace(layout, degrees=Degrees(ulysses=4)))
    assert four.match(describe(demo_vae)).model.layout.degrees == Degrees(ulysses=4)


def test_bindings_of_another_model_are_refused(cache: ModelCache, describe: Describer) -> None:
    state = flux1_state_dict(0, **SMALL)
    match = cache.match(describe(state))
    bindings = match.bind(state)
    del bindings["x_embedder.bias"]
    with pytest.raises(Internal, match=r"x_embedder\.bias"):
        match.model.plug(bindings)
    assert all(parameter.is_meta for parameter in match.model.module.parameters())


def test_strided_tensors_are_viewed_too(cache: ModelCache, describe: Describer, plug: Plugger) -> None:
    state = flux1_state_dict(0, **SMALL)
    expected = prediction(plug(cache, state))
    columns = {name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor for name, tensor in state.items()}
    match = plug(cache, columns)
    assert match.model.module.x_embedder.weight.data_ptr() == columns["img_in.weight"].data_ptr()
    assert torch.allclose(prediction(match), expected, rtol=1e-4, atol=1e-5)


def test_a_full_size_model_is_planned_and_plugged(cache: ModelCache) -> None:
    one = torch.zeros((), dtype=torch.bfloat16)
    entries = Flux1().entries(Flux1Config(3072, 19, 38, 4096, 768, True), ())
    state = {entry.source: one.expand(entry.shape) for entry in entries}
    match = cache.match({name: TensorInfo.of(tensor) for name, tensor in state.items()})
    match.model.plug(match.bind(state))
    assert len(list(match.model.module.parameters())) == 1160
    assert not any(parameter.is_meta for parameter in match.model.module.parameters())
