"""The entries of all tiny pipelines, by name."""

from __future__ import annotations

import flux_pipelines
import image_pipelines
import kv_cache_pipelines
from pipeline_entry import PipelineEntry

PIPELINES: dict[str, PipelineEntry] = {
    entry.name: entry
    for group in (flux_pipelines.ENTRIES, image_pipelines.ENTRIES, kv_cache_pipelines.ENTRIES)
    for entry in group
}
