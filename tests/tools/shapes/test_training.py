"""Steps of training: what they change, and that a resumed training repeats the bits of one that went on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shapes.flow_training import Flow, FlowSettings, FlowTraining
from shapes.lora import Lora
from shapes.models import build_clip, build_t5, build_transformer
from shapes.pool import pack, tokens
from shapes.vae_training import Budget

CPU = torch.device("cpu")


class FewLatents:
    """A pool whose pictures are noise."""

    def __init__(self) -> None:
        self.latents = torch.randn(4, 16, 32, 32, generator=torch.Generator().manual_seed(1))
        self.clip, self.t5 = tokens(["a red circle", "a blue star", "一个绿色的圆环", ""])
        self.refreshed = 0

    def refresh(self) -> None:
        self.refreshed += 1

    def batch(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        chosen = torch.randint(4, (count,), generator=generator)
        return pack(self.latents[chosen]), self.clip[chosen], self.t5[chosen]


def fresh_flow() -> Flow:
    """A small model in which every tensor matters: what starts at zero would hide all that lies before it."""
    torch.manual_seed(7)
    flow = Flow(build_transformer(1, 1), build_clip(), build_t5())
    for tensor in flow.transformer.parameters():
        torch.nn.init.normal_(tensor, std=0.05)
    return flow


def training(steps: int, *, is_distilled: bool = False) -> FlowTraining:
    settings = FlowSettings(Budget(0, steps), is_distilled=is_distilled, batch=1, refresh_every=2, is_compiled=False)
    return FlowTraining(fresh_flow(), settings, CPU)


def test_a_resumed_training_has_the_bits_of_one_that_went_on(tmp_path: Path) -> None:
    straight = training(3)
    straight.train(FewLatents())
    first, pool = training(3), FewLatents()
    first.train(pool, until=2)
    first.save_state(tmp_path)
    resumed = training(3)
    resumed.load_state(tmp_path)
    assert resumed.step == 2
    resumed.train(pool)
    for name, tensor in straight.ema.state_dict().items():
        assert torch.equal(tensor, resumed.ema.state_dict()[name]), name
    assert max(path.stat().st_size for path in tmp_path.iterdir()) < 16_000_000
    with pytest.raises(ValueError, match="state of the phase flow, not distilled"):
        training(1, is_distilled=True).load_state(tmp_path)


def test_both_phases_change_all_models() -> None:
    for is_distilled in (False, True):
        begun = training(2, is_distilled=is_distilled)
        before = {name: tensor.clone() for name, tensor in begun.flow.named_parameters()}
        loss = begun.train(FewLatents())
        assert loss > 0
        changed = {name.split(".")[0] for name, each in begun.flow.named_parameters() if not each.equal(before[name])}
        assert changed == {"transformer", "text_encoder", "text_encoder_2"}


def test_a_lora_starts_as_nothing_and_leaves_no_trace(tmp_path: Path) -> None:
    flow = fresh_flow().requires_grad_(False)
    lora = Lora(flow.transformer, 4, torch.Generator().manual_seed(1))
    latents, clip, t5 = FewLatents().batch(1, torch.Generator().manual_seed(1))
    given = (latents, torch.full((1,), 0.5), torch.ones(1), clip, t5)
    plain = flow(*given)
    with lora.applied():
        assert torch.equal(flow(*given), plain)
    with torch.no_grad():
        for up in lora.up:
            up.normal_(std=0.1)
    with lora.applied():
        changed = flow(*given)
    with lora.applied(0.5):
        half = flow(*given)
    assert torch.equal(flow(*given), plain)
    assert 0 < (half - plain).norm() < (changed - plain).norm()
    lora.save(tmp_path / "lora.safetensors")
    assert (tmp_path / "lora.safetensors").stat().st_size < 1_000_000
