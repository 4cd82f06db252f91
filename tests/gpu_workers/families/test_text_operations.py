"""Text encoders from lent weights against plain transformers: the same bits, and proof that each tensor is read."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from text_checkpoints import clip_l_state_dict, in_wans_names, t5_state_dict, umt5_state_dict

from xditd.gpu_workers.models.cached_model import CachedModel
from xditd.gpu_workers.models.checkpoint_match import CheckpointMatch
from xditd.gpu_workers.models.model_cache import ModelCache

State = dict[str, torch.Tensor]
Plugger = Callable[[ModelCache, State], CheckpointMatch]
BAR = 1e-6
VOCABULARY = 300
END = VOCABULARY - 1
CLIP_SHAPES = [(1, 77), (2, 77), (3, 15), (1, 1)]
T5_SHAPES = [(1, 256), (1, 301), (2, 15), (3, 33), (1, 1)]


def clip_state(**options: Any) -> State:
    return clip_l_state_dict(3, vocabulary=VOCABULARY, **options)


def t5_state(**options: Any) -> State:
    return t5_state_dict(3, vocabulary=VOCABULARY, **options)


def token_ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Random tokens; each row ends its text at another place, and goes on with padding of the same token."""
    ids = torch.randint(0, END, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    for row in range(batch):
        ids[row, max(1, tokens // 2 - row) :] = END
    return ids


def plain_clip(state: State) -> Any:
    """transformers' own module, built and loaded the ordinary way."""
    from transformers import CLIPTextConfig, CLIPTextModel

    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=512, num_hidden_layers=2,
            num_attention_heads=2, eos_token_id=END,
        )
    ).eval()  # fmt: skip
    named = {name.removeprefix("text_model."): tensor.float() for name, tensor in state.items()}
    if hasattr(model, "text_model"):
        named = {f"text_model.{name}": tensor for name, tensor in named.items()}
    model.load_state_dict(named)
    return model


def plain_t5(state: State) -> Any:
    from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(
        T5Config(
            vocab_size=VOCABULARY, d_model=128, d_kv=64, d_ff=256, num_layers=2, num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    ).eval()  # fmt: skip
    named = {name: tensor.float() for name, tensor in state.items()}
    model.load_state_dict({**named, "encoder.embed_tokens.weight": named["shared.weight"]})
    return model


def plain_umt5(state: State) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    model = UMT5EncoderModel(
        UMT5Config(vocab_size=VOCABULARY, d_model=128, d_kv=64, d_ff=256, num_layers=2, num_heads=2)
    ).eval()
    named = {name: tensor.float() for name, tensor in state.items()}
    model.load_state_dict({**named, "encoder.embed_tokens.weight": named["shared.weight"]})
    return model


def padded(lengths: tuple[int, ...], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids of texts of these lengths, padded with token 0, and their mask."""
    ids = torch.randint(1, END, (len(lengths), tokens), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def wans_embeds(encoder: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What diffusers' ``WanPipeline`` makes of a text, of ids that its tokenizer gives."""
    from types import SimpleNamespace

    from diffusers import WanPipeline

    pipeline = SimpleNamespace(
        tokenizer=lambda *_, **__: SimpleNamespace(input_ids=ids, attention_mask=mask),
        text_encoder=encoder,
        _execution_device=torch.device("cpu"),
    )
    texts = ["text"] * ids.shape[0]
    return WanPipeline._get_t5_prompt_embeds(pipeline, texts, max_sequence_length=ids.shape[1])


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "tokens"), CLIP_SHAPES)
@torch.no_grad()
def test_clip_has_the_bits_of_transformers_in_float32(
    shared_cache: ModelCache, plug: Plugger, direct: ModuleType, batch: int, tokens: int, dtype: torch.dtype
) -> None:
    state = clip_state(dtype=dtype)
    ids = token_ids(batch, tokens)
    hidden, pooled = direct.encode_text(plug(shared_cache, state).model, ids, pooled=True)
    expected = plain_clip(state)(input_ids=ids)
    assert hidden.dtype == pooled.dtype == torch.float32
    assert torch.equal(hidden, expected.last_hidden_state)
    assert torch.equal(pooled, expected.pooler_output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "tokens"), T5_SHAPES)
@torch.no_grad()
def test_t5_has_the_bits_of_transformers_in_float32(
    shared_cache: ModelCache, plug: Plugger, direct: ModuleType, batch: int, tokens: int, dtype: torch.dtype
) -> None:
    state = t5_state(dtype=dtype)
    ids = token_ids(batch, tokens)
    hidden, pooled = direct.encode_text(plug(shared_cache, state).model, ids)
    assert pooled is None
    assert hidden.dtype == torch.float32
    assert torch.equal(hidden, plain_t5(state)(input_ids=ids).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(512,), (7,), (20, 1), (301, 512, 33)], ids=str)
@torch.no_grad()
def test_umt5_has_the_bits_of_the_embeddings_of_wans_pipeline(
    shared_cache: ModelCache, plug: Plugger, direct: ModuleType, lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    state = umt5_state_dict(3, vocabulary=VOCABULARY, dtype=dtype)
    ids, mask = padded(lengths, 512)
    model = plug(shared_cache, state).model
    hidden, _ = direct.encode_text(model, ids, mask=mask)
    assert hidden.dtype == torch.float32
    assert torch.equal(hidden, wans_embeds(plain_umt5(state), ids, mask))
    if lengths[0] != 512:
        unmasked, _ = direct.encode_text(model, ids)
        assert relative_error(hidden[0, : lengths[0]], unmasked[0, : lengths[0]]) > 1e-3
        assert torch.equal(unmasked, plain_umt5(state)(input_ids=ids).last_hidden_state)


@torch.no_grad()
def test_umt5_gives_the_states_of_its_layers_and_is_read_in_wans_names(
    shared_cache: ModelCache, plug: Plugger, direct: ModuleType
) -> None:
    state = umt5_state_dict(3, vocabulary=VOCABULARY)
    ids, mask = padded((9, 4), 16)
    model = plug(shared_cache, state).model
    found = direct.encode_text(model, ids, mask=mask, layers=(0, 1))[0]
    states = plain_umt5(state)(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert torch.equal(found, torch.cat(states[:2], -1) * mask[..., None])
    other = plug(shared_cache, in_wans_names(state)).model
    expected = direct.encode_text(model, ids, mask=mask)[0]
    assert torch.equal(direct.encode_text(other, ids, mask=mask)[0], expected)


def test_pooled_is_the_state_at_the_first_end_of_text_and_without_one_that_of_transformers(
    shared_cache: ModelCache, plug: Plugger, direct: ModuleType
) -> None:
    model = plug(shared_cache, clip_state()).model
    ids = token_ids(3, 20)
    ids[2] = 7
    hidden, pooled = direct.encode_text(model, ids, pooled=True)
    firsts = [int((ids[row] == END).nonzero()[0]) for row in (0, 1)]
    assert firsts == [10, 9]
    assert torch.equal(pooled, hidden[[0, 1, 2], [*firsts, 0]])
    assert torch.equal(pooled, plain_clip(clip_state())(input_ids=ids).pooler_output)


@pytest.mark.parametrize("kept", ["DenseReluDense.wo.weight", "layer_norm.weight", "shared.weight"])
@torch.no_grad()
def test_a_t5_with_some_weights_kept_in_float32_has_their_bits(
    shared_cache: ModelCache, plug: Plugger, direct: ModuleType, kept: str
) -> None:
    """transformers keeps ``wo`` in float32 when it loads float16, and saves it so."""
    state = {name: tensor if name.endswith(kept) else tensor.half() for name, tensor in t5_state().items()}
    ids = token_ids(2, 33)
    hidden, _ = direct.encode_text(plug(shared_cache, state).model, ids)
    assert torch.equal(hidden, plain_t5(state)(input_ids=ids).last_hidden_state)


def test_every_row_of_a_batch_is_its_own(shared_cache: ModelCache, plug: Plugger, direct: ModuleType) -> None:
    for state in (clip_state(), t5_state()):
        model = plug(shared_cache, state).model
        ids = token_ids(3, 33)
        together, _ = direct.encode_text(model, ids)
        for row in range(3):
            alone, _ = direct.encode_text(model, ids[row : row + 1])
            assert relative_error(together[row], alone[0]) <= BAR


def moved_by_zeroing(model: CachedModel, state: State, encode: Callable[[], torch.Tensor]) -> dict[str, float]:
    """How far the result moves when each tensor in turn is zeroed where it lies, in the lent memory."""
    before = encode()
    moved = {}
    for name, tensor in state.items():
        kept = tensor.clone()
        tensor.zero_()
        moved[name] = relative_error(encode(), before)
        tensor.copy_(kept)
    assert torch.equal(encode(), before)
    return moved


def test_a_lost_tensor_of_clip_would_be_noticed(shared_cache: ModelCache, plug: Plugger, direct: ModuleType) -> None:
    state = clip_state(has_extras=True)
    model = plug(shared_cache, state).model
    ids = token_ids(2, 77)
    for part in (0, 1):
        moved = moved_by_zeroing(model, state, lambda part=part: direct.encode_text(model, ids, pooled=True)[part])
        unmoved = {name for name, figure in moved.items() if figure < 10 * BAR}
        # The same number is added to all logits of a query, and softmax ignores it. The others are not read.
        assert unmoved == {
            "text_model.encoder.layers.0.self_attn.k_proj.bias",
            "text_model.encoder.layers.1.self_attn.k_proj.bias",
            "text_projection.weight",
            "logit_scale",
            "text_model.embeddings.position_ids",
        }


def test_a_lost_tensor_of_t5_would_be_noticed(shared_cache: ModelCache, plug: Plugger, direct: ModuleType) -> None:
    state = t5_state(has_copy=True)
    model = plug(shared_cache, state).model
    ids = token_ids(2, 301)
    moved = moved_by_zeroing(model, state, lambda: direct.encode_text(model, ids)[0])
    assert {name for name, figure in moved.items() if figure < 10 * BAR} == {"encoder.embed_tokens.weight"}


def test_a_lost_tensor_of_umt5_would_be_noticed(shared_cache: ModelCache, plug: Plugger, direct: ModuleType) -> None:
    state = umt5_state_dict(3, vocabulary=VOCABULARY, has_extras=True)
    model = plug(shared_cache, state).model
    ids, mask = padded((301, 200), 301)
    moved = moved_by_zeroing(model, state, lambda: direct.encode_text(model, ids, mask=mask)[0])
    unmoved = {name for name, figure in moved.items() if figure < 10 * BAR}
    assert unmoved == {"encoder.embed_tokens.weight", "spiece_model"}


def test_half_precision_weights_are_left_as_they_were_lent(
    cache: ModelCache, plug: Plugger, direct: ModuleType
) -> None:
    state = t5_state(dtype=torch.bfloat16)
    model = plug(cache, state).model
    addresses = {tensor.data_ptr() for tensor in state.values()}
    direct.encode_text(model, token_ids(1, 9))
    assert {parameter.data_ptr() for parameter in model.module.parameters()} == addresses
    # So they are after a forward that fails, too: the hooks of the layers that were entered are all left.
    broken = model.module.encoder.block[1].layer[1].DenseReluDense
    broken.forward, kept = lambda _: 1 / 0, broken.forward
    with pytest.raises(ZeroDivisionError):
        direct.encode_text(model, token_ids(1, 9))
    broken.forward = kept
    assert {parameter.data_ptr() for parameter in model.module.parameters()} == addresses
