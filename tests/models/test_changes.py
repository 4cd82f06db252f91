"""Changes of a lent module are followed, with the bits of this process, or refused by name."""

from __future__ import annotations

import copy
import json
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from class_entries import ENTRIES
from class_entry import Random
from fault_parts import embedded_call, same
from flux_pipelines import flux, flux_transformer, run_image_to_image, run_plain
from followed_changes import FOLLOWED, Followed, write_parameter
from pipeline_parts import clip_text_encoder
from refused_changes import REFUSED, Refused, hook_block
from safetensors.torch import save_file
from stable_diffusion_pipelines import TEXT_SIZE, unet

from xditd.client import Client, Unsupported, XditdError, accelerate, unaccelerate

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("as_many_threads_as_the_worker")]


@pytest.mark.parametrize("case", FOLLOWED, ids=lambda case: case.name)
def test_change_is_followed(client: Client, case: Followed) -> None:
    here, there = case.build(), case.build()
    with accelerate(there, components=case.components, client=client) as fast:
        before = case.run(here)
        assert same(case.run(there), before)
        for number, change in enumerate(case.changes):
            change(here)
            change(there)
            expected = case.run(here)
            calls = dict(fast.calls)
            found = case.run(there)
            assert same(found, expected), number
            assert all(fast.calls[name] > calls[name] for name in case.components)
            if case.has_effect:
                assert not same(expected, before), number
                before = expected
    assert "forward" not in vars(there.transformer)
    # This process has the module as it was changed.
    assert same(case.run(there), expected)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_change_is_refused_until_it_is_undone(client: Client, case: Refused) -> None:
    pipe = flux()
    expected = run_plain(flux())
    with accelerate(pipe, client=client) as fast:
        assert same(run_plain(pipe), expected)
        calls = fast.calls["transformer"]
        undo = case.change(pipe)
        try:
            for _ in range(2):  # also when the same state is seen again
                with pytest.raises(XditdError, match=case.text):
                    run_plain(pipe)
        finally:
            undo()
        assert fast.calls["transformer"] == calls
        assert same(run_plain(pipe), expected)
        assert fast.calls["transformer"] > calls


@pytest.mark.long
@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_changed_module_is_refused_at_once(client: Client, case: Refused) -> None:
    pipe = flux()
    expected = run_plain(flux())
    undo = case.change(pipe)
    try:
        with pytest.raises(XditdError), accelerate(pipe, client=client):
            run_plain(pipe)
    finally:
        undo()
    with accelerate(pipe, client=client):
        assert same(run_plain(pipe), expected)


def test_compiled_module_is_refused(client: Client) -> None:
    pipe = flux()
    pipe.transformer.compile(backend="eager")
    with pytest.raises(Unsupported, match="_compiled_call_impl"), accelerate(pipe, client=client):
        run_plain(pipe)
    pipe = flux()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(Unsupported, match=r"compiled by torch.compile.*_orig_mod"):
        accelerate(pipe, client=client)


@torch.no_grad()
def test_method_that_another_one_uses_is_replaced_in_the_block(client: Client) -> None:
    """The workers' forward of a VAE would call the class's ``encode``."""
    vae = flux().vae
    image = torch.full((1, 3, 16, 16), 0.3)
    expected = vae(image).sample
    with accelerate(vae, client=client):
        accelerated = vae.encode
        vae.encode = lambda given, **others: accelerated(given * 2.0, **others)
        with pytest.raises(Unsupported, match="its encode was replaced within the accelerate block"):
            vae(image)
        vae.encode = accelerated
        assert torch.equal(vae(image).sample, expected)


@torch.no_grad()
def test_compiled_function_calls_the_workers(client: Client) -> None:
    transformer = flux_transformer()
    expected = transformer(**embedded_call())[0] * 2.0
    function = torch.compile(lambda arguments: transformer(**arguments)[0] * 2.0, backend="eager")
    with accelerate(transformer, client=client) as fast:
        for _ in range(2):
            assert torch.equal(function(embedded_call()), expected)
        assert fast.calls["FluxTransformer2DModel"] == 2


def test_refused_change_of_a_changed_module_is_refused_again(client: Client) -> None:
    """A change that is refused does not hide one that would be followed."""
    pipe, other = flux(), flux()
    with accelerate(pipe, client=client):
        run_plain(pipe)
        undo = hook_block(pipe)
        write_parameter(pipe)
        for _ in range(2):
            with pytest.raises(Unsupported, match="_forward_hooks"):
                run_plain(pipe)
        undo()
        write_parameter(other)
        assert same(run_plain(pipe), run_plain(other))


def test_deep_copy_runs_in_this_process(client: Client) -> None:
    pipe = flux()
    with accelerate(pipe, client=client) as fast:
        run_plain(pipe)
        calls = fast.calls["transformer"]
        other = flux()
        other.transformer = copy.deepcopy(pipe.transformer)
        write_parameter(other)
        expected = flux()
        write_parameter(expected)
        assert same(run_plain(other), run_plain(expected))
        assert ForkingPickler.dumps(pipe.transformer)
        assert same(run_plain(pipe), run_plain(flux()))
        assert fast.calls["transformer"] == 2 * calls


def test_shallow_copy_runs_in_this_process(client: Client) -> None:
    """Its own attributes count: the workers know those of the module of which it is a copy."""
    pipe, expected = flux(), flux()
    latents = Random(5).normal(1, 4, 16, 16)
    with accelerate(pipe, components=("vae",), client=client) as fast, torch.no_grad():
        other = copy.copy(pipe.vae)
        for each in (other, expected.vae):
            each.enable_tiling()
            each.tile_sample_min_size, each.tile_latent_min_size = 8, 4
        assert torch.equal(other.decode(latents).sample, expected.vae.decode(latents).sample)
        assert not torch.equal(pipe.vae.decode(latents).sample, expected.vae.decode(latents).sample)
        assert fast.calls["vae"] == 1
    assert not {"__getstate__", "decode"} & vars(pipe.vae).keys()


def test_module_on_the_meta_device_is_refused_by_name(client: Client) -> None:
    pipe = flux()
    with accelerate(pipe, client=client):
        pipe.transformer.to("meta")
        with pytest.raises(Unsupported, match=r"transformer: its weights are on the meta device.*remove_all_hooks"):
            run_plain(pipe)


@torch.no_grad()
def test_memory_format_of_a_unet_is_followed(client: Client) -> None:
    """Kernels of one element are in any order at once: torch takes their order from the strides."""
    here, there = unet(cross_attention_dim=TEXT_SIZE), unet(cross_attention_dim=TEXT_SIZE)
    call = (Random(1).normal(2, 4, 8, 8), 3, Random(2).normal(2, 5, TEXT_SIZE))
    with accelerate(there, client=client):
        assert torch.equal(there(*call).sample, here(*call).sample)
        for each in (here, there):
            each.to(memory_format=torch.channels_last)
        found, expected = there(*call).sample, here(*call).sample
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()


@torch.no_grad()
def test_attention_of_a_text_encoder_is_followed(client: Client) -> None:
    here, there = (clip_text_encoder(TEXT_SIZE) for _ in range(2))
    ids = torch.tensor([[1, 2, 3, 4]])
    with accelerate(there, client=client):
        assert not there(ids, output_attentions=True).attentions
        for each in (here, there):
            each.set_attn_implementation("eager")
        found, expected = (each(ids, output_attentions=True) for each in (there, here))
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(found.attentions[0], expected.attentions[0])


@pytest.mark.parametrize("keep", ["client", "daemon"])
def test_accelerated_model_is_not_lent_by_hand(client: Client, keep: Any) -> None:
    transformer = flux_transformer()
    with accelerate(transformer, client=client, keep=keep):
        for as_class in (False, True):
            with pytest.raises(Unsupported, match=r"it runs in the workers by accelerate\(\): leave that block"):
                client.lend(transformer, as_class=as_class)
    client.lend(transformer).return_()


def test_model_that_was_compiled_in_the_pipeline_is_given_back(client: Client) -> None:
    pipe = flux()
    model = pipe.transformer
    fast = accelerate(pipe, client=client)
    pipe.transformer = torch.compile(model, backend="eager")
    unaccelerate(pipe)
    assert repr(fast) == "<Accelerated closed>"
    assert "forward" not in vars(model)


def test_another_pipeline_with_the_same_module(client: Client) -> None:
    pipe = flux()
    with accelerate(pipe, client=client) as fast:
        other = diffusers.FluxImg2ImgPipeline.from_pipe(pipe)
        with pytest.raises(Unsupported, match="accelerated already"):
            accelerate(other, client=client)
        calls = fast.calls["transformer"]
        assert same(run_image_to_image(other), run_image_to_image(flux("FluxImg2ImgPipeline")))
        assert fast.calls["transformer"] > calls


def test_module_is_lent_once_under_two_names(client: Client) -> None:
    pipe = flux()
    pipe.transformer_2 = pipe.transformer
    with accelerate(pipe, client=client) as fast:
        assert fast.components == ("transformer",)


def test_module_without_changes_is_lent_once(client: Client) -> None:
    pipe = flux()
    with accelerate(pipe, client=client) as fast:
        run_plain(pipe)
        run_plain(pipe)
        assert fast._stand_ins["transformer"].lends == 1


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file, and where its tensors begin."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return {name: entry for name, entry in json.loads(data[8:end]).items() if name != "__metadata__"}, end


def is_near(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Return whether results differ by roundings: here and in the workers a file's tensors are aligned differently."""
    return all(bool(((mine - its).abs() < 1e-5).all()) for mine, its in zip(found, expected, strict=True))


def test_pipelines_of_one_file_keep_their_own_states(client: Client, tmp_path: Path) -> None:
    flux_transformer().save_pretrained(tmp_path)
    pipes = [flux(transformer=diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)) for _ in range(2)]
    plain = run_plain(pipes[0])
    pipes[1].transformer.norm_out.norm.eps = 0.5
    changed = run_plain(pipes[1])
    assert not is_near(plain, changed)
    with accelerate(pipes[0], client=client), accelerate(pipes[1], client=client):
        assert is_near(run_plain(pipes[0]), plain)
        assert is_near(run_plain(pipes[1]), changed)
        pipes[0].transformer.norm_out.norm.eps = 0.5
        assert is_near(run_plain(pipes[0]), changed)
        assert len(client.status().components) == 1
        pipes[1].transformer.norm_out.norm.eps = 1e-6
        assert is_near(run_plain(pipes[1]), plain)
        assert is_near(run_plain(pipes[0]), changed)
    assert not client.status().components


def test_writes_through_a_shared_mapping_of_a_file_are_followed(client: Client, tmp_path: Path) -> None:
    model, other = flux_transformer(), flux_transformer()
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    header, content = read_header(path)
    data = np.memmap(path, dtype=np.uint8, mode="r+", offset=content)
    state = {
        name: torch.from_numpy(data[slice(*entry["data_offsets"])].view(np.float32).reshape(entry["shape"]))
        for name, entry in header.items()
    }
    model.load_state_dict(state, assign=True)
    here, there = flux(transformer=other), flux(transformer=model.requires_grad_(False))
    with accelerate(there, client=client):
        for _ in range(3):
            for pipe in (here, there):
                write_parameter(pipe)
            assert is_near(run_plain(there), run_plain(here))


def test_pipeline_of_a_file_that_another_one_has_lent_again(client: Client, tmp_path: Path) -> None:
    flux_transformer().save_pretrained(tmp_path)
    first, second = (flux(transformer=diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)) for _ in range(2))
    plain = run_plain(second)
    with accelerate(first, client=client) as fast:
        for eps in (0.5, 1e-6):
            first.transformer.norm_out.norm.eps = eps
            run_plain(first)
        assert fast._stand_ins["transformer"].lends == 3
        with accelerate(second, client=client):
            assert is_near(run_plain(second), plain)


@torch.no_grad()
def test_tables_that_a_class_keeps_are_those_of_one_loan(client: Client) -> None:
    """Qwen-Image's table of positions has an ``lru_cache`` on a method, whose results the submodule keeps."""
    entry = ENTRIES["QwenImageTransformer2DModel"]

    def build(power: int) -> Any:
        model: Any = entry.build()
        model.pos_embed.pos_freqs = model.pos_embed.pos_freqs**power
        return model

    def run(model: Any) -> torch.Tensor:
        return model(**entry.arguments(Random(3)), return_dict=False)[0]

    expected = {power: run(build(power)) for power in (1, 3)}
    assert not torch.equal(expected[1], expected[3])
    for power in (3, 1, 3):
        model = build(power)
        with accelerate(model, client=client):
            assert torch.equal(run(model), expected[power])
    first, second = build(1), build(3)
    with accelerate(first, client=client), accelerate(second, client=client):
        for _ in range(2):
            assert torch.equal(run(first), expected[1])
            assert torch.equal(run(second), expected[3])


@torch.no_grad()
def test_conjugated_table_is_followed(client: Client) -> None:
    """The view has the memory, the version and the storage of the table."""
    entry = ENTRIES["QwenImageTransformer2DModel"]
    here, there = entry.build(), entry.build()
    with accelerate(there, client=client):
        there(**entry.arguments(Random(3)))
        for each in (here, there):
            each.pos_embed.pos_freqs = each.pos_embed.pos_freqs.conj()
        found, expected = (each(**entry.arguments(Random(3)), return_dict=False)[0] for each in (there, here))
    assert torch.equal(found, expected)


def test_forward_that_was_kept_runs_here_after_the_block(client: Client) -> None:
    transformer = flux_transformer()
    with accelerate(transformer, client=client, components=None):
        kept = transformer.forward
    pipe = flux(transformer=transformer)
    transformer.forward = kept
    assert same(run_plain(pipe), run_plain(flux()))


def test_module_of_another_version_of_diffusers_is_refused(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers, "__version__", "0.1.0")
    with pytest.raises(Unsupported, match=r"^transformer: diffusers is 0\.1\.0 in your process and 0\.\d+"):
        accelerate(flux(), client=client)


def test_module_that_is_compiled_within_the_block_is_refused(client: Client) -> None:
    pipe = flux()
    with accelerate(pipe, client=client):
        pipe.transformer.compile(backend="eager")
        with pytest.raises(Unsupported, match="_compiled_call_impl"):
            run_plain(pipe)
        del pipe.transformer._compiled_call_impl
        assert same(run_plain(pipe), run_plain(flux()))
