"""For tests: jobs for a demo FLUX.1 transformer as messages, with their tensors in a room of :mod:`one_rank`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from one_rank import Room

from xditd.ipc.arguments import Argument, Values
from xditd.ipc.job_parts import Part, Sampling
from xditd.ipc.requests import Call, Generate
from xditd.ipc.tensors import IoTensor

TEXT_TOKENS = 4
SIDE = 64
LATENT = SIDE // 8
TOKENS = (LATENT // 2) ** 2


def numbers(*values: float, dtype: Any = "float32") -> Values:
    return Values(dtype=dtype, shape=(len(values),), values=values)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conditioning(batch: int = 1) -> dict[str, torch.Tensor]:
    return {
        "prompt_embeds": random(batch, TEXT_TOKENS, 4096, seed=1),
        "pooled_prompt_embeds": random(batch, 768, seed=2),
    }


def noise(batch: int = 1) -> torch.Tensor:
    return random(batch, 16, LATENT, LATENT, seed=3)


def generate(
    room: Room,
    *,
    given: Mapping[str, torch.Tensor | Argument] | None = None,
    noise: torch.Tensor | None = None,
    sampling: Mapping[str, Any] | None = None,
    components: Mapping[str, str] | None = None,
    batch: int = 1,
    outputs: Mapping[str, tuple[int, ...]] | None = None,
) -> Generate:
    """A job of two steps on ``transformer``. ``outputs`` are shapes by name, besides ``out_latents``.

    Tensors among ``given`` go into the block.
    """
    written = {
        name: room.argument(each) if isinstance(each, torch.Tensor) else each
        for name, each in (conditioning(batch) if given is None else given).items()
    }
    told = {"height": SIDE, "width": SIDE, "steps": 2, **(sampling or {})}
    placed: dict[str, IoTensor | None] = {"noise": None if noise is None else room.input(noise)}
    shapes = {"out_latents": (batch, 16, LATENT, LATENT), **(outputs or {})}
    placed |= {name: room.output(*shape) for name, shape in shapes.items()}
    named: Any = {"transformer": "transformer"} if components is None else dict(components)
    fields: dict[str, Any] = placed
    return Generate(
        request_id="r", components=named, conditioning=written, sampling=Sampling(**told), io=room.block(), **fields
    )


def forward(room: Room, rows: int = 1, *, seed: int = 4, sigma: float = 0.5) -> dict[str, Argument]:
    """The arguments of one forward."""
    return {
        "hidden_states": room.argument(random(rows, TOKENS, 64, seed=seed)),
        "encoder_hidden_states": room.argument(random(rows, TEXT_TOKENS, 4096, seed=seed + 1)),
        "pooled_projections": room.argument(random(rows, 768, seed=seed + 2)),
        "timestep": numbers(*[sigma] * rows),
        "img_ids": room.argument(positions()),
        "txt_ids": room.argument(torch.zeros(TEXT_TOKENS, 3)),
        "guidance": numbers(*[3.5] * rows),
    }


def positions() -> torch.Tensor:
    side = LATENT // 2
    ids = torch.zeros(side, side, 3)
    ids[..., 1] = torch.arange(side)[:, None]
    ids[..., 2] = torch.arange(side)
    return ids.view(-1, 3)


def call(room: Room, *parts: dict[str, Argument], size_bytes: int = 2**20, **fields: Any) -> Call:
    """A call of ``transformer``, of forwards whose tensors are in the room."""
    given = parts or (forward(room),)
    where = room.results(size_bytes)
    return Call(
        request_id="r",
        component_id="transformer",
        parts=tuple(Part(arguments=dict(each)) for each in given),
        io=room.block(),
        **where,
        **fields,
    )
