"""ControlNets in a real ComfyUI, by its own nodes: stock's latents, with residuals that never leave the workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import FluxControlNetModel  # noqa: F401 - before ComfyUI is on the path
from flux1_controlnets import MODES, comfyui_state, diffusers_state
from safetensors.torch import save_file

from xditd.ipc.errors import Unsupported
from xditd.ipc.tensors import ComponentKind

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def controlnets(comfy: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What stock's Load ControlNet Model makes: unions in diffusers' naming, as they are released, and a single one."""
    folder = tmp_path_factory.mktemp("controlnets")
    states = {
        "union": diffusers_state(comfyui_state(5, modes=MODES)),
        "other union": diffusers_state(comfyui_state(6, modes=MODES)),
        "single": diffusers_state(comfyui_state(7, double_blocks=1, single_blocks=0)),
    }
    found = {}
    for name, state in states.items():
        save_file(state, folder / f"{name}.safetensors")
        found[name] = comfy.comfy.controlnet.load_controlnet(str(folder / f"{name}.safetensors"))
    return found


def typed(controlnet: Any, kind: int | None) -> Any:
    """What SetUnionControlNetType makes; ``None`` is its "auto"."""
    made = controlnet.copy()
    made.set_extra_arg("control_type", [] if kind is None else [kind])
    return made


@pytest.fixture
def whole_vae(connected: None, whole_file: Path) -> Any:
    from xditd.client.comfyui.nodes.vae_loader import load_vae

    return load_vae(str(whole_file))


@pytest.fixture(scope="module")
def stock_whole(comfy: SimpleNamespace, whole_file: Path) -> Any:
    return comfy.comfy.sd.VAE(sd=comfy.comfy.utils.load_torch_file(str(whole_file)))


def picture(seed: int, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def applied(comfy: SimpleNamespace) -> Callable[..., tuple[Any, Any]]:
    """Apply ControlNets one after the other, by ControlNetApplyAdvanced."""

    def apply(positive: Any, negative: Any, vae: Any, *uses: tuple[Any, int, dict[str, float]]) -> tuple[Any, Any]:
        for controlnet, seed, options in uses:
            values = {"strength": 0.7, "start_percent": 0.0, "end_percent": 1.0, **options}
            positive, negative = comfy.nodes.ControlNetApplyAdvanced().apply_controlnet(
                positive, negative, controlnet, picture(seed), vae=vae, **values
            )
        return positive, negative

    return apply


CASES: list[dict[str, Any]] = [
    {"uses": [("union", 2, {"strength": 0.0})]},
    {"uses": [("union", 2, {"strength": 0.5})]},
    {"uses": [("union", 2, {"strength": 1.0})], "cfg": 5.0},
    {"uses": [("union", None, {})], "sampler_name": "dpmpp_2m", "scheduler": "beta"},
    {"uses": [("single", None, {"start_percent": 0.3, "end_percent": 0.8})], "steps": 6},
    {
        "uses": [("union", 1, {"strength": 0.4}), ("other union", 3, {"end_percent": 0.5}), ("single", None, {})],
        "cfg": 5.0,
    },
    {"uses": [("union", 0, {}), ("union", 3, {"strength": 0.3})], "batch": 2},
    {"uses": [("single", None, {})], "pixels": 72},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stock_latents(
    case: dict[str, Any],
    remote: Any,
    local: Any,
    controlnets: dict[str, Any],
    stock_whole: Any,
    conditioning: Any,
    ksample: Any,
    applied: Any,
    relative_error: Callable[..., float],
) -> None:
    options = dict(case)
    side, batch = options.pop("pixels", 64) // 8, options.pop("batch", 1)
    uses = [
        (controlnets[name] if name == "single" else typed(controlnets[name], kind), number, given)
        for number, (name, kind, given) in enumerate(options.pop("uses"))
    ]
    latent = {"samples": torch.zeros(batch, 16, side, side)}
    positive, negative = applied(conditioning(1), conditioning(2), stock_whole, *uses)
    expected = ksample(local, positive, negative, dict(latent), **options)
    assert relative_error(ksample(remote, positive, negative, dict(latent), **options), expected) <= TOLERANCE
    plain = ksample(local, conditioning(1), conditioning(2), dict(latent), **options)
    is_off = case["uses"][0][2].get("strength") == 0.0
    assert (relative_error(plain, expected) > 1e-3) is not is_off


def test_an_accelerated_model_and_the_workers_vae(
    comfy: Any, files: Any, whole_vae: Any, stock_whole: Any, local: Any, controlnets: Any, conditioning: Any,
    ksample: Any, applied: Any, relative_error: Callable[..., float], daemon: Any,
) -> None:  # fmt: skip
    from xditd.client import Client
    from xditd.client.comfyui.accelerate import accelerate

    remote = accelerate(comfy.comfy.sd.load_diffusion_model(str(files.transformer)))
    latent, use = {"samples": torch.zeros(1, 16, 8, 8)}, (typed(controlnets["union"], 1), 3, {})
    expected = ksample(local, *applied(conditioning(1), conditioning(2), stock_whole, use), dict(latent))
    given = applied(conditioning(1), conditioning(2), whole_vae, use)
    first = ksample(remote, *given, dict(latent))
    assert relative_error(first, expected) <= 2e-6  # the picture was encoded in the workers
    assert torch.equal(ksample(remote, *given, dict(latent)), first)
    with Client(daemon.runtime_dir) as client:
        lent = [each for each in client.status().components if each.kind is ComponentKind.CONTROLNET]
    assert len(lent) == 1
    assert lent[0].facts is not None
    assert lent[0].facts.controlnet is not None
    assert lent[0].facts.controlnet.modes == MODES
    comfy.comfy.model_management.unload_all_models()
    with Client(daemon.runtime_dir) as client:
        assert not [each for each in client.status().components if each.kind is ComponentKind.CONTROLNET]


def test_half_precision_is_cast_as_stock_casts_it(
    comfy: Any, remote: Any, local: Any, stock_whole: Any, conditioning: Any, ksample: Any, applied: Any,
    relative_error: Callable[..., float], tmp_path: Path,
) -> None:  # fmt: skip
    save_file(diffusers_state(comfyui_state(5, modes=MODES, dtype=torch.bfloat16)), tmp_path / "half.safetensors")
    controlnet = comfy.comfy.controlnet.load_controlnet(str(tmp_path / "half.safetensors"))
    given = applied(conditioning(1), conditioning(2), stock_whole, (typed(controlnet, 1), 3, {}))
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    expected = ksample(local, *given, dict(latent))
    is_cast = controlnet.manual_cast_dtype is not None
    assert relative_error(ksample(remote, *given, dict(latent)), expected) <= (TOLERANCE if is_cast else 2.5e-2)


def test_with_a_reference_of_kontext(
    remote: Any, local: Any, controlnets: Any, stock_whole: Any, conditioning: Any, ksample: Any, applied: Any,
    relative_error: Callable[..., float],
) -> None:  # fmt: skip
    from comfy_extras.nodes_edit_model import ReferenceLatent

    reference = {"samples": torch.randn(1, 16, 6, 10, generator=torch.Generator().manual_seed(3))}
    positive = ReferenceLatent.execute(conditioning(1), reference).result[0]
    given = applied(positive, conditioning(2), stock_whole, (typed(controlnets["union"], 1), 3, {}))
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    expected = ksample(local, *given, dict(latent))
    assert relative_error(ksample(remote, *given, dict(latent)), expected) <= TOLERANCE


def test_beside_the_channels_of_canny(
    comfy: Any, connected: None, controlnets: Any, stock_whole: Any, conditioning: Any, ksample: Any, applied: Any,
    relative_error: Callable[..., float], tmp_path: Path,
) -> None:  # fmt: skip
    from flux1_variants import state_of
    from node_helpers import conditioning_set_values

    from xditd.client.comfyui.nodes.unet_loader import load_unet

    save_file(state_of(128), tmp_path / "canny.safetensors")
    values = {"concat_latent_image": torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))}
    texts = [conditioning_set_values(conditioning(seed), values) for seed in (1, 2)]
    given = applied(*texts, stock_whole, (typed(controlnets["union"], 1), 3, {}))
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    expected = ksample(comfy.comfy.sd.load_diffusion_model(str(tmp_path / "canny.safetensors")), *given, dict(latent))
    remote = load_unet(str(tmp_path / "canny.safetensors"))
    assert relative_error(ksample(remote, *given, dict(latent)), expected) <= TOLERANCE


def test_xdit_ksampler_runs_step_by_step(
    comfy: Any, remote: Any, local: Any, controlnets: Any, conditioning: Any, ksample: Any, xsample: Any,
    relative_error: Callable[..., float], stock_whole: Any,
) -> None:  # fmt: skip
    apply = comfy.nodes.ControlNetApplyAdvanced().apply_controlnet
    positive, negative = apply(
        conditioning(1), conditioning(2), controlnets["single"], picture(1), 1.0, 0.0, 1.0, vae=stock_whole
    )
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    found, _, note = xsample(remote, positive=positive, negative=negative, latent_image=dict(latent))
    assert "step by step: the positive conditioning has control" in note
    assert relative_error(found, ksample(local, positive, negative, dict(latent))) <= TOLERANCE


def _xlabs(tmp_path: Path) -> Path:
    state = comfyui_state(3, double_blocks=1, single_blocks=1)
    state |= {f"input_hint_block.{n}.weight": torch.zeros(16, 3 if n == 0 else 16, 3, 3) for n in range(0, 16, 2)}
    save_file(state, tmp_path / "xlabs.safetensors")
    return tmp_path / "xlabs.safetensors"


def test_other_controlnets_are_refused_by_name(
    comfy: Any, remote: Any, controlnets: Any, conditioning: Any, ksample: Any, applied: Any, tmp_path: Path,
    stock_whole: Any,
) -> None:  # fmt: skip
    latent = {"samples": torch.zeros(1, 16, 8, 8)}

    def refused(controlnet: Any, message: str) -> None:
        given = applied(conditioning(1), conditioning(2), stock_whole, (controlnet, 1, {}))
        with pytest.raises(Unsupported, match=message):
            ksample(remote, *given, dict(latent))

    refused(typed(controlnets["union"], MODES), f"ControlNet of {MODES} types with the type {MODES}")
    refused(comfy.comfy.controlnet.load_controlnet(str(_xlabs(tmp_path))), "ControlNet of XLabs, which reads pixels")
    wide = diffusers_state(comfyui_state(3, double_blocks=1, single_blocks=1, heads=3))
    save_file(wide, tmp_path / "wide.safetensors")
    refused(
        comfy.comfy.controlnet.load_controlnet(str(tmp_path / "wide.safetensors")), "384 channels for a model of 256"
    )
    odd = typed(controlnets["union"], 1)
    odd.set_extra_arg("weights", 1)
    refused(odd, "ControlNet with the argument 'weights'")
    patched = typed(controlnets["union"], 1)
    patched.control_model_wrapped = patched.control_model_wrapped.clone()
    patched.control_model_wrapped.add_object_patch("dtype", torch.float16)
    refused(patched, "a ControlNet whose model has object patches")
    adapter = comfy.comfy.controlnet.T2IAdapter(None, 3, 8, "nearest-exact")
    refused(adapter, "ControlNet of the kind T2IAdapter")


def test_a_model_of_another_family_refuses_by_name(comfy: Any, controlnets: Any) -> None:
    from xditd.client.comfyui.controlnets import place_controls

    part = {"control": controlnets["single"]}
    (found,) = place_controls({"positive": [part]}, cast(Any, SimpleNamespace()), cast(Any, None))
    assert found == "ControlNet (ControlNetFlux of controlnet) for this model"
    assert part["control"] is controlnets["single"]
