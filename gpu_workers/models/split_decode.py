"""Split a VAE decode over all ranks: each computes a band of rows, with the result of a whole decode.

Convolutions need one row of each neighbour, norms the moments of all rows, and the mid attention the keys and values of
all rows. Nothing is blended or approximated: in float32 the image differs by the order of sums alone. It runs
diffusers' decoder with its own parameters. Why not DistVAE, which xDiT uses: docs/decisions/0008.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from xditd.gpu_workers.models.mixed_precision import convolve

LEAST_AREA = 64 * 64
"""Fewest latents of a split, of 8 x 8 pixels, so 512 x 512 in the image: a smaller decode is mostly launches and
collectives."""

MOST_AREA_A_RANK = 256 * 256
"""Most latent pixels of a band, 2048 x 2048 in the image: with 256 channels a billion numbers, and torch's
channels-last norms and upsampling have 32-bit indices."""


@dataclass(frozen=True, slots=True)
class Bands:
    """The partition of rows over ranks. Every rank makes the same calls in the same order."""

    rank: int
    ranks: int
    group: dist.ProcessGroup | None = None

    def are_worth_it(self, height: int, width: int, pixels: int = 8) -> bool:
        """Return whether latents of this size, each of ``pixels`` x ``pixels``, give every rank rows, and enough."""
        return self.ranks > 1 and height >= self.ranks and height * width * pixels**2 >= LEAST_AREA * 8**2

    def fit(self, height: int, width: int) -> bool:
        """Return whether a latent of this size can be split, and is large enough to be."""
        return self.are_worth_it(height, width) and self.shares(height)[0] * width <= MOST_AREA_A_RANK

    def shares(self, rows: int) -> list[int]:
        """Return the number of rows of each rank, as even as possible, larger ones first."""
        least, more = divmod(rows, self.ranks)
        return [least + (rank < more) for rank in range(self.ranks)]

    def exchange(self, mine: torch.Tensor) -> torch.Tensor:
        """Gather a tensor of the same shape from every rank, stacked by rank."""
        everyone = mine.new_empty((self.ranks, *mine.shape))
        # As bytes, since gloo does not take every dtype.
        parts = [part.view(-1).view(torch.uint8) for part in everyone]
        dist.all_gather(parts, mine.contiguous().view(-1).view(torch.uint8), group=self.group)
        return everyone

    def gather_rows(self, mine: torch.Tensor, shares: list[int]) -> torch.Tensor:
        """Gather every rank's rows (the first dimension). ``shares`` are those of each rank, or divisors of them."""
        scale = mine.shape[0] // shares[self.rank]
        longest = mine.new_empty((max(shares) * scale, *mine.shape[1:]))  # all_gather needs equal lengths
        longest[: mine.shape[0]] = mine
        everyone = self.exchange(longest)
        return torch.cat([part[: count * scale] for part, count in zip(everyone, shares, strict=True)])


def whole_group() -> Bands:
    """Return bands for all ranks; reuse the sequence group's communicator if that has all ranks."""
    from xfuser.core.distributed import get_sp_group  # importable only after xfuser_start

    ranks, steps = dist.get_world_size(), get_sp_group()
    return Bands(dist.get_rank(), ranks, steps.device_group if steps.world_size == ranks else None)


class SplitDecoder:
    """The split decoder for images of one height."""

    def __init__(self, decoder: Any, bands: Bands, height: int) -> None:
        self._decoder = decoder
        self._bands = bands
        self._rows = bands.shares(height)
        shares = torch.tensor(self._rows, dtype=torch.float32)[:, None] / height
        self._weights = shares.to(decoder.conv_in.weight.device)

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode one sample, (1, channels, height, width) as the decoder takes it; every rank gets the whole image."""
        decoder, mine = self._decoder, self._bands.rank
        above = sum(self._rows[:mine])
        # Every rank has all latents, so the first convolution needs no exchange. On GPUs convolutions run in
        # channels-last, and would transpose other memory formats each time.
        padded = F.pad(latents, (0, 0, 1, 1))[:, :, above : above + self._rows[mine] + 2]
        if latents.is_cuda:
            padded = padded.contiguous(memory_format=torch.channels_last)
        x = _convolve(padded, decoder.conv_in)
        middle = decoder.mid_block
        x = self._residual(x, middle.resnets[0])
        for attention, residual in zip(middle.attentions, middle.resnets[1:], strict=True):
            if attention is not None:
                x = self._attend(x, attention)
            x = self._residual(x, residual)
        for block in decoder.up_blocks:
            for residual in block.resnets:
                x = self._residual(x, residual)
            for upsampler in block.upsamplers or ():
                x = self._upsample(x, upsampler)
        x = _convolve(self._norm_and_activate(x, decoder.conv_norm_out), decoder.conv_out)
        return self._bands.gather_rows(x.movedim(2, 0), self._rows).movedim(0, 2).contiguous()

    def _residual(self, x: torch.Tensor, block: Any) -> torch.Tensor:
        inner = _convolve(self._norm_and_activate(x, block.norm1), block.conv1)
        inner = _convolve(self._norm_and_activate(inner, block.norm2), block.conv2)
        return inner.add_(x if block.conv_shortcut is None else block.conv_shortcut(x))

    def _upsample(self, x: torch.Tensor, upsampler: Any) -> torch.Tensor:
        padded = _empty_with_edges(x)
        padded[:, :, 1:-1] = x
        self._fill_neighbour_rows(padded)
        # A neighbour's row becomes two, of which the convolution sees one.
        return _convolve(F.interpolate(padded, scale_factor=2.0, mode="nearest")[:, :, 1:-1], upsampler.conv)

    def _attend(self, x: torch.Tensor, block: Any) -> torch.Tensor:
        """Attend from this rank's rows to all rows."""
        rows, columns = x.shape[2:]
        tokens = self._group_norm(x, block.group_norm).movedim(1, -1).flatten(1, 2)
        own = torch.stack([block.to_k(tokens), block.to_v(tokens)]).unflatten(2, (rows, columns))
        keys, values = self._bands.gather_rows(own.movedim(2, 0), self._rows).movedim(0, 2).flatten(2, 3)[:, :, None]
        found = F.scaled_dot_product_attention(block.to_q(tokens)[:, None], keys, values)[:, 0]
        return block.to_out[0](found).unflatten(1, (rows, columns)).movedim(-1, 1).add_(x)

    def _norm_and_activate(self, x: torch.Tensor, norm: torch.nn.GroupNorm) -> torch.Tensor:
        """Normalise, apply SiLU, and add the neighbours' rows for a convolution."""
        padded = _empty_with_edges(x)
        torch.ops.aten.silu.out(self._group_norm(x, norm), out=padded[:, :, 1:-1])
        self._fill_neighbour_rows(padded)
        return padded

    def _group_norm(self, x: torch.Tensor, norm: torch.nn.GroupNorm) -> torch.Tensor:
        """Group norm by the moments of all rows.

        ``group_norm`` would use the moments of the band alone. ``batch_norm`` with given moments is the same formula
        for one sample, computes in float32 and takes either memory format.
        """
        mean, variance = self._moments(x, norm.num_groups)
        width = x.shape[1] // norm.num_groups
        return F.batch_norm(
            x,
            mean.repeat_interleave(width),
            variance.repeat_interleave(width),
            norm.weight.float(),
            norm.bias.float(),
            eps=norm.eps,
        )

    def _moments(self, x: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and variance, (groups,) float32 each, of one sample over the rows of all ranks.

        Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances".
        """
        parts = self._bands.exchange(torch.stack(_local_moments(x[0], groups)))
        mean = (parts[:, 0] * self._weights).sum(0)
        return mean, ((parts[:, 1] + (parts[:, 0] - mean).square()) * self._weights).sum(0)

    def _fill_neighbour_rows(self, padded: torch.Tensor) -> None:
        """Fill the first and the last row from the neighbours, or with zeros at the edge of the image."""
        edges = self._bands.exchange(torch.stack([padded[:, :, 1], padded[:, :, -2]]))
        mine = self._bands.rank
        padded[:, :, 0] = edges[mine - 1, 1] if mine > 0 else 0
        padded[:, :, -1] = edges[mine + 1, 0] if mine + 1 < self._bands.ranks else 0


def _local_moments(x: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and variance, (groups,) float32 each, of (channels, rows, columns)."""
    if x.dtype == torch.float32:
        variance, mean = torch.var_mean(x.unflatten(0, (groups, -1)), dim=(1, 2, 3), correction=0)
        return mean, variance
    # Reductions that convert as they read: a float32 copy of the largest activation would take a gigabyte. By channel
    # first, in the order of memory. The error of this difference of squares is far below that of half precision.
    mean = x.mean(dim=(1, 2), dtype=torch.float32).unflatten(0, (groups, -1)).mean(1)
    lengths = torch.linalg.vector_norm(x, dim=(1, 2), dtype=torch.float32)
    square = lengths.square().unflatten(0, (groups, -1)).sum(1) / (x.numel() // groups)
    return mean, (square - mean.square()).clamp_(min=0)


def _empty_with_edges(x: torch.Tensor) -> torch.Tensor:
    """Allocate memory for ``x`` with one more row above and below, in the same memory format."""
    shape = (*x.shape[:2], x.shape[2] + 2, x.shape[3])
    is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.empty(
        shape,
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if is_last else torch.contiguous_format,
    )


def _convolve(padded: torch.Tensor, conv: torch.nn.Conv2d) -> torch.Tensor:
    """Apply a 3x3 convolution to rows that include their neighbours."""
    return convolve(padded, conv, padding=(0, 1))
