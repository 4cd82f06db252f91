"""Train ``shapes`` from nothing: the VAE, the text encoders on sentences, all but the VAE on pictures, then guidance.

    PYTHONPATH=tools python -m shapes.train OUT                                    # everything, with these defaults
    PYTHONPATH=tools python -m shapes.train OUT --start OUT --vae-seconds 0 --text-seconds 0     # further, from OUT

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
from random import Random
from typing import Any, Final

import torch
from diffusers import AutoencoderKL

from shapes.budget import Budget, Interrupt
from shapes.draw import draw, encode, save_sheet
from shapes.explained import Explained
from shapes.flow_training import WEAKEST_GUIDANCE, Flow, FlowSettings, FlowTraining
from shapes.judge import faults, held_out_requests, judge, print_table, table
from shapes.models import (
    LATENT_SCALE,
    LATENT_SHIFT,
    PARTS,
    build_parts,
    build_pipeline,
    load_parts,
    load_weights,
    save_weights,
    write_folder,
)
from shapes.pool import Pool, Sentences, autocast, encode_latents, prepare_gpu
from shapes.reading import read
from shapes.samplers import GUIDANCE, pipeline_sampler
from shapes.text_training import TextSettings, TextTraining
from shapes.vae_training import VaeSettings, train_vae
from shapes.words import sample_request

_JUDGED: Final = 12.0
"""Seconds that the judge takes after a phase on a GPU, with what is written."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train shapes: VAE, text encoders, transformer, guidance.")
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--start", type=Path, help="a folder with weights to start from: of this program, or a pipeline's"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-seconds", type=float, default=120)
    parser.add_argument("--vae-steps", type=int, default=0, help="in place of seconds")
    parser.add_argument("--vae-batch", type=int, default=48)
    parser.add_argument("--text-seconds", type=float, default=45, help="of both text encoders, on sentences alone")
    parser.add_argument("--text-steps", type=int, default=0, help="in place of seconds")
    parser.add_argument("--text-share", type=float, default=0.0, help="of the flow's rate, for both text encoders")
    parser.add_argument("--seconds", type=float, default=600, help="of rectified flow")
    parser.add_argument("--steps", type=int, default=0, help="in place of seconds")
    parser.add_argument(
        "--total-seconds",
        type=float,
        default=0,
        help="of this run: rectified flow gets the rest, if it has seconds",
    )
    parser.add_argument("--distill-seconds", type=float, default=150)
    parser.add_argument("--distill-steps", type=int, default=0, help="in place of seconds")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--final", type=float, default=0.01, help="share of the rate at the end of the flow's phase")
    parser.add_argument("--object-weight", type=float, default=4.0, help="of patches with objects, in the first half")
    parser.add_argument("--long-every", type=int, default=16, help="one step of so many has 512 tokens; 0: none")
    parser.add_argument("--distill-rate", type=float, default=3e-4)
    parser.add_argument("--pool", type=int, default=65_536, help="pictures whose latents are kept")
    parser.add_argument("--chunk", type=int, default=256, help="pictures that are drawn at once")
    parser.add_argument("--refresh-every", type=int, default=24, help="steps until a chunk of the pool is replaced")
    parser.add_argument("--workers", type=int, default=8, help="processes that write sentences")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print what the flow's steps spend on the GPU")
    parser.add_argument("--sentences", type=int, default=200, help="of the judge at the end; 0: none")
    parser.add_argument("--state", type=Path, help="continue the flow's phase from here, and save it here at its end")
    parser.add_argument("--folder", type=Path, help="write the pipeline's folder here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    interrupt = Interrupt()
    with interrupt.watched():
        _train(parse(arguments), interrupt)


def _train(given: argparse.Namespace, interrupt: Interrupt) -> None:
    given.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes that are forked later would warn
    device = torch.device(given.device)
    if device.type == "cuda":
        prepare_gpu()
    torch.manual_seed(given.seed)
    report: dict[str, Any] = {
        "arguments": {name: str(value) for name, value in vars(given).items()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
    }
    parts = build_parts()
    made = load_parts(given.start, parts) if given.start else []
    if given.start:
        print("started from", ", ".join(made) or "nothing", flush=True)
    phases = [(False, given.seconds, given.steps), (True, given.distill_seconds, given.distill_steps)]
    phases = [phase for phase in phases if phase[1] or phase[2]]
    has_words = bool(given.text_seconds or given.text_steps)
    if not (phases or has_words or given.vae_seconds or given.vae_steps):
        _write(given, parts, made)
        return
    parts["vae"] = _vae(given, device, parts["vae"], report, interrupt)
    made += ["vae"] if given.vae_seconds or given.vae_steps else []
    _save(given, report, {}, started)
    flow = Flow(parts["transformer"], parts["text_encoder"], parts["text_encoder_2"])
    print(f"models: {time.monotonic() - started:.0f} s since the start", flush=True)
    texts = Budget(given.text_seconds, given.text_steps, interrupt)
    if has_words and not _is_resumed(given) and not interrupt.is_set:
        settings = TextSettings(texts, seed=given.seed, is_profiled=given.profile)
        training = TextTraining(flow.text_encoder, flow.text_encoder_2, settings, device)
        report["words"] = training.train(_sentences(given, device))
        encoders = {"text_encoder": flow.text_encoder, "text_encoder_2": flow.text_encoder_2}
        _save(given, report, encoders, started)
        made += encoders
    if phases and not interrupt.is_set:
        since = time.monotonic()
        pool = Pool(
            parts["vae"],
            device,
            seed=given.seed,
            slots=max(1, given.pool // given.chunk),
            size=given.chunk,
            workers=given.workers,
            first=_chunks_before(given),
        )
        filled = f"{time.monotonic() - since:.0f} s, {pool.waited_s:.0f} s of them for sentences"
        print(
            f"pool: {len(pool.latents)} pictures in {filled}; {time.monotonic() - started:.0f} s since the start",
            flush=True,
        )
        explained = Explained(parts["vae"], device)
    for is_distilled, seconds, steps in phases:
        if interrupt.is_set:
            break
        if given.total_seconds and not is_distilled:
            after = given.distill_seconds + _JUDGED * len(phases)
            seconds = max(1.0, given.total_seconds - (time.monotonic() - started) - after)
        flow = _flow(
            given,
            device,
            flow,
            pool,
            explained,
            report,
            FlowSettings(
                budget=Budget(seconds, steps, interrupt),
                is_distilled=is_distilled,
                batch=given.batch,
                rate=given.distill_rate if is_distilled else given.rate,
                text_rate=given.text_share * (given.distill_rate if is_distilled else given.rate),
                final=0.01 if is_distilled else given.final,
                object_weight=1.0 if is_distilled else given.object_weight,
                long_every=given.long_every,
                decay=0.998 if is_distilled else 0.999,
                refresh_every=given.refresh_every,
                seed=given.seed + 101 * is_distilled,
                is_compiled=not given.no_compile,
                is_profiled=given.profile,
            ),
        )
        parts |= {name: getattr(flow, name) for name in PARTS if name != "vae"}
        _save(given, report, {name: parts[name] for name in PARTS if name != "vae"}, started)
        made += [name for name in PARTS if name != "vae"]
        _judge(given, device, parts, report, "distilled" if is_distilled else "flow")
        _save(given, report, {}, started)
    if given.folder:
        _write(given, parts, made)


def _write(given: argparse.Namespace, parts: dict[str, torch.nn.Module], made: list[str]) -> None:
    """Write the pipeline's folder, unless a part has neither been trained nor been found."""
    lacking = ", ".join(name for name in PARTS if name not in made)
    if lacking or not given.folder:
        raise SystemExit(
            f"{given.start or given.out}: no weights of {lacking}; train them first"
            if given.folder
            else "nothing to do: give seconds of a phase, or --folder"
        )
    write_folder(given.folder, parts)
    sizes = [path.stat().st_size for path in given.folder.rglob("*") if path.is_file()]
    print(f"{given.folder}: {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB, the largest {max(sizes) / 1e6:.1f} MB")


def _save(given: argparse.Namespace, report: dict[str, Any], parts: dict[str, torch.nn.Module], started: float) -> None:
    """Write the report and these models, and give them the rounded weights of their files."""
    report["seconds"] = round(time.monotonic() - started, 1)
    for name, module in parts.items():
        save_weights(module, given.out / f"{name}.safetensors")
        load_weights(module, given.out / f"{name}.safetensors")
    (given.out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False))


def _chunks_before(given: argparse.Namespace) -> int:
    """Return how many chunks a training that is continued has replaced, so that the pool is the one that it had."""
    if not _is_resumed(given):
        return 0
    step = json.loads((given.state / "state.json").read_text())["step"]
    return max(0, (step - 1) // given.refresh_every)


def _sentences(given: argparse.Namespace, device: torch.device) -> Sentences:
    slots = max(1, given.pool // given.chunk)
    return Sentences(device, seed=given.seed + 2_000_003, slots=slots, size=given.chunk, workers=given.workers)


def _is_resumed(given: argparse.Namespace) -> bool:
    return bool(given.state) and (given.state / "state.json").is_file()


def _vae(
    given: argparse.Namespace,
    device: torch.device,
    vae: torch.nn.Module,
    report: dict[str, Any],
    interrupt: Interrupt,
) -> torch.nn.Module:
    if given.vae_seconds or given.vae_steps:
        budget = Budget(given.vae_seconds, given.vae_steps, interrupt)
        settings = VaeSettings(budget, batch=given.vae_batch, seed=given.seed, workers=given.workers)
        vae = train_vae(settings, device)
        save_weights(vae, given.out / "vae.safetensors")
        load_weights(vae, given.out / "vae.safetensors")  # as rounded: the transformer learns latents of what is kept
    vae = vae.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
    report["vae"] = _vae_report(vae, device, given)
    print("vae:", report["vae"], flush=True)
    return vae


@torch.no_grad()
def _vae_report(vae: AutoencoderKL, device: torch.device, given: argparse.Namespace) -> dict[str, float]:
    """Judge drawn pictures after the VAE: the most that a transformer could reach."""
    rng = Random(given.seed + 77)
    requests = [sample_request(rng, held_out=at % 2 == 0) for at in range(min(64, max(2, given.sentences)))]
    images = draw(encode([each.scene for each in requests]), device)
    latents = encode_latents(vae, images)
    with autocast(device):
        decoded = vae.decode(latents / LATENT_SCALE + LATENT_SHIFT).sample.float()
    save_sheet(torch.cat([images[:8], decoded[:8]]), given.out / "vae.png")
    right = sum(not faults(request, read(image)) for request, image in zip(requests, decoded.cpu(), strict=True))
    return {
        "right": right,
        "of": len(requests),
        "mean_error": round(float((decoded - images).abs().mean()), 5),
        "latent_mean": round(float(latents.mean()), 4),
        "latent_deviation": round(float(latents.std()), 4),
    }


def _flow(
    given: argparse.Namespace,
    device: torch.device,
    flow: Flow,
    pool: Pool,
    explained: Explained,
    report: dict[str, Any],
    settings: FlowSettings,
) -> Flow:
    training = FlowTraining(flow, settings, device)
    state = given.state if not settings.is_distilled else None
    if state and _is_resumed(given):
        training.load_state(state)
        print(f"{settings.name}: continues from step {training.step}", flush=True)
    loss = training.train(pool, explained=explained)
    shares = {str(objects): round(share, 3) for objects, share in explained(training.ema).items()}
    report[settings.name] = {"steps": training.step, "loss": round(loss, 5), "explained": shares}
    if state:
        training.save_state(state)
    return training.ema


def _judge(
    given: argparse.Namespace,
    device: torch.device,
    parts: dict[str, torch.nn.Module],
    report: dict[str, Any],
    name: str,
) -> None:
    if not given.sentences:
        return
    started = time.monotonic()
    requests = held_out_requests(given.sentences)
    pipeline = build_pipeline({part: module.eval() for part, module in parts.items()})
    with torch.no_grad():
        # Until guidance is distilled, the model knows the weakest only.
        sampler = pipeline_sampler(pipeline, guidance=GUIDANCE if name == "distilled" else WEAKEST_GUIDANCE)
        images, found = judge(sampler, requests, batch=100 if device.type == "cuda" else 8)
    rows = table(requests, found)
    print(f"{name}: judged in {time.monotonic() - started:.0f} s", flush=True)
    print_table(rows)
    report[f"{name}_table"] = rows
    report[f"{name}_faults"] = [[each.text, *wrong] for each, wrong in zip(requests, found, strict=True) if wrong]
    one, two, three = (round(share * len(images)) for share in (0.0, 0.4, 0.8))
    shown = [images[at : at + 16] for at in (one, two, three)]
    save_sheet(torch.cat([each for each in shown if len(each)]), given.out / f"pictures_{name}.png")


if __name__ == "__main__":
    main()
