"""Decoding and encoding jobs: what is written, in which memory format, and what is refused.

That the numbers are those of diffusers is in ``families/flux_vae/test_operations.py``.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import msgspec
import pytest
import torch

from xditd.ipc.errors import BadRequest, NotFinite, Unsupported
from xditd.ipc.facts import LatentScaling
from xditd.ipc.requests import Decode, Encode

if TYPE_CHECKING:
    from one_rank import OneRank, Room

State = dict[str, torch.Tensor]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def decode(room: Room, latents: torch.Tensor, *out: int, dtype: torch.dtype = torch.float32) -> Decode:
    given = room.input(latents)
    return Decode(request_id="r", vae_id="vae", latents=given, out=room.output(*out, dtype=dtype), io=room.block())


def encode(room: Room, image: torch.Tensor, *out: int) -> Encode:
    given = room.input(image)
    return Encode(request_id="r", vae_id="vae", image=given, out=room.output(*out), io=room.block())


@pytest.fixture
def lent(rank: OneRank, demo_vae: State) -> OneRank:
    rank.lend("vae", demo_vae)
    return rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_image_is_written_uncut_in_the_dtype_that_was_asked_for(
    lent: OneRank, direct: ModuleType, dtype: torch.dtype
) -> None:
    latents, room = 40 * random(2, 16, 4, 6), lent.room()
    asked = decode(room, latents, 2, 3, 32, 48, dtype=dtype)
    lent.run(asked)
    expected = direct.decode(lent.components.get("vae", "vae").match.model, latents)
    assert expected.abs().max() > 1.0
    assert torch.equal(room.read(asked.out), expected.to(dtype))


@pytest.mark.usefixtures("all_cores")
def test_a_scaling_that_is_given_goes_before_that_of_the_vae(lent: OneRank, direct: ModuleType) -> None:
    vae = lent.components.get("vae", "vae").match.model
    scaling = LatentScaling(factor=1.5305, shift=0.0609)
    room, latents, image = lent.room(), random(1, 16, 4, 6), random(1, 3, 32, 48)
    decoding = msgspec.structs.replace(decode(room, latents, 1, 3, 32, 48), scaling=scaling)
    lent.run(decoding)
    assert torch.equal(room.read(decoding.out), direct.decode(vae, latents, scaling=scaling))
    room = lent.room()
    encoding = msgspec.structs.replace(encode(room, image, 1, 16, 4, 6), scaling=scaling)
    lent.run(encoding)
    assert torch.equal(room.read(encoding.out), direct.encode(vae, image, scaling=scaling))
    assert not torch.equal(room.read(encoding.out), direct.encode(vae, image))


@pytest.mark.usefixtures("all_cores")
def test_images_come_channels_first_or_last(lent: OneRank, direct: ModuleType) -> None:
    image = random(2, 3, 32, 48)
    vae = lent.components.get("vae", "vae").match.model
    last = image.movedim(1, -1).contiguous()
    for given, computed in ((image, image), (last, last.movedim(-1, 1))):
        room = lent.room()
        asked = encode(room, given, 2, 16, 4, 6)
        lent.run(asked)
        assert torch.equal(room.read(asked.out), direct.encode(vae, computed))


def test_latents_and_images_that_do_not_fit_are_refused_by_shape(lent: OneRank) -> None:
    with pytest.raises(BadRequest, match=r"latents are \[1, 4, 4, 4\]: use \[batch, 16, height / 8, width / 8\]"):
        lent.run(decode(lent.room(), torch.zeros(1, 4, 4, 4), 1, 3, 32, 32))
    with pytest.raises(BadRequest, match=r"image is \[1, 4, 32, 32\]: use \[batch, 3, height, width\]"):
        lent.run(encode(lent.room(), torch.zeros(1, 4, 32, 32), 1, 16, 4, 4))
    with pytest.raises(BadRequest, match=r"out: the place for it is \[1, 3, 32, 40\], but the result will be \[1, 3"):
        lent.run(decode(lent.room(), torch.zeros(1, 16, 4, 4), 1, 3, 32, 40))
    with pytest.raises(BadRequest, match="latents: some values are not finite in float32"):
        lent.run(decode(lent.room(), torch.full((1, 16, 4, 4), torch.nan), 1, 3, 32, 32))


def test_a_vae_without_its_encoder_refuses_to_encode(rank: OneRank, demo_vae: State) -> None:
    rank.lend("vae", {name: tensor for name, tensor in demo_vae.items() if name.startswith("decoder.")})
    with pytest.raises(Unsupported, match="encode: this VAE was lent without its encoder tensors; lend the whole VAE"):
        rank.run(encode(rank.room(), torch.zeros(1, 3, 32, 32), 1, 16, 4, 4))


def test_results_that_are_not_finite_name_the_vae(rank: OneRank, demo_vae: State) -> None:
    broken = {name: tensor.clone() for name, tensor in demo_vae.items()}
    broken["decoder.conv_out.bias"][0] = torch.nan
    broken["encoder.conv_out.bias"][0] = torch.nan
    rank.lend("vae", broken)
    with pytest.raises(NotFinite, match=r"vae vae \(.*\): image: some values are NaN or infinite"):
        rank.run(decode(rank.room(), random(1, 16, 4, 4), 1, 3, 32, 32))
    with pytest.raises(NotFinite, match=r"vae vae \(.*\): latents: some values are NaN or infinite"):
        rank.run(encode(rank.room(), random(1, 3, 32, 32), 1, 16, 4, 4))
