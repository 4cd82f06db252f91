"""A program, not a test: lend an arena on one GPU to two NCCL ranks and write their results.

    python two_gpus.py OUT_FOLDER FIRST_DEVICE SECOND_DEVICE

The first rank maps the arena, the second gets it from the first. Where both devices are one GPU, the second rank gives
itself another name, so that it takes the same path; NCCL has to allow that (``NCCL_MULTI_RANK_GPU_ENABLE=1``).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
from pathlib import Path

import torch

STEPS = 4
GUIDANCE = 3.5
ROUNDS = 2

# text tokens, pixels
CASES = {"all divide": (16, 128), "odd text": (15, 128), "odd text and image": (301, 112), "odd total": (16, 112)}


def inputs(tokens: int, pixels: int) -> dict[str, torch.Tensor]:
    """The conditioning and noise of a case, the same in every process."""
    generator = torch.Generator().manual_seed(tokens * 10_000 + pixels)
    return {
        "prompt_embeds": torch.randn(1, tokens, 4096, generator=generator),
        "pooled": torch.randn(1, 768, generator=generator),
        "noise": torch.randn(1, 16, pixels // 8, pixels // 8, generator=generator),
    }


def digest_of(tensors: dict[str, torch.Tensor]) -> str:
    """The bytes of all tensors, by name."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        flat = tensors[name].contiguous().view(-1).view(torch.uint8).cpu()
        found.update(name.encode())
        found.update(ctypes.string_at(flat.data_ptr(), flat.numel()))
    return found.hexdigest()


def run_rank(rank: int, devices: list[str], folder: str, prepare: bytes) -> None:
    from safetensors.torch import save_file

    from xditd.gpu_workers.process import xfuser_start
    from xditd.ipc.codec import command_decoder
    from xditd.ipc.transports.cuda_ipc import device_uuid
    from xditd.ipc.worker_messages import Prepare

    device = torch.device(devices[rank])
    layout = xfuser_start.start(rank, len(devices), f"{folder}/store", device)
    from direct_jobs import generate

    from xditd.gpu_workers.models.components import Components
    from xditd.gpu_workers.parallel.rank_sync import agree, gather_uuids

    name = device_uuid(device.index)
    if rank and devices[0] == devices[1]:
        name = "GPU-another"
    components = Components(layout, name, gather_uuids(name, layout.world_size))
    command = command_decoder.decode(prepare)
    if not isinstance(command, Prepare):
        raise SystemExit("not a Prepare")
    facts: dict[str, object] = {"is direct": components.gpu_copies.is_direct, "attention": layout.attention_backend}

    def free_bytes() -> int:
        """Free memory of this rank's own GPU, once every rank has come as far."""
        torch.cuda.synchronize(device)
        agree(True)
        free = torch.cuda.mem_get_info(device)[0]
        agree(True)
        return free

    # By the way of choice first: whatever a peer copy opens on the lender's GPU must not have been there before.
    for attempt, is_direct in {"chosen": components.gpu_copies.is_direct, "broadcast": False}.items():
        components.gpu_copies.is_direct = is_direct
        before = free_bytes()
        component = components.prepare(command.component_id, command.manifest, command.exporter)
        facts[f"{attempt}: taken"] = before - free_bytes()
        facts[f"{attempt}: peer_copy_ms"] = component.timings_ms["peer_copy"]
        facts[f"{attempt}: digest"] = digest_of(component.tensors)
        del component
        components.unmap(command.component_id)
        facts[f"{attempt}: left"] = before - free_bytes()
    components.gpu_copies.is_direct = bool(facts["is direct"])
    component = components.prepare(command.component_id, command.manifest, command.exporter)
    components.plug(command.component_id)
    results = {}
    for case, (tokens, pixels) in CASES.items():
        for attempt in range(ROUNDS):
            results[f"{case}/{attempt}"] = generate(
                component.match.model,
                **inputs(tokens, pixels),
                height=pixels,
                width=pixels,
                steps=STEPS,
                guidance_scale=GUIDANCE,
            )
    facts |= {"peer": component.copied.peer, "total": component.copied.total}
    components.close()
    save_file({name: tensor.cpu().contiguous() for name, tensor in results.items()}, f"{folder}/rank{rank}.safetensors")
    Path(folder, f"rank{rank}.json").write_text(json.dumps(facts))
    xfuser_start.stop()


def reference(state: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    """The same jobs in plain diffusers, in this process."""
    from xditd.gpu_workers.families.flux1 import reference as plain

    transformer = plain.transformer_from({name: tensor.to(device) for name, tensor in state.items()})
    found = {}
    for case, (tokens, pixels) in CASES.items():
        given = inputs(tokens, pixels)
        found[case] = plain.reference_latents(
            transformer,
            prompt_embeds=given["prompt_embeds"],
            pooled_prompt_embeds=given["pooled"],
            noise=given["noise"],
            height=pixels,
            width=pixels,
            steps=STEPS,
            guidance_scale=GUIDANCE,
        )
    return found


def main(folder: str, devices: list[str]) -> None:
    sys.path.append(str(Path(__file__).parents[1] / "support"))  # which spawned ranks get, too
    from safetensors.torch import save_file
    from torch import multiprocessing

    from xditd.client.arenas import Arena
    from xditd.client.demo import checkpoints
    from xditd.client.lending import describe
    from xditd.ipc.codec import encode
    from xditd.ipc.processes import identify
    from xditd.ipc.worker_messages import Prepare

    state = checkpoints.flux1_state_dict(1, dtype=torch.float32)
    arena = Arena.copy_of(state, devices[0])
    Path(folder, "lent.txt").write_text(digest_of(state))
    offer = describe(arena.tensors)
    command = Prepare(op_number=1, component_id="c", manifest=offer.manifest, exporter=identify(os.getpid()))
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=run_rank, args=(rank, devices, folder, encode(command))) for rank in range(len(devices))
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    expected = reference(state, devices[0])
    save_file({name: tensor.cpu().contiguous() for name, tensor in expected.items()}, f"{folder}/reference.safetensors")
    if any(process.exitcode for process in ranks):
        sys.exit(f"ranks ended with {[process.exitcode for process in ranks]}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
