"""A program, not a test: products in eight bits in Triton's interpreter on the CPU; writes what was found as JSON.

python eight_bits.py OUT_FILE STORE_FILE

Triton reads ``TRITON_INTERPRET`` when it is imported, so this needs a process of its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy
import torch
from inputs import GUIDANCE, job, reference_latents
from triton.runtime import interpreter

STEPS = 2
LARGEST = 448.0


def mend_the_interpreter() -> None:
    """Round to e4m3 as GPUs do. Triton 3.7's interpreter drops the carry of 7.9, which becomes 4 instead of 8."""
    theirs = interpreter._convert_float

    def convert(given: Any, source: Any, target: Any, rounding: Any) -> Any:
        if target == interpreter.tl.float8e4nv and source == interpreter.tl.float32:
            wide = torch.from_numpy(numpy.ascontiguousarray(given).view(numpy.float32).copy())
            return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(given.shape)
        return theirs(given, source, target, rounding)

    interpreter._convert_float = convert


def rounded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a row is in eight bits, by torch alone: (values, scales)."""
    largest = rows.float().abs().amax(-1).clamp(min=1e-30)
    values = (rows.float() * (LARGEST / largest)[..., None]).to(torch.float8_e4m3fn)
    return values, largest / LARGEST


def again(rows: torch.Tensor) -> torch.Tensor:
    values, scales = rounded(rows)
    return values.to(rows.dtype) * scales[..., None].to(rows.dtype)


def quantiser() -> dict[str, Any]:
    """Compare the kernel with torch, value by value, on rows from tiny to huge."""
    from xditd.gpu_workers.kernels.eight_bits import quantise

    found: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-6, 6, 301)[:, None]
    for dtype in (torch.float32, torch.bfloat16):
        x = (torch.randn(301, 72, generator=generator) * sizes).to(dtype)
        x[7] = 0.0
        y = torch.randn(301, 40, generator=generator).to(dtype)
        gelu = torch.nn.functional.gelu(y.float(), approximate="tanh").to(dtype)
        for label, result, expected in (
            ("x", quantise(x), x),
            ("gelu", quantise(gelu_of=y), gelu),
            ("both", quantise(x, gelu_of=y), torch.cat([x, gelu], 1)),
        ):
            values, scales = rounded(expected)
            found[f"{dtype} {label}"] = {
                # GELU by another formula may fall on the other side of a tie.
                "other values": float((result.values.float() != values.float()).float().mean()),
                "scales": float(((result.scales - scales).abs() / scales).max()),
                "error": float((again(expected) - expected).float().norm() / expected.float().norm()),
            }
    return found


def modulation() -> float:
    """Compare modulating straight into eight bits with rounding what is modulated; the share of other values."""
    from xditd.gpu_workers.kernels import triton_kernels

    generator = torch.Generator().manual_seed(1)
    x, added = (torch.randn(9, 256, generator=generator) for _ in range(2))
    vectors = torch.randn(2, 6 * 256, generator=generator)
    given: dict[str, Any] = {"text_rows": 3, "added": added, "gate": (vectors, 0), "shift": (vectors, 256)}
    copy = x.clone()
    values, scales = rounded(triton_kernels.add_and_modulate(x, **given))
    result = triton_kernels.add_and_modulate_to_eight_bits(copy, **given)
    assert torch.equal(x, copy)
    text, images = result.halves(3)
    assert images.scales.data_ptr() % 16 == 0
    assert torch.equal(torch.cat([text.scales, images.scales]), scales)
    return float((torch.cat([text.values, images.values]).float() != values.float()).float().mean())


def products() -> dict[str, float]:
    """Compare each kind of product with float32 ones of the same rounded numbers: relative errors."""
    from xditd.gpu_workers.kernels.products import EightBit

    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    shapes = {"up": (512, 128), "down": (128, 512), "second": (128, 640)}
    checkpoint = {f"{name}.weight": random(*shape) for name, shape in shapes.items()}
    checkpoint |= {f"{name}.bias": random(shape[0]) for name, shape in shapes.items()}
    eight = EightBit(shapes, torch.device("cpu"))
    eight.load(checkpoint)
    up, down, second = (eight.linear(name) for name in shapes)
    x, attended = random(7, 128), random(7, 128)

    def product(rows: torch.Tensor, name: str, outputs: slice = slice(None)) -> torch.Tensor:
        weight = again(checkpoint[f"{name}.weight"])
        return (again(rows) @ weight.t() + checkpoint[f"{name}.bias"])[:, outputs]

    hidden = torch.nn.functional.gelu(product(x, "up"), approximate="tanh")
    some = slice(128, None)
    results = {
        "multiply": (eight.multiply, (eight.take(x, (up, up), 0), up), product(x, "up")),
        "some outputs": (
            eight.multiply,
            (eight.take(x, (up, up), 0), eight.linear("up", some)),
            product(x, "up", some),
        ),
        "images of both": (eight.multiply, (eight.halves(eight.take(x, (up, up), 0), 3)[1], up), product(x, "up")[3:]),
        "mlp": (eight.mlp, (eight.take(x, (up, up), 0), up, down), product(hidden, "down")),
        "mlp and attention": (
            eight.mlp_and_attention,
            (attended, eight.take(x, (up, up), 0), up, second),
            product(torch.cat([attended, hidden], 1), "second"),
        ),
    }
    found = {}
    for label, (method, given, expected) in results.items():
        out = torch.full_like(expected, torch.nan)
        method(*given, out)
        found[label] = float((out - expected).norm() / expected.norm())
    return found


def packed_products() -> dict[str, Any]:
    """Compare products of packed weights with those of the same ones that were quantised here."""
    from xditd.gpu_workers.kernels.products import EightBit
    from xditd.gpu_workers.packed.linear import PackedMemory
    from xditd.gpu_workers.packed.native_products import native_product
    from xditd.gpu_workers.packed.products import Dequantiser, Float8Products
    from xditd.gpu_workers.packed.tensors import PackedTensor

    generator = torch.Generator().manual_seed(3)
    shapes = {"up": (512, 128), "down": (128, 512), "second": (128, 640)}
    plain: dict[str, torch.Tensor] = {}
    lent: dict[str, Any] = {}
    for name, shape in shapes.items():
        plain[f"{name}.weight"] = torch.randn(*shape, generator=generator)
        plain[f"{name}.bias"] = lent[f"{name}.bias"] = torch.randn(shape[0], generator=generator)
        values, scales = rounded(plain[f"{name}.weight"])
        lent[f"{name}.weight"] = PackedTensor("float8", shape, values, scales[:, None], native=native_product)
    memory = PackedMemory(torch.device("cpu"))
    ours = Float8Products(Dequantiser(memory, torch.float32), 640 * 128)
    theirs = EightBit(shapes, torch.device("cpu"))
    outs = []
    x, attended = torch.randn(7, 128, generator=generator), torch.randn(7, 128, generator=generator)
    for products, checkpoint in ((ours, lent), (theirs, plain)):
        products.load(checkpoint)
        linear = products.linear("up")
        rows = products.take(x, (linear, linear), 0)
        up, down, second, some = (torch.empty(7, width) for width in (512, 128, 128, 256))
        products.multiply(rows, products.linear("up"), up)
        products.mlp(rows, products.linear("up"), products.linear("down"), down)
        products.mlp_and_attention(attended, rows, products.linear("up"), products.linear("second"), second)
        products.multiply(rows, products.linear("up", slice(256, None)), some)
        outs.append([up, down, second, some])
    return {
        "same bits": [torch.equal(*pair) for pair in zip(*outs, strict=True)],
        "counted": memory.counts.report()[0].native,
    }


def given_scales() -> dict[str, Any]:
    """Compare rows and products that have the scales of a file with the products of single layers."""
    from xditd.gpu_workers.kernels import triton_kernels
    from xditd.gpu_workers.packed.linear import PackedMemory
    from xditd.gpu_workers.packed.native_products import float8_linear, native_product, quantise_float8
    from xditd.gpu_workers.packed.products import Dequantiser, Float8Products
    from xditd.gpu_workers.packed.tensors import PackedTensor

    generator = torch.Generator().manual_seed(4)
    shapes = {"text": (128, 128), "image": (512, 128), "down": (128, 512), "second": (128, 640)}
    lent: dict[str, Any] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        lent[f"{name}.bias"] = torch.randn(shape[0], generator=generator)
        values, scales = rounded(torch.randn(*shape, generator=generator))
        scale = torch.tensor(0.004 * (1 + number))
        lent[f"{name}.weight"] = PackedTensor(
            "float8", shape, values, scales[:, None], input_scale=scale, native=native_product
        )
    products = Float8Products(Dequantiser(PackedMemory(torch.device("cpu")), torch.float32), 640 * 128)
    products.load(lent)
    text, image, down, second = map(products.linear, shapes)
    x, attended = (torch.randn(7, 128, generator=generator) for _ in range(2))
    vectors = torch.randn(2, 2 * 128, generator=generator)

    def expected_rows(rows: torch.Tensor) -> torch.Tensor:
        parts = ((rows[:3], "text"), (rows[3:], "image"))
        return torch.cat([quantise_float8(part, lent[f"{name}.weight"].input_scale).values for part, name in parts])

    def expected(rows: torch.Tensor, name: str) -> torch.Tensor:
        weight = lent[f"{name}.weight"]
        return float8_linear(rows, weight.values, weight.scale, weight.input_scale, lent[f"{name}.bias"])

    taken = products.take(x, (text, image), 3)
    modulated = products.modulate(x.clone(), (text, image), text_rows=3, shift=(vectors, 0))
    plain = triton_kernels.add_and_modulate(x.clone(), text_rows=3, shift=(vectors, 0))
    outs = {name: torch.empty(7, 128) for name in ("down", "second")}
    rows = products.take(x, (image, image), 0)
    products.mlp(rows, image, down, outs["down"])
    products.mlp_and_attention(attended, rows, image, second, outs["second"])
    hidden = torch.nn.functional.gelu(expected(x, "image"), approximate="tanh")
    right = {"down": expected(hidden, "down"), "second": expected(torch.cat([attended, hidden], 1), "second")}
    return {
        "other values": [
            float((found.values.float() != theirs.float()).float().mean())
            for found, theirs in ((taken, expected_rows(x)), (modulated, expected_rows(plain)))
        ],
        "cut off": float(taken.values.float().abs().max()),
        "errors": [float((outs[name] - each).norm() / each.norm()) for name, each in right.items()],
        "scales": [sorted(set(each.scales.tolist())) for each in (taken, modulated)],
    }


def whole_model(store: str) -> dict[str, Any]:
    """Denoise in eight bits, and compare with plain diffusers."""
    from xditd.client.demo import checkpoints
    from xditd.gpu_workers.families.flux1 import reference
    from xditd.gpu_workers.models.entries import TensorInfo
    from xditd.gpu_workers.models.model_cache import ModelCache
    from xditd.gpu_workers.process import xfuser_start

    started = xfuser_start.start(0, 1, store, torch.device("cpu"))
    layout = dataclasses.replace(started, fused_attention="SDPA", precision="fp8")
    from direct_jobs import generate

    cache = ModelCache(layout)
    state = checkpoints.flux1_state_dict(1, double_blocks=2, single_blocks=2)
    match = cache.match({name: TensorInfo.of(tensor) for name, tensor in state.items()})
    model = match.model
    given = job(5, 32, 32, 1)
    found: dict[str, Any] = {"reserved": model.reserve()}

    def run() -> torch.Tensor:
        return generate(model, **given, steps=STEPS, guidance_scale=GUIDANCE)

    model.plug(match.bind(state), "a", match.by_canonical_name(state))
    result = run()
    fused = model.module.fused
    found["check"] = {
        "error": max(each.error for each in fused.check._passed.values()),
        "tolerance": fused._products.tolerance,
        "label": fused.check._what,
    }
    found["same bits"] = torch.equal(result, run())
    exact = reference_latents(reference.transformer_from(state), given, STEPS)
    found["error"] = reference.relative_error(result, exact)
    name = "single_blocks.1.linear2.weight"
    other = {**state, name: torch.flip(state[name], (0,))}
    model.plug(match.bind(other), "b", match.by_canonical_name(other))
    found["another checkpoint"] = reference.relative_error(
        run(), reference_latents(reference.transformer_from(other), given, STEPS)
    )
    model.unplug()
    found["held after unplug"] = fused._products._memory is not None
    model.reserve()
    cache.release_idle()
    found["held when idle"] = fused._products._memory is not None
    model.plug(match.bind(state), "a", match.by_canonical_name(state))
    for tensor in model.module.fused._products._weights["single_blocks.1.linear2"]:
        tensor.zero_()
    given = job(3, 16, 32, 1)
    judged = run()
    found["broken"] = {
        "refused": fused.check.is_refused,
        "error": reference.relative_error(judged, reference_latents(reference.transformer_from(state), given, STEPS)),
    }
    xfuser_start.stop()
    return found


if __name__ == "__main__":
    mend_the_interpreter()
    parts = {
        "quantiser": quantiser(),
        "modulation": modulation(),
        "products": products(),
        "packed": packed_products(),
        "given scales": given_scales(),
    }
    Path(sys.argv[1]).write_text(json.dumps({**parts, "model": whole_model(sys.argv[2])}))
