"""A tiny folder of FLUX.1 with its tokenizers and text encoders."""

from __future__ import annotations

from pathlib import Path

import pipeline_folders
import prompt_pipelines

from xditd.client.demo.checkpoints import flux1_state_dict


def saved(folder: Path) -> Path:
    """Save ``FluxPipeline`` with everything that words need, and return its folder."""
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

    from xditd.gpu_workers.families.flux1 import reference

    parts = folder.with_name(f"{folder.name}-parts")
    prompt_pipelines.flux1(parts)
    pipeline = pipeline_folders.flux1(
        transformer=reference.transformer_from(flux1_state_dict(3, context_dim=128, pooled_dim=128)),
        text_encoder=CLIPTextModel.from_pretrained(parts / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(parts / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(parts / "text_encoder_2"),
        tokenizer_2=T5TokenizerFast.from_pretrained(parts / "tokenizer_2"),
    )
    return pipeline_folders.saved(pipeline, folder)
