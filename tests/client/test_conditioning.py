"""Conditioning by the names and shapes of a transformer's facts."""

import pytest

torch = pytest.importorskip("torch")

import sample_facts  # noqa: E402

from xditd.client.conditioning import conditioning_of, random_conditioning  # noqa: E402
from xditd.ipc.errors import BadRequest  # noqa: E402

TENSORS = {"prompt_embeds": torch.zeros(5, 8), "pooled_prompt_embeds": torch.zeros(4), "other": torch.zeros(1)}


def test_a_missing_batch_dimension_is_added():
    found = conditioning_of(TENSORS, sample_facts.TRANSFORMER, "e.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "prompt_embeds": (1, 5, 8),
        "pooled_prompt_embeds": (1, 4),
    }


def test_lists_are_of_one_image_or_a_tensor_with_a_row_for_each():
    found = conditioning_of(TENSORS, sample_facts.LISTS, "e.safetensors")
    assert [tensor.shape for tensor in found["prompt_embeds"]] == [(5, 8)]
    found = conditioning_of({"prompt_embeds": torch.zeros(2, 5, 8)}, sample_facts.LISTS, "e.safetensors")
    assert [tensor.shape for tensor in found["prompt_embeds"]] == [(5, 8), (5, 8)]


def test_lists_of_unequal_lengths_are_numbered():
    tensors = {f"prompt_embeds.{number}": torch.full((number + 1, 8), number) for number in reversed(range(11))}
    tensors |= {"negative_prompt_embeds.0": torch.zeros(3, 8), "prompt_embeds.mask": torch.zeros(1)}
    found = conditioning_of(tensors, sample_facts.LISTS, "e.safetensors")
    assert [tuple(tensor.shape) for tensor in found["prompt_embeds"]] == [(number + 1, 8) for number in range(11)]
    assert [int(tensor[0, 0]) for tensor in found["prompt_embeds"]] == list(range(11))
    assert [tuple(tensor.shape) for tensor in found["negative_prompt_embeds"]] == [(3, 8)]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["prompt_embeds.0", "prompt_embeds.2"], "lacks prompt_embeds.1, but holds prompt_embeds.0, prompt_embeds.2"),
        (["prompt_embeds.1"], "lacks prompt_embeds.0, but holds prompt_embeds.1; number the images from 0"),
        (["prompt_embeds.00"], "lacks prompt_embeds.0, but holds prompt_embeds.00"),
        (["prompt_embeds", "prompt_embeds.0"], "holds both prompt_embeds and prompt_embeds.0 and on; leave one"),
        (["negative_prompt_embeds.0"], "lacks prompt_embeds (or prompt_embeds.0 and on, one for each image)"),
    ],
)
def test_lists_that_are_incomplete_or_given_twice_are_refused(names, says):
    with pytest.raises(BadRequest) as refused:
        conditioning_of({name: torch.zeros(5, 8) for name in names}, sample_facts.LISTS, "e.safetensors")
    assert f"e.safetensors: {says}" in refused.value.detail


def test_a_numbered_name_is_ignored_for_an_argument_that_is_no_list():
    given = {"prompt_embeds.0": torch.zeros(5, 8), "pooled_prompt_embeds": torch.zeros(4)}
    with pytest.raises(BadRequest, match=r"lacks prompt_embeds; it holds prompt_embeds\.0, pooled_prompt_embeds"):
        conditioning_of(given, sample_facts.TRANSFORMER, "e.safetensors")


def test_conditioning_that_is_incomplete_is_named():
    with pytest.raises(BadRequest, match=r"e\.safetensors: lacks pooled_prompt_embeds; it holds prompt_embeds"):
        conditioning_of({"prompt_embeds": TENSORS["prompt_embeds"]}, sample_facts.TRANSFORMER, "e.safetensors")


def test_random_conditioning_is_drawn_in_the_order_of_the_facts():
    found = random_conditioning(sample_facts.TRANSFORMER, 3, 7)
    generator = torch.Generator().manual_seed(3)
    assert list(found) == ["prompt_embeds", "pooled_prompt_embeds"]
    assert torch.equal(found["prompt_embeds"], torch.randn(1, 7, 8, generator=generator))
    assert torch.equal(found["pooled_prompt_embeds"], torch.randn(1, 4, generator=generator))
    (text,) = random_conditioning(sample_facts.LISTS, 3, 7)["prompt_embeds"]
    assert text.shape == (7, 8)


def test_a_component_without_conditioning_is_refused():
    with pytest.raises(BadRequest, match="AutoencoderKL: a vae takes no conditioning; name a transformer"):
        random_conditioning(sample_facts.VAE, 3, 7)
