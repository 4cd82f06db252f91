"""For tests of jobs: a conditioning, and what the fake daemon writes and reports."""

import torch

from xditd.ipc.replies import StepDone

TEXT = {"prompt_embeds": torch.randn(1, 3, 8), "pooled_prompt_embeds": torch.randn(1, 4)}


def write(daemon, io, spec, value):
    daemon.open_io(io, spec).copy_(torch.as_tensor(value))


def step(request, number, total):
    return StepDone(request_id=request.request_id, step=number, total_steps=total, elapsed_s=0.1 * number)
