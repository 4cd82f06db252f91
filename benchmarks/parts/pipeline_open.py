"""Time ``Pipeline.open`` of a whole folder beside the loans of its parts: what finding and checking the files adds.

    python benchmarks/run.py pipeline_open
    python benchmarks/run.py pipeline_open --device cpu --small

The folder is one of FLUX.1-dev in diffusers' layout, of full size (31 GiB with both text encoders, the transformer in
shards with an index) and with weights of zeros in files without blocks on the disk. Exit status 1 if opening takes more
than a second beyond the loans, as each loan times itself.

Needs: a GPU with 36 GiB; --device cpu maps the files, so that little memory does, and --small is a dry run
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from measuring import GIB, Report, add_device, need_gpus, print_table, say

from xditd.client import Client, Pipeline
from xditd.client.demo.daemon_process import DaemonProcess
from xditd.gpu_workers.families.clip_l import ClipL, ClipLConfig
from xditd.gpu_workers.families.flux1.checkpoint import Flux1
from xditd.gpu_workers.families.flux1.config import DEV_SCHEDULER, Flux1Config
from xditd.gpu_workers.families.flux_vae.checkpoint import FluxVae
from xditd.gpu_workers.families.flux_vae.config import FluxVaeConfig
from xditd.gpu_workers.families.t5 import T5, T5Config

BAR_S: Final = 1.0
SHARDS: Final = 3
DEV: Final = Flux1Config(3072, 19, 38, 4096, 768, has_guidance=True, is_original=False)
SMALL: Final = Flux1Config(256, 2, 2, 128, 64, has_guidance=True, is_original=False)
VAE: Final = FluxVaeConfig((128, 256, 512, 512), 2, has_mid_attention=True, has_encoder=True, has_linear_attention=True)
CLIP: Final = ClipLConfig(vocabulary=49408, max_tokens=77, width=768, layers=12, inner=3072)
T5_XXL: Final = T5Config(vocabulary=32128, width=4096, layers=24, heads=64, inner=10240)
T5_SMALL: Final = T5Config(vocabulary=128, width=128, layers=2, heads=2, inner=256)
CLASSES: Final = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "transformer": ("diffusers", "FluxTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
}

Shapes = Mapping[str, tuple[int, ...]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=3)
    add_device(parser)


def run(given: argparse.Namespace, report: Report) -> int:
    need_gpus("pipeline_open", 1, given.device)
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="xditd-pipeline-open-") as name:
        folder = Path(name, "flux")
        size_bytes = write_folder(folder, is_small=given.small)
        daemon = DaemonProcess(Path(name, "daemon.log"), 1, given.device, [])
        try:
            with daemon.connect() as client:
                client.wait_ready(300.0)
                client.check_memory()
                rows = [("open", "loans", "beyond")]
                for _ in range(given.repeats):
                    opened_s, loans_s = time_open(client, folder)
                    worst = max(worst, opened_s - loans_s)
                    rows.append((f"{opened_s:.3f} s", f"{loans_s:.3f} s", f"{opened_s - loans_s:.3f} s"))
                    report.add(bytes=size_bytes, open_s=opened_s, loans_s=loans_s, worst_beyond_s=worst)
        finally:
            daemon.stop(None)
    print_table(f"Pipeline.open of {size_bytes / GIB:.1f} GiB", rows)
    if worst > BAR_S:
        say(f"opening takes {worst:.2f} s beyond the loans; at most {BAR_S:g} s")
    return int(worst > BAR_S)


def time_open(client: Client, folder: Path) -> tuple[float, float]:
    """Return the seconds of ``Pipeline.open``, and those of its loans."""
    started = time.perf_counter()
    with Pipeline.open(folder, client=client) as pipe:
        opened_s = time.perf_counter() - started
        return opened_s, sum(loan.timings_ms["total"] for loan in pipe.loans.values()) / 1e3


def write_folder(folder: Path, *, is_small: bool) -> int:
    """Write a folder of FLUX.1 without tokenizers; return the bytes of its weights."""
    for part, (library, name) in CLASSES.items():
        (folder / part).mkdir(parents=True)
        key, value = ("_class_name", name) if library == "diffusers" else ("architectures", [name])
        (folder / part / "config.json").write_text(json.dumps({key: value}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **CLASSES}))
    scheduler = {"_class_name": CLASSES["scheduler"][1], **DEV_SCHEDULER}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    size = write_shards(folder / "transformer", _shapes(Flux1(), SMALL if is_small else DEV))
    clip = ClipL().smallest if is_small else CLIP
    for path, shapes in (
        ("vae/diffusion_pytorch_model.safetensors", vae_shapes()),
        ("text_encoder/model.safetensors", _shapes(ClipL(), clip)),
        ("text_encoder_2/model.safetensors", _shapes(T5(), T5_SMALL if is_small else T5_XXL)),
    ):
        size += write_zeros(folder / path, shapes)
    return size


def write_shards(folder: Path, shapes: Shapes) -> int:
    """Write a model in several files with an index; return their bytes."""
    names = list(shapes)
    stem, weight_map, total = "diffusion_pytorch_model", {}, 0
    for number in range(SHARDS):
        name = f"{stem}-{number + 1:05}-of-{SHARDS:05}.safetensors"
        shard = names[number * len(names) // SHARDS : (number + 1) * len(names) // SHARDS]
        weight_map.update(dict.fromkeys(shard, name))
        total += write_zeros(folder / name, {each: shapes[each] for each in shard})
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def _shapes(family: Any, config: Any) -> Shapes:
    return {entry.source: entry.shape for entry in family.entries(config, ())}


def vae_shapes() -> Shapes:
    """Return the tensors of the VAE in diffusers' naming."""
    entries = FluxVae().entries(VAE, ())
    return {entry.targets[0][0]: entry.view or entry.shape for entry in entries}


def write_zeros(path: Path, shapes: Shapes) -> int:
    """Write bfloat16 zeros without blocks on the disk; return their bytes."""
    header: dict[str, object] = {}
    at = 0
    for name, shape in _in_order(shapes.items()):
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64 + 56)  # so that the data begins at a multiple of 64
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return at


def _in_order(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> list[tuple[str, tuple[int, ...]]]:
    return sorted(shapes)
