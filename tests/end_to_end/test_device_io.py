"""Large tensors of calls stay on the GPU: the bits are those of the way through host memory, and all memory returns."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from xditd.client import BadRequest, Client, ForeignGpu, StaleSource
from xditd.client.device_blocks import DeviceBlock
from xditd.client.jobs import runner
from xditd.ipc import limits
from xditd.ipc.tensors import CudaIpcBlock, Fingerprint

MIB = 2**20
TOKENS, WIDTH, BATCH, LAYERS = 1024, 1024, 64, 4
"""A residual takes 128 MiB in bfloat16, and those of all layers 512 MiB."""
CONFIG = {
    "in_channels": 64,
    "num_layers": LAYERS,
    "num_single_layers": 0,
    "attention_head_dim": 128,
    "num_attention_heads": WIDTH // 128,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "guidance_embeds": False,
}
SIZES = [
    pytest.param(1, 0, id="one worker"),
    pytest.param(2, 0, id="two workers, the caller on the first GPU", marks=pytest.mark.multigpu),
    pytest.param(2, 1, id="two workers, the caller on the second GPU", marks=pytest.mark.multigpu),
]


def free_bytes(gpu: int) -> int:
    torch.cuda.synchronize(gpu)
    return torch.cuda.mem_get_info(gpu)[0]


def made(kind: str, device: torch.device) -> torch.nn.Module:
    import diffusers

    torch.manual_seed(0)
    with torch.device(device):
        module = getattr(diffusers, kind)(**CONFIG).bfloat16().eval().requires_grad_(False)
    for parameter in module.parameters():  # the projections of a ControlNet begin at zero
        torch.nn.init.normal_(parameter, std=0.02)
    return module


def inputs(device: torch.device, batch: int = BATCH, tokens: int = TOKENS) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)

    return {
        "hidden_states": random(batch, tokens, 64),
        "encoder_hidden_states": random(batch, 16, 64),
        "pooled_projections": random(batch, 64),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=torch.bfloat16),
        "img_ids": torch.zeros(tokens, 3, device=device),
        "txt_ids": torch.zeros(16, 3, device=device),
        "return_dict": False,
    }


def residuals(device: torch.device, batch: int = BATCH) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(2)
    shape = (batch, TOKENS, WIDTH)
    return [torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator) for _ in range(LAYERS)]


@pytest.fixture(scope="module")
def daemons(start_daemon: Callable[..., Any]) -> Iterator[Callable[[int], Any]]:
    started: dict[int, Any] = {}

    def get(workers: int) -> Any:
        if workers not in started:
            for each in list(started):
                started.pop(each).stop()
            started[workers] = start_daemon(workers, "cuda")
            started[workers].wait_ready()
        return started[workers]

    yield get
    for each in started.values():
        each.stop()


@pytest.fixture
def host_way(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Send all tensors through host memory from here on."""
    return lambda: monkeypatch.setattr(limits, "DEVICE_IO_FROM_BYTES", 2**60)


def idle(client: Client, gpu: int) -> list[DeviceBlock]:
    return client._pool.devices._idle.get(gpu, [])


@pytest.mark.gpu
@pytest.mark.parametrize(("workers", "gpu"), SIZES)
def test_arguments_of_512_mib_have_the_same_bits(
    daemons: Callable[[int], Any], host_way: Callable[[], None], workers: int, gpu: int
) -> None:
    device = torch.device("cuda", gpu)
    module = made("FluxTransformer2DModel", device)
    given = {**inputs(device), "controlnet_block_samples": residuals(device)}
    copies = [each.clone() for each in given["controlnet_block_samples"]]
    with daemons(workers).connect() as client, client.lend(module, as_class=True) as loan:
        results = [client.call(loan, given)[0] for _ in range(3)]
        assert [each.size_bytes >= 512 * MIB for each in idle(client, gpu)] == [True]
        host_way()
        (expected,) = client.call(loan, given)
    assert all(torch.equal(each, expected) for each in results)
    assert expected.device == device
    assert all(torch.equal(mine, its) for mine, its in zip(given["controlnet_block_samples"], copies, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("workers", "gpu"), SIZES)
def test_results_of_512_mib_have_the_same_bits(
    daemons: Callable[[int], Any], host_way: Callable[[], None], workers: int, gpu: int
) -> None:
    device = torch.device("cuda", gpu)
    module = made("FluxControlNetModel", device)
    given = {**inputs(device), "controlnet_cond": inputs(device)["hidden_states"]}
    with daemons(workers).connect() as client, client.lend(module, as_class=True) as loan:
        found = [client.call(loan, given)[0] for _ in range(3)]  # room for the results from the second call on
        assert max(each.size_bytes for each in idle(client, gpu)) >= 512 * MIB
        host_way()
        expected = client.call(loan, given)[0]
    for results in found:
        assert len(results) == len(expected) == LAYERS
        for result, wanted in zip(results, expected, strict=True):
            assert result.device == device
            assert torch.equal(result, wanted)


@pytest.mark.gpu
def test_memory_returns_when_blocks_are_replaced_and_when_the_client_closes(daemons: Callable[[int], Any]) -> None:
    device = torch.device("cuda", 0)
    daemon = daemons(1)
    module = made("FluxTransformer2DModel", device)

    def call(client: Client, loan: Any, batch: int) -> None:
        client.call(loan, {**inputs(device, batch), "controlnet_block_samples": residuals(device, batch)})
        torch.cuda.empty_cache()

    with daemon.connect() as client, client.lend(module, as_class=True) as loan:
        call(client, loan, BATCH)  # the workers' allocator has what it needs
    free = free_bytes(0)
    with daemon.connect() as client, client.lend(module, as_class=True) as loan:
        for batch in (8, 16, 32, BATCH, BATCH):
            call(client, loan, batch)
        # One block: the smaller ones are freed. The workers' allocator keeps its working memory while a loan lasts.
        assert sum(each.size_bytes for each in idle(client, 0)) < (512 + 256) * MIB
        assert client._pool.devices._retired == []
    assert free - free_bytes(0) < 64 * MIB


@pytest.mark.gpu
def test_a_killed_client_leaves_no_memory_mapped(
    daemons: Callable[[int], Any], wait_until: Callable[..., object]
) -> None:
    daemon = daemons(1)
    program = """
        import sys, torch
        sys.path.insert(0, sys.argv[2])
        import test_device_io as here
        from xditd.client import Client
        device = torch.device("cuda", 0)
        client = Client(sys.argv[1])
        loan = client.lend(here.made("FluxTransformer2DModel", device), as_class=True)
        client.call(loan, {**here.inputs(device), "controlnet_block_samples": here.residuals(device)})
        assert here.idle(client, 0)
        print("called", flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(daemon.runtime_dir), str(Path(__file__).parent)]

    def run_and_kill() -> None:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "called\n"
            os.kill(process.pid, signal.SIGKILL)

    run_and_kill()
    with daemon.connect() as client:
        wait_until(lambda: not client.status().components, "the loan to end")
    free = free_bytes(0)
    run_and_kill()
    wait_until(lambda: free - free_bytes(0) < 64 * MIB, "the memory to return")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"handle": bytes(range(64))}, StaleSource),
        ({"size_bytes": 8 * 2**30}, StaleSource),
        ({"size_bytes": 64 * 1024}, BadRequest),
    ],
    ids=["handle", "longer", "tensors outside"],
)
def test_false_blocks_are_refused_or_replaced_and_no_worker_ends(
    daemons: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], error: type[Exception]
) -> None:
    device = torch.device("cuda", 0)
    module = made("FluxTransformer2DModel", device)
    given = {**inputs(device, 8), "controlnet_block_samples": residuals(device, 8)}
    with daemons(1).connect() as client, client.lend(module, as_class=True) as loan:
        pids = [worker.pid for worker in client.status().workers]
        expected = client.call(loan, given)[0]
        describe = runner._with_device_io

        def describe_falsely(*arguments: Any) -> Any:
            request = describe(*arguments)
            if request.device_io is None:
                return request
            block = msgspec.structs.replace(request.device_io, **changed)
            fresh = msgspec.structs.replace(block.fingerprint, digest=os.urandom(16))
            return msgspec.structs.replace(request, device_io=msgspec.structs.replace(block, fingerprint=fresh))

        monkeypatch.setattr(runner, "_with_device_io", describe_falsely)
        if error is BadRequest:
            with pytest.raises(BadRequest, match="of a block of device memory of 65536"):
                client.call(loan, given)
        else:
            assert torch.equal(client.call(loan, given)[0], expected)  # run again through host memory
            assert not client._runner._device_use.room(client._current(), ("", "")).is_on_device
        monkeypatch.undo()
        assert torch.equal(client.call(loan, given)[0], expected)
        assert [worker.pid for worker in client.status().workers] == pids


@pytest.mark.slow
def test_workers_on_the_cpu_refuse_device_memory_and_go_on(daemon: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    small = {**CONFIG, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}
    module = diffusers.FluxTransformer2DModel(**small).eval().requires_grad_(False)
    given = {
        name: each.float() if isinstance(each, torch.Tensor) else each
        for name, each in inputs(torch.device("cpu"), 1, 16).items()
    }
    block = CudaIpcBlock(
        device_uuid="GPU-1",
        handle=bytes(64),
        size_bytes=2 * MIB,
        fingerprint=Fingerprint(length_bytes=4096, digest=bytes(16)),
    )
    with daemon.connect() as client, client.lend(module, as_class=True) as loan:
        pids = [worker.pid for worker in client.status().workers]
        (expected,) = client.call(loan, given)
        describe = runner._with_device_io
        monkeypatch.setattr(
            runner, "_with_device_io", lambda *given: msgspec.structs.replace(describe(*given), device_io=block)
        )
        with pytest.raises(ForeignGpu, match="the workers' GPUs are none, they run on the CPU"):
            client.call(loan, given)
        monkeypatch.undo()
        assert torch.equal(client.call(loan, given)[0], expected)
        assert [worker.pid for worker in client.status().workers] == pids
