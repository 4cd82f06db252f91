"""A program, not a test: captured fused blocks with LoRAs on one or more GPUs; writes what was found as JSON.

python loras_on_gpus.py OUT_FOLDER RANKS
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from inputs import GUIDANCE, job

STEPS = 2
CASE = (33, 192, 192, 1)
LORAS, SWITCHES = 20, 200


class Model:
    """A model with plugged weights, and LoRAs of all its blocks. ``acceleration`` is the setting."""

    def __init__(self, layout: Any, acceleration: str, state: dict[str, torch.Tensor]) -> None:
        from xditd.gpu_workers.models.entries import TensorInfo
        from xditd.gpu_workers.models.lora_binding import LentLora
        from xditd.gpu_workers.models.lora_variants import LoraCounters
        from xditd.gpu_workers.models.model_cache import ModelCache

        cache = ModelCache(dataclasses.replace(layout, acceleration=acceleration))
        match = cache.match({name: TensorInfo.of(tensor) for name, tensor in state.items()})
        self.model: Any = match.model
        self.bound = match.bind(state)
        self.model.plug(self.bound, "a", match.by_canonical_name(state))
        self.counters, self.given = LoraCounters(), job(*CASE)
        self.lent: dict[str, LentLora] = {}

    def lend(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        from xditd.client.loras.lending import describe_lora
        from xditd.gpu_workers.models.lora_binding import LentLora

        offer = describe_lora(tensors)
        self.lent[name] = LentLora(name, offer.manifest.lora)
        self.lent[name].plug(dict(tensors), name)
        offer.close()

    def run(self, *uses: Any) -> torch.Tensor:
        """Generate as a job does; a use is a name with a strength, and with those of later steps."""
        from direct_jobs import generate

        from xditd.gpu_workers.models.lora_variants import prepare_variant
        from xditd.ipc.job_parts import LoraUse, StepStrength

        named = [
            LoraUse(
                component_id=name,
                strength=strength,
                later=tuple(StepStrength(step=step, strength=value) for step, value in later),
            )
            for name, strength, *later in uses
        ]
        variant = prepare_variant(self.model, named, self.lent.__getitem__, self.counters)
        given = {**self.given, "pooled": self.given["pooled"].clone()}  # as a job: nothing is kept of it
        found = generate(self.model, **given, steps=STEPS, guidance_scale=GUIDANCE, switched_on=variant)
        self.model.paths.decide()
        return found

    def counts(self) -> dict[str, int]:
        counts = self.model.lora_memory.counts
        return {name: getattr(counts, name) for name in ("forwards", "launched", "layouts", "copies")}


def run_rank(rank: int, ranks: int, folder: str) -> None:
    import lora_files

    from xditd.client.demo import checkpoints
    from xditd.gpu_workers.process import xfuser_start

    gpu = torch.device("cuda", rank)
    layout = xfuser_start.start(rank, ranks, f"{folder}/store", gpu, kernels="fused")
    state = {
        name: tensor.to(gpu)
        for name, tensor in checkpoints.flux1_state_dict(
            0, heads=4, double_blocks=2, single_blocks=2, dtype=torch.bfloat16
        ).items()
    }
    shapes = lora_files.matrices(state)
    made = [
        {
            name: tensor.to(gpu)
            for name, tensor in lora_files.make(
                shapes, "kohya", number, ranks=(16, 9, 12), dtype=torch.bfloat16, size=0.3
            ).tensors.items()
        }
        for number in range(LORAS)
    ]
    facts: dict[str, Any] = {}
    eager, captured = Model(layout, "eager", state), Model(layout, "captured", state)
    for model in (eager, captured):
        model.lend("first", made[0])
        model.lend("second", made[1])
    plain = captured.run()
    captured.run()
    facts["plain"] = torch.equal(captured.run(), plain)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()

    first = captured.run(("first", 0.8))
    facts["graph"] = torch.equal(captured.run(("first", 0.8)), first)
    facts["after two jobs"] = captured.counts()
    cases = {
        "same": (("first", 0.8),),
        "other strength": (("first", -0.4),),
        "other LoRA": (("second", 0.6),),
        "by step": (("first", 0.5, (1, -0.7)),),
        "begins later": (("first", 0.0, (1, 0.9)),),
    }
    facts["cases"] = {}
    for label, uses in cases.items():
        found = captured.run(*uses)
        facts["cases"][label] = {
            "error": distance(found, eager.run(*uses)),
            "moved": distance(found, plain),
            "same bits twice": torch.equal(found, captured.run(*uses)),
        }
    facts["after switches"] = captured.counts()
    facts["reports"] = [[each.path, each.shapes.split(":")[0]] for each in captured.model.paths.take_reports()]
    both = (("first", 0.4), ("second", -0.3))
    facts["both"] = [distance(captured.run(*both), eager.run(*both)) for _ in range(3)]
    facts["without, between"] = torch.equal(captured.run(), plain)

    for number, tensors in enumerate(made):
        captured.lend(f"lora {number}", tensors)
    expected = {number: captured.run((f"lora {number}", 0.7)) for number in range(LORAS)}
    layouts, size = captured.counts()["layouts"], captured.model.lora_memory.nbytes
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    wrong = 0
    for turn in range(SWITCHES):
        number = 7 * turn % LORAS
        wrong += not torch.equal(captured.run((f"lora {number}", 0.7)), expected[number])
    torch.cuda.synchronize()
    facts["switches"] = {
        "wrong": wrong,
        "layouts": captured.counts()["layouts"] - layouts,
        "memory": captured.model.lora_memory.nbytes - size,
        "allocated": torch.cuda.memory_allocated() - allocated,
        "slowest_ms": captured.counters.slowest_switch_ms,
    }
    facts["copy_ms"] = copy_ms(captured)
    del found, first, expected
    for lent in (*captured.lent.values(), *eager.lent.values()):
        lent.unplug()
    gc.collect()
    torch.cuda.synchronize()
    facts["left"] = {
        "memory": captured.model.lora_memory.nbytes,
        "allocated": torch.cuda.memory_allocated() - before,
        "plain": torch.equal(captured.run(), plain),
    }
    captured.bound.clear()
    captured.model.paths.close()
    if rank == 0:
        Path(folder, "facts.json").write_text(json.dumps(facts))
    xfuser_start.stop()


def copy_ms(model: Model) -> float:
    """Return the milliseconds of the GPU for a switch, without the bytes of a model of full size."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    layout = next(reversed(model.model.module.fused.loras._static._layouts.values()))
    copies, scales = next(iter(layout._plans.values()))
    events[0].record()
    copies.run([0.5] * len(scales))
    events[1].record()
    events[1].synchronize()
    layout._holds = None
    return events[0].elapsed_time(events[1])


def distance(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.float() - expected.float()).norm() / expected.float().norm())


if __name__ == "__main__":
    count = int(sys.argv[2])
    torch.multiprocessing.spawn(run_rank, (count, sys.argv[1]), nprocs=count)
