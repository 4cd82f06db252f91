"""Words to the conditioning of each family, with the bits of diffusers' pipeline on the same folders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import flux2_models
import prompt_pipelines
import pytest
import qwen2_5_vl_models
import qwen_image_models
import torch
import wan_models
import z_image_models
from safetensors.torch import save_file
from tokenizer_folders import PROMPTS

from xditd.client import BadRequest, Client, Unsupported

Same = Callable[[Any, Any], None]
TEXTS = ["a cat", "一只猫 (cat:1.2) sits &amp; waits 🐈" * 30]


class Words:
    """The loans of one family, and diffusers' pipeline with the same tokenizer and encoder."""

    def __init__(self, client: Client, folder: Path, pipe: Any, encoder: str = "text_encoder") -> None:
        self.client = client
        self.folder = folder
        self.pipe = pipe
        self.transformer = client.lend(folder / "transformer.safetensors")
        self.encoders = {"text_encoder": client.lend(folder / encoder)}
        self.tokenizers = {"tokenizer": client.lend_tokenizer(folder / "tokenizer")}

    def encode(self, prompt: Any, negative: Any = None, **more: Any) -> Any:
        given = {"encoders": self.encoders, "tokenizers": self.tokenizers} | more
        return self.client.encode_prompt(self.transformer, prompt, negative_prompt=negative, **given)

    def ids(self, prompts: Any, **more: Any) -> torch.Tensor:
        found = self.client.tokenize(self.transformer, prompts, **({"tokenizers": self.tokenizers} | more))
        return found["text_encoder"]["token_ids"]


WordsOf = Callable[..., Words]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By family, what is saved already."""
    return {}


@pytest.fixture
def words_of(client: Client, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> WordsOf:
    """Lend a family's models; its pipeline is of class ``kind``."""

    def make(family: str, kind: str, transformer: Callable[[], Any], encoder: str = "text_encoder") -> Words:
        if family not in folders:
            where = folders[family] = tmp_path_factory.mktemp(family)
            prompt_pipelines.save_texts(family, where)
            save_file(transformer(), where / "transformer.safetensors")
        texts = prompt_pipelines.read_texts(family, folders[family])
        pipe = getattr(diffusers, kind)(scheduler=None, vae=None, transformer=None, **texts)
        return Words(client, folders[family], pipe, encoder)

    return make


class Tokenized(Exception):
    """The pipeline has its token ids, and is about to encode them."""


def tokens_that_pipelines_make(pipe: Any, encode: Callable[[], None]) -> torch.Tensor:
    """Return the token ids of all calls of a pipeline's tokenizer before it encodes; nothing is encoded."""
    seen: list[torch.Tensor] = []
    tokenizer = pipe.tokenizer

    def stop(*_: Any) -> None:
        raise Tokenized

    class Spy:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            found = tokenizer(*args, **kwargs)
            seen.append(found["input_ids"])
            return found

        def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
            found = tokenizer.apply_chat_template(*args, **kwargs)
            if kwargs.get("tokenize"):
                seen.append(found["input_ids"])
            return found

    pipe.tokenizer = Spy()
    hook = pipe.text_encoder.register_forward_pre_hook(stop)
    with pytest.raises(Tokenized):
        encode()
    hook.remove()
    return torch.cat(seen)


# --- Z-Image ---------------------------------------------------------------------------------------


@pytest.fixture
def z_image(words_of: WordsOf) -> Words:
    return words_of("z_image", "ZImagePipeline", lambda: z_image_models.state_dict(1))


@torch.no_grad()
def test_z_image_has_the_bits_of_diffusers_pipeline(z_image: Words, same: Same) -> None:
    for prompt, negative in (("a cat", None), (TEXTS, ["", "blurry"])):
        positive, negatives = z_image.pipe.encode_prompt(
            list(prompt) if isinstance(prompt, list) else prompt, device="cpu",
            do_classifier_free_guidance=negative is not None, negative_prompt=None if negative is None else [*negative],
        )  # fmt: skip
        expected = {"prompt_embeds": positive} | ({} if negative is None else {"negative_prompt_embeds": negatives})
        same(z_image.encode(prompt, negative), expected)
    assert z_image.transformer.facts.transformer.prompt.default_negative == ""


@torch.no_grad()
def test_z_image_has_the_token_ids_of_diffusers_pipeline(z_image: Words) -> None:
    def encode() -> None:
        z_image.pipe.encode_prompt(list(PROMPTS), device="cpu", do_classifier_free_guidance=False)

    assert torch.equal(z_image.ids(PROMPTS), tokens_that_pipelines_make(z_image.pipe, encode))


# --- FLUX.2 ----------------------------------------------------------------------------------------


@pytest.fixture
def klein(words_of: WordsOf) -> Words:
    return words_of("flux2_klein", "Flux2KleinPipeline", lambda: flux2_models.state_dict(1, flux2_models.KLEIN))


@pytest.fixture
def dev(words_of: WordsOf) -> Words:
    return words_of("flux2_dev", "Flux2Pipeline", lambda: flux2_models.state_dict(1))


@torch.no_grad()
@pytest.mark.parametrize("model", ["klein", "dev"])
def test_flux2_has_the_bits_and_token_ids_of_diffusers_pipeline(
    model: str, request: pytest.FixtureRequest, same: Same
) -> None:
    words: Words = request.getfixturevalue(model)
    for prompt in ("a cat", TEXTS):
        same(words.encode(prompt), {"prompt_embeds": words.pipe.encode_prompt(prompt, device="cpu")[0]})

    def encode() -> None:
        words.pipe.encode_prompt(list(PROMPTS), device="cpu")

    assert torch.equal(words.ids(PROMPTS), tokens_that_pipelines_make(words.pipe, encode))


@torch.no_grad()
def test_negative_prompts_are_of_klein_alone(klein: Words, dev: Words, same: Same) -> None:
    found = klein.encode("a cat", "a dog")
    encoded = {f"{before}prompt_embeds": klein.pipe.encode_prompt(text, device="cpu")[0]
               for before, text in (("", "a cat"), ("negative_", "a dog"))}  # fmt: skip
    same(found, encoded)
    with pytest.raises(Unsupported, match="negative_prompt: flux2 has no second prediction"):
        dev.encode("a cat", "a dog")


# --- Wan -------------------------------------------------------------------------------------------


@pytest.fixture
def wan(words_of: WordsOf) -> Words:
    return words_of("wan", "WanPipeline", lambda: wan_models.state_dict(1))


@torch.no_grad()
def test_wan_has_the_bits_and_token_ids_of_diffusers_pipeline(wan: Words, same: Same) -> None:
    for prompt, negative in (("a cat", ""), (TEXTS, ["", "blurry"])):
        positive, negatives = wan.pipe.encode_prompt(prompt, negative, device="cpu", max_sequence_length=512)
        same(wan.encode(prompt, negative), {"prompt_embeds": positive, "negative_prompt_embeds": negatives})

    def encode() -> None:
        wan.pipe.encode_prompt(
            list(PROMPTS), do_classifier_free_guidance=False, device="cpu", max_sequence_length=512
        )  # fmt: skip

    assert torch.equal(wan.ids(PROMPTS), tokens_that_pipelines_make(wan.pipe, encode))


# --- Qwen-Image ------------------------------------------------------------------------------------


@pytest.fixture
def qwen_image(words_of: WordsOf) -> Words:
    transformer = partial(qwen_image_models.state_dict, 1, prompt_pipelines.QWEN_IMAGE)
    words = words_of("qwen_image", "QwenImagePipeline", transformer, "text_encoder.safetensors")
    words.processors = {"processor": words.client.lend_tokenizer(words.folder / "processor")}  # type: ignore[attr-defined]
    return words


def with_mask(found: Any, before: str = "") -> dict[str, torch.Tensor]:
    embeds, mask = found
    masks = {} if mask is None else {f"{before}prompt_embeds_mask": mask.to(embeds.dtype)}  # as a generation takes it
    return {f"{before}prompt_embeds": embeds} | masks


@torch.no_grad()
def test_qwen_image_has_the_bits_and_token_ids_of_diffusers_pipeline(qwen_image: Words, same: Same) -> None:
    pipe = qwen_image.pipe
    for prompt, negative in (("a cat", " "), (TEXTS, ["", "blurry"])):
        expected = with_mask(pipe.encode_prompt(prompt, device="cpu", max_sequence_length=512))
        expected |= with_mask(pipe.encode_prompt(negative, device="cpu", max_sequence_length=512), "negative_")
        same(qwen_image.encode(prompt, negative), expected)
    expected = with_mask(pipe.encode_prompt(TEXTS, device="cpu", max_sequence_length=20))
    same(qwen_image.encode(TEXTS, options={"max_sequence_length": 20}), expected)

    def encode() -> None:
        pipe.encode_prompt(list(PROMPTS), device="cpu")

    assert torch.equal(qwen_image.ids(PROMPTS), tokens_that_pipelines_make(pipe, encode))


@torch.no_grad()
@pytest.mark.parametrize("model", ["plus", "edit"])
def test_qwen_image_edit_agrees_with_diffusers_pipeline(
    qwen_image: Words, model: str, relative_error: Callable[..., float]
) -> None:
    from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import CONDITION_IMAGE_SIZE, calculate_dimensions

    kind = QwenImageEditPlusPipeline if model == "plus" else QwenImageEditPipeline
    pipe = kind(
        scheduler=None, vae=None, transformer=None, tokenizer=None,
        text_encoder=qwen_image.pipe.text_encoder, processor=qwen2_5_vl_models.Processor(),
    )  # fmt: skip
    pictures = [qwen2_5_vl_models.picture(90, 64), qwen2_5_vl_models.picture(50, 120, 1)]
    given = pictures if model == "plus" else pictures[:1]
    area = CONDITION_IMAGE_SIZE if model == "plus" else 1024 * 1024
    resized = []
    for each in given:
        width, height = calculate_dimensions(area, each.width / each.height)
        resized.append(pipe.image_processor.resize(each, height, width))
    prompts = {"": "make it blue", "negative_": " "}
    expected: dict[str, torch.Tensor] = {}
    for before, prompt in prompts.items():
        of_pipe = resized if model == "plus" else resized[0]
        expected |= with_mask(pipe.encode_prompt(prompt, of_pipe, device="cpu"), before)
    found = qwen_image.encode(
        prompts[""], prompts["negative_"], images=given, tokenizers=qwen_image.processors,  # type: ignore[attr-defined]
        options={"edit": True} if model == "edit" else None,
    )  # fmt: skip
    # Not the bits: our vision tower sums in another order.
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert relative_error(found[name].float(), tensor.float()) <= 2e-6, name


def test_what_pictures_do_not_go_with_is_refused_by_name(qwen_image: Words) -> None:
    picture = qwen2_5_vl_models.picture(64, 64)
    processors = qwen_image.processors  # type: ignore[attr-defined]
    for says, given in {
        r"tokenizers: given are tokenizer; qwen_image needs processor \(Qwen2VLProcessor": {"images": [picture]},
        "2 with pictures; encode one prompt": {"prompt": ["a", "b"], "images": [picture], "tokenizers": processors},
        "the token of pictures": {"prompt": "<|image_pad|>", "images": [picture], "tokenizers": processors},
        "edit a prompt takes one": {"images": [picture] * 2, "tokenizers": processors, "options": {"edit": True}},
        "edit is of prompts with a picture": {"options": {"edit": True}},
        "max_sequence_length is of texts alone": {
            "images": [picture], "tokenizers": processors, "options": {"max_sequence_length": 9},
        },
        "images: 9, at most 8": {"images": [picture] * 9, "tokenizers": processors},
        r"images\[0\]: a picture of mode L; give image.convert": {
            "images": [picture.convert("L")], "tokenizers": processors,
        },
    }.items():  # fmt: skip
        with pytest.raises(BadRequest, match=says):
            qwen_image.encode(**{"prompt": "a cat", **given})


# --- Texts that are too long -----------------------------------------------------------------------


@pytest.mark.parametrize("model", ["z_image", "klein", "dev", "wan", "qwen_image"])
def test_texts_that_are_cut_are_named_in_a_warning(
    model: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    words: Words = request.getfixturevalue(model)
    long, negatives = "a cat on a mat, " * 20, None if model == "dev" else ["", "a dog, " * 30]
    dropped = 34 if model == "qwen_image" else 0

    def tokens(text: str) -> int:
        found = words.client.tokenize(words.transformer, text, tokenizers=words.tokenizers)["text_encoder"]
        return int(found["mask"].sum()) - dropped

    whole = {each: tokens(each) for each in (long, *(negatives or ()))}
    read = tokens("") + 10  # templates have tokens, too
    assert not caplog.messages
    words.encode(["", long], negatives, options={"max_sequence_length": read})
    assert whole[long] > read
    assert caplog.messages == [
        f"prompt 1: text_encoder reads the first {read} of {whole[long]} tokens",
        *(
            f"negative prompt 1: text_encoder reads the first {read} of {whole[each]} tokens"
            for each in (negatives or ())[1:]
        ),
    ]
