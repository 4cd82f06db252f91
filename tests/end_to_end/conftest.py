"""A real daemon with two real workers on the CPU, shared by the tests of a session, and plain diffusers beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lora_files import matrices
from process_tree import count_fds, cpu_s, descendants, is_running, memfds, memory_bytes, parent_of
from running_daemon import RunningDaemon, until
from safetensors.torch import load_file

from xditd.client import Client, Loan
from xditd.client.demo import checkpoints
from xditd.client.demo.flux1_calls import Prompt

PACKAGE = Path(__file__).parents[1] / "family_package"
GPU_NOISE = 30.0
"""Other sines and sums: FLUX.1 and FLUX.2 in float32 differ by 1.3e-5 between an H200 and the CPU, others by 4e-6."""


@dataclass
class Inputs:
    """What one job is made of; ``noise`` keeps the schedule and the seed in the test's hands."""

    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    noise: torch.Tensor
    pixels: int

    @property
    def conditioning(self) -> dict[str, torch.Tensor]:
        """As ``generate`` takes it."""
        return {"prompt_embeds": self.prompt_embeds, "pooled_prompt_embeds": self.pooled_prompt_embeds}

    @property
    def prompt(self) -> Prompt:
        """As the demo's calls take it, sent along."""
        return Prompt(self.prompt_embeds, self.pooled_prompt_embeds)


@pytest.fixture(scope="session")
def processes() -> SimpleNamespace:
    """Looking at other processes."""
    return SimpleNamespace(
        parent_of=parent_of,
        descendants=descendants,
        is_running=is_running,
        count_fds=count_fds,
        cpu_s=cpu_s,
        memfds=memfds,
        memory_bytes=memory_bytes,
    )


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., object]:
    return until


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two transformers of one architecture and a VAE, in the files that users have."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found = SimpleNamespace(
        transformer=folder / "flux1.safetensors", tuned=folder / "tuned.safetensors", vae=folder / "ae.safetensors"
    )
    checkpoints.write_flux1(found.transformer, seed=1)
    checkpoints.write_flux1(found.tuned, seed=2)
    checkpoints.write_flux_vae(found.vae, seed=3)
    return found


@pytest.fixture(scope="session")
def daemon(shared_daemon: RunningDaemon) -> RunningDaemon:
    """Two workers, or on a machine with one GPU one. Tests that kill a worker leave it rebuilt.

    On the CPU they also have the family of :data:`PACKAGE`.
    """
    return shared_daemon


@pytest.fixture(scope="session")
def shared_daemon(start_daemon: Callable[..., RunningDaemon], pytestconfig: pytest.Config) -> RunningDaemon:
    """What ``daemon`` is where a module has none of its own."""
    device = pytestconfig.getoption("daemon_device")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVIDIA_TF32_OVERRIDE", "0")  # convolutions of float32 are rounded to TF32 otherwise
        if device == "cpu":
            patch.setenv("PYTHONPATH", str(PACKAGE), prepend=os.pathsep)
        started = start_daemon(2 if device == "cpu" else min(2, torch.cuda.device_count()), device)
    started.wait_ready()
    return started


@pytest.fixture(scope="session")
def package_daemon(
    request: pytest.FixtureRequest, start_daemon: Callable[..., RunningDaemon], pytestconfig: pytest.Config
) -> RunningDaemon:
    """Two workers on the CPU that have the family of :data:`PACKAGE`: those of the other tests, if these are."""
    if pytestconfig.getoption("daemon_device") == "cpu":
        shared: RunningDaemon = request.getfixturevalue("shared_daemon")
        return shared
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(PACKAGE), prepend=os.pathsep)
        started = start_daemon(2)
    started.wait_ready()
    return started


@pytest.fixture
def client(daemon: RunningDaemon) -> Iterator[Client]:
    with daemon.connect() as connected:
        yield connected


@pytest.fixture
def transformer(client: Client, files: SimpleNamespace) -> Loan:
    return client.lend(files.transformer)


@pytest.fixture
def vae(client: Client, files: SimpleNamespace) -> Loan:
    return client.lend(files.vae)


@pytest.fixture(scope="session")
def state(files: SimpleNamespace) -> dict[str, torch.Tensor]:
    """The tensors of the transformer."""
    return load_file(files.transformer)


@pytest.fixture(scope="session")
def of_class(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of the linear layers of diffusers' class of the transformer."""
    from xditd.gpu_workers.families.flux1 import reference

    return matrices(reference.transformer_from(state).state_dict())


@pytest.fixture
def leaves_nothing(client: Client) -> Iterator[None]:
    """Nothing is lent when the test has returned what it lent."""
    before = {each.component_id for each in client.status().components}
    yield
    assert {each.component_id for each in client.status().components} == before


@pytest.fixture(scope="session")
def inputs(make_inputs: Callable[..., Inputs]) -> Inputs:
    """Inputs whose number of tokens two workers cannot halve."""
    return make_inputs(tokens=13)


@pytest.fixture(scope="session")
def make_inputs() -> Callable[..., Inputs]:
    def make(tokens: int = 16, pixels: int = 128, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        return Inputs(
            prompt_embeds=torch.randn(1, tokens, 4096, generator=generator),
            pooled_prompt_embeds=torch.randn(1, 768, generator=generator),
            noise=torch.randn(1, 16, pixels // 8, pixels // 8, generator=generator),
            pixels=pixels,
        )

    return make


@pytest.fixture(scope="session")
def run() -> Callable[..., torch.Tensor]:
    """Generate through a client; return the latents."""

    def generate(client: Client, loan: Loan, inputs: Inputs, steps: int = 4, **more: object) -> torch.Tensor:
        job = client.generate(
            loan,
            inputs.conditioning,
            noise=inputs.noise,
            height=inputs.pixels,
            width=inputs.pixels,
            steps=steps,
            **more,
        )
        return job.result().latents

    return generate


@pytest.fixture(scope="session")
def diffusers_run(files: SimpleNamespace) -> Callable[..., torch.Tensor]:
    """The same job in plain diffusers in this process, on the same file."""
    from xditd.gpu_workers.families.flux1 import reference

    loaded: dict[Path, object] = {}

    def generate(inputs: Inputs, path: Path | None = None, steps: int = 4, **more: object) -> torch.Tensor:
        path = path or files.transformer
        if path not in loaded:
            loaded[path] = reference.load_transformer(path)
        return reference.reference_latents(
            loaded[path],
            prompt_embeds=inputs.prompt_embeds,
            pooled_prompt_embeds=inputs.pooled_prompt_embeds,
            noise=inputs.noise,
            height=inputs.pixels,
            width=inputs.pixels,
            steps=steps,
            **more,
        )

    return generate


@pytest.fixture(scope="session")
def relative_error(pytestconfig: pytest.Config) -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Of results on a GPU, which are compared with those on the CPU, the error is divided by :data:`GPU_NOISE`."""
    scale = GPU_NOISE if pytestconfig.getoption("daemon_device") == "cuda" else 1.0

    def measure(actual: torch.Tensor, expected: torch.Tensor) -> float:
        return float((actual - expected).norm() / expected.norm()) / scale

    return measure


@pytest.fixture(scope="session")
def same(pytestconfig: pytest.Config) -> Callable[[Any, Any], None]:
    """Compare conditioning by name, also lists: the bits of results on the CPU, on a GPU within its noise."""
    is_exact = pytestconfig.getoption("daemon_device") == "cpu"

    def compare(found: Any, expected: Any) -> None:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            pairs = zip(found[name], value, strict=True) if isinstance(value, list) else [(found[name], value)]
            for mine, right in pairs:
                assert (mine.dtype, mine.shape) == (right.dtype, right.shape), name
                if is_exact or not right.is_floating_point():
                    assert torch.equal(mine, right), name
                else:
                    assert float((mine - right).norm() / right.norm()) <= 1e-6 * GPU_NOISE, name

    return compare
