"""The entries of all tiny pipelines, by name."""

from __future__ import annotations

import audio_pipelines
import customized_pipelines
import flux_pipelines
import image_pipelines
import kv_cache_pipelines
import modular_pipelines
import qwen_and_sd3_pipelines
import stable_diffusion_pipelines
import video_pipelines
import wan_pipelines
from pipeline_entry import PipelineEntry

PIPELINES: dict[str, PipelineEntry] = {
    entry.name: entry
    for group in (
        flux_pipelines.ENTRIES,
        qwen_and_sd3_pipelines.ENTRIES,
        image_pipelines.ENTRIES,
        kv_cache_pipelines.ENTRIES,
        wan_pipelines.ENTRIES,
        video_pipelines.ENTRIES,
        audio_pipelines.ENTRIES,
        stable_diffusion_pipelines.ENTRIES,
        modular_pipelines.ENTRIES,
        customized_pipelines.ENTRIES,
    )
    for entry in group
}
