"""Lend model components to warm xDiT workers, and run jobs on them.

Importing this package does not import torch; the first use of tensors does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from xditd.client.client import Client
from xditd.client.loans import Loan, LoanWithLoras
from xditd.ipc.errors import (
    AlreadyRunning,
    BadCheckpoint,
    BadMessage,
    BadRequest,
    Busy,
    Cancelled,
    Closed,
    DaemonStopping,
    DaemonUnreachable,
    DeadlineExceeded,
    ForeignGpu,
    Internal,
    LeaseLost,
    NotFinite,
    NotPermitted,
    OutOfMemory,
    OutputFailed,
    PeerError,
    ProcessGone,
    ProtocolMismatch,
    RequestError,
    StaleSource,
    StorageError,
    UnknownComponent,
    UnknownFamily,
    UnknownKept,
    Unsupported,
    UnsupportedDtype,
    WorkersLost,
    WorkersUnavailable,
    XditdError,
)
from xditd.ipc.facts import ComponentFacts, LatentScaling
from xditd.ipc.replies import FramesDecoded, Queued, StepDone
from xditd.ipc.status import DaemonStatus
from xditd.ipc.tensors import ComponentKind, CopiedBytes, Tier

if TYPE_CHECKING:
    from xditd.client.arenas import Arena
    from xditd.client.async_client import AsyncClient, AsyncGenerationJob
    from xditd.client.diffusers.accelerate import accelerate, unaccelerate
    from xditd.client.jobs.arguments import KeptTensor, RowsOf
    from xditd.client.jobs.controls import CallControl, Control
    from xditd.client.jobs.generation import GenerationJob
    from xditd.client.pipeline.job import PipelineJob
    from xditd.client.pipeline.pipeline import Pipeline
    from xditd.client.pipeline.results import PipelineResult
    from xditd.client.pipeline.settings import RunSettings
    from xditd.client.results import GenerationResult, TextEncoding

__all__ = [
    "AlreadyRunning",
    "Arena",
    "AsyncClient",
    "AsyncGenerationJob",
    "BadCheckpoint",
    "BadMessage",
    "BadRequest",
    "Busy",
    "CallControl",
    "Cancelled",
    "Client",
    "Closed",
    "ComponentFacts",
    "ComponentKind",
    "Control",
    "CopiedBytes",
    "DaemonStatus",
    "DaemonStopping",
    "DaemonUnreachable",
    "DeadlineExceeded",
    "ForeignGpu",
    "FramesDecoded",
    "GenerationJob",
    "GenerationResult",
    "Internal",
    "KeptTensor",
    "LatentScaling",
    "LeaseLost",
    "Loan",
    "LoanWithLoras",
    "NotFinite",
    "NotPermitted",
    "OutOfMemory",
    "OutputFailed",
    "PeerError",
    "Pipeline",
    "PipelineJob",
    "PipelineResult",
    "ProcessGone",
    "ProtocolMismatch",
    "Queued",
    "RequestError",
    "RowsOf",
    "RunSettings",
    "StaleSource",
    "StepDone",
    "StorageError",
    "TextEncoding",
    "Tier",
    "UnknownComponent",
    "UnknownFamily",
    "UnknownKept",
    "Unsupported",
    "UnsupportedDtype",
    "WorkersLost",
    "WorkersUnavailable",
    "XditdError",
    "accelerate",
    "unaccelerate",
]


_MODULES = {
    "Arena": "arenas",
    "AsyncClient": "async_client",
    "AsyncGenerationJob": "async_client",
    "CallControl": "jobs.controls",
    "Control": "jobs.controls",
    "GenerationJob": "jobs.generation",
    "GenerationResult": "results",
    "KeptTensor": "jobs.arguments",
    "Pipeline": "pipeline.pipeline",
    "PipelineJob": "pipeline.job",
    "PipelineResult": "pipeline.results",
    "RowsOf": "jobs.arguments",
    "RunSettings": "pipeline.settings",
    "TextEncoding": "results",
    "accelerate": "diffusers.accelerate",
    "unaccelerate": "diffusers.accelerate",
}
"""Names that are imported on first use, so that a program that only asks for the status needs no modules of jobs."""


def __getattr__(name: str) -> object:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{module}"), name)
