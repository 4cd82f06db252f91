"""Steps of training: what they change, and that a resumed training repeats the bits of one that went on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from shapes import train
from shapes.budget import Budget, Interrupt
from shapes.draw import draw, encode
from shapes.flow_training import Flow, FlowSettings, FlowTraining
from shapes.lora import Lora
from shapes.models import build_clip, build_parts, build_t5, build_transformer, load_parts, save_weights
from shapes.pool import Sentences, covered_patches, pack
from shapes.scenes import COLOURS, FORMS, SIZES, Scene, Thing
from shapes.text_tokens import tokens
from shapes.text_training import TextSettings, TextTraining, said
from shapes.vae_training import VaeSettings, train_vae
from shapes.words import sample_request
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def environment_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # as train.main sets it, for its process alone


class FewLatents:
    """A pool whose pictures are noise."""

    def __init__(self) -> None:
        self.latents = torch.randn(4, 16, 32, 32, generator=torch.Generator().manual_seed(1))
        self.clip, self.t5 = tokens(["a red circle", "a blue star", "一个绿色的圆环", ""])
        self.covered = (torch.arange(4 * 256).view(4, 256) % 5 == 0).float()
        self.refreshed = 0

    def refresh(self) -> None:
        self.refreshed += 1

    def batch(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        chosen = torch.randint(4, (count,), generator=generator)
        return pack(self.latents[chosen]), self.clip[chosen], self.t5[chosen], self.covered[chosen]


def fresh_flow() -> Flow:
    """A small model in which every tensor matters: what starts at zero would hide all that lies before it."""
    torch.manual_seed(7)
    flow = Flow(build_transformer(1, 1), build_clip(), build_t5())
    for tensor in flow.transformer.parameters():
        torch.nn.init.normal_(tensor, std=0.05)
    return flow


def training(
    steps: int, *, is_distilled: bool = False, text_rate: float = 5e-4, interrupt: Interrupt | None = None
) -> FlowTraining:
    settings = FlowSettings(
        Budget(0, steps, interrupt or Interrupt()),
        is_distilled=is_distilled,
        text_rate=text_rate,
        batch=1,
        refresh_every=2,
        long_every=3,
        object_weight=4.0,
        is_compiled=False,
    )
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


@pytest.mark.parametrize(("is_distilled", "text_rate"), [(False, 5e-4), (False, 0.0), (True, 0.0)])
def test_phases_change_the_models_that_they_train(is_distilled: bool, text_rate: float) -> None:
    begun = training(2, is_distilled=is_distilled, text_rate=text_rate)
    before = {name: tensor.clone() for name, tensor in begun.flow.named_parameters()}
    loss = begun.train(FewLatents())
    assert loss > 0
    changed = {name.split(".")[0] for name, each in begun.flow.named_parameters() if not each.equal(before[name])}
    assert changed == ({"transformer", "text_encoder", "text_encoder_2"} if text_rate else {"transformer"})
    averages = {name.split(".")[0] for name, each in begun.ema.named_parameters() if not each.equal(before[name])}
    assert averages == changed


class NothingRead(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: values read on the host, and random numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(word in name for word in ("_local_scalar_dense", "nonzero", "is_nonzero", "aten.rand", "normal_")):
            raise AssertionError(f"{name} in a step that is recorded")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_distilled", [False, True])
def test_a_step_reads_nothing_on_the_host(is_distilled: bool) -> None:
    begun, pool = training(2, is_distilled=is_distilled), FewLatents()
    step = begun._learn

    def watched(*inputs: torch.Tensor) -> torch.Tensor:
        with NothingRead():
            return step(*inputs)

    begun._optimizer.step = lambda: None  # type: ignore[method-assign]  # on a CPU it counts on the host
    begun._update._step = watched
    assert begun.train(pool) > 0


def test_covered_patches_are_those_that_objects_change() -> None:
    things = (Thing("square", "red", "large", 0, 0.2, 0.25, 0.15), Thing("star", "blue", "small", 5, 0.8, 0.5, 0.09))
    rows = encode([Scene(things, "plain", "white"), Scene((), "plain", "white")])
    covered = covered_patches(rows)
    changed = (draw(rows) < 0.999).any(1).unfold(1, 16, 16).unfold(2, 16, 16).flatten(3).any(-1).flatten(1)
    assert not (changed & ~covered).any()
    assert 0 < int(covered[0].sum()) < 2 * int(changed[0].sum())
    assert not covered[1].any()


def test_the_vae_learns_with_both_halves_then_its_decoder(capsys: pytest.CaptureFixture[str]) -> None:
    vae = train_vae(VaeSettings(Budget(0, 3), batch=1, workers=0), CPU)
    assert "vae: 3 steps" in capsys.readouterr().out
    assert all(each.isfinite().all() for each in vae.parameters())


def test_a_lora_starts_as_nothing_and_leaves_no_trace(tmp_path: Path) -> None:
    flow = fresh_flow().requires_grad_(False)
    lora = Lora(flow.transformer, 4, torch.Generator().manual_seed(1))
    latents, clip, t5, _ = FewLatents().batch(1, torch.Generator().manual_seed(1))
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


def few_sentences(count: int) -> Sentences:
    return Sentences(CPU, seed=5, slots=1, size=count, workers=0)


def test_answers_are_what_scenes_show() -> None:
    rng = Random(4)
    scenes = [sample_request(rng).scene for _ in range(32)]
    answers, behind = said(encode(scenes))
    assert answers.shape == (32, 25, 5)
    assert behind.shape == (32, 2)
    unclear = 0
    for scene, found in zip(scenes, answers.tolist(), strict=True):
        right = [
            (FORMS.index(t.form), list(COLOURS).index(t.colour), list(SIZES).index(t.size), t.cell)
            for t in scene.things
        ]
        for which, first, count in ((3, 0, 9), (0, 9, 8), (1, 17, 8)):
            for asked in range(count):
                there = [each for each in right if each[which] == asked]
                unclear += len(there) > 1
                expected = [*(there[0] if len(there) == 1 else [-100] * 4), bool(there)]
                assert found[first + asked] == expected
    assert unclear


def test_text_encoders_learn_what_sentences_say() -> None:
    torch.manual_seed(3)
    few = few_sentences(8)
    clip, t5 = build_clip(), build_t5()
    before = {name: each.clone() for name, each in [*clip.named_parameters(), *t5.named_parameters()]}
    begun = TextTraining(clip, t5, TextSettings(Budget(0, 30), batch=8, rate=2e-3, refresh_every=100), CPU)
    first = begun._learn(few.clip, few.t5, *said(few.scenes))
    report = begun.train(few)
    last = begun._learn(few.clip, few.t5, *said(few.scenes))
    assert report["steps"] == 30
    assert set(report["read_right"]) == {"1", "2", "3"}
    assert last < 0.7 * first
    after = dict([*clip.named_parameters(), *t5.named_parameters()])
    assert all(not each.equal(before[name]) for name, each in after.items() if "final" not in name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupt_ends_a_phase_and_keeps_what_it_learned(number: signal.Signals) -> None:
    interrupt = Interrupt()
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    begun = training(1_000_000, interrupt=interrupt)

    class Interrupting(FewLatents):
        def refresh(self) -> None:
            os.kill(os.getpid(), number)

    with interrupt.watched():
        assert begun.train(Interrupting()) > 0
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert begun.step == 3
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_phase_that_is_interrupted_before_its_first_step_changes_nothing() -> None:
    begun = training(3, interrupt=Interrupt(is_set=True))
    before = {name: tensor.clone() for name, tensor in begun.ema.named_parameters()}
    assert begun.train(FewLatents()) == 0.0
    assert begun.step == 0
    assert all(each.equal(before[name]) for name, each in begun.ema.named_parameters())


def test_an_interrupted_phase_is_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: train.Run) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def begun(*_: object, **__: object) -> None:
        raise AssertionError("a further phase has begun")

    monkeypatch.setattr(train.Run, "train_vae", interrupted)
    for name in ("TextTraining", "Pool", "FlowTraining"):
        monkeypatch.setattr(train, name, begun)
    before = torch.backends.cuda.matmul.allow_tf32
    train.main([str(tmp_path), "--text-steps", "1", "--steps", "1", "--distill-steps", "1", "--device", "cpu"])
    assert torch.backends.cuda.matmul.allow_tf32 == before  # settings for GPUs do not stay in a process


def test_a_folder_is_written_from_weights_alone_and_not_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.Run, "train_vae", lambda _: pytest.fail("a VAE has been judged where nothing is trained"))
    none = ["--vae-seconds", "0", "--text-seconds", "0", "--seconds", "0", "--distill-seconds", "0"]
    out, folder = tmp_path / "out", tmp_path / "folder"
    with pytest.raises(SystemExit, match="nothing to do"):
        train.main([str(out), *none])
    parts = build_parts()
    for name in ("vae", "text_encoder", "text_encoder_2"):
        save_weights(parts[name], out / f"{name}.safetensors")
    with pytest.raises(SystemExit, match="out: no weights of transformer; train them first"):
        train.main([str(out), *none, "--start", str(out), "--folder", str(folder)])
    assert not folder.exists()
    save_weights(parts["transformer"], out / "transformer.safetensors")
    (out / "report.json").write_text("{}")
    train.main([str(out), *none, "--start", str(out), "--folder", str(folder)])
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert "model_index.json" in sizes
    assert max(sizes.values()) < 16_000_000
    assert sum(sizes.values()) < 25_000_000
    assert (out / "report.json").read_text() == "{}", "the report of the training is gone"
    assert load_parts(folder, parts) == list(parts)
