"""Compare the demo's latents with those of plain diffusers, run in one process on the same files."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xditd.client.subprograms import module_command, module_environment
from xditd.client.tensor_files import read_tensors, write_tensors
from xditd.ipc.errors import DeadlineExceeded, PeerError

if TYPE_CHECKING:
    import torch

TOLERANCES: Final = {"float32": 1e-6, "bfloat16": 1e-2}
"""Largest relative error that passes, by dtype of the weights."""

_DEADLINE_S: Final = 300.0
_POLL_S: Final = 0.25


@dataclass(frozen=True, repr=False)
class Inputs:
    """Everything that determines the latents, except the weights."""

    conditioning: Mapping[str, Any]
    """``prompt_embeds`` and ``pooled_prompt_embeds``, as ``Client.generate`` takes them."""
    noise: torch.Tensor
    sigmas: tuple[float, ...]
    height: int
    width: int
    guidance: float


def reference_latents(
    transformer: Path, inputs: Inputs, folder: Path, device: str, on_poll: Callable[[int], None]
) -> torch.Tensor:
    """Run the plain pipeline in a child process, and read its latents. ``on_poll`` is called with its pid repeatedly.

    Raises:
        PeerError: the process failed; the message has the end of its log.
        DeadlineExceeded: it took longer than five minutes.
    """
    import torch

    given, made = folder / "reference-inputs.safetensors", folder / "reference-latents.safetensors"
    write_tensors(
        given,
        {
            **inputs.conditioning,
            "noise": inputs.noise,
            "sigmas": torch.tensor(inputs.sigmas, dtype=torch.float64),
        },
    )
    arguments = [ "--transformer", str(transformer),
               "--inputs", str(given), "--out", str(made), "--height", str(inputs.height), "--width", str(inputs.width),
               "--steps", str(len(inputs.sigmas)), "--guidance", str(inputs.guidance), "--device", device]  # fmt: skip
    command = module_command("xditd.gpu_workers.families.flux1.reference", arguments)
    environment = {**module_environment(), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    waited_s = 0.0
    with (folder / "reference.log").open("w+") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            while process.poll() is None:
                on_poll(process.pid)
                if waited_s > _DEADLINE_S:
                    raise DeadlineExceeded(f"reference: did not finish within {_DEADLINE_S:.0f} s; see {log.name}")
                try:
                    process.wait(_POLL_S)
                except subprocess.TimeoutExpired:
                    waited_s += _POLL_S
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode != 0:
            log.seek(0)
            raise PeerError(f"reference: exit status {process.returncode}: {log.read()[-2000:]}")
    return read_tensors(made)["latents"]


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference divided by the norm of ``expected``, in float64."""
    wanted = expected.double().cpu()
    return float((result.double().cpu() - wanted).norm() / wanted.norm())
