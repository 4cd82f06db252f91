"""Cases of the kernel that copies factors, against copies by torch."""

from __future__ import annotations

import torch

from xditd.gpu_workers.kernels.factor_copies import Copy, FactorCopies

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3, 5), (16, 3072), (700, 16), (1, 1), (129, 130)]
FACTORS = (0.3, -1.75)


def check_copies(dtype: torch.dtype, device: str) -> None:
    """Copy into slices of wider tensors, scaled and not, and look at what lies beside them."""
    generator = torch.Generator().manual_seed(1)
    sources = [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]
    targets = [torch.full((rows, columns + 3), 7.0, dtype=dtype, device=device) for rows, columns in SHAPES]
    slices = [target[:, 2:-1] for target in targets]
    copies = FactorCopies(
        [Copy(source, part, number % 3) for number, (source, part) in enumerate(zip(sources, slices, strict=True))]
    )
    assert copies.run(FACTORS) == sum(each.nbytes for each in sources)
    _check(sources, targets, FACTORS)
    for part in slices:
        part.zero_()
    other = (2.5, 0.0)
    assert copies.run(other, only_scaled=True) == sum(sources[number].nbytes for number in (1, 2, 4))
    for number in (0, 3):
        assert not slices[number].any()
        slices[number].copy_(sources[number])
    _check(sources, targets, other)


def _check(sources: list[torch.Tensor], targets: list[torch.Tensor], factors: tuple[float, float]) -> None:
    for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
        factor = torch.tensor((1.0, *factors)[number % 3], device=source.device)
        assert torch.equal(target[:, 2:-1], (source.float() * factor).to(source.dtype)), SHAPES[number]
        assert bool((target[:, :2] == 7.0).all())
        assert bool((target[:, -1] == 7.0).all())
