"""For tests: forwards of ComfyUI's modules and of the workers' in one process, in float32 and in float64.

A float64 forward is exact where a float32 one is rounded: the distance to it says which of two is the better one; two
programs that agree in float64 compute the same function. Both modules have tables, casts and angles in float32: in
float64 these are replaced (:class:`InFloat64`), or all would be exact but for them.

    python float64_forwards.py COMFYUI FILE...

A FILE is ``VARIANT.safetensors``, with the name of a variant of ``comfyui_families``. Prints one line of JSON for each.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

CFG = 5.0
ULP = torch.finfo(torch.float32).eps

Forward = Callable[..., torch.Tensor]
_WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}


class InFloat64(TorchFunctionMode):
    """Makes float64 of every tensor of float32 that is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(_wider, args), **{name: _wider(each) for name, each in (kwargs or {}).items()})


def _wider(value: Any) -> Any:
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value


@contextlib.contextmanager
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with InFloat64(), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


def doubled(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(map(doubled, value))
    if isinstance(value, dict):
        return {name: doubled(each) for name, each in value.items()}
    return value


def plain(value: Any) -> Any:
    """Return an argument of a call as the workers read it."""
    from xditd.client.jobs.arguments import KeptTensor, RowsOf

    if isinstance(value, KeptTensor):
        return value.tensor
    if isinstance(value, RowsOf):
        return torch.cat([torch.cat([plain(each)] * times) for each, times in value.parts])
    return [plain(each) for each in value] if isinstance(value, list) else value


class Ours:
    """A model in this process as one rank has it, called with the arguments of ComfyUI's forward."""

    def __init__(self, file: Path, patcher: Any, layout: Any, *, is_exact: bool) -> None:
        import direct_jobs
        from safetensors.torch import load_file

        from xditd.client.comfyui.families import adapter_of_model
        from xditd.gpu_workers.models.model_cache import ModelCache

        adapter = adapter_of_model(patcher.model)
        assert adapter is not None
        self._adapter = adapter.adapt(patcher.model)
        self._state = load_file(file)
        self._dtype, self._arithmetic = torch.float32, contextlib.nullcontext
        if is_exact:
            self._dtype, self._arithmetic = torch.float64, float64
        with self._arithmetic():  # tables are made here
            self._model = direct_jobs.plugged(ModelCache(layout), self._state)
        if is_exact:
            self._model.module.double()
            self._model.dtype = torch.float64

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        from xditd.client.jobs.arguments import KeptTensor
        from xditd.gpu_workers.models.operations import CallOptions, Inputs

        with self._arithmetic():
            if self._dtype == torch.float64:
                args, kwargs = doubled(args), doubled(kwargs)
            call = self._adapter.read(*args, **kwargs)
            assert not call.faults, call.faults
            rows = range(call.rows)
            texts = [{name: each[row : row + 1] for name, each in call.texts.items()} for row in rows]
            kept = [self._adapter.keep_row(each, KeptTensor, self._dtype) for each in texts]
            numbers = {name: each.double().tolist() for name, each in call.numbers.items()}
            whole = slice(0, call.rows)
            trees = []
            for given in call.arguments(whole, numbers, kept, KeptTensor, self._dtype):
                inputs = Inputs({name: plain(each) for name, each in given.items()})
                operations: Any = self._model.operations
                if self._dtype == torch.float32:
                    operations.check(self._model, inputs)
                done = operations.run(self._model, inputs, CallOptions(self._adapter.variant))
                trees.append(operations.tree(done))
            return call.prediction(whole, trees)


def exact_stock(patcher: Any) -> Forward:
    """Return the forward of ComfyUI's own module in float64."""
    import comfy.ops
    from comfy_kitchen.registry import registry

    own, find = patcher.model.diffusion_model, registry.get_capable_backend

    def find_backend(name: str, kwargs: Any = None) -> str:
        """Let its eager operators, which take any dtype, take float64, too."""
        given = (each for each in (kwargs or {}).values() if isinstance(each, torch.Tensor))
        return "eager" if any(each.dtype == torch.float64 for each in given) else find(name, kwargs)

    registry.get_capable_backend = find_backend
    config = {
        name: each
        for name, each in patcher.model.model_config.unet_config.items()
        if name not in ("dtype", "device", "operations", "disable_unet_model_creation")
    }
    operations = comfy.ops.disable_weight_init
    with float64():
        module = type(own)(**config, device="cpu", dtype=torch.float64, operations=operations).eval()
        module.load_state_dict({name: each.double() for name, each in own.state_dict().items()})
    for each in module.modules():
        if isinstance(each, torch.nn.RMSNorm) and each.eps is None:
            each.eps = ULP  # torch's default in float32 and below; in float64 it is that of float64

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: each for name, each in value.items() if name not in ("wrappers", "callbacks")}
        return doubled(value)

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        with float64():
            found: torch.Tensor = module(*map(bare, args), **{name: bare(each) for name, each in kwargs.items()})
            return found

    return run


def sampled(patcher: Any, case: tuple[Any, ...], forward: Callable[..., torch.Tensor] | None = None) -> torch.Tensor:
    """Sample by ComfyUI's own node, with another forward in place of the model's."""
    import comfy.patcher_extension
    import nodes

    conditioning, options = case
    model = patcher.clone()
    if forward is not None:
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        model.add_wrapper_with_key(kind, "test", forward)
    positive, negative, latent = conditioning
    given = {"sampler_name": "euler", "scheduler": "simple", "denoise": 1.0, **options}
    (out,) = nodes.common_ksampler(model, 7, 4, CFG, positive=positive, negative=negative, latent=latent, **given)
    found: torch.Tensor = out["samples"]
    return found


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """By norm: the largest difference of a few hundred numbers is a matter of luck."""
    return float((one.double() - other.double()).norm() / other.double().norm())


def largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


def measured(name: str, file: Path, layout: Any) -> dict[str, Any]:
    """Return distances of latents after 4 steps at cfg 5, and of forwards in float64."""
    import comfy.sd
    from comfyui_families import VARIANTS

    variant, patcher = VARIANTS[name], comfy.sd.load_diffusion_model(str(file))
    ours, exact = (Ours(file, patcher, layout, is_exact=is_exact) for is_exact in (False, True))
    stock_exact = exact_stock(patcher)
    calls: list[tuple[Any, Any]] = []

    def noted(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append((args, kwargs))
        found: torch.Tensor = executor(*args, **kwargs)
        return found

    def with_other_last_bits(executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        signs = torch.randint(-1, 2, x.shape, generator=torch.Generator().manual_seed(len(calls)))
        found: torch.Tensor = executor(x * (1 + signs * ULP), *args, **kwargs)
        return found

    sampler, scheduler = variant.sampler
    longer = 41 if variant.tokens == 16 else variant.tokens
    cases = [
        (
            (variant.text(1, longer), variant.text(2), variant.latent()),
            {"sampler_name": sampler, "scheduler": scheduler},
        ),
        ((*(variant.text(seed, size=variant.odd) for seed in (3, 4)), variant.latent(1, variant.odd)), {}),
    ]
    found: dict[str, Any] = {"name": name}
    figures: dict[str, list[float]] = {"ours": [], "stock": [], "apart": [], "last_bits": []}
    for case in cases:
        stock = sampled(patcher, case, noted)
        mine = sampled(patcher, case, lambda _, *args, **kwargs: ours(*args, **kwargs))
        reference = sampled(patcher, case, lambda _, *args, **kwargs: stock_exact(*args, **kwargs).float())
        figures["ours"].append(distance(mine, reference))
        figures["stock"].append(distance(stock, reference))
        figures["apart"].append(largest(mine, stock))
        figures["last_bits"].append(largest(sampled(patcher, case, with_other_last_bits), stock))
    found |= {label: sum(each) / len(each) for label, each in figures.items()}
    found["same_function"] = max(
        largest(exact(*args, **kwargs), stock_exact(*args, **kwargs)) for args, kwargs in (calls[0], calls[-1])
    )
    return found


def main(comfyui: str, *files: str) -> None:
    # Before ComfyUI's folder is on the path: transformers would find its modules in place of others.
    from xditd.gpu_workers.process import xfuser_start

    with tempfile.TemporaryDirectory() as folder:
        layout = xfuser_start.start(0, 1, f"{folder}/store", torch.device("cpu"))
        import direct_jobs  # noqa: F401

        sys.argv = sys.argv[:1]
        sys.path.insert(0, comfyui)
        import comfy.cli_args
        import comfy_aimdo.control

        comfy_aimdo.control.init()
        comfy.cli_args.args.cpu = True
        from comfyui_families import detect_small_models

        with pytest.MonkeyPatch.context() as patch:
            detect_small_models(patch)
            for file in files:
                print(json.dumps(measured(Path(file).stem, Path(file), layout)), flush=True)
        xfuser_start.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
