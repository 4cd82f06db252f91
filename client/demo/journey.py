"""Run the demo: write checkpoints, start a daemon, lend, generate images, compare with diffusers.

With ``shapes`` the images show what three sentences say; with generated weights, two images show areas of colour.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xditd.client.client import Client
from xditd.client.demo import parity, shapes_model
from xditd.client.demo.daemon_process import DaemonProcess, outside_sockets
from xditd.client.demo.output import writing_to
from xditd.client.demo.page import write_page
from xditd.client.demo.report import PHASES, Picture, Report
from xditd.client.loans import Loan
from xditd.client.results import GenerationResult
from xditd.ipc.errors import BadRequest
from xditd.ipc.network_watch import OutsideConnections
from xditd.ipc.replies import StepDone
from xditd.ipc.status import DaemonStatus

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SEED: Final = 20
TEXT_TOKENS: Final = 64
GUIDANCE: Final = 3.5
IMAGES: Final = {"first_image": "demo.png", "second_image": "demo-second.png", "third_image": "demo-third.png"}
"""The files of the images by their phases."""
PLAIN_IMAGES: Final = 2
"""How many there are with generated weights."""
LEAST_STEPS: Final = 4
"""Pictures of fewer steps show no clear forms, and are not read back."""
MAX_WORKERS: Final = 2
"""The demo's transformer has two attention heads, and each worker needs one."""


@dataclass(frozen=True)
class DemoOptions:
    """The options of the command line. ``workers`` 0: two, or one if there is only one GPU."""

    out: Path
    workers: int
    device: str
    size: tuple[int, int]
    steps: int
    keep: bool


@dataclass(frozen=True)
class Checkpoints:
    transformer: Path
    vae: Path


class DemoRun:
    """Runs the demo step by step and fills its report."""

    def __init__(self, options: DemoOptions, steps: Any) -> None:
        self.options = options
        self.report = Report(size=options.size, steps=options.steps)
        self._shapes = shapes_model.find_shapes()
        self._steps = steps
        self._own_connections = OutsideConnections.install()
        self._outside_sockets: set[str] = set()

    @staticmethod
    def length(options: DemoOptions) -> int:
        """Number of steps of the progress bar: daemon, workers, checkpoints, two loans, images, parity."""
        return 6 + (PLAIN_IMAGES if shapes_model.find_shapes() is None else len(shapes_model.SENTENCES)) * options.steps

    def run(self) -> Report:
        """Run everything, and write the report. Always stops the daemon, unless ``options.keep`` is set.

        Raises:
            OutputFailed: the output folder, or the one for temporary files, cannot be written.
            BadCheckpoint: files of models/shapes are missing or damaged.
            XditdError: a phase failed.
        """
        # The demo needs no files of a model hub; a request for one must fail instead of downloading it.
        os.environ["HF_HUB_OFFLINE"] = "1"
        if self._shapes is not None:
            shapes_model.check_shapes(self._shapes)
        with writing_to(self.options.out, "--out"):
            self._run()
            self.report.write(self.options.out / "demo.json")
        return self.report

    def _run(self) -> None:
        self.options.out.mkdir(parents=True, exist_ok=True)
        with self._phase("daemon_start", "starting the daemon"):
            daemon = DaemonProcess(
                self.options.out / "daemon.log",
                self._count_workers(),
                self.options.device,
                ends_with_parent=not self.options.keep,
            )
        client = None
        is_done = False
        try:
            with self._phase("daemon_start", "starting the daemon"):
                client = daemon.connect()
            self._steps.update()
            self._run_phases(daemon, client)
            is_done = True
        finally:
            if self.options.keep and is_done:
                self.report.kept_runtime_dir = str(daemon.runtime_dir)
                if client is not None:
                    client.close()
            else:
                try:
                    daemon.stop(client)
                finally:
                    if client is not None:
                        client.close()

    def _run_phases(self, daemon: DaemonProcess, client: Client) -> None:
        report = self.report
        with self._phase("workers_ready", "workers start"):
            status = daemon.wait_ready(client, self._show)
        self._steps.update()
        self._record_workers(daemon, status)
        with self._phase("checkpoints", "writing checkpoints"):
            files = self._write_checkpoints(status.device_kind)
        self._steps.update()
        with self._phase("lend", "lending"):
            transformer, vae = self._lend(client, files, status.device_kind)
        report.loans = [transformer, vae]
        with self._phase("lend", "lending"):
            asked = self._make_inputs(client, transformer)
        plugs = client.status().counters.plugs
        latents = self._draw(client, transformer, vae, asked, daemon)

        status = client.status()
        report.is_lent_once = status.counters.plugs == plugs
        with self._phase("parity", "comparing with plain diffusers"):
            expected = self._reference(files, asked[0], status.device_kind)
        report.parity = parity.relative_error(latents, expected)
        report.parity_bar = parity.TOLERANCES[report.dtype]
        self._steps.update()
        self._record_outside_sockets(daemon)
        report.outside_connections = [
            *(f"the demo tried to reach {address}" for address in self._own_connections.attempts),
            *sorted(self._outside_sockets),
        ]
        if status.counters.outside_connections:
            report.outside_connections.append(
                f"workers tried to reach other hosts {status.counters.outside_connections} times; see {daemon.log}"
            )

    def _draw(
        self, client: Client, transformer: Loan, vae: Loan, asked: list[parity.Inputs], daemon: DaemonProcess
    ) -> torch.Tensor:
        """Generate the images, write them and read them back; return the latents of the first one."""
        results, paths = [], []
        for inputs, (phase, name) in zip(asked, IMAGES.items(), strict=False):
            with self._phase(phase, PHASES[phase]):
                results.append(self._generate(client, transformer, vae, inputs, daemon))
            paths.append(self.options.out / name)
            results[-1].save(paths[-1])
        self.report.image, self.report.second_image = map(str, paths[:2])
        if self._shapes is not None:
            with self._phase("reading", "reading the pictures"):
                self._read(paths)
        return results[0].latents

    def _count_workers(self) -> int:
        """Return the number of workers: two, or the number of GPUs if that is less."""
        if self.options.workers > MAX_WORKERS:
            raise BadRequest(
                f"--workers {self.options.workers}: the demo's small transformer has {MAX_WORKERS} attention heads, "
                f"one for each worker; use 1 or {MAX_WORKERS}"
            )
        if self.options.workers:
            return self.options.workers
        import torch

        gpus = 0 if self.options.device == "cpu" else torch.cuda.device_count()
        return min(MAX_WORKERS, gpus) if gpus else MAX_WORKERS

    def _record_workers(self, daemon: DaemonProcess, status: DaemonStatus) -> None:
        self.report.device_kind = status.device_kind
        self.report.workers = len(status.workers)
        self.report.parallel = dict(status.parallel)
        self.report.attention_backend = status.attention_backend
        self.report.dtype = "bfloat16" if status.device_kind == "cuda" else "float32"
        self._record_outside_sockets(daemon)
        loaded = sum(worker.loaded for worker in status.workers)
        logger.info("%d workers ready, %d loaded", len(status.workers), loaded)

    def _write_checkpoints(self, device_kind: str) -> Checkpoints:
        import torch

        from xditd.client.demo.checkpoints import write_flux1, write_flux_vae

        folder = self.options.out / "checkpoints"
        folder.mkdir(exist_ok=True)
        files = Checkpoints(folder / "flux1-demo.safetensors", folder / "ae-demo.safetensors")
        dtype = torch.bfloat16 if device_kind == "cuda" else torch.float32
        if self._shapes is None:
            write_flux1(files.transformer, SEED, dtype=dtype)
            write_flux_vae(files.vae, SEED, dtype=dtype)
        else:
            shapes_model.write_originals(self._shapes, files.transformer, files.vae, dtype)
        return files

    def _make_inputs(self, client: Client, transformer: Loan) -> list[parity.Inputs]:
        """Make the inputs of each image, which has noise of its own."""
        width, height = self.options.size
        steps = self.options.steps
        plain = tuple(1.0 - step / steps for step in range(steps))
        return [
            parity.Inputs(
                conditioning=conditioning,
                noise=_noise(SEED + at, self.options.size),
                sigmas=plain if self._shapes is None else shapes_model.shifted_sigmas(steps),
                height=height,
                width=width,
                guidance=GUIDANCE,
            )
            for at, conditioning in enumerate(self._make_conditioning(client, transformer))
        ]

    def _make_conditioning(self, client: Client, transformer: Loan) -> Iterator[Mapping[str, Any]]:
        from xditd.client.conditioning import random_conditioning

        if self._shapes is None:
            yield from [random_conditioning(transformer.facts, SEED, TEXT_TOKENS)] * PLAIN_IMAGES
            return
        with shapes_model.of_checkout(self._shapes):
            encoders = {name: client.lend(self._shapes / name) for name in shapes_model.ENCODERS}
            tokenizers = {name: client.lend_tokenizer(self._shapes / name) for name in shapes_model.TOKENIZERS}
        for sentence in shapes_model.SENTENCES:
            yield client.encode_prompt(
                transformer,
                sentence.text,
                encoders=encoders,
                tokenizers=tokenizers,
                options={"max_sequence_length": TEXT_TOKENS},
            )

    def _read(self, images: list[Path]) -> None:
        """Put sentences, and what the pictures show, into the report."""
        is_read = self.options.size == (256, 256) and self.options.steps >= LEAST_STEPS
        found = shapes_model.read_pictures(images) if is_read else None
        for at, (sentence, image) in enumerate(zip(shapes_model.SENTENCES, images, strict=True)):
            read = found[at] if found else None
            picture = Picture(str(image), sentence.text, read, shapes_model.differs(sentence, read) if read else "")
            self.report.pictures.append(picture)
        write_page(self.options.out / "demo.html", self.report.pictures)

    def _lend(self, client: Client, files: Checkpoints, device_kind: str) -> tuple[Loan, Loan]:
        """Lend the transformer by its path and the VAE as tensors."""
        from xditd.client.tensor_files import read_tensors

        device = "cuda" if device_kind == "cuda" and can_lend_cuda() else None
        transformer = client.lend(files.transformer, kind="transformer", device=device)
        self._steps.update()
        tensors = read_tensors(files.vae)
        if device is not None:
            tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        vae = client.lend(tensors, kind="vae", label=files.vae.stem)
        self._steps.update()
        return transformer, vae

    def _generate(
        self,
        client: Client,
        transformer: Loan,
        vae: Loan,
        inputs: parity.Inputs,
        daemon: DaemonProcess,
    ) -> GenerationResult:
        job = client.generate(
            transformer,
            inputs.conditioning,
            vae=vae,
            height=inputs.height,
            width=inputs.width,
            steps=len(inputs.sigmas),
            sigmas=inputs.sigmas,
            guidance_scale=inputs.guidance,
            noise=inputs.noise,
        )
        seen = 0
        for event in job.events():
            if isinstance(event, StepDone):
                self._steps.update(event.step - seen)
                seen = event.step
                self._record_outside_sockets(daemon)
        return job.result()

    def _reference(self, files: Checkpoints, inputs: parity.Inputs, device_kind: str) -> torch.Tensor:
        device = "cuda" if device_kind == "cuda" else "cpu"

        def on_poll(pid: int) -> None:
            self._outside_sockets.update(outside_sockets([pid]))

        return parity.reference_latents(files.transformer, inputs, self.options.out, device, on_poll)

    def _record_outside_sockets(self, daemon: DaemonProcess) -> None:
        self._outside_sockets.update(daemon.outside_sockets())
        self._outside_sockets.update(outside_sockets([os.getpid()]))

    def _show(self, text: str) -> None:
        """Show a text before the bar; redraw only for a new text, or on a terminal to update the elapsed time."""
        if self._steps.desc != text:
            self._steps.set_description_str(text)
        elif sys.stderr.isatty():
            self._steps.refresh()

    @contextmanager
    def _phase(self, name: str, text: str) -> Iterator[None]:
        """Show a phase in the progress bar and add its time to the report."""
        self._steps.set_description_str(text)
        started = time.perf_counter()
        yield
        spent = time.perf_counter() - started
        self.report.seconds[name] = self.report.seconds.get(name, 0.0) + spent


def _noise(seed: int, size: tuple[int, int]) -> torch.Tensor:
    import torch

    width, height = size
    return torch.randn(1, 16, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))


def can_lend_cuda() -> bool:
    """Return whether this process can allocate weights on a GPU and export them."""
    import torch

    try:
        from cuda.bindings import runtime  # noqa: F401
    except ImportError:
        logger.warning("cuda-bindings is not installed: lending by file and shared memory; pip install 'xditd[cuda]'")
        return False
    return torch.cuda.is_available()
