"""``Client.encode_prompt``: what is sent, and what is refused before it is sent."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

torch = pytest.importorskip("torch")

import sample_facts  # noqa: E402

from xditd.client.jobs.component import Component  # noqa: E402
from xditd.client.jobs.prompt_images import image_tensors  # noqa: E402
from xditd.client.jobs.prompt_requests import prompt_request  # noqa: E402
from xditd.ipc.errors import BadRequest, Unsupported  # noqa: E402
from xditd.ipc.facts import ComponentFacts, PromptFacts, TokenizerFacts  # noqa: E402
from xditd.ipc.requests import EncodePrompt  # noqa: E402
from xditd.ipc.tensors import ComponentKind, Fingerprint, HostShmBlock  # noqa: E402

PROMPT = PromptFacts(
    encoders={"text_encoder": ("bert", "gpt")},
    tokenizers={"tokenizer": ("BertTokenizer",)},
    image_tokenizers={"processor": ("BertProcessor",)},
    max_images=2,
    takes_negative=True,
    options=("max_sequence_length",),
)
BLOCK = HostShmBlock(fd=3, inode=4, size_bytes=2**25, fingerprint=Fingerprint(length_bytes=1, digest=bytes(16)))


def component(kind: ComponentKind, family: str = "", class_name: str = "X", **more: Any) -> Component:
    facts = ComponentFacts(
        family=family or kind.value, class_name=class_name, kind=kind, dtype="float32", bytes_by_dtype={}, **more
    )
    return Component(f"{kind.value}-1", facts)


def transformer(prompt: PromptFacts | None = PROMPT) -> Component:
    facts = sample_facts.TRANSFORMER
    assert facts.transformer is not None
    return Component("transformer-1", replace(facts, transformer=replace(facts.transformer, prompt=prompt)))


ENCODERS = {"text_encoder": component(ComponentKind.TEXT_ENCODER, "bert")}
TOKENS = TokenizerFacts(vocabulary=9, files=(), takes_images=False, has_chat_template=False)
TOKENIZERS = {"tokenizer": component(ComponentKind.TOKENIZER, class_name="BertTokenizer", tokenizer=TOKENS)}
PROCESSORS = {"processor": component(ComponentKind.TOKENIZER, class_name="BertProcessor", tokenizer=TOKENS)}
GIVEN: dict[str, Any] = {
    "negative_prompt": None, "images": (), "encoders": ENCODERS, "tokenizers": TOKENIZERS, "weights": False,
    "options": None, "device": None,
}  # fmt: skip


def sent(prompt: Any = "a cat", of: Component | None = None, **given: Any) -> EncodePrompt:
    request = prompt_request(of or transformer(), prompt, **(GIVEN | given)).write("r", BLOCK)
    assert isinstance(request, EncodePrompt)
    return request


def test_one_negative_prompt_is_for_all_prompts() -> None:
    assert sent(["a", "b"], negative_prompt="c").negative_prompts == ("c", "c")
    assert sent(["a", "b"], negative_prompt=["c", "d"]).negative_prompts == ("c", "d")
    assert sent("a").negative_prompts == ()
    assert sent("", negative_prompt="").prompts == ("",)


def test_pictures_are_sent_as_they_are_with_the_processor() -> None:
    picture = torch.arange(2 * 3 * 3, dtype=torch.uint8).view(2, 3, 3)
    (place,) = sent(images=[picture], tokenizers=PROCESSORS).images
    assert (place.dtype, place.shape) == ("uint8", (2, 3, 3))
    image = pytest.importorskip("PIL.Image").fromarray(picture.numpy())
    for given in (image, picture, picture.numpy()):
        assert torch.equal(image_tensors([given])[0], picture)


@pytest.mark.parametrize(
    ("error", "says", "given"),
    [
        (BadRequest, "prompt: 7 is no text and no list of texts", {"prompt": 7}),
        (BadRequest, "prompt: .* is no text and no list of texts", {"prompt": []}),
        (BadRequest, "prompt: 65 texts, at most 64", {"prompt": ["a"] * 65}),
        (BadRequest, r"prompt\[1\]: 32769 characters, at most 32768", {"prompt": ["a", "a" * 32_769]}),
        (BadRequest, "prompt: more than 524288 characters in all", {"prompt": ["a" * 32_000] * 20}),
        (BadRequest, r"prompt\[1\]: it has half a character", {"prompt": ["a", "\udc80"]}),
        (BadRequest, "negative_prompt: 1 texts for 2 prompts", {"prompt": ["a", "b"], "negative_prompt": ["c"]}),
        (Unsupported, "weights: .* reads weights such as", {"weights": True}),
        (BadRequest, "images: 3, at most 2", {"images": [torch.zeros(1, 1, 3, dtype=torch.uint8)] * 3}),
        (BadRequest, r"tokenizers: given are tokenizer; .* needs processor \(BertProcessor\)",
         {"images": [torch.zeros(1, 1, 3, dtype=torch.uint8)]}),
        (BadRequest, r"encoders: given are other; .* needs text_encoder \(bert or gpt\)",
         {"encoders": {"other": ENCODERS["text_encoder"]}}),
        (BadRequest, "encoders: text_encoder is a t5; a bert or gpt is needed",
         {"encoders": {"text_encoder": component(ComponentKind.TEXT_ENCODER, "t5")}}),
        (BadRequest, "tokenizers: tokenizer is a BertProcessor; a BertTokenizer is needed",
         {"tokenizers": {"tokenizer": PROCESSORS["processor"]}}),
        (BadRequest, "options: clip_skip is not known to .* take max_sequence_length", {"options": {"clip_skip": 1}}),
    ],
)  # fmt: skip
def test_what_the_facts_do_not_have_is_refused(error: type[Exception], says: str, given: dict[str, Any]) -> None:
    with pytest.raises(error, match=says):
        sent(**given)


def test_a_family_without_prompts_is_named() -> None:
    with pytest.raises(Unsupported, match="its family encodes no prompts; encode token ids by encode_text"):
        sent(of=transformer(None))
    with pytest.raises(Unsupported, match=r"images: .* take texts alone"):
        sent(of=transformer(replace(PROMPT, max_images=0)), images=[torch.zeros(1, 1, 3, dtype=torch.uint8)])
    with pytest.raises(Unsupported, match=r"negative_prompt: .* has no second prediction"):
        sent(of=transformer(replace(PROMPT, takes_negative=False)), negative_prompt="x")


def test_other_pictures_are_refused_by_name() -> None:
    numpy = pytest.importorskip("numpy")
    image = pytest.importorskip("PIL.Image").new("RGBA", (2, 2))
    for picture, says in (
        (image, r"images\[0\]: a picture of mode RGBA; give image.convert\('RGB'\)"),
        (torch.zeros(2, 2, 3), r"images\[0\]: \(2, 2, 3\) of float32"),
        (torch.zeros(3, 2, 2, dtype=torch.uint8), r"\(3, 2, 2\) of uint8; give \(height, width, 3\)"),
        (torch.zeros(1, 8_193, 3, dtype=torch.uint8), "sides of at most 8192 pixels"),
        (numpy.zeros((2, 2, 3)), "an array of float64"),
        ("cat.png", "a str; give a PIL image"),
    ):
        with pytest.raises(BadRequest, match=says):
            image_tensors([picture])
    with pytest.raises(BadRequest, match="images: a list of pictures is needed, not Image"):
        image_tensors(image)


def test_the_second_prompt_goes_with_the_first_where_a_family_takes_it() -> None:
    takes = transformer(replace(PROMPT, takes_second=True))
    assert sent(["a", "b"], of=takes, prompt_2="c").prompts_2 == ("c", "c")
    assert sent("a", of=takes, prompt_2=["c"]).prompts_2 == ("c",)
    assert sent("a", of=takes).prompts_2 == ()
    with pytest.raises(BadRequest, match="prompt_2: 2 texts for 1 prompts; give as many, or one for all"):
        sent("a", of=takes, prompt_2=["b", "c"])
    with pytest.raises(Unsupported, match=r"prompt_2: .* has one text for all of its encoders; leave it out"):
        sent("a", prompt_2="c")
