"""LoRAs as branches, through a real daemon with two workers: against the same LoRA baked into plain diffusers."""

from __future__ import annotations

from pathlib import Path

import lora_files
import pytest
import text_checkpoints
import torch
import z_image_models
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from gguf_files import dequantise, write_model
from lora_files import CHECKPOINT_SPELLINGS, CLASS_SPELLINGS, matrices
from lora_runs import baked, called, expected, latents_of, reference_ids
from packed_checkpoints import pack

from xditd.client import BadRequest

BAR = 1e-6
HALF_BAR = 1e-2


@pytest.mark.parametrize("spelling", [*CHECKPOINT_SPELLINGS, *CLASS_SPELLINGS])
def test_every_spelling_is_as_baked(
    client, transformer, state, of_class, inputs, tmp_path: Path, spelling: str, relative_error, leaves_nothing
) -> None:
    shapes = matrices(state) if spelling in CHECKPOINT_SPELLINGS else of_class
    if spelling == "xlabs":
        shapes = {name: shape for name, shape in shapes.items() if name.endswith(("attn.qkv", "attn.proj"))}
    lora = lora_files.make(shapes, spelling, seed=5)
    with client.lend_lora(lora.save(tmp_path / "x.safetensors")) as loan:
        assert loan.facts.lora.families["flux1"] == loan.facts.lora.layers == len(shapes)
        assert [tier.value for tier in loan.tiers] == ["file"]
        found = latents_of(client, transformer.with_loras([(loan, 0.8)]), inputs)
        plain = latents_of(client, transformer, inputs)
    right = expected(baked(state, (lora, 0.8)), inputs)
    assert relative_error(found, right) <= BAR
    assert relative_error(plain, expected(baked(state), inputs)) <= BAR
    assert relative_error(plain, right) > 0.1


def test_mixes_of_three_and_strengths(client, transformer, state, of_class, inputs, relative_error, leaves_nothing):
    """Stacked, of unequal ranks and other namings, with negative and zero strengths, and named twice."""
    kohya = lora_files.make(matrices(state), "kohya", 1, ranks=(3,))
    diffusers = lora_files.make(of_class, "diffusers", 2, ranks=(16, 2))
    some = {name: shape for name, shape in of_class.items() if "attn" in name}
    peft = lora_files.make(some, "peft", 3, dtype=torch.bfloat16)
    loans = [client.lend_lora(each.tensors) for each in (kohya, diffusers, peft)]
    try:
        first, second, third = loans
        mixed = transformer.with_loras([(first, 0.4), (second, -0.7)]).with_loras([(third, 1.2)])
        found = latents_of(client, mixed, inputs)
        right = expected(baked(state, (kohya, 0.4), (diffusers, -0.7), (peft, 1.2)), inputs)
        assert relative_error(found, right) <= BAR
        alone = latents_of(client, transformer, inputs)
        assert torch.equal(latents_of(client, transformer.with_loras([(first, 0.0)]), inputs), alone)
        assert torch.equal(latents_of(client, transformer.with_loras([]), inputs), alone)
        twice = transformer.with_loras([(second, 0.5), (second, -1.2), (first, 0.0)])
        assert (
            relative_error(latents_of(client, twice, inputs), expected(baked(state, (diffusers, -0.7)), inputs)) <= BAR
        )
        by_id = transformer.with_loras([(second.component_id, -0.7)])
        assert torch.equal(latents_of(client, by_id, inputs), latents_of(client, twice, inputs))
    finally:
        for loan in loans:
            loan.return_()


def test_strengths_by_step(client, transformer, state, inputs, relative_error, leaves_nothing):
    """Each step has the model with its strengths in the weights, as a loop over calls shows."""
    first, second = (lora_files.make(matrices(state), "kohya", seed) for seed in (1, 2))
    strengths = [(0.0, 0.5), (0.8, 0.5), (0.8, -0.4)]
    modules = [baked(state, (first, one), (second, other)) for one, other in strengths]
    scheduler = FlowMatchEulerDiscreteScheduler()
    sigmas = (1.0, 0.6, 0.3)
    scheduler.set_timesteps(sigmas=list(sigmas))
    side = inputs.pixels // 16
    latents = FluxPipeline._pack_latents(inputs.noise, *inputs.noise.shape)
    given = {
        "encoder_hidden_states": inputs.prompt_embeds,
        "pooled_projections": inputs.pooled_prompt_embeds,
        "guidance": torch.tensor([3.5]),
        "img_ids": reference_ids(side),
        "txt_ids": torch.zeros(inputs.prompt_embeds.shape[1], 3),
    }
    with torch.no_grad():
        for module, timestep in zip(modules, scheduler.timesteps, strict=True):
            moved = module(latents, timestep=timestep[None] / 1000, return_dict=False, **given)[0]
            latents = scheduler.step(moved, timestep, latents, return_dict=False)[0]
    right = FluxPipeline._unpack_latents(latents, inputs.pixels, inputs.pixels, 8)
    with client.lend_lora(first.tensors) as one, client.lend_lora(second.tensors) as two:
        by_step = transformer.with_loras([(one, [0.0, 0.8]), (two, [(0, 0.5), (2, -0.4)])])
        found = latents_of(client, by_step, inputs, steps=3, sigmas=sigmas)
        never = transformer.with_loras([(one, [0.0, 0.0, 0.0])])
        alone = latents_of(client, transformer, inputs, steps=3, sigmas=sigmas)
        assert torch.equal(latents_of(client, never, inputs, steps=3, sigmas=sigmas), alone)
        with pytest.raises(BadRequest, match=r"change at the steps 2: ascending ones below 2 are needed"):
            latents_of(client, by_step, inputs, steps=2)
        with pytest.raises(BadRequest, match="has strengths by step: only a generation has steps"):
            called(client, by_step)
    assert relative_error(found, right) <= BAR


def test_a_call_and_a_step_cache_have_them_too(client, transformer, state, inputs, relative_error):
    lora = lora_files.make(matrices(state), "kohya", 1)
    with client.lend_lora(lora.tensors) as loan:
        view = transformer.with_loras([(loan, 0.8)])
        cached = latents_of(client, view, inputs, step_cache=1e-4)
        given = {
            "hidden_states": torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0)),
            "encoder_hidden_states": inputs.prompt_embeds,
            "pooled_projections": inputs.pooled_prompt_embeds,
            "timestep": torch.tensor([0.7]),
            "guidance": torch.tensor([3.5]),
            "img_ids": reference_ids(8),
            "txt_ids": torch.zeros(inputs.prompt_embeds.shape[1], 3),
        }
        (called,) = client.call(view, given)
        (plain,) = client.call(transformer, given)
    module = baked(state, (lora, 0.8))
    assert relative_error(cached, expected(module, inputs)) <= BAR
    with torch.no_grad():
        assert relative_error(called, module(**given, return_dict=False)[0]) <= BAR
        assert relative_error(plain, baked(state)(**given, return_dict=False)[0]) <= BAR


def test_bfloat16_is_as_near_to_the_unrounded_one_as_the_baked_one(client, state):
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    lora = lora_files.make(matrices(state), "kohya", 4, size=0.1)
    with client.lend({name: tensor.float() for name, tensor in lora.baked_into(half, 1.0).items()}) as loan:
        unrounded = called(client, loan)
    with client.lend(half) as loan, client.lend_lora(lora.tensors) as lent:
        branch = called(client, loan.with_loras([(lent, 1.0)]), torch.bfloat16)
        alone = called(client, loan, torch.bfloat16)
    with client.lend(lora.baked_into(half, 1.0)) as loan:
        in_weights = called(client, loan, torch.bfloat16)

    def error_of(found: torch.Tensor) -> float:
        return float((found.float() - unrounded).norm() / unrounded.norm())

    assert error_of(branch) <= HALF_BAR
    assert error_of(branch) <= 1.5 * error_of(in_weights)
    assert error_of(alone) > 10 * HALF_BAR


@pytest.mark.parametrize("packed_format", ["int8_convrot", "old", "q8_0"])
def test_packed_bases_are_as_the_dequantised_ones(
    client, state, inputs, tmp_path: Path, packed_format: str, relative_error
) -> None:
    if packed_format == "q8_0":
        path = tmp_path / "x.gguf"
        written = write_model(path, state, lambda name: "q8_0" if ".img_" in name or "single" in name else None, "flux")
        meant = {
            name: dequantise(written[name][1], written[name][0], torch.float32) if name in written else tensor
            for name, tensor in state.items()
        }
    else:
        packed = pack(state, packed_format, torch.float32)
        path, meant = packed.save(tmp_path / "x.safetensors"), packed.meant
    lora = lora_files.make(matrices(state), "kohya", 6)
    with client.lend(path, compute_dtype="float32") as loan, client.lend_lora(lora.tensors) as lent:
        found = latents_of(client, loan.with_loras([(lent, 0.9)]), inputs)
        alone = latents_of(client, loan, inputs)
    assert relative_error(found, expected(baked(meant, (lora, 0.9)), inputs)) <= BAR
    assert relative_error(alone, expected(baked(meant), inputs)) <= BAR


@pytest.mark.parametrize(
    ("names", "spelling"), [("comfyui", "comfyui"), ("comfyui", "diffusers"), ("diffusers", "kohya")]
)
def test_z_image_in_both_namings(client, names: str, spelling: str, relative_error):
    """A LoRA in either naming fits a checkpoint in either."""
    state = z_image_models.state_dict(0, names=z_image_models.COMFYUI if names == "comfyui" else ())
    module = z_image_models.reference(state)
    other = z_image_models.state_dict(0, names=z_image_models.COMFYUI)
    # diffusers' names are those of its class, also where kohya's scripts flatten them
    shapes = matrices(other) if spelling == "comfyui" else matrices(module.state_dict())
    lora = lora_files.make(shapes, spelling, 7, size=0.2)
    lora.is_of_class = spelling != "comfyui"
    with client.lend(state) as loan, client.lend_lora(lora.tensors) as lent:
        given = z_image_models.inputs((7, 40), ((8, 12), (6, 4)))
        (found,) = client.call(loan.with_loras([(lent, 0.6)]), given)
        (plain,) = client.call(loan, given)
    with torch.no_grad():
        without = module(**given, return_dict=False)[0]
        if lora.is_of_class:
            lora.bake_into(module, 0.6)
        else:
            module = z_image_models.reference(lora.baked_into(state, 0.6))
        right = module(**given, return_dict=False)[0]
    for row in range(2):
        assert relative_error(found[row], right[row]) <= 2 * BAR
        assert relative_error(plain[row], without[row]) <= 2 * BAR
        assert relative_error(plain[row], right[row]) > 0.05


def test_a_mix_of_three_on_z_image(client, relative_error, leaves_nothing):
    """In three spellings and two namings of its layers."""
    state = z_image_models.state_dict(0, names=z_image_models.COMFYUI)
    names = matrices(z_image_models.reference(state).state_dict())
    loras = [
        lora_files.make(matrices(state), "comfyui", 1, size=0.2),
        lora_files.make(names, "diffusers", 2, size=0.2, ranks=(5,)),
        lora_files.make(names, "onetrainer", 3, size=0.2),
    ]
    strengths = (0.6, -0.4, 0.9)
    module = z_image_models.reference(loras[0].baked_into(state, strengths[0]))
    for lora, strength in zip(loras[1:], strengths[1:], strict=True):
        lora.bake_into(module, strength)
    given = z_image_models.inputs((7, 40), ((8, 12), (6, 4)))
    loans = [client.lend_lora(lora.tensors) for lora in loras]
    with client.lend(state) as loan:
        (found,) = client.call(loan.with_loras(zip(loans, strengths, strict=True)), given)
    for each in loans:
        each.return_()
    with torch.no_grad():
        right = module(**given, return_dict=False)[0]
    for row in range(2):
        assert relative_error(found[row], right[row]) <= 2 * BAR


@pytest.mark.long
def test_switches_variants_and_clients(daemon, files, state, inputs, processes):
    """Four clients, twenty variants, two hundred switches: right results, no weight copied, nothing leaks."""
    loras = [lora_files.make(matrices(state), "kohya", seed, ranks=(2,)) for seed in range(4)]
    with daemon.connect() as watcher:
        before = watcher.status()
        clients = [daemon.connect() for _ in range(4)]
        try:
            bases = [client.lend(files.transformer) for client in clients]
            lent = [client.lend_lora(lora.tensors) for client, lora in zip(clients, loras, strict=True)]
            started = watcher.status()
            strengths = (0.3, -0.5, 1.0, 0.0, 0.7)
            variants = [(who, strength) for who in range(4) for strength in strengths]

            def run(who: int, strength: float) -> torch.Tensor:
                view = bases[who].with_loras([(lent[who], strength)])
                return latents_of(clients[who], view, inputs, steps=1)

            first = {variant: run(*variant) for variant in variants}
            open_files = processes.count_fds(watcher.daemon_pid)
            workers = [each.pid for each in watcher.status().workers]
            mapped = [processes.memfds(pid) for pid in workers]
            for number in range(200):
                variant = variants[(number * 7) % len(variants)]
                assert torch.equal(run(*variant), first[variant]), variant
            assert processes.count_fds(watcher.daemon_pid) <= open_files + 2
            assert [processes.memfds(pid) for pid in workers] == mapped
            # The four of strength 0 are alike.
            assert len({tuple(each.flatten()[:8].tolist()) for each in first.values()}) == 17
            status = watcher.status()
            assert status.loras.jobs - before.loras.jobs == 220
            assert status.loras.switches - before.loras.switches == 220 * 4 // 5  # not to strength 0
            assert status.loras.bound - before.loras.bound == 4  # four loans of one file are of one model
            assert status.loras.converted_bytes == before.loras.converted_bytes
            copied = {each.component_id: each.copied for each in started.components}
            assert {each.component_id: each.copied for each in status.components} == copied
            assert status.loras.detail == "" or "plain blocks" in status.loras.detail
        finally:
            for client in clients:
                client.close()
        after = watcher.status()
        # Loans of earlier tests may have ended meanwhile, and their errors are older now.
        assert {each.component_id for each in after.components} <= {each.component_id for each in before.components}
        errors, known = ({each.detail for each in found.last_errors} for found in (after, before))
        assert errors <= known


TEXT_SPELLINGS = {
    "kohya": ("lora_te{}_", "_", ".lora_down.weight", ".lora_up.weight"),
    "diffusers": ("text_encoder{}.", ".", ".lora_A.weight", ".lora_B.weight"),
    "comfyui": ("text_encoders.{}.transformer.", ".", ".lora_down.weight", ".lora_up.weight"),
}
"""What is before the name of a layer (with the encoder's number or name), between its parts, and after it."""


def test_text_encoders(client, relative_error, leaves_nothing):
    """CLIP-L and T5 with three LoRAs, each in another spelling, in files with layers of a transformer."""
    encoders = {
        "clip_l": (text_checkpoints.clip_l_state_dict(5), ("1", "", "clip_l")),
        "t5": (text_checkpoints.t5_state_dict(6), ("2", "_2", "t5xxl")),
    }
    strengths = (0.5, -0.3, 0.8)
    ends = ("_proj", ".fc1", ".fc2", ".q", ".o", ".wi_0", ".wo")
    states = {name: state for name, (state, _) in encoders.items()}
    alone = {spelling: dict(states) for spelling in TEXT_SPELLINGS}
    mixed, loans = dict(states), []
    for number, (spelling, (before, between, down, up)) in enumerate(TEXT_SPELLINGS.items()):
        tensors = lora_files.make({"double_blocks.0.img_mod.lin": (1536, 256)}, "kohya", 9).tensors
        for name, (state, names) in encoders.items():
            lora = lora_files.make(matrices(state, *ends), "comfyui", 8 + number)
            alone[spelling][name] = lora.baked_into(state, strengths[number])
            mixed[name] = lora.baked_into(mixed[name], strengths[number])
            for key, tensor in lora.tensors.items():
                layer, role = key.removeprefix("diffusion_model.").rsplit(".lora_", 1)
                layer = before.format(names[number]) + layer.replace(".", between)
                tensors[layer + (down if role.startswith("A") else up)] = tensor
        loans.append(client.lend_lora(tensors))
        assert set(loans[-1].facts.lora.families) == {"clip_l", "t5", "umt5", "flux1"}  # T5 and UMT5 name layers alike
        assert loans[-1].facts.lora.text_encoders == (("clip_l",), ("t5", "umt5"))
        assert loans[-1].facts.lora.unknown == ()
    uses = list(zip(loans, strengths, strict=True))
    ids = torch.randint(2, 1000, (2, 20), generator=torch.Generator().manual_seed(1))

    def encoded(state: dict[str, torch.Tensor], *uses: tuple[object, float]) -> torch.Tensor:
        with client.lend(state) as loan:
            return client.encode_text(loan.with_loras(uses), ids).hidden_states

    for name, state in states.items():
        plain = encoded(state)
        for use, baked_one in zip(uses, alone.values(), strict=True):
            right = encoded(baked_one[name])
            assert relative_error(encoded(state, use), right) <= 2 * BAR
            assert relative_error(plain, right) > 0.05
        assert relative_error(encoded(state, *uses), encoded(mixed[name])) <= 2 * BAR
    for loan in loans:
        loan.return_()
