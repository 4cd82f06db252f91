"""Lend all of Wan 2.2 A14B at once: two transformers, VAE and UMT5-XXL, and generate with them.

    python benchmarks/run.py lend_all
    python benchmarks/run.py lend_all --workers 2 --frames 81 --json FILE
    python benchmarks/run.py lend_all --device cpu --small

Weights are random bfloat16 of full size, made on the first GPU and lent from there: 64 GiB in all. Prints of each part,
as the daemon's status has it, the bytes that were lent and copied, the milliseconds of the lend, and by how much the
memory of the busiest worker grew (without what it maps of this process); then the same memory after a text was encoded
and after each generation, of which half of the steps run in each transformer, with decode.

Needs: 78 GiB of one GPU, and one GPU for each worker; --device cpu --small is a dry run
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import torch
from machine import gpu_memory_by_process, gpu_memory_used
from measuring import GIB, Report, add_device, add_ranks, need_gpus, print_table, say
from parts.modules import build

from xditd.client import Client, DaemonUnreachable, Loan
from xditd.client.demo.daemon_process import DaemonProcess
from xditd.ipc.tensors import Acceleration

UMT5_XXL = {"vocab_size": 256_384, "d_model": 4096, "d_ff": 10_240, "num_layers": 24, "num_heads": 64}
SMALL_UMT5 = {"vocab_size": 300, "d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 2}
SMALL_WAN = {"num_layers": 2, "num_attention_heads": 2, "text_dim": 64, "ffn_dim": 256}
TOKENS = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--frames", type=int, default=33, help="of 832x480")
    parser.add_argument("--steps", type=int, default=4, help="of a generation")
    parser.add_argument("--repeats", type=int, default=2, help="generations")
    parser.add_argument("--acceleration", default="auto", choices=get_args(Acceleration), help="of the workers")
    add_ranks(parser)
    add_device(parser)


def run(given: argparse.Namespace, report: Report) -> None:
    need_gpus("lend_all", max(given.ranks), given.device)
    device, dtype = torch.device(given.device), torch.bfloat16 if given.device == "cuda" else torch.float32
    parts = make_parts(device, dtype, small=given.small)
    for ranks in given.ranks:
        with tempfile.TemporaryDirectory(prefix="xditd-lend-all-") as folder:
            flags = ["--acceleration", given.acceleration]
            daemon = DaemonProcess(Path(folder, "daemon.log"), ranks, given.device, flags)
            client = None
            try:
                client = daemon.connect()
                client.wait_ready(300.0)
                measure(client, parts, given, report, f"{ranks} workers")
            except DaemonUnreachable as error:
                raise DaemonUnreachable(f"{error.detail}; its log ends:\n{daemon.log_tail()}") from None
            finally:
                daemon.stop(client)


def make_parts(device: torch.device, dtype: torch.dtype, *, small: bool) -> dict[str, torch.nn.Module]:
    """Build the parts by name, each with weights of its own."""
    from transformers import UMT5Config, UMT5EncoderModel

    wan = SMALL_WAN if small else {}
    config = UMT5Config(**(SMALL_UMT5 if small else UMT5_XXL), feed_forward_proj="gated-gelu")
    encoder = build(UMT5EncoderModel, {"config": config}, device, dtype)
    encoder.encoder.embed_tokens.weight = encoder.shared.weight  # one tensor, as in files
    return {
        "transformer": build("WanTransformer3DModel", wan, device, dtype, seed=1),
        "transformer_2": build("WanTransformer3DModel", wan, device, dtype, seed=2),
        "vae": build("AutoencoderKLWan", {"base_dim": 8} if small else {}, device, dtype),
        "text_encoder": encoder,
    }


class Memory:
    """The GPU memory of the busiest worker, without what it maps of this process."""

    def __init__(self, client: Client) -> None:
        self._pids = {worker.pid for worker in client.status().workers}
        self._last = self.now()

    def now(self) -> int:
        return max((size for pid, size in gpu_memory_by_process().items() if pid in self._pids), default=0)

    def figures(self) -> dict[str, float]:
        """Return it in GiB, and by how much it grew since the last call."""
        now, before = self.now(), self._last
        self._last = now
        return {"worker_gib": round(now / GIB, 2), "grew_gib": round((now - before) / GIB, 2)}


def measure(
    client: Client, parts: dict[str, torch.nn.Module], given: argparse.Namespace, report: Report, title: str
) -> None:
    memory = Memory(client)
    found: dict[str, Any] = {"before": memory.figures() | {"gpu_gib": gpu_gib()}}
    loans: dict[str, Loan] = {}
    for name, part in parts.items():
        began = time.perf_counter()
        # Of tied tensors the first one, as files have them: a loan counts each that it names.
        state = {key: each for key, each in part.state_dict().items() if key != "encoder.embed_tokens.weight"}
        loans[name] = client.lend(state, label=name)
        found[name] = {"lend_ms": round((time.perf_counter() - began) * 1e3, 1), **memory.figures()}
        report.add(**{title: found})
    for each in client.status().components:
        found[each.label] |= {
            "family": each.facts.family if each.facts is not None else "",
            "lent_gib": round(each.lent_bytes / GIB, 2),
            "copied_gib": round(each.copied.total / GIB, 2),
            "tiers": ", ".join(tier.value for tier in each.tiers),
        }
    found["all lent"] = {
        "lent_gib": round(sum(loan.lent_bytes for loan in loans.values()) / GIB, 2),
        "worker_gib": round(memory.now() / GIB, 2),
        "gpu_gib": gpu_gib(),
    }
    report.add(**{title: found})
    say(f"{title}: all parts are lent")
    device = next(parts["vae"].parameters()).device
    ids = torch.randint(0, 200, (2, 16 if given.small else TOKENS), device=device)
    began = time.perf_counter()
    texts = client.encode_text(loans["text_encoder"], ids, mask=torch.ones_like(ids)).hidden_states
    found["text encoded"] = {"ms": round((time.perf_counter() - began) * 1e3, 1), **memory.figures()}
    for number in range(given.repeats):
        began = time.perf_counter()
        timings = generate(client, loans, texts, given)
        found[f"generation {number + 1}"] = {
            "ms": round((time.perf_counter() - began) * 1e3, 1),
            "step_ms": round(timings["steps"] / given.steps, 1),
            "decode_ms": round(timings["decode"], 1),
            **memory.figures(),
            "gpu_gib": gpu_gib(),
        }
        report.add(**{title: found})
    for loan in loans.values():
        loan.return_()
    found["all returned"] = memory.figures() | {"gpu_gib": gpu_gib()}
    report.add(**{title: found})
    columns = list(dict.fromkeys(column for each in found.values() for column in each))
    rows = [(name, *(str(each.get(column, "")) for column in columns)) for name, each in found.items()]
    print_table(title, [("", *columns), *rows])


def generate(
    client: Client, loans: dict[str, Loan], texts: torch.Tensor, given: argparse.Namespace
) -> dict[str, float]:
    """Generate a video of which half of the steps run in each transformer; return the workers' times by phase."""
    width, height, frames = (96, 64, 9) if given.small else (832, 480, given.frames)
    # Ever less noise, without a shift: half of the times are below the boundary.
    sigmas = [1 - step / given.steps for step in range(given.steps)]
    result = client.generate(
        loans["transformer"],
        {"prompt_embeds": texts[:1], "negative_prompt_embeds": texts[1:]},
        vae=loans["vae"],
        transformer_2=loans["transformer_2"],
        height=height,
        width=width,
        frames=frames,
        steps=given.steps,
        sigmas=sigmas,
        guidance_scale=4.0,
        options={"boundary_ratio": 0.55},
        seed=0,
    ).result()
    return result.timings_ms


def gpu_gib() -> float:
    """Return the memory in use of the fullest GPU, by every process."""
    return round(max(gpu_memory_used(), default=0) / GIB, 2)
