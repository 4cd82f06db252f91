"""Calls of classes of videos and audio beside those of their entries: masks, times of tokens, parts left out."""

from __future__ import annotations

from typing import Any

import torch
from class_entry import Random
from further_calls import further
from model_arguments import padding_mask

_FRAMEPACK = "HunyuanVideoFramepackTransformer3DModel"
_HELIOS = "HeliosTransformer3DModel"
_HUNYUAN = "HunyuanVideoTransformer3DModel"
_HUNYUAN_15 = "HunyuanVideo15Transformer3DModel"
_KANDINSKY_6 = "Kandinsky6Transformer3DModel"
_LTX_2 = "LTX2VideoTransformer3DModel"
_VACE = "WanVACETransformer3DModel"


def _vace_image(random: Random, _: dict[str, Any]) -> dict[str, Any]:
    return {
        "encoder_hidden_states": random.normal(1, 512, 24),
        "encoder_hidden_states_image": random.normal(1, 6, 40),
    }


def _ltx_2_padding(random: Random, _: dict[str, Any]) -> dict[str, Any]:
    return {
        "encoder_hidden_states": random.normal(2, 9, 32),
        "audio_encoder_hidden_states": random.normal(2, 9, 16),
        "encoder_attention_mask": padding_mask((9, 2), 9),
        "audio_encoder_attention_mask": padding_mask((3, 9), 9),
    }


def _ltx_2_times(random: Random, _: dict[str, Any]) -> dict[str, Any]:
    """A time for each token of the video and of the audio."""
    return {
        "timestep": random.normal(2, 12).abs() * 500,
        "audio_timestep": random.normal(2, 7).abs() * 500,
        "use_cross_timestep": False,
    }


def _ltx_2_image(random: Random, given: dict[str, Any]) -> dict[str, Any]:
    """An image to a video: a time for each token, the image's tokens marked, and seen by all others alone."""
    tokens, audio = (given[name].shape[1] for name in ("hidden_states", "audio_hidden_states"))
    times = torch.full((2, tokens), 875.0)
    times[:, :6] = 0
    marked = torch.zeros(2, tokens, 1)
    marked[:, :6] = 1
    seen = torch.ones(2, tokens, tokens)
    seen[:, :6, 6:] = 0
    return {
        "timestep": times,
        "audio_timestep": torch.linspace(0, 875, audio).expand(2, audio),
        "audio_sigma": given["sigma"],
        "video_keyframes_mask": marked,
        "video_self_attention_mask": seen,
    }


def _ltx_2_guidance(_: Random, given: dict[str, Any]) -> dict[str, Any]:
    """Spatio-temporal guidance in one block, and the audio's time given."""
    return {"spatio_temporal_guidance_blocks": [1], "audio_timestep": given["timestep"]}


def _ltx_2_guidance_of_a_row(*_: Any) -> dict[str, Any]:
    return {"spatio_temporal_guidance_blocks": [0], "perturbation_mask": torch.tensor([0.0, 1.0])}


def _hunyuan_padding(random: Random, _: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_states": random.normal(2, 4, 5, 2, 6),
        "encoder_attention_mask": padding_mask((6, 1), 6, torch.float32),
    }


def _animate_longer(random: Random, _: dict[str, Any]) -> dict[str, Any]:
    """Nine frames: three of latents, before which stands the reference's."""
    return {
        "hidden_states": random.normal(2, 12, 4, 4, 6),
        "pose_hidden_states": random.normal(2, 4, 3, 4, 6),
        "face_pixel_values": random.normal(2, 3, 9, 16, 16).tanh(),
    }


def _allegro_parts(*_: Any) -> dict[str, Any]:
    """Some places of the second video are not to be seen."""
    seen = torch.ones(2, 2, 8, 8)
    seen[1, 0, :2] = 0
    seen[1, 1, 4:, 4:] = 0
    return {"attention_mask": seen}


def _kandinsky_short_text(random: Random, _: dict[str, Any]) -> dict[str, Any]:
    return {"encoder_hidden_states": random.normal(2, 5, 16), "encoder_attention_mask": padding_mask((5, 3), 5)}


def _helios_small(random: Random, _: dict[str, Any]) -> dict[str, Any]:
    return {"hidden_states": random.normal(2, 4, 1, 2, 2), "indices_hidden_states": torch.tensor([[8]])}


def _stable_audio_padding(*_: Any) -> dict[str, Any]:
    return {"attention_mask": padding_mask((12, 9), 12), "encoder_attention_mask": padding_mask((7, 4), 7)}


def _times(random: Random, given: dict[str, Any]) -> dict[str, Any]:
    """A time for each token."""
    return {"timestep": random.normal(*given["hidden_states"].shape[:2]).abs() * 500}


VIDEO_CALLS = (
    further(_VACE, "from_an_image", _vace_image, image_dim=40, added_kv_proj_dim=32),
    further(_VACE, "short_control", lambda random, _: {"control_hidden_states": random.normal(1, 12, 2, 4, 6)}),
    further("SkyReelsV2Transformer3DModel", "mask_of_blocks", num_frame_per_block=2),
    further("LTXVideoTransformer3DModel", "times_of_tokens", _times),
    further(_LTX_2, "padding", _ltx_2_padding),
    further(_LTX_2, "times_of_tokens", _ltx_2_times),
    further(_LTX_2, "from_an_image", _ltx_2_image, use_keyframes_abs_pos_embedding=True),
    further(
        _LTX_2,
        "mask_of_the_video",
        lambda random, _: {"video_self_attention_mask": random.normal(2, 12, 12).abs().clamp(0, 1)},
    ),
    further(_LTX_2, "guidance", _ltx_2_guidance),
    further(_LTX_2, "guidance_of_a_row", _ltx_2_guidance_of_a_row),
    further(_LTX_2, "isolated", lambda *_: {"isolate_modalities": True}),
    further(_LTX_2, "interleaved", rope_type="interleaved"),
    further(_HUNYUAN, "padding", _hunyuan_padding),
    further(_HUNYUAN, "replaced_frame", _hunyuan_padding, image_condition_type="token_replace"),
    # The padding of a text, which comes last, is on more ranks than the last one.
    further(_FRAMEPACK, "padding", lambda *_: {"encoder_attention_mask": padding_mask((1,), 6, torch.float32)}),
    further(_HUNYUAN_15, "text_alone", lambda *_: {"image_embeds": torch.zeros(2, 4, 20)}),
    further(_HUNYUAN_15, "odd_size", lambda random, _: {"hidden_states": random.normal(2, 9, 3, 1, 5)}),
    further(_HELIOS, "louder_history", is_amplify_history=True),
    further(_HELIOS, "small_chunk", _helios_small),
    further("AllegroTransformer3DModel", "parts_seen", _allegro_parts),
    further("WanAnimateTransformer3DModel", "longer", _animate_longer),
    further(_KANDINSKY_6, "without_audio", lambda *_: {"audio_hidden_states": None}),
    further(_KANDINSKY_6, "short_text", _kandinsky_short_text),
    further("MochiTransformer3DModel", "short_texts", lambda *_: {"encoder_attention_mask": padding_mask((1, 5), 6)}),
    further("StableAudioDiTModel", "padding", _stable_audio_padding),
    further("StableAudio3DiTModel", "much_memory", num_memory_tokens=11),
    further("LongCatAudioDiTTransformer", "padding", lambda *_: {"attention_mask": padding_mask((9, 5), 9)}),
)
"""Their variants say what differs."""
