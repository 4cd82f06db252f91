"""Text encoders and kept conditioning, from a client's tensors through the daemon and two ranks, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import text_checkpoints
import torch

from xditd.client import BadRequest, Client
from xditd.client.arenas import Arena
from xditd.client.demo.flux1_calls import Flux1Calls, Prompt

BAR = 1e-6
CLIP_END = text_checkpoints.CLIP_VOCABULARY - 1


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("encoders")
    found = SimpleNamespace(**{name: folder / f"{name}.safetensors" for name in ("clip", "t5", "umt5")})
    text_checkpoints.write_clip_l(found.clip, seed=5)
    text_checkpoints.write_t5(found.t5, seed=6)
    text_checkpoints.write_umt5(found.umt5, seed=7)
    return found


def tokens(batch: int, count: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(2, vocabulary - 1, (batch, count), generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def plain_clip(path: Path, ids: torch.Tensor) -> SimpleNamespace:
    """transformers' own module, built and loaded the ordinary way, of the shape of the demo's checkpoint."""
    from safetensors.torch import load_file
    from transformers import CLIPTextConfig, CLIPTextModel

    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=CLIP_END + 1, hidden_size=128, intermediate_size=512, num_hidden_layers=2,
            num_attention_heads=2, eos_token_id=CLIP_END,
        )
    ).eval()  # fmt: skip
    inner = getattr(model, "text_model", model)
    inner.load_state_dict({name.removeprefix("text_model."): tensor for name, tensor in load_file(path).items()})
    result = model(input_ids=ids)
    return SimpleNamespace(hidden=result.last_hidden_state, pooled=result.pooler_output)


@torch.no_grad()
def plain_t5(path: Path, ids: torch.Tensor) -> torch.Tensor:
    from safetensors.torch import load_file
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=text_checkpoints.T5_VOCABULARY, d_model=128, d_kv=64, d_ff=256, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = T5EncoderModel(config).eval()
    state = load_file(path)
    model.load_state_dict({**state, "encoder.embed_tokens.weight": state["shared.weight"]})
    return model(input_ids=ids).last_hidden_state


@pytest.mark.parametrize(("batch", "count"), [(1, 77), (3, 77), (2, 15)])
def test_clip_agrees_with_transformers(client, texts, relative_error, batch, count):
    loan = client.lend(texts.clip)
    assert (loan.family, loan.copied.total) == ("clip_l", 0)
    ids = tokens(batch, count, CLIP_END)
    ids[:, count // 2 :] = CLIP_END
    ours = client.encode_text(loan, ids, pooled=True)
    expected = plain_clip(texts.clip, ids)
    assert relative_error(ours.hidden_states, expected.hidden) <= BAR
    assert relative_error(ours.pooled, expected.pooled) <= BAR


@pytest.mark.parametrize(("batch", "count"), [(1, 256), (1, 301), (2, 33)])
def test_t5_agrees_with_transformers(client, texts, relative_error, batch, count):
    loan = client.lend(texts.t5)
    assert (loan.family, loan.copied.total) == ("t5", 0)
    ids = tokens(batch, count, text_checkpoints.T5_VOCABULARY)
    ours = client.encode_text(loan, ids)
    assert ours.pooled is None
    assert relative_error(ours.hidden_states, plain_t5(texts.t5, ids)) <= BAR


@torch.no_grad()
def test_umt5_of_a_file_with_a_tokenizer_agrees_with_transformers(client, texts, relative_error):
    from safetensors.torch import load_file
    from transformers import UMT5Config, UMT5EncoderModel

    loan = client.lend(texts.umt5)
    assert (loan.family, loan.copied.total) == ("umt5", 0)
    ids, mask = tokens(2, 40, text_checkpoints.T5_VOCABULARY), torch.ones(2, 40, dtype=torch.int64)
    mask[1, 7:] = ids[1, 7:] = 0
    ours = client.encode_text(loan, ids, mask=mask).hidden_states
    model = UMT5EncoderModel(
        UMT5Config(vocab_size=text_checkpoints.T5_VOCABULARY, d_model=128, d_ff=256, num_layers=2, num_heads=2)
    ).eval()
    state = load_file(texts.umt5)
    state.pop("spiece_model")
    model.load_state_dict(state)
    expected = model(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
    assert relative_error(ours, expected) <= BAR
    assert not ours[1, 7:].any()
    with pytest.raises(BadRequest, match=r"mask\[1\]: no token is left"):
        client.encode_text(loan, ids, mask=mask * torch.tensor([[1], [0]]))


@pytest.mark.parametrize(
    ("encoder", "name"),
    [
        ("clip", "text_model.encoder.layers.1.self_attn.v_proj.bias"),
        ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    ],
)
def test_lent_encoders_are_the_same_memory(client, texts, relative_error, encoder, name):
    from safetensors.torch import load_file

    arena = Arena.copy_of(load_file(getattr(texts, encoder)))
    ids = tokens(1, 21, 1000)
    with client.lend(arena.tensors) as loan:
        before = client.encode_text(loan, ids).hidden_states
        kept = arena.tensors[name].clone()
        arena.tensors[name].zero_()
        assert relative_error(client.encode_text(loan, ids).hidden_states, before) > 10 * BAR
        arena.tensors[name].copy_(kept)
        assert torch.equal(client.encode_text(loan, ids).hidden_states, before)
    arena.close()


def test_what_an_encoder_cannot_read_is_refused_and_the_next_text_is_right(client, texts, transformer):
    clip, t5 = client.lend(texts.clip), client.lend(texts.t5)
    good = client.encode_text(t5, [[1, 2, 3]]).hidden_states
    for encoder, ids, pooled, says in [
        (
            t5,
            [[1, 32_128]],
            False,
            r"token_ids\[0\]\[1\]: 32128 is not in the vocabulary of t5, which has 32128 tokens",
        ),
        (clip, [[0] * 78], False, "78 tokens, but clip_l takes up to 77"),
        (t5, [[1]], True, "t5 has no pooled state"),
        (transformer.component_id, [[1]], False, "transformer where a text_encoder is needed"),
    ]:
        with pytest.raises(BadRequest, match=says):
            client.encode_text(encoder, ids, pooled=pooled)
    assert torch.equal(client.encode_text(t5, [[1, 2, 3]]).hidden_states, good)


Forward = Callable[..., torch.Tensor]


@pytest.fixture
def calls(client: Client, transformer) -> Flux1Calls:
    return Flux1Calls(client, transformer)


@pytest.fixture
def forward(calls: Flux1Calls) -> Forward:
    """One image, tensors sent along: what everything else is compared with."""

    def run(latents, inputs, sigma=0.6, guidance=3.5):
        return calls.predict(latents, sigma, Prompt(inputs.prompt_embeds, inputs.pooled_prompt_embeds, guidance))

    return run


def test_kept_conditioning_has_the_bits_of_tensors_sent_along(calls, make_inputs, forward):
    inputs = make_inputs(tokens=33)
    kept = calls.keep(inputs.prompt_embeds, inputs.pooled_prompt_embeds)
    for sigma in (0.9, 0.6, 0.3):
        assert torch.equal(calls.predict(inputs.noise, sigma, kept), forward(inputs.noise, inputs, sigma))


def test_conditional_and_unconditional_in_one_request(calls, make_inputs, forward, relative_error):
    positive, negative, longer = make_inputs(33, seed=1), make_inputs(33, seed=2), make_inputs(301, seed=3)
    wanted = [(positive, 3.5), (negative, 1.0), (longer, 2.0)]
    made = [calls.keep(inputs.prompt_embeds, inputs.pooled_prompt_embeds, guidance) for inputs, guidance in wanted]
    alone = [forward(inputs.noise, inputs, 0.6, guidance) for inputs, guidance in wanted]
    for chosen in ([0, 1], [0, 2], [2, 0], [1, 2, 0, 1]):
        latents = torch.cat([wanted[i][0].noise for i in chosen])
        together = calls.predict(latents, 0.6, [made[i] for i in chosen])
        for i, ours in zip(chosen, together.split(1), strict=True):
            assert relative_error(ours, alone[i]) <= BAR
    # One row serves every image of its share.
    doubled = calls.predict(positive.noise.repeat(4, 1, 1, 1), 0.6, made[:2])
    for row, (inputs, guidance) in enumerate([(positive, 3.5), (positive, 3.5), (negative, 1.0), (negative, 1.0)]):
        assert relative_error(doubled[row : row + 1], forward(positive.noise, inputs, 0.6, guidance)) <= BAR


@pytest.mark.long
def test_conditioning_that_was_pushed_out_is_sent_again(daemon, calls, make_inputs):
    from xditd.ipc import limits

    inputs = make_inputs()
    first = calls.keep(inputs.prompt_embeds, inputs.pooled_prompt_embeds)
    before = calls.predict(inputs.noise, 0.5, first)
    for number in range(limits.MAX_KEPT_TENSORS // 2):  # each is two
        other = calls.keep(inputs.prompt_embeds * (1 + number / 100), inputs.pooled_prompt_embeds)
        calls.predict(inputs.noise[..., :4, :4], 0.5, other)
    known = refusals(daemon)
    assert torch.equal(calls.predict(inputs.noise, 0.5, first), before)
    assert refusals(daemon) > known


def test_what_is_kept_goes_with_the_client(daemon, files, make_inputs):
    inputs = make_inputs()
    with daemon.connect() as first:
        loan = first.lend(files.transformer)
        calls = Flux1Calls(first, loan)
        kept = calls.keep(inputs.prompt_embeds, inputs.pooled_prompt_embeds)
        before = calls.predict(inputs.noise, 0.5, kept)
    with daemon.connect() as second:
        loan = second.lend(files.transformer)
        # As if the workers still knew its name, which they do not: it is this process's last client that has left.
        for tensor in (kept.prompt_embeds, kept.pooled_prompt_embeds):
            tensor.note_kept_by(second._current())
        known = refusals(daemon)
        assert torch.equal(Flux1Calls(second, loan).predict(inputs.noise, 0.5, kept), before)
        assert refusals(daemon) > known


def refusals(daemon) -> int:
    """How often a request named what the workers did not keep."""
    return daemon.log_text().count("code=unknown_kept")


def test_conditioning_that_is_not_finite_is_refused_and_not_kept(calls, make_inputs):
    inputs = make_inputs()
    inputs.prompt_embeds[0, 3, 7] = float("nan")
    kept = calls.keep(inputs.prompt_embeds, inputs.pooled_prompt_embeds)
    for _ in range(2):
        with pytest.raises(BadRequest, match=r"encoder_hidden_states.*: some values are not finite"):
            calls.predict(inputs.noise, 0.5, kept)
