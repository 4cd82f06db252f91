"""The entries of all tiny pipelines, by name."""

from __future__ import annotations

import flux_pipelines
from pipeline_entry import PipelineEntry

PIPELINES: dict[str, PipelineEntry] = {entry.name: entry for group in (flux_pipelines.ENTRIES,) for entry in group}
