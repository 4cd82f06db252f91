"""LoRAs on a GPU, on fused and on plain blocks: against the same LoRAs baked into the weights."""

from __future__ import annotations

import lora_files
import pytest
import torch
from lora_files import matrices
from packed_checkpoints import pack

from xditd.client import Client
from xditd.client.arenas import Arena
from xditd.client.demo import checkpoints

pytestmark = pytest.mark.gpu

BAR = 0.02
"""In bfloat16, of the norm of one forward: merged weights are rounded, too."""


@pytest.fixture(scope="module")
def daemon(start_daemon):
    """One worker on the first GPU."""
    started = start_daemon(1, "cuda")
    started.wait_ready()
    yield started
    started.stop()


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return checkpoints.flux1_state_dict(1)


def velocity(client: Client, component: object) -> torch.Tensor:
    """One forward, at a time and a guidance that bfloat16 does not round."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(8, 8, 3)
    ids[..., 1] += torch.arange(8)[:, None]
    ids[..., 2] += torch.arange(8)[None]
    given = {
        "hidden_states": torch.randn(1, 64, 64, generator=generator).bfloat16(),
        "encoder_hidden_states": torch.randn(1, 12, 4096, generator=generator).bfloat16(),
        "pooled_projections": torch.randn(1, 768, generator=generator).bfloat16(),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([4.0]),
        "img_ids": ids.reshape(64, 3),
        "txt_ids": torch.zeros(12, 3),
    }
    return client.call(component, given)[0].float()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("base", ["bfloat16", "int8_convrot", "float8"])
def test_one_and_two_loras_are_as_baked(client, state, base):
    loras = [lora_files.make(matrices(state), "kohya", seed, ranks=(16, 3), size=0.2) for seed in (1, 2)]
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    packed = None if base == "bfloat16" else pack(state, base, torch.bfloat16)
    source, meant = (half, half) if packed is None else (packed.tensors, packed.meant)
    both = loras[1].baked_into(loras[0].baked_into(meant, 0.8), -0.5)
    arena = Arena.copy_of({name: tensor.bfloat16() for name, tensor in loras[0].tensors.items() if tensor.ndim}, "cuda")
    on_gpu = arena.tensors | {name: tensor for name, tensor in loras[0].tensors.items() if not tensor.ndim}
    expected = {}
    for count, baked in ((0, meant), (1, loras[0].baked_into(meant, 0.8)), (2, both)):
        with client.lend(baked) as loan:
            expected[count] = velocity(client, loan)
    with client.lend(source) as loan, client.lend_lora(on_gpu) as first, client.lend_lora(loras[1].tensors) as second:
        assert "cuda_ipc" in {tier.value for tier in first.tiers}
        alone = velocity(client, loan)
        uses = [(first, 0.8), (second, -0.5)]
        found = {count: velocity(client, loan.with_loras(uses[:count])) for count in (1, 2)}
        again = velocity(client, loan.with_loras(uses[:1]))
        assert torch.equal(velocity(client, loan), alone)
        status = client.status()
    noise = distance(alone, expected[0])  # products in eight bits round their inputs
    print({"base": base, "noise": noise, **{count: distance(found[count], expected[count]) for count in (1, 2)}})
    assert distance(found[1], expected[1]) <= BAR + 2 * noise
    assert distance(found[2], expected[2]) <= BAR + 2 * noise
    assert torch.equal(again, found[1])
    assert distance(expected[0], expected[1]) > 0.1 < distance(expected[1], expected[2])
    assert status.loras.last_switch_ms < 5.0
    assert all(each.is_used for each in status.fused_checks)
    arena.close()
