"""A program, not a test: run one rank on the first GPU and write what was found as JSON.

python one_gpu.py OUT_FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

GUIDANCE = 3.5
BF16 = torch.bfloat16


def job(tokens: int, height: int, width: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens)
    return {
        "prompt_embeds": torch.randn(1, tokens, 4096, generator=generator),
        "pooled": torch.randn(1, 768, generator=generator),
        "noise": torch.randn(1, 16, height // 8, width // 8, generator=generator),
        "height": height,
        "width": width,
    }


def main(folder: str) -> None:
    sys.path.append(str(Path(__file__).parents[2] / "checkpoints"))
    from text_checkpoints import clip_l_state_dict, t5_state_dict

    from xditd.client.demo import checkpoints
    from xditd.gpu_workers.families.flux1 import reference
    from xditd.gpu_workers.models.model_cache import ModelCache
    from xditd.gpu_workers.process import xfuser_start

    gpu = torch.device("cuda", 0)
    layout = xfuser_start.start(0, 1, f"{folder}/store", gpu)
    import direct_jobs

    from xditd.gpu_workers.models.checkpoint_order import CheckpointOrderNorm

    facts: dict[str, Any] = {"attention": layout.attention_backend}
    cache = ModelCache(layout)

    cpu_cache = ModelCache(dataclasses.replace(layout, device=torch.device("cpu")))

    def parity(state: dict[str, torch.Tensor], given: dict[str, Any], steps: int) -> dict[str, Any]:
        cached = direct_jobs.plugged(cache, state)
        model = reference.transformer_from(state)
        renamed = {"pooled_prompt_embeds" if name == "pooled" else name: value for name, value in given.items()}
        expected = reference.reference_latents(model, **renamed, steps=steps, guidance_scale=GUIDANCE)
        found: dict[str, Any] = {}
        own = cached.layout
        for backend in dict.fromkeys((own.attention_backend, "SDPA")):
            cached.layout = dataclasses.replace(own, attention_backend=backend)
            results = [direct_jobs.generate(cached, **given, steps=steps) for _ in range(2)]
            found[backend] = {
                "error": reference.relative_error(results[0], expected),
                "same bits as plain": torch.equal(results[0], expected),
                "same bits twice": torch.equal(*results),
            }
        cached.layout = own
        return found

    demo = {name: tensor.to(gpu) for name, tensor in checkpoints.flux1_state_dict(0).items()}
    facts["float32 demo"] = parity(demo, job(15, 112, 112), 4)
    wide = {
        name: tensor.to(gpu)
        for name, tensor in checkpoints.flux1_state_dict(
            0, heads=24, double_blocks=1, single_blocks=1, dtype=BF16
        ).items()
    }
    facts["bfloat16 full width"] = parity(wide, job(512, 1024, 1024), 2)

    vae = {name: tensor.to(gpu) for name, tensor in checkpoints.flux_vae_state_dict(0).items()}
    cached = direct_jobs.plugged(cache, vae)
    model = reference.vae_from(vae)
    latents = torch.randn(1, 16, 14, 14, generator=torch.Generator().manual_seed(0))
    image = direct_jobs.decode(cached, latents).clamp(-1.0, 1.0)
    facts["decode error"] = reference.relative_error(image, reference.reference_decode(model, latents))
    facts["encode error"] = reference.relative_error(
        direct_jobs.encode(cached, image), reference.reference_encode(model, image)
    )

    # Against this rank's own modules on the CPU, which other tests hold to the bits of transformers.
    for encoder, state, tokens in (
        ("clip_l", clip_l_state_dict(3, vocabulary=300), 77),
        ("t5", t5_state_dict(3, vocabulary=300), 301),
    ):
        ids = torch.randint(0, 300, (2, tokens), generator=torch.Generator().manual_seed(0))
        on_cpu = direct_jobs.encode_text(direct_jobs.plugged(cpu_cache, state), ids)[0]
        uploaded = {name: tensor.to(gpu) for name, tensor in state.items()}
        on_gpu = direct_jobs.encode_text(direct_jobs.plugged(cache, uploaded), ids)[0]
        facts[f"{encoder} error"] = reference.relative_error(on_gpu.cpu(), on_cpu)

    # Waits for the GPU: the same number however many steps there are.
    cached = direct_jobs.plugged(cache, wide)
    given = {n: v.to(gpu) if isinstance(v, torch.Tensor) else v for n, v in job(64, 256, 256).items()}
    direct_jobs.generate(cached, **given, steps=1)
    waits = {}
    for steps in (2, 6):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            direct_jobs.generate(cached, **given, steps=steps)
            torch.cuda.set_sync_debug_mode("default")
        waits[str(steps)] = sum("synchroniz" in str(warning.message) for warning in caught)
    facts["waits by steps"] = waits

    torch.manual_seed(0)
    for dtype in (torch.float32, BF16):
        norm = CheckpointOrderNorm(3072, 3072, elementwise_affine=False, eps=1e-6).to(gpu, dtype)
        plain = type(norm).__bases__[0](3072, 3072, elementwise_affine=False, eps=1e-6).to(gpu, dtype)
        for mine, theirs in zip(norm.parameters(), plain.parameters(), strict=True):
            mine.data.copy_(torch.cat(theirs.data.chunk(2)[::-1]))
        tokens = torch.randn(1, 4096, 3072, dtype=dtype, device=gpu)
        conditioning = torch.randn(1, 3072, dtype=dtype, device=gpu)
        with torch.no_grad():
            same = torch.equal(norm(tokens, conditioning), plain(tokens, conditioning))
        facts[f"last norm has the same bits in {dtype}"] = same

    Path(folder, "facts.json").write_text(json.dumps(facts, indent=1))
    xfuser_start.stop()


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1] / "support"))
    main(sys.argv[1])
