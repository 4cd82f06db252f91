"""Calls of modules that run as their class, on one rank: results, caches that stay, and refusals of one call alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch

from xditd.ipc.arguments import Argument, Held, InIo, ListOf, ObjectOf, OutputOf
from xditd.ipc.errors import BadRequest, LeaseLost, Unsupported
from xditd.ipc.job_parts import Numerics, Part
from xditd.ipc.processes import ProcessIdentity
from xditd.ipc.requests import Call, ReadTensors

if TYPE_CHECKING:
    from one_rank import OneRank, Room

CACHE = "diffusers.models.transformers.transformer_flux2:Flux2KVCache"
OTHER = ProcessIdentity(pid=1, start_ticks=1)


def make_vae(seed: int = 0, **config: Any) -> Any:
    torch.manual_seed(seed)
    config = {"block_out_channels": (8,), "norm_num_groups": 4, "sample_size": 8} | config
    return diffusers.AutoencoderKL(**config).eval()


class Vae:
    """A lent VAE; ``decode`` calls the copy on the rank."""

    def __init__(self, rank: OneRank, module: Any, component_id: str = "vae") -> None:
        self.rank, self.module, self.component_id = rank, module, component_id
        rank.lend(component_id, module)

    def run(self, room: Room, method: str = "forward", **arguments: Argument) -> Any:
        job = Call(
            request_id="r1",
            component_id=self.component_id,
            io=room.block(),
            parts=(Part(arguments=arguments),),
            method=method,
            **self.results,
        )
        return self.rank.run(job)

    def decode(self, latents: torch.Tensor, **more: Argument) -> torch.Tensor:
        room = self.rank.room()
        place = room.argument(latents)
        self.results = room.results(2**16)
        finished = self.run(room, "decode", z=place, **more)
        assert finished.results is not None
        (tree,) = finished.results.trees
        assert isinstance(tree, OutputOf)
        assert tree.class_name == "diffusers.models.autoencoders.vae:DecoderOutput"
        sample = tree.items["sample"]
        assert isinstance(sample, InIo)
        return room.read(sample.place)

    def expected(self, latents: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = self.module.decode(latents).sample
        return found


LATENTS = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_method_gives_what_the_class_gives(rank: OneRank) -> None:
    vae = Vae(rank, make_vae())
    assert torch.equal(vae.decode(LATENTS), vae.expected(LATENTS))


def test_two_components_of_one_description_are_plugged_in_turn(rank: OneRank) -> None:
    first, second = Vae(rank, make_vae(1), "first"), Vae(rank, make_vae(2), "second")
    for _ in range(2):
        for vae in (first, second):
            assert torch.equal(vae.decode(LATENTS), vae.expected(LATENTS))
    assert not torch.equal(first.expected(LATENTS), second.expected(LATENTS))
    rank.components.unmap("second")
    assert torch.equal(first.decode(LATENTS), first.expected(LATENTS))


def test_a_component_that_is_not_plugged_is_copied(rank: OneRank) -> None:
    """Nothing else holds the memory of its client."""
    first, second = Vae(rank, make_vae(1), "first"), Vae(rank, make_vae(2), "second")
    for vae in (first, second):
        vae.decode(LATENTS)
    held = len(rank.components.blocks)
    rank.components.copy_component("first")
    assert len(rank.components.blocks) < held
    for vae in (first, second):
        assert torch.equal(vae.decode(LATENTS), vae.expected(LATENTS))


def test_a_copied_component_gives_the_same(rank: OneRank) -> None:
    vae = Vae(rank, make_vae())
    assert rank.components.weights_bytes == 0  # mapped memory is the client's
    copied, _ = rank.components.copy_component("vae")
    assert copied.host_to_host > 0
    assert copied.host_to_host <= rank.components.weights_bytes < 2 * copied.host_to_host
    assert torch.equal(vae.decode(LATENTS), vae.expected(LATENTS))


@pytest.mark.parametrize(
    ("method", "arguments", "kind", "message"),
    [
        ("save_pretrained", {}, BadRequest, "method 'save_pretrained': AutoencoderKL has forward, encode, decode"),
        ("decode", {}, BadRequest, "z is missing; AutoencoderKL.decode takes z"),
        ("decode", {"z": None, "y": 1}, BadRequest, "y: AutoencoderKL.decode takes z"),
        ("decode", {"z": "text"}, BadRequest, "vae.decode refused its arguments"),
        ("decode", {"z": ObjectOf(class_name="os:system", attributes={})}, Unsupported, "class os:system"),
        ("decode", {"z": Held(held_id="h9", dtype="float32", shape=())}, LeaseLost, "z: its contents (h9)"),
    ],
)
def test_what_the_class_does_not_take_is_refused_and_the_next_call_runs(
    rank: OneRank, method: str, arguments: dict[str, Argument], kind: type[Exception], message: str
) -> None:
    vae = Vae(rank, make_vae())
    room = rank.room()
    vae.results = room.results(2**16)
    with pytest.raises(kind) as caught:
        vae.run(room, method, **arguments)
    assert message.replace("vae.", "AutoencoderKL.") in str(caught.value)
    assert torch.equal(vae.decode(LATENTS), vae.expected(LATENTS))


def test_a_forward_that_draws_random_numbers_is_refused(rank: OneRank) -> None:
    vae = Vae(rank, make_vae())
    room = rank.room()
    image = room.argument(torch.zeros(1, 3, 8, 8))
    vae.results = room.results(2**16)
    with pytest.raises(Unsupported, match=r"AutoencoderKL.forward draws random numbers"):
        vae.run(room, sample=image, sample_posterior=True)
    assert torch.equal(vae.decode(LATENTS), vae.expected(LATENTS))


def test_numerics_hold_for_one_call(rank: OneRank) -> None:
    vae = Vae(rank, make_vae())
    room = rank.room()
    latents = room.argument(LATENTS)
    more = room.results(2**16)
    part = Part(arguments={"z": latents, "return_dict": False})
    numerics = Numerics(autocast="bfloat16", matmul_precision="medium", is_deterministic=True)
    before = torch.get_float32_matmul_precision()
    job = Call(
        request_id="r", component_id="vae", io=room.block(), parts=(part,), method="decode", numerics=numerics, **more
    )
    finished = rank.run(job)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (expected,) = vae.module.decode(LATENTS, return_dict=False)
    assert finished.results is not None
    (place,) = finished.results.trees[0].items  # type: ignore[union-attr]
    assert torch.equal(room.read(place.place), expected)
    assert torch.get_float32_matmul_precision() == before
    assert not torch.is_autocast_enabled("cpu")
    assert not torch.are_deterministic_algorithms_enabled()


def make_flux2() -> Any:
    from diffusers.models.transformers import transformer_flux2

    torch.manual_seed(0)
    module = diffusers.Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
    ).eval()
    for block in module.transformer_blocks:
        block.attn.set_processor(transformer_flux2.Flux2KVAttnProcessor())
    for block in module.single_transformer_blocks:
        block.attn.set_processor(transformer_flux2.Flux2KVParallelSelfAttnProcessor())
    return module


def test_a_cache_stays_on_the_rank_until_it_is_released(rank: OneRank) -> None:
    module = make_flux2()
    rank.lend("flux", module)
    given = {
        "hidden_states": torch.randn(1, 6, 4),
        "encoder_hidden_states": torch.randn(1, 3, 8),
        "timestep": torch.ones(1),
        "img_ids": torch.zeros(1, 6, 4),
        "txt_ids": torch.zeros(1, 3, 4),
        "guidance": torch.ones(1),
    }
    with torch.no_grad():
        expected = module(**given, kv_cache_mode="extract", num_ref_tokens=2)
    room = rank.room()
    arguments: dict[str, Argument] = {name: room.argument(tensor) for name, tensor in given.items()}
    arguments |= {"kv_cache_mode": "extract", "num_ref_tokens": 2}
    more = room.results(2**16)
    job = Call(request_id="r", component_id="flux", io=room.block(), parts=(Part(arguments=arguments),), **more)
    finished = rank.run(job)
    assert finished.results is not None
    tree = finished.results.trees[0]
    assert isinstance(tree, OutputOf)
    cache = tree.items["kv_cache"]
    assert isinstance(cache, ObjectOf)
    assert cache.class_name == CACHE
    layers = cache.attributes["double_block_caches"]
    assert isinstance(layers, ListOf)
    key = layers.items[0].attributes["k_ref"]  # type: ignore[union-attr]
    assert isinstance(key, Held)

    def read(client: ProcessIdentity | None = None, released: tuple[str, ...] = ()) -> torch.Tensor:
        again = rank.room()
        place = again.output(*key.shape)
        job = ReadTensors(request_id="r", io=again.block(), places={key.held_id: place}, released=released)
        rank.run(job, client=client)
        return again.read(place)

    assert torch.equal(read(), expected.kv_cache.double_block_caches[0].k_ref)
    with pytest.raises(LeaseLost):
        read(OTHER)
    read(released=(key.held_id,))
    with pytest.raises(LeaseLost, match="or were released"):
        read()


def test_what_a_client_holds_goes_with_it(rank: OneRank) -> None:
    held = rank.runner._held
    held.hold(OTHER, torch.zeros(1))
    rank.forget(OTHER)
    assert len(held) == 0
