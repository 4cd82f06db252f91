"""Train ``shapes`` from nothing: the VAE, the text encoders on sentences, the transformer on pictures, then guidance.

    PYTHONPATH=tools:.pkg python -m shapes.train OUT                # everything, with these defaults
    PYTHONPATH=tools:.pkg python -m shapes.train OUT --start OUT    # the same, with the weights in OUT to start from

Each phase is skipped if its seconds (and steps) are 0. OUT gets ``vae.safetensors``, ``transformer.safetensors``,
``text_encoder.safetensors``, ``text_encoder_2.safetensors`` (bfloat16, each below 16 MB), ``report.json`` and
pictures of the judge; ``--folder`` writes the pipeline's folder from them. With ``--state`` the flow's phase saves its
optimizer, too, and continues from there. After Ctrl-C or SIGTERM, the phase ends at once, as the last one, and what it
has learned is written.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any, Final

import torch

from shapes.arguments import whole
from shapes.budget import Budget, Interrupt
from shapes.draw import save_sheet
from shapes.explained import Explained
from shapes.flow_training import WEAKEST_GUIDANCE, Flow, FlowSettings, FlowTraining
from shapes.judge import held_out_requests, judge, print_table, table
from shapes.models import (
    PARTS,
    build_parts,
    build_pipeline,
    load_parts,
    load_weights,
    save_weights,
    write_folder,
)
from shapes.pool import Pool, Sentences, prepare_gpu
from shapes.samplers import GUIDANCE, pipeline_sampler
from shapes.text_training import TextSettings, TextTraining
from shapes.vae_training import VaeSettings, judged_vae, train_vae

_JUDGED: Final = 12.0
"""Seconds that the judge takes after a phase on a GPU, with what is written."""
_FLOW_PARTS: Final = tuple(name for name in PARTS if name != "vae")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train shapes: VAE, text encoders, transformer, guidance.")
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--start", type=Path, help="a folder with weights to start from: of this program, or a pipeline's"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-seconds", type=float, default=120)
    parser.add_argument("--vae-steps", type=whole(0), default=0, help="in place of seconds")
    parser.add_argument("--vae-batch", type=whole(1), default=48)
    parser.add_argument("--text-seconds", type=float, default=45, help="of both text encoders, on sentences alone")
    parser.add_argument("--text-steps", type=whole(0), default=0, help="in place of seconds")
    parser.add_argument("--text-share", type=float, default=0.0, help="of the flow's rate, for both text encoders")
    parser.add_argument("--seconds", type=float, default=600, help="of rectified flow")
    parser.add_argument("--steps", type=whole(0), default=0, help="in place of seconds")
    parser.add_argument(
        "--total-seconds",
        type=float,
        default=0,
        help="of this run: rectified flow gets the rest, if it has seconds",
    )
    parser.add_argument("--distill-seconds", type=float, default=150)
    parser.add_argument("--distill-steps", type=whole(0), default=0, help="in place of seconds")
    parser.add_argument("--batch", type=whole(1), default=256)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--final", type=float, default=0.01, help="share of the rate at the end of the flow's phase")
    parser.add_argument("--object-weight", type=float, default=4.0, help="of patches with objects, in the first half")
    parser.add_argument("--long-every", type=whole(0), default=16, help="one step of so many has 512 tokens; 0: none")
    parser.add_argument("--distill-rate", type=float, default=3e-4)
    parser.add_argument("--pool", type=whole(1), default=65_536, help="pictures whose latents are kept")
    parser.add_argument("--chunk", type=whole(1), default=256, help="pictures that are drawn at once")
    parser.add_argument(
        "--refresh-every", type=whole(1), default=24, help="steps until a chunk of the pool is replaced"
    )
    parser.add_argument("--workers", type=whole(0), default=8, help="processes that write sentences")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print what the flow's steps spend on the GPU")
    parser.add_argument("--sentences", type=whole(0), default=200, help="of the judge at the end; 0: none")
    parser.add_argument("--state", type=Path, help="continue the flow's phase from here, and save it here at its end")
    parser.add_argument("--folder", type=Path, help="write the pipeline's folder here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    interrupt = Interrupt()
    with interrupt.watched():
        given = parse(arguments)
        for folder in filter(None, (given.out, given.state)):
            try:  # before the work, whose weights would be lost
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SystemExit(f"{folder}: cannot be made: {error.strerror}; name another folder") from error
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes that are forked later would warn
        run = Run(given, interrupt)
        if run.learns:
            run.train()
        elif not given.folder:
            raise SystemExit("nothing to do: give seconds of a phase, or --folder")
        if given.folder:
            run.write_folder()


class Run:
    """A run of this program: the models by the names of :data:`~shapes.models.PARTS`, and its report."""

    def __init__(self, given: argparse.Namespace, interrupt: Interrupt) -> None:
        self._given, self._interrupt, self._started = given, interrupt, time.monotonic()
        self._device = torch.device(given.device)
        if self._device.type == "cuda":
            prepare_gpu()
        torch.manual_seed(given.seed)
        self._report: dict[str, Any] = {
            "arguments": {name: str(value) for name, value in vars(given).items()},
            "device": torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "CPU",
            "torch": torch.__version__,
        }
        self._parts = build_parts()
        # The parts that have been found or trained: no others are written to a pipeline's folder.
        self._made = load_parts(given.start, self._parts) if given.start else []
        if given.start:
            if not self._made:
                raise SystemExit(
                    f"--start {given.start}: has no weights; name a folder of this program, or a pipeline's"
                )
            print("started from", ", ".join(self._made), flush=True)
        self._learns_vae = bool(given.vae_seconds or given.vae_steps)
        self._learns_words = bool(given.text_seconds or given.text_steps)
        phases = [(False, given.seconds, given.steps), (True, given.distill_seconds, given.distill_steps)]
        self._phases = [phase for phase in phases if phase[1] or phase[2]]

    @property
    def learns(self) -> bool:
        """Whether any phase has seconds or steps."""
        return bool(self._learns_vae or self._learns_words or self._phases)

    def train(self) -> None:
        """Train each phase that has seconds or steps; after each, write its weights and the report."""
        self.train_vae()
        print(f"models: {self._spent_s():.0f} s since the start", flush=True)
        if self._learns_words and not _is_resumed(self._given) and not self._interrupt.is_set:
            self.train_words()
        if self._phases and not self._interrupt.is_set:
            self.train_flow()

    def train_vae(self) -> None:
        """Train the VAE if it has seconds, and judge it in any case."""
        given, vae = self._given, self._parts["vae"]
        if self._learns_vae:
            budget = Budget(given.vae_seconds, given.vae_steps, self._interrupt)
            settings = VaeSettings(budget, batch=given.vae_batch, seed=given.seed, workers=given.workers)
            vae = self._parts["vae"] = train_vae(settings, self._device)
            self._save("vae")  # rounded: the transformer learns latents of what is kept
        vae = vae.to(self._device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        count = min(64, max(2, given.sentences))
        self._report["vae"] = judged_vae(
            vae.eval().requires_grad_(False), self._device, count=count, seed=given.seed, sheet=given.out / "vae.png"
        )
        print("vae:", self._report["vae"], flush=True)
        self._save()

    def train_words(self) -> None:
        """Train both text encoders on sentences."""
        given = self._given
        texts = Budget(given.text_seconds, given.text_steps, self._interrupt)
        settings = TextSettings(texts, seed=given.seed, is_profiled=given.profile)
        encoders = (self._parts["text_encoder"], self._parts["text_encoder_2"])
        training = TextTraining(*encoders, settings, self._device)
        slots = max(1, given.pool // given.chunk)
        sentences = Sentences(
            self._device, seed=given.seed + 2_000_003, slots=slots, size=given.chunk, workers=given.workers
        )
        self._report["words"] = training.train(sentences)
        self._save("text_encoder", "text_encoder_2")

    def train_flow(self) -> None:
        """Train the transformer by rectified flow, then its guidance; judge the pictures after each."""
        pool = self._fill_pool()
        explained = Explained(self._parts["vae"], self._device)
        flow = Flow(self._parts["transformer"], self._parts["text_encoder"], self._parts["text_encoder_2"])
        for is_distilled, seconds, steps in self._phases:
            if self._interrupt.is_set:
                break
            if self._given.total_seconds and not is_distilled:
                after = self._given.distill_seconds + _JUDGED * len(self._phases)
                seconds = max(1.0, self._given.total_seconds - self._spent_s() - after)
            settings = self._flow_settings(Budget(seconds, steps, self._interrupt), is_distilled=is_distilled)
            flow = self._train_phase(flow, pool, explained, settings)
            self._parts |= {name: getattr(flow, name) for name in _FLOW_PARTS}
            self._save(*_FLOW_PARTS)
            self._judge(settings.name)
            self._save()

    def _fill_pool(self) -> Pool:
        given, since = self._given, time.monotonic()
        pool = Pool(
            self._parts["vae"],
            self._device,
            seed=given.seed,
            slots=max(1, given.pool // given.chunk),
            size=given.chunk,
            workers=given.workers,
            first=_chunks_before(given),
        )
        filled = f"{time.monotonic() - since:.0f} s, {pool.waited_s:.0f} s of them for sentences"
        print(f"pool: {len(pool.latents)} pictures in {filled}; {self._spent_s():.0f} s since the start", flush=True)
        return pool

    def _flow_settings(self, budget: Budget, *, is_distilled: bool) -> FlowSettings:
        given = self._given
        rate = given.distill_rate if is_distilled else given.rate
        return FlowSettings(
            budget=budget,
            is_distilled=is_distilled,
            batch=given.batch,
            rate=rate,
            text_rate=given.text_share * rate,
            final=0.01 if is_distilled else given.final,
            object_weight=1.0 if is_distilled else given.object_weight,
            long_every=given.long_every,
            decay=0.998 if is_distilled else 0.999,
            refresh_every=given.refresh_every,
            seed=given.seed + 101 * is_distilled,
            is_compiled=not given.no_compile,
            is_profiled=given.profile,
        )

    def _train_phase(self, flow: Flow, pool: Pool, explained: Explained, settings: FlowSettings) -> Flow:
        """Train a phase, from its saved state if there is one; return the averaged weights."""
        training = FlowTraining(flow, settings, self._device)
        state = self._given.state if not settings.is_distilled else None
        if state and _is_resumed(self._given):
            training.load_state(state)
            print(f"{settings.name}: continues from step {training.step}", flush=True)
        loss = training.train(pool, explained=explained)
        shares = {str(objects): round(share, 3) for objects, share in explained(training.ema).items()}
        self._report[settings.name] = {"steps": training.step, "loss": round(loss, 5), "explained": shares}
        if state:
            training.save_state(state)
        return training.ema

    def _judge(self, name: str) -> None:
        """Put the judge's table of a phase, and the faults, into the report, and write some of its pictures."""
        if not self._given.sentences:
            return
        started = time.monotonic()
        requests = held_out_requests(self._given.sentences)
        pipeline = build_pipeline({part: module.eval() for part, module in self._parts.items()})
        with torch.no_grad():
            # Until guidance is distilled, the model knows the weakest only.
            sampler = pipeline_sampler(pipeline, guidance=GUIDANCE if name == "distilled" else WEAKEST_GUIDANCE)
            images, found = judge(sampler, requests, batch=100 if self._device.type == "cuda" else 8)
        rows = table(requests, found)
        print(f"{name}: judged in {time.monotonic() - started:.0f} s", flush=True)
        print_table(rows)
        wrong = [[each.text, *faulty] for each, faulty in zip(requests, found, strict=True) if faulty]
        self._report |= {f"{name}_table": rows, f"{name}_faults": wrong}
        shown = [images[at : at + 16] for at in (round(share * len(images)) for share in (0.0, 0.4, 0.8))]
        save_sheet(torch.cat([each for each in shown if len(each)]), self._given.out / f"pictures_{name}.png")

    def _spent_s(self) -> float:
        return time.monotonic() - self._started

    def _save(self, *names: str) -> None:
        """Write the report and these models, and give them the rounded weights of their files."""
        self._made += names
        self._report["seconds"] = round(self._spent_s(), 1)
        for name in names:
            save_weights(self._parts[name], self._given.out / f"{name}.safetensors")
            load_weights(self._parts[name], self._given.out / f"{name}.safetensors")
        (self._given.out / "report.json").write_text(json.dumps(self._report, indent=1, ensure_ascii=False))

    def write_folder(self) -> None:
        """Write the pipeline's folder.

        Raises:
            SystemExit: a part has neither been trained nor been found.
        """
        folder = self._given.folder
        lacking = ", ".join(name for name in PARTS if name not in self._made)
        if lacking:
            raise SystemExit(f"{self._given.start or self._given.out}: no weights of {lacking}; train them first")
        write_folder(folder, self._parts)
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        print(f"{folder}: {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB, the largest {max(sizes) / 1e6:.1f} MB")


def _chunks_before(given: argparse.Namespace) -> int:
    """Return how many chunks a training that is continued has replaced, so that the pool is the one that it had."""
    if not _is_resumed(given):
        return 0
    step = json.loads((given.state / "state.json").read_text())["step"]
    return max(0, (step - 1) // given.refresh_every)


def _is_resumed(given: argparse.Namespace) -> bool:
    return bool(given.state) and (given.state / "state.json").is_file()


if __name__ == "__main__":
    main()
