"""Words through the daemon: token ids and conditioning as diffusers' pipelines make them of the same folders."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prompt_pipelines
import pytest
import torch
from tokenizer_folders import PROMPTS

from xditd.client import (
    AsyncClient,
    BadCheckpoint,
    BadRequest,
    Client,
    ComponentKind,
    LeaseLost,
    Loan,
    UnknownComponent,
    Unsupported,
)
from xditd.client.demo import checkpoints

Same = Callable[[Any, Any], None]


class Flux1:
    """FLUX.1: a pipeline of diffusers, and the loans of what it is made of."""

    def __init__(self, client: Client, folder: Path) -> None:
        from diffusers import FluxPipeline
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

        self.pipe = FluxPipeline(
            scheduler=None, vae=None, transformer=None,
            text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
            tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            text_encoder_2=T5EncoderModel.from_pretrained(folder / "text_encoder_2"),
            tokenizer_2=T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
        )  # fmt: skip
        self.transformer = client.lend(folder / "transformer.safetensors")
        self.encoders = {role: client.lend(folder / role) for role in ("text_encoder", "text_encoder_2")}
        self.tokenizers = {role: client.lend_tokenizer(folder / role) for role in ("tokenizer", "tokenizer_2")}

    @property
    def loans(self) -> dict[str, Any]:
        return {"encoders": self.encoders, "tokenizers": self.tokenizers}

    @torch.no_grad()
    def expected(self, prompt: str | list[str], prompt_2: str | None = None, **more: Any) -> dict[str, torch.Tensor]:
        embeds, pooled, _ = self.pipe.encode_prompt(prompt, prompt_2, device="cpu", **more)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


@pytest.fixture(scope="module")
def flux1_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux1")
    prompt_pipelines.flux1(folder)
    checkpoints.save_aligned(
        checkpoints.flux1_state_dict(3, context_dim=128, pooled_dim=128), folder / "transformer.safetensors"
    )
    return folder


@pytest.fixture
def flux1(client: Client, flux1_folder: Path) -> Flux1:
    return Flux1(client, flux1_folder)


def test_flux1_has_the_bits_of_diffusers_pipeline(client: Client, flux1: Flux1, same: Same) -> None:
    for prompt in ("a cat", ["a cat", "一只猫 (cat:1.2)" * 40]):
        same(client.encode_prompt(flux1.transformer, prompt, **flux1.loans), flux1.expected(prompt))
    short = client.encode_prompt(flux1.transformer, "a cat", options={"max_sequence_length": 64}, **flux1.loans)
    same(short, flux1.expected("a cat", max_sequence_length=64))
    both = client.encode_prompt(flux1.transformer, "a cat", prompt_2="a hat", **flux1.loans)
    same(both, flux1.expected("a cat", prompt_2="a hat"))


def test_results_that_do_not_fit_the_clients_block_come_in_one_of_the_workers(
    client: Client, flux1: Flux1, relative_error: Callable[..., float]
) -> None:
    found = client.encode_prompt(flux1.transformer, ["a cat"] * 64, **flux1.loans)  # 16.03 MiB, with room for 16
    assert found["prompt_embeds"].shape == (64, 512, 128)
    for name, tensor in flux1.expected("a cat").items():
        expected = tensor.expand_as(found[name])
        assert relative_error(found[name], expected) <= 1e-5, name  # other sums in products of other sizes


def test_conditioning_of_words_is_what_a_generation_takes(client: Client, flux1: Flux1) -> None:
    conditioning = client.encode_prompt(flux1.transformer, ["a cat", "a dog"], **flux1.loans)
    job = client.generate(flux1.transformer, conditioning, height=64, width=64, steps=2, seed=1)
    assert job.result().latents.shape == (2, 16, 8, 8)


def test_flux1_has_the_token_ids_of_diffusers_pipeline(client: Client, flux1: Flux1) -> None:
    found = client.tokenize(flux1.transformer, PROMPTS, tokenizers=flux1.tokenizers)
    for role, tokenizer, length in (
        ("text_encoder", flux1.pipe.tokenizer, 77),
        ("text_encoder_2", flux1.pipe.tokenizer_2, 512),
    ):
        expected = tokenizer(
            list(PROMPTS), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        assert torch.equal(found[role]["token_ids"], expected)


def test_texts_that_are_cut_are_named_in_a_warning(
    client: Client, flux1: Flux1, caplog: pytest.LogCaptureFixture
) -> None:
    fits, long = " a" * 75, " a" * 76
    clip, t5 = (len(each(long, verbose=False).input_ids) for each in (flux1.pipe.tokenizer, flux1.pipe.tokenizer_2))
    client.encode_prompt(flux1.transformer, ["a cat", fits], **flux1.loans)
    assert not caplog.messages
    client.encode_prompt(flux1.transformer, [fits, long], options={"max_sequence_length": t5}, **flux1.loans)
    assert caplog.messages.pop() == f"prompt 1: text_encoder reads the first 77 of {clip} tokens"
    client.encode_prompt(
        flux1.transformer, "a cat", prompt_2=long, options={"max_sequence_length": t5 - 1}, **flux1.loans
    )
    assert caplog.messages.pop() == f"prompt 0: text_encoder_2 reads the first {t5 - 1} of {t5} tokens"
    client.tokenize(flux1.transformer, long, tokenizers=flux1.tokenizers)
    assert [each for each in caplog.messages if "text_encoder reads" in each]


def test_what_the_family_does_not_take_is_refused_by_name(
    client: Client, flux1: Flux1, transformer: Loan, same: Same
) -> None:
    def refused(error: type[Exception], says: str, **given: Any) -> None:
        with pytest.raises(error, match=says):
            client.encode_prompt(flux1.transformer, **{"prompt": "a cat", **flux1.loans, **given})

    refused(Unsupported, "negative_prompt: flux1 has no second prediction", negative_prompt="a dog")
    refused(Unsupported, r"weights: flux1 reads weights such as \(cat:1.2\) as text", weights=True)
    refused(Unsupported, "images: flux1's prompts take texts alone", images=[torch.zeros(8, 8, 3, dtype=torch.uint8)])
    refused(BadRequest, "options: clip_skip is not known", options={"clip_skip": 2})
    refused(BadRequest, "max_sequence_length is 513; use a whole number", options={"max_sequence_length": 513})
    refused(BadRequest, r"encoders: given are text_encoder; flux1 needs text_encoder \(clip_l\)",
            encoders={"text_encoder": flux1.encoders["text_encoder"]})  # fmt: skip
    refused(BadRequest, "encoders: text_encoder is a t5; a clip_l is needed",
            encoders={role: flux1.encoders["text_encoder_2"] for role in flux1.encoders})  # fmt: skip
    refused(BadRequest, "tokenizers: tokenizer is a T5Tokenizer; a CLIPTokenizer is needed",
            tokenizers={role: flux1.tokenizers["tokenizer_2"] for role in flux1.tokenizers})  # fmt: skip
    refused(BadRequest, "tokenizer: .* is a transformer; name a tokenizer",
            tokenizers={role: transformer for role in flux1.tokenizers})  # fmt: skip
    refused(BadRequest, "prompt: 40000 characters, at most 32768", prompt="x" * 40_000)
    refused(BadRequest, "half a character", prompt="\ud800")
    refused(BadRequest, "prompt_2: an empty text, for which diffusers takes the prompt", prompt_2="")
    same(client.encode_prompt(flux1.transformer, "a cat", **flux1.loans), flux1.expected("a cat"))


def test_hostile_folders_are_refused_and_the_next_request_is_served(
    client: Client, flux1: Flux1, flux1_folder: Path, tmp_path: Path, same: Same
) -> None:
    from tokenizer_folders import save, t5_tokenizer

    folder = tmp_path / "mine"
    shutil.copytree(flux1_folder / "tokenizer_2", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for error, says, change in (
        (Unsupported, "mine: tokenizer_config.json names code of its own by auto_map",
         {"auto_map": {"AutoTokenizer": "x.Y"}}),
        (Unsupported, "mine: tokenizer_config.json names the class 'os.system'", {"tokenizer_class": "os.system"}),
        (BadCheckpoint, "mine: transformers cannot make a T5Tokenizer", {"extra_ids": "many"}),
    ):  # fmt: skip
        (folder / "tokenizer_config.json").write_text(json.dumps(config | change))
        with pytest.raises(error, match=says):
            client.lend_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/etc/passwd")
    with pytest.raises(BadCheckpoint, match=r"mine: tokenizer\.json is not JSON"):
        client.lend_tokenizer(folder)

    larger = t5_tokenizer()
    larger.add_tokens([f"<more_{number}>" for number in range(60)])
    lent = client.lend_tokenizer(save(larger, tmp_path / "larger"))
    given = flux1.loans | {"tokenizers": {**flux1.tokenizers, "tokenizer_2": lent}}
    with pytest.raises(BadRequest, match=r"tokenizers: that of tokenizer_2 has \d+ ids, and the t5 .* of \d+: lend"):
        client.encode_prompt(flux1.transformer, "a cat", **given)
    same(client.encode_prompt(flux1.transformer, "a cat", **flux1.loans), flux1.expected("a cat"))


def test_a_lent_tokenizer_outlives_its_files_and_ends_with_its_loan(
    client: Client, flux1: Flux1, flux1_folder: Path, tmp_path: Path, same: Same
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(flux1_folder / "tokenizer", folder)
    lent = client.lend_tokenizer(folder)
    assert (lent.kind, lent.family, lent.facts.class_name) == (ComponentKind.TOKENIZER, "tokenizer", "CLIPTokenizer")
    (folder / "tokenizer.json").write_text("{}")  # what was built holds no file
    loans = flux1.loans | {"tokenizers": {**flux1.tokenizers, "tokenizer": lent}}
    same(client.encode_prompt(flux1.transformer, "a cat", **loans), flux1.expected("a cat"))
    assert lent.adopt().total == 0  # the workers hold what they built already
    same(client.encode_prompt(flux1.transformer, "a cat", **loans), flux1.expected("a cat"))
    client.revoke(lent)
    with pytest.raises((LeaseLost, UnknownComponent)):
        client.encode_prompt(flux1.transformer, "a cat", **loans)


def test_loras_of_an_encoder_change_what_it_encodes(client: Client, flux1: Flux1, same: Same) -> None:
    plain = client.encode_prompt(flux1.transformer, "a cat", **flux1.loans)
    name = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    factors = {
        f"{name}.lora_down.weight": torch.full((2, 128), 0.1),
        f"{name}.lora_up.weight": torch.full((512, 2), 0.1),
        f"{name}.alpha": torch.tensor(2.0),
    }
    loan = flux1.encoders["text_encoder"].with_loras([(client.lend_lora(factors), 1.0)])
    loans = flux1.loans | {"encoders": {**flux1.encoders, "text_encoder": loan}}
    changed = client.encode_prompt(flux1.transformer, "a cat", **loans)
    assert not torch.equal(changed["pooled_prompt_embeds"], plain["pooled_prompt_embeds"])
    assert torch.equal(changed["prompt_embeds"], plain["prompt_embeds"])
    same(client.encode_prompt(flux1.transformer, "a cat", **flux1.loans), flux1.expected("a cat"))


def test_an_async_client_encodes_prompts(daemon: Any, flux1_folder: Path, flux1: Flux1, same: Same) -> None:
    async def run() -> Any:
        async with AsyncClient(daemon.runtime_dir) as client:
            transformer = await client.lend(flux1_folder / "transformer.safetensors")
            encoders = {role: await client.lend(flux1_folder / role) for role in flux1.encoders}
            tokenizers = {role: await client.lend_tokenizer(flux1_folder / role) for role in flux1.tokenizers}
            return await client.encode_prompt(transformer, "a cat", encoders=encoders, tokenizers=tokenizers)

    same(asyncio.run(run()), flux1.expected("a cat"))
