"""Time one transformer family through a daemon, and diffusers' own class in this process.

    python benchmarks/run.py families --family z_image --workers 1 2
    python benchmarks/run.py families --family z_image --guidance 5 --json FILE
    python benchmarks/run.py families --family flux1 --device cpu --small

Weights are random, of full size, made on the first GPU; the daemon's workers and diffusers' class use the same tensors.
``call`` is one forward, ``generate`` a whole loop, in diffusers that of the family's pipeline. Prints milliseconds of a
step (the median), ratios, and the relative error against diffusers.

Needs: as many GPUs as workers; --device cpu --small is a dry run
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import family_pipelines
import flux
import torch
from measuring import Report, add_device, add_ranks, need_gpus, print_table, repeat_ms, synchronize

from xditd.client import Client
from xditd.client.demo.daemon_process import DaemonProcess

State = dict[str, torch.Tensor]
LATENT_CHANNELS = 16
PIXELS_PER_LATENT = 8
SEED = 0


@dataclass(frozen=True, eq=False)
class Subject:
    """One family's weights, and the same work for this process and for a daemon."""

    state: State
    forward: Callable[[], torch.Tensor]
    """Runs one forward in this process; returns its rows."""
    arguments: Mapping[str, Any]
    """Arguments of the same forward for ``Client.call``."""
    rows: Callable[[Any], torch.Tensor]
    """Returns the rows of a call's result tree."""
    loop: Callable[[int], torch.Tensor]
    """Runs the family's pipeline with a number of steps; returns its latents."""
    conditioning: Mapping[str, Any]
    noise: torch.Tensor
    sampling: Mapping[str, Any] = field(default_factory=dict)


def z_image(given: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Subject:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    from xditd.gpu_workers.families.z_image.checkpoint import ZImage
    from xditd.gpu_workers.families.z_image.config import BASE_SHIFT, TURBO_SHIFT, ZImageConfig

    config = ZImageConfig(256, 2, 2, 64) if given.small else ZImageConfig(3840, 30, 2, 2560)
    state = {
        entry.source: random_weight(entry.source, entry.shape, device, dtype) for entry in ZImage().entries(config, ())
    }
    with torch.device("meta"):
        module = ZImageTransformer2DModel(
            dim=config.hidden,
            n_layers=config.layers,
            n_heads=config.heads,
            n_kv_heads=config.heads,
            cap_feat_dim=config.text_channels,
        )
    module.load_state_dict(state, assign=True)
    module.eval().requires_grad_(False)
    noise, is_guided = noise_of(given, device), given.guidance > 0
    texts = [torch.randn(given.tokens, config.text_channels, device=device, dtype=dtype) for _ in range(1 + is_guided)]
    arguments = {
        "x": [noise[0].to(dtype).unsqueeze(1)] * len(texts),
        "t": torch.full((len(texts),), 0.3),
        "cap_feats": texts,
    }
    conditioning = {"prompt_embeds": texts[:1]} | ({"negative_prompt_embeds": texts[1:]} if is_guided else {})
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=BASE_SHIFT if is_guided else TURBO_SHIFT),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=module,
    )
    pipeline.set_progress_bar_config(disable=True)
    return Subject(
        state=state,
        forward=lambda: torch.stack(module(**{**arguments, "t": arguments["t"].to(device)}, return_dict=False)[0]),
        arguments=arguments,
        rows=lambda tree: torch.stack(tree[0]),
        loop=lambda steps: pipeline(
            latents=noise,
            height=given.pixels,
            width=given.pixels,
            num_inference_steps=steps,
            guidance_scale=given.guidance,
            output_type="latent",
            return_dict=False,
            **conditioning,
        )[0],
        conditioning=conditioning,
        noise=noise,
        sampling={"guidance_scale": given.guidance},
    )


def flux1(given: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Subject:
    from diffusers import FluxPipeline

    from xditd.gpu_workers.families.flux1 import reference

    state = flux.state_dict(flux.scale_of(given).size, dtype, device, SEED)
    module = reference.transformer_from(state)
    noise, side = noise_of(given, device), given.pixels // 16
    prompt, pooled = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((1, given.tokens, 4096), (1, 768)))
    arguments = {
        "hidden_states": FluxPipeline._pack_latents(noise.to(dtype), *noise.shape),
        "encoder_hidden_states": prompt,
        "pooled_projections": pooled,
        "timestep": torch.tensor([0.7]),
        "img_ids": FluxPipeline._prepare_latent_image_ids(1, side, side, device, dtype),
        "txt_ids": torch.zeros(given.tokens, 3, device=device, dtype=dtype),
        "guidance": torch.tensor([3.5]),
    }
    return Subject(
        state=state,
        forward=lambda: module(**{name: each.to(device) for name, each in arguments.items()}, return_dict=False)[0],
        arguments=arguments,
        rows=lambda tree: tree[0],
        loop=lambda steps: reference.reference_latents(
            module,
            prompt_embeds=prompt,
            pooled_prompt_embeds=pooled,
            noise=noise,
            height=given.pixels,
            width=given.pixels,
            steps=steps,
        ),
        conditioning={"prompt_embeds": prompt, "pooled_prompt_embeds": pooled},
        noise=noise,
    )


def qwen_image(given: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Subject:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

    from xditd.gpu_workers.families.qwen_image.checkpoint import QwenImage
    from xditd.gpu_workers.families.qwen_image.config import SCHEDULER, QwenImageConfig

    config = QwenImageConfig(256, 2, 64) if given.small else QwenImageConfig(3072, 60, 3584)
    state = {
        entry.source: random_weight(entry.source, entry.shape, device, dtype)
        for entry in QwenImage().entries(config, ())
    }
    with torch.device("meta"):
        module = QwenImageTransformer2DModel(
            num_layers=config.blocks, num_attention_heads=config.heads, joint_attention_dim=config.text_channels
        )
    module.pos_embed = type(module.pos_embed)(10000, [16, 56, 56], scale_rope=True)  # its tables are no parameters
    module.load_state_dict(state, assign=True)
    module.eval().requires_grad_(False)
    noise, is_guided, side = noise_of(given, device), given.guidance > 1, given.pixels // 16
    texts = [torch.randn(1, given.tokens, config.text_channels, device=device, dtype=dtype) for _ in range(2)]
    packed = QwenImagePipeline._pack_latents(noise.to(dtype), *noise.shape)
    arguments = {
        "hidden_states": packed,
        "encoder_hidden_states": texts[0],
        "timestep": torch.tensor([0.7]),
        "img_shapes": [[(1, side, side)]],
    }
    conditioning = {"prompt_embeds": texts[0]} | ({"negative_prompt_embeds": texts[1]} if is_guided else {})
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=module,
    )
    pipeline.set_progress_bar_config(disable=True)

    def loop(steps: int) -> torch.Tensor:
        found = pipeline(
            latents=packed,
            height=given.pixels,
            width=given.pixels,
            num_inference_steps=steps,
            true_cfg_scale=given.guidance,
            output_type="latent",
            return_dict=False,
            **conditioning,
        )[0]
        return QwenImagePipeline._unpack_latents(found, given.pixels, given.pixels, PIXELS_PER_LATENT).squeeze(2)

    return Subject(
        state=state,
        forward=lambda: module(**{**arguments, "timestep": arguments["timestep"].to(device)}, return_dict=False)[0],
        arguments=arguments,
        rows=lambda tree: tree[0],
        loop=loop,
        conditioning=conditioning,
        noise=noise,
        sampling={"guidance_scale": given.guidance},
    )


def flux2(given: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Subject:
    """Build FLUX.2-dev, in diffusers' names. Its guidance is an input: 4, or ``--guidance``."""
    generation = family_pipelines.make("flux2", device, dtype, small=given.small)
    module, pipeline = generation.pipeline.transformer, generation.pipeline
    pipeline.vae = None
    rows = given.pixels // 16
    noise = torch.randn(1, 128, rows, rows, device=device, dtype=dtype)
    scale = given.guidance or 4.0
    (text,) = generation.conditioning.values()
    text = torch.randn(1, given.tokens, text.shape[2], device=device, dtype=dtype)
    arguments = {
        "hidden_states": noise.flatten(2).transpose(1, 2).contiguous(),
        "encoder_hidden_states": text,
        "timestep": torch.tensor([0.7]),
        "img_ids": pipeline._prepare_latent_ids(noise)[0].float(),
        "txt_ids": pipeline._prepare_text_ids(text)[0].float(),
        "guidance": torch.tensor([scale]),
    }

    def loop(steps: int) -> torch.Tensor:
        clock = family_pipelines.StepClock(device)
        pipeline(
            prompt_embeds=text,
            latents=noise,
            height=given.pixels,
            width=given.pixels,
            num_inference_steps=steps,
            guidance_scale=scale,
            output_type="latent",
            callback_on_step_end=clock.after_step,
        )
        assert clock.latents is not None
        return clock.latents.transpose(1, 2).unflatten(2, noise.shape[2:])

    return Subject(
        state=module.state_dict(),
        forward=lambda: module(**{name: each.to(device) for name, each in arguments.items()}, return_dict=False)[0],
        arguments=arguments,
        rows=lambda tree: tree[0],
        loop=loop,
        conditioning={"prompt_embeds": text},
        noise=noise,
        sampling={"guidance_scale": scale},
    )


FAMILIES = {"z_image": z_image, "flux1": flux1, "qwen_image": qwen_image, "flux2": flux2}


def keep_text(client: Client, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Keep in the workers what is the same in every step, as samplers do: all but latents and numbers."""
    latents, *_ = arguments

    def kept(value: Any) -> Any:
        if isinstance(value, list):
            return [kept(each) for each in value]
        return client.keep(value) if isinstance(value, torch.Tensor) and value.numel() > 1 else value

    return {name: value if name == latents else kept(value) for name, value in arguments.items()}


def random_weight(name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.empty(shape, device=device, dtype=dtype)
    if len(shape) > 1 and "pad_token" not in name:
        return tensor.normal_(0.0, shape[-1] ** -0.5)
    return tensor.normal_(1.0, 0.1) if name.endswith("weight") else tensor.normal_(0.0, 0.02)


def noise_of(given: argparse.Namespace, device: torch.device) -> torch.Tensor:
    side = given.pixels // PIXELS_PER_LATENT
    return torch.randn(1, LATENT_CHANNELS, side, side, device=device)


def relative_error(ours: torch.Tensor, right: torch.Tensor) -> float:
    right = right.double().cpu()
    return float((ours.double().cpu() - right).norm() / right.norm())


def measure(given: argparse.Namespace, subject: Subject, workers: int, log: Path) -> dict[str, Any]:
    """Start a daemon, lend it the weights, and time both ways alternately."""

    def here(action: Callable[[], torch.Tensor]) -> torch.Tensor:
        with torch.inference_mode():
            result = action()
        synchronize(given.device)
        return result

    daemon = DaemonProcess(log, workers, given.device, given.flags)
    client = None
    try:
        client = daemon.connect()
        client.wait_ready(300.0)
        loan = client.lend(subject.state, label=given.family)
        kept = keep_text(client, subject.arguments)
        size = {"height": given.pixels, "width": given.pixels, "steps": given.steps, "noise": subject.noise}
        ways: dict[str, tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor], int]] = {
            "call": (
                lambda: here(subject.forward),
                lambda: subject.rows(client.call(loan, kept)),
                1,
            ),
            "generate": (
                lambda: here(lambda: subject.loop(given.steps)),
                lambda: client.generate(loan, subject.conditioning, **size, **subject.sampling).result().latents,
                given.steps,
            ),
        }
        found: dict[str, Any] = {"workers": workers, "layout": str(client.status().workers)}
        for way, (mine, theirs, steps) in ways.items():
            error = relative_error(theirs(), mine())
            # Alternately, so that the GPU's clocks and temperature are the same for both.
            took: dict[str, list[float]] = {"here": [], "daemon": []}
            for number in range(given.repeats + 2):
                for who, action in (("here", mine), ("daemon", theirs)):
                    ms = repeat_ms(action, 1)
                    took[who] += ms if number >= 2 else []
            found[way] = {**{who: statistics.median(each) / steps for who, each in took.items()}, "error": error}
        return found
    finally:
        daemon.stop(client)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", choices=sorted(FAMILIES), required=True)
    add_ranks(parser)
    add_device(parser)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=256, help="of the text")
    parser.add_argument("--guidance", type=float, default=0.0, help="classifier-free guidance: two rows in a step")
    parser.add_argument("--steps", type=int, default=8, help="of one generation")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each; the median counts")
    parser.add_argument("--flags", action="append", default=[], help="a flag of the daemon, --flags=--name=value")


def run(given: argparse.Namespace, report: Report) -> None:
    need_gpus("families", max(given.ranks), given.device)
    device = flux.device_of(given)
    torch.manual_seed(SEED)
    subject = FAMILIES[given.family](given, device, flux.dtype_on(given.device))
    size = sum(tensor.numel() for tensor in subject.state.values())
    report.add(parameters=size, groups=[])
    rows = [("workers", "what", "diffusers here", "through the daemon", "ratio", "relative error")]
    for workers in given.ranks:
        with tempfile.TemporaryDirectory(prefix="xditd-families-") as folder:
            found = measure(given, subject, workers, Path(folder, "daemon.log"))
        report.add(groups=[*report.found["groups"], found])
        for way in ("call", "generate"):
            here, daemon, error = (found[way][name] for name in ("here", "daemon", "error"))
            times = (f"{here:.2f} ms", f"{daemon:.2f} ms", f"{daemon / here:.3f}x")
            rows.append((str(workers), way, *times, f"{error:.1e}"))
    print_table(
        f"{given.family}, {size / 1e9:.2f} B parameters, {given.pixels}x{given.pixels}, {given.tokens} text tokens, "
        f"guidance {given.guidance:g}",
        rows,
    )
