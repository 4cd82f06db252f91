"""Calls of classes of videos and audio beside those of their entries: masks, times of tokens, parts left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from class_entries import ENTRIES
from class_entry import ClassEntry, Random
from model_arguments import padding_mask

Change = Callable[[Random], dict[str, Any]]
"""From a source of numbers, arguments in place of those of the entry."""


@dataclass(frozen=True)
class VideoCall:
    """A call of the class of an entry, with another configuration and other arguments."""

    key: str
    config: Mapping[str, Any] = field(default_factory=dict)
    change: Change = lambda random: {}

    @property
    def entry(self) -> ClassEntry:
        own = ENTRIES[self.key]
        return ClassEntry(
            own.name, {**own.config, **self.config}, lambda random: own.arguments(random) | self.change(random)
        )


_HUNYUAN = "HunyuanVideoTransformer3DModel"
_HUNYUAN_15 = "HunyuanVideo15Transformer3DModel"
_LTX_2 = "LTX2VideoTransformer3DModel"
_HELIOS = "HeliosTransformer3DModel"
_STABLE_AUDIO_3 = "StableAudio3DiTModel"


def _wan_image(random: Random) -> dict[str, Any]:
    return {
        "encoder_hidden_states": random.normal(1, 512, 24),
        "encoder_hidden_states_image": random.normal(1, 6, 40),
    }


def _ltx_2_padded(random: Random) -> dict[str, Any]:
    return {
        "encoder_hidden_states": random.normal(2, 9, 32),
        "audio_encoder_hidden_states": random.normal(2, 9, 16),
        "encoder_attention_mask": padding_mask((9, 2), 9),
        "audio_encoder_attention_mask": padding_mask((3, 9), 9),
    }


def _ltx_2_times(random: Random) -> dict[str, Any]:
    """A time for each token of the video and of the audio, as from an image."""
    return {
        "timestep": random.normal(2, 12).abs() * 500,
        "audio_timestep": random.normal(2, 7).abs() * 500,
        "use_cross_timestep": False,
    }


def _hunyuan_odd(random: Random) -> dict[str, Any]:
    return {
        "hidden_states": random.normal(2, 4, 5, 2, 6),
        "encoder_attention_mask": padding_mask((6, 1), 6, torch.float32),
    }


VIDEO_CALLS: Mapping[str, VideoCall] = {
    "vace_from_an_image": VideoCall(
        "WanVACETransformer3DModel", {"image_dim": 40, "added_kv_proj_dim": 32}, _wan_image
    ),
    "vace_of_a_short_control": VideoCall(
        "WanVACETransformer3DModel", {}, lambda random: {"control_hidden_states": random.normal(1, 12, 2, 4, 6)}
    ),
    "skyreels_with_a_mask_of_blocks": VideoCall("SkyReelsV2Transformer3DModel", {"num_frame_per_block": 2}),
    "ltx_with_a_time_for_each_token": VideoCall(
        "LTXVideoTransformer3DModel", {}, lambda random: {"timestep": random.normal(2, 12).abs() * 500}
    ),
    "ltx_2_with_padding": VideoCall(_LTX_2, {}, _ltx_2_padded),
    "ltx_2_with_times_of_tokens": VideoCall(_LTX_2, {}, _ltx_2_times),
    "ltx_2_with_a_mask_of_the_video": VideoCall(
        _LTX_2, {}, lambda random: {"video_self_attention_mask": random.normal(2, 12, 12).abs().clamp(0, 1)}
    ),
    "ltx_2_perturbed": VideoCall(_LTX_2, {}, lambda random: {"spatio_temporal_guidance_blocks": [1]}),
    "ltx_2_perturbed_in_one_row": VideoCall(
        _LTX_2,
        {},
        lambda random: {"spatio_temporal_guidance_blocks": [0], "perturbation_mask": torch.tensor([0.0, 1.0])},
    ),
    "ltx_2_isolated": VideoCall(_LTX_2, {}, lambda random: {"isolate_modalities": True}),
    "ltx_2_interleaved": VideoCall(_LTX_2, {"rope_type": "interleaved"}),
    "hunyuan_with_padding": VideoCall(_HUNYUAN, {}, _hunyuan_odd),
    "hunyuan_with_a_replaced_frame": VideoCall(_HUNYUAN, {"image_condition_type": "token_replace"}, _hunyuan_odd),
    "hunyuan_15_from_text_alone": VideoCall(_HUNYUAN_15, {}, lambda random: {"image_embeds": torch.zeros(2, 4, 20)}),
    "hunyuan_15_of_an_odd_size": VideoCall(
        _HUNYUAN_15, {}, lambda random: {"hidden_states": random.normal(2, 9, 3, 1, 5)}
    ),
    "helios_with_louder_history": VideoCall(_HELIOS, {"is_amplify_history": True}),
    "helios_of_a_small_chunk": VideoCall(
        _HELIOS,
        {},
        lambda random: {
            "hidden_states": random.normal(2, 4, 1, 2, 2),
            "indices_hidden_states": torch.tensor([[8]]),
        },
    ),
    "kandinsky_6_without_audio": VideoCall(
        "Kandinsky6Transformer3DModel", {}, lambda random: {"audio_hidden_states": None}
    ),
    "mochi_of_short_texts": VideoCall(
        "MochiTransformer3DModel", {}, lambda random: {"encoder_attention_mask": padding_mask((1, 5), 6)}
    ),
    "stable_audio_with_padding": VideoCall(
        "StableAudioDiTModel",
        {},
        lambda random: {
            "attention_mask": padding_mask((12, 9), 12),
            "encoder_attention_mask": padding_mask((7, 4), 7),
        },
    ),
    "stable_audio_3_of_much_memory": VideoCall(_STABLE_AUDIO_3, {"num_memory_tokens": 11}),
    "long_cat_with_padding": VideoCall(
        "LongCatAudioDiTTransformer", {}, lambda random: {"attention_mask": padding_mask((9, 5), 9)}
    ),
}
