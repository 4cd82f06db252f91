"""A program, not a test: run the fused kernels in Triton's interpreter on the CPU, and write what was found as JSON.

python interpreted.py OUT_FILE STORE_FILE

Triton reads ``TRITON_INTERPRET`` when it is imported, so this needs a process of its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import msgspec
import torch
from inputs import GUIDANCE, job, reference_latents

ALIKE = (1.0, 0.9999)


def whole_model(store: str) -> dict[str, Any]:
    """Denoise with fused blocks, and compare with plain diffusers; then zero every tensor once."""
    from xditd.client.demo import checkpoints
    from xditd.gpu_workers.families.flux1 import reference
    from xditd.gpu_workers.models.entries import TensorInfo
    from xditd.gpu_workers.models.model_cache import ModelCache
    from xditd.gpu_workers.process import xfuser_start

    layout = dataclasses.replace(xfuser_start.start(0, 1, store, torch.device("cpu")), fused_attention="SDPA")
    from direct_jobs import generate

    found: dict[str, Any] = {"parity": {}, "check": {}, "unmoved": []}
    cache = ModelCache(layout)
    for label, has_guidance, blocks, (tokens, height, width, batch) in (
        ("dev", True, 1, (5, 32, 32, 1)),
        ("schnell", False, 2, (4, 48, 16, 2)),
    ):
        state = checkpoints.flux1_state_dict(1, guidance=has_guidance, double_blocks=blocks, single_blocks=blocks)
        match = cache.match({name: TensorInfo.of(tensor) for name, tensor in state.items()})
        lent = match.model
        lent.plug(match.bind(state), "a", match.by_canonical_name(state))
        given = job(tokens, height, width, batch)
        result = generate(lent, **given, steps=2, guidance_scale=GUIDANCE)
        model = reference.transformer_from(state)
        found["parity"][label] = reference.relative_error(result, reference_latents(model, given, steps=2))
        check = lent.module.fused.check
        if has_guidance:
            found["at once"] = steps_at_once(lent)
            given = job(3, 16, 32, 1)
            before = generate(lent, **given, steps=1)
            for name, tensor in state.items():
                kept = tensor.clone()
                tensor.zero_()
                # Of a prompt of its own, as a job has it: for the same one modulations are kept.
                after = generate(lent, **{**given, "pooled": given["pooled"].clone()}, steps=1)
                tensor.copy_(kept)
                if reference.relative_error(after, before) < 1e-5:
                    found["unmoved"].append(name)
            found["cached"] = cached(lent, given)
            found["not finite"] = not_finite(lent, state)
            found["controls"] = with_controls(cache, lent, state)
            found["loras"] = with_loras(lent, state)
            found["foreseen"] = foreseen(lent)
        found["check"][label] = {
            "refused": check.is_refused,
            "passed": len(check._passed),
            "checks": [msgspec.to_builtins(check) for check in cache.take_checks()],
        }
        lent.unplug()
        found["check"][label]["plugged after unplug"] = lent.module.fused.is_loaded
        gapped = {name: torch.stack([tensor, tensor], -1)[..., 0] for name, tensor in state.items()}
        lent.plug(match.bind(gapped), "gapped", match.by_canonical_name(gapped))
        found["gapped"] = {
            "plugged": lent.module.fused.is_loaded,
            "error": reference.relative_error(
                generate(lent, **given, steps=1), reference_latents(model, given, steps=1)
            ),
        }
    found["half"] = half_precision(layout)
    found["epsilons"] = epsilons(layout)
    xfuser_start.stop()
    return found


def with_controls(cache: Any, lent: Any, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Run ControlNets on fused blocks, and compare with diffusers' classes; and on plain blocks, after a fault."""
    from direct_jobs import DirectControls, generate
    from flux1_controlnets import MODES, comfyui_state

    from xditd.gpu_workers.families.flux1 import reference
    from xditd.gpu_workers.models.entries import TensorInfo

    given, found = job(3, 16, 32, 2), {"errors": {}, "moved": []}
    alone = generate(lent, **given, steps=1)
    check, others = lent.module.fused.control_check, dict(lent.module.fused.check._passed)
    uses: list[Any] = []
    for number, (modes, single) in enumerate(((MODES, 1), (0, 0))):
        control = comfyui_state(number, modes=modes, double_blocks=1, single_blocks=single)
        match = cache.match({name: TensorInfo.of(tensor) for name, tensor in control.items()})
        match.model.plug(match.bind(control))
        latents = torch.randn(2, 16, 2, 4, generator=torch.Generator().manual_seed(number))
        uses.append((match.model, latents, 1 if modes else None, 0.5))
    for label, each in (("union", uses[:1]), ("double blocks alone", uses[1:]), ("both", uses)):
        result = generate(lent, **given, steps=1, controls=DirectControls.of(*each))
        kept, lent.module.fused = lent.module.fused, None
        plain = generate(lent, **given, steps=1, controls=DirectControls.of(*each))
        lent.module.fused = kept
        found["errors"][label] = reference.relative_error(result, plain)
        found["moved"].append(reference.relative_error(result, alone))
    found["checked"] = [[each.kernels, each.case, each.is_used] for each in check.take_checks()]
    found["counted apart"] = others == lent.module.fused.check._passed
    found["as before"] = torch.equal(generate(lent, **given, steps=1), alone)
    return found


def with_loras(lent: Any, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Run LoRAs on fused blocks, and compare with plain diffusers that have them in their weights."""
    import lora_files
    from direct_jobs import generate

    from xditd.client.loras.lending import describe_lora
    from xditd.gpu_workers.families.flux1 import reference
    from xditd.gpu_workers.models.lora_binding import LentLora
    from xditd.gpu_workers.models.lora_variants import LoraCounters, prepare_variant
    from xditd.ipc.job_parts import LoraUse

    given, counters = job(3, 16, 32, 1), LoraCounters()
    kohya = lora_files.make(lora_files.matrices(state), "kohya", 1)
    of_class = lora_files.matrices(reference.transformer_from(dict(state)).state_dict())
    diffusers = lora_files.make(of_class, "diffusers", 2, ranks=(2, 5))
    lent_loras: dict[str, LentLora] = {}
    for name, lora in (("kohya", kohya), ("diffusers", diffusers)):
        offer = describe_lora(lora.tensors)
        lent_loras[name] = LentLora(name, offer.manifest.lora)
        lent_loras[name].plug(dict(lora.tensors), name)
        offer.close()

    def run(*uses: tuple[str, float]) -> torch.Tensor:
        named = [LoraUse(component_id=name, strength=strength) for name, strength in uses]
        variant = prepare_variant(lent, named, lent_loras.__getitem__, counters)
        with variant.switched_on():
            return generate(lent, **given, steps=2, guidance_scale=GUIDANCE, loras=variant.begin_step())

    def expected(*uses: tuple[str, float]) -> torch.Tensor:
        strengths = dict(uses)
        module = reference.transformer_from(kohya.baked_into(state, strengths.get("kohya", 0.0)))
        diffusers.bake_into(module, strengths.get("diffusers", 0.0))
        return reference_latents(module, given, steps=2)

    alone = run()
    cases: dict[str, tuple[tuple[str, float], ...]] = {
        "kohya": (("kohya", 0.8),),
        "of the same prompt, another strength": (("kohya", -0.3),),
        "diffusers": (("diffusers", 0.5),),
        "both": (("kohya", 0.4), ("diffusers", -0.6)),
    }
    fused = {label: run(*uses) for label, uses in cases.items()}
    check, others = lent.module.fused.lora_check, dict(lent.module.fused.check._passed)
    found: dict[str, Any] = {
        "errors": {label: reference.relative_error(fused[label], expected(*uses)) for label, uses in cases.items()},
        "moved": min(reference.relative_error(each, alone) for each in fused.values()),
        "as before": torch.equal(run(), alone),
        "checked": [[each.kernels, each.case, each.is_used] for each in check.take_checks()],
        "counted apart": others == lent.module.fused.check._passed,
        "takes": lent.lora_detail,
    }
    found["captured"] = captured_with_loras(lent, run, {uses: fused[label] for label, uses in cases.items()}, alone)
    check.is_refused = True  # as after a fault: plain blocks run with LoRAs, and fused ones without
    found["refused"] = reference.relative_error(run(*cases["both"]), expected(*cases["both"]))
    found["as before, too"] = torch.equal(run(), alone)
    check.is_refused = False
    known = [weakref.ref(lent_lora.bind(lent)) for lent_lora in lent_loras.values()]
    for lent_lora in lent_loras.values():
        lent_lora.unplug()
    found["captured"]["left"] = lent.lora_memory.nbytes
    found["captured"]["cases left"] = sum(key[1].layout > 0 for cases in lent.paths._cases.values() for key in cases)
    found["still referenced"] = sum(each() is not None for each in known)
    return found


def captured_with_loras(
    lent: Any, run: Any, expected: dict[tuple[tuple[str, float], ...], torch.Tensor], alone: torch.Tensor
) -> dict[str, Any]:
    """Run LoRAs as on a GPU, where forwards are captured; here a graph is the forward itself, with no LoRA on."""
    from xditd.gpu_workers.families.flux1 import reference

    chooser, counts = lent.paths._chooser, lent.lora_memory.counts
    before = chooser._try_capture

    def capture(last: Any) -> Any:
        return SimpleNamespace(run=last.forward, replay_last=lambda: last.forward(last.arguments), memory_bytes=0), ""

    chooser.captures, chooser._try_capture = True, capture
    found: dict[str, Any] = {"eager without": counts.layouts, "errors": [], "launched": []}
    kohya, other, _, both = expected
    for uses in (kohya, other, kohya, both):
        launched = counts.launched
        found["errors"].append(reference.relative_error(run(*uses), expected[uses]))
        found["launched"].append(counts.launched - launched)
        lent.paths.decide()
    found["copies"], found["layouts"], found["refusal"] = counts.copies, counts.layouts, counts.refusal
    found["reports"] = [[each.path, each.shapes.split(":")[0]] for each in lent.paths.take_reports()]
    found["as before"] = torch.equal(run(), alone)
    chooser.captures, chooser._try_capture = False, before
    return found


def not_finite(lent: Any, state: dict[str, torch.Tensor]) -> dict[str, bool]:
    """Run a size for the first time with a weight that is NaN, and again with a sound one."""
    from direct_jobs import generate

    check, given = lent.module.fused.check, job(2, 32, 16, 1)
    kept = state["img_in.bias"].clone()
    state["img_in.bias"][3] = torch.nan
    broken = generate(lent, **given, steps=1)
    judged = len(check._passed)
    state["img_in.bias"].copy_(kept)
    sound = generate(lent, **given, steps=1)
    found = {
        "result is NaN": bool(broken.isnan().any()),
        "sound one is finite": bool(sound.isfinite().all()),
        "judged by it": len(check._passed) != judged + 1,
        "refused": check.is_refused,
    }
    check._passed.pop((2, given["height"] * given["width"] // 256), None)
    return found


def half_precision(layout: Any) -> dict[str, float | bool]:
    """Generate in bfloat16 as ComfyUI rounds: modulations of all steps at once and of each alone, and plain modules."""
    from direct_jobs import generate

    from xditd.client.demo import checkpoints
    from xditd.gpu_workers.families.flux1 import reference
    from xditd.gpu_workers.models.entries import TensorInfo
    from xditd.gpu_workers.models.model_cache import ModelCache

    state = checkpoints.flux1_state_dict(1, double_blocks=1, single_blocks=1, dtype=torch.bfloat16)
    match = ModelCache(layout).match({name: TensorInfo.of(tensor) for name, tensor in state.items()})
    lent = match.model
    lent.plug(match.bind(state), "half", match.by_canonical_name(state))
    given, sigmas = job(3, 16, 32, 1), (0.9871, 0.7313, 0.4457)

    def run(variant: str, *, is_foreseen: bool = True) -> torch.Tensor:
        return generate(lent, **given, steps=len(sigmas), sigmas=sigmas, variant=variant, is_foreseen=is_foreseen)

    at_once, alone = run("float32_time"), run("float32_time", is_foreseen=False)
    fused = lent.module.fused
    lent.module.fused = None
    plain, rounded = run("float32_time"), run("class")
    return {
        "same bits": torch.equal(at_once, alone),
        "refused": fused.check.is_refused,
        "error": reference.relative_error(at_once, plain),
        "apart": reference.relative_error(rounded, plain),
    }


def epsilons(layout: Any) -> dict[str, float]:
    """Generate in both variants, where queries and keys are so small that the epsilon of their norms counts."""
    from direct_jobs import generate

    from xditd.client.demo import checkpoints
    from xditd.gpu_workers.families.flux1 import reference
    from xditd.gpu_workers.models.entries import TensorInfo
    from xditd.gpu_workers.models.model_cache import ModelCache

    state = {
        name: each * 1e-3 if ".qkv." in name or ".linear1." in name else each
        for name, each in checkpoints.flux1_state_dict(1, double_blocks=1, single_blocks=1).items()
    }
    match = ModelCache(layout).match({name: TensorInfo.of(each) for name, each in state.items()})
    lent = match.model
    lent.plug(match.bind(state), "small", match.by_canonical_name(state))
    fused, made = lent.module.fused, {}
    for variant in ("class", "float32_time"):
        for blocks in (fused, None):
            lent.module.fused = blocks
            made[variant, blocks is fused] = generate(lent, **job(3, 16, 32, 1), steps=2, variant=variant)
    return {
        "class": reference.relative_error(made["class", True], made["class", False]),
        "float32_time": reference.relative_error(made["float32_time", True], made["float32_time", False]),
        "apart": reference.relative_error(made["class", False], made["float32_time", False]),
    }


def steps_at_once(lent: Any) -> dict[str, bool]:
    """Generate with modulations of all steps, of two at a time, and of each alone; say whether bits are the same."""
    from direct_jobs import generate

    from xditd.gpu_workers.families.flux1 import modulations

    given = job(3, 16, 32, 2)
    alone = generate(lent, **given, steps=5, is_foreseen=False)
    found = {}
    usual = modulations.MAX_VECTORS
    for label, ahead in (("all", usual), ("two", 4)):
        modulations.MAX_VECTORS = ahead
        pooled = given["pooled"].clone()  # so that nothing is kept of it
        found[label] = torch.equal(generate(lent, **{**given, "pooled": pooled}, steps=5), alone)
    modulations.MAX_VECTORS = usual
    return found


def foreseen(lent: Any) -> dict[str, Any]:
    """Run forwards whose sigmas are foreseen and others, twice; say whether bits are the same and what was computed."""
    from direct_jobs import denoise

    from xditd.gpu_workers.kernels import triton_kernels

    modulator, given = lent.module.fused._modulator, job(3, 16, 32, 2)
    pooled, other = given["pooled"], given["pooled"] + 1
    sigmas, counts = (1.0, 0.75, 0.5, 0.25, 0.0), []
    multiply = triton_kernels.multiply_vectors

    def count(weights: Any, biases: Any, vectors: torch.Tensor, rows: int) -> torch.Tensor:
        counts.append(len(vectors))
        return multiply(weights, biases, vectors, rows)

    def run(sigma: float, pooled: torch.Tensor, foreseen: dict[str, Any], variant: str = "class") -> torch.Tensor:
        return denoise(
            lent,
            latents=given["noise"],
            timestep=torch.full((2,), sigma),
            prompt_embeds=given["prompt_embeds"],
            pooled=pooled,
            guidance=torch.full((2,), GUIDANCE),
            foreseen=foreseen,
            variant=variant,
        )

    found: dict[str, Any] = {"same bits": True, "vectors": []}
    triton_kernels.multiply_vectors = count
    # The first alone, the others at once; a sigma between them, another prompt, another guidance: each by itself.
    walk = [(1.0, pooled), (0.75, pooled), (0.6, pooled), (0.5, pooled), (0.25, other)]
    for sigma, given_pooled in [*walk, (1.0, pooled), (0.25, pooled)]:
        counts.clear()
        result = run(sigma, given_pooled, {"timestep": sigmas})
        found["vectors"].append(sum(counts) // 2)
        found["same bits"] &= torch.equal(result, run(sigma, given_pooled, {}))
    triton_kernels.multiply_vectors = multiply
    found["kept"] = modulator.kept
    counts.clear()
    triton_kernels.multiply_vectors = count
    run(0.25, pooled, {"timestep": sigmas}, "float32_time")
    triton_kernels.multiply_vectors = multiply
    found["vectors of the other variant"] = sum(counts) // 2
    lent.unplug()
    found["left"] = modulator.kept
    return found


def cached(lent: Any, given: dict[str, Any]) -> dict[str, float]:
    """Spare steps of a job on fused blocks and on plain ones; the error is that of one against the other."""
    from direct_jobs import generate

    from xditd.gpu_workers.families.flux1 import reference
    from xditd.gpu_workers.models.step_cache import StepCache

    def run(cache: StepCache | None) -> torch.Tensor:
        return generate(lent, **given, steps=len(ALIKE), sigmas=ALIKE, step_cache=cache)

    fused, plain = StepCache(0.1), StepCache(0.1)
    result, whole = run(fused), run(None)
    kept, lent.module.fused = lent.module.fused, None
    expected = run(plain)
    lent.module.fused = kept
    return {
        "fused": fused.reused,
        "plain": plain.reused,
        "error": reference.relative_error(result, expected),
        "cost": reference.relative_error(result, whole),
    }


def exchange_of_two() -> dict[str, float]:
    """Let two ranks' kernels run in turn on buffers of this process, and compare with one rank's attention."""
    from xditd.gpu_workers.kernels import triton_kernels

    ranks, heads, rows, text = 2, 4, 6, 2
    width = heads * triton_kernels.HEAD_SIZE
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    qkv = [random(rows, 3 * width) for _ in range(ranks)]
    norms = tuple(random(triton_kernels.HEAD_SIZE) for _ in range(4))
    angles = [(random(rows, 64), random(rows, 64)) for _ in range(ranks)]
    received = [torch.full((3, ranks * rows, width // ranks), float("nan")) for _ in range(ranks)]
    tokens = [torch.full((rows, width), float("nan")) for _ in range(ranks)]
    flags = [torch.zeros(ranks, dtype=torch.int64) for _ in range(ranks)]

    def bases(buffers: list[torch.Tensor]) -> torch.Tensor:
        return torch.tensor([buffer.data_ptr() for buffer in buffers])

    for rank in range(ranks):
        triton_kernels.norm_and_rotate(
            qkv[rank], heads=heads, norms=norms, angles=angles[rank], text_rows=text,
            bases=bases(received), first_row=rank * rows, all_rows=ranks * rows,
        )  # fmt: skip
    for buffer in flags:
        buffer.fill_(7)
    flags[0][0] = 6  # this rank has not come yet
    triton_kernels.barrier(bases=bases(flags), rank=0)
    assert all(int(buffer[0]) == 7 for buffer in flags)
    for rank in range(ranks):
        triton_kernels.send_rows(received[rank][0].contiguous(), bases=bases(tokens), rank=rank, rows_a_rank=rows)
    for rank in range(ranks):
        triton_kernels.norm_and_rotate(qkv[rank], heads=heads, norms=norms, angles=angles[rank], text_rows=text)
    alone = torch.cat(qkv).view(ranks * rows, 3, ranks, width // ranks)
    sent = max(float((received[rank].transpose(0, 1) - alone[:, :, rank]).abs().max()) for rank in range(ranks))
    returned = float((torch.cat(tokens) - alone[:, 0].flatten(1)).abs().max())
    return {"sent": sent, "returned": returned}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps({"model": whole_model(sys.argv[2]), "exchange": exchange_of_two()}))
