"""Split the encoder and decoder of the VAE over all ranks: each computes a band of rows, with the whole's result.

Convolutions need one row of each neighbour in each frame, and attention in the middle the keys and values of all rows;
norms, convolutions over time, averages and repeats need no other row. So the class runs as it is, with its caches of
earlier frames, and only the forwards of its layers that reach other rows are replaced while it runs. Nothing is
blended: in float32 the result differs by the order of sums alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanCausalConv3d, WanResample

from xditd.gpu_workers.models.split_decode import Bands

Forward = Callable[..., torch.Tensor]


@contextmanager
def rows_split(side: torch.nn.Module, bands: Bands, rows: int) -> Iterator[None]:
    """Let an encoder or decoder run on this rank's band of rows. ``rows`` are those of all bands, in latents.

    Every rank runs it at the same point. Its input and result are (batch, channels, frames, rows of the band, columns).
    """
    replaced: list[torch.nn.Module] = []
    try:
        for layer, forward in _forwards(side, bands, rows):
            layer.forward = forward
            replaced.append(layer)
        yield
    finally:
        for layer in replaced:
            del layer.forward


def _forwards(side: torch.nn.Module, bands: Bands, rows: int) -> Iterator[tuple[torch.nn.Module, Forward]]:
    for layer in side.modules():
        if isinstance(layer, WanCausalConv3d) and layer.kernel_size[1] > 1:
            yield layer, partial(_convolve_in_time, layer, bands)
        elif isinstance(layer, WanAttentionBlock):
            yield layer, partial(_attend, layer, bands, bands.shares(rows))
        elif isinstance(layer, WanResample) and isinstance(layer.resample, torch.nn.Sequential):
            before, convolution = layer.resample
            assert isinstance(convolution, torch.nn.Conv2d)
            if isinstance(before, torch.nn.ZeroPad2d):  # half of the resolution: a row reads two, and the one below
                yield before, partial(_pad_right_and_below, bands)
            else:
                yield convolution, partial(_convolve, convolution, bands)


def _convolve_in_time(
    layer: WanCausalConv3d, bands: Bands, x: torch.Tensor, cache_x: torch.Tensor | None = None
) -> torch.Tensor:
    """Convolve frames with those before them, from the cache or zeros, as the class does."""
    left, right, above, below, before, _ = layer._padding
    assert (above, below) == (1, 1)
    batch, channels, frames, rows, columns = x.shape
    kept = 0 if cache_x is None else cache_x.shape[2]
    padded = x.new_empty(batch, channels, before + frames, rows + 2, left + columns + right)
    padded[..., :left] = 0
    padded[..., left + columns :] = 0
    inside = padded[..., 1:-1, left : left + columns]
    inside[:, :, : before - kept] = 0
    if cache_x is not None:
        inside[:, :, before - kept : before] = cache_x
    inside[:, :, before:] = x
    _fill_neighbour_rows(padded, bands)
    return F.conv3d(padded, layer.weight, layer.bias, layer.stride)


def _convolve(layer: torch.nn.Conv2d, bands: Bands, x: torch.Tensor) -> torch.Tensor:
    padded = F.pad(x, (1, 1, 1, 1))
    _fill_neighbour_rows(padded, bands)
    return F.conv2d(padded, layer.weight, layer.bias)


def _pad_right_and_below(bands: Bands, x: torch.Tensor) -> torch.Tensor:
    """Add a column of zeros, and the next band's first row, or zeros below the last one."""
    padded = F.pad(x, (0, 1, 0, 1))
    tops = bands.exchange(padded[..., 0, :])
    if bands.rank + 1 < bands.ranks:
        padded[..., -1, :] = tops[bands.rank + 1]
    return padded


def _attend(layer: WanAttentionBlock, bands: Bands, shares: list[int], x: torch.Tensor) -> torch.Tensor:
    """Attend from this band's rows to all rows of the same frame."""
    batch, channels, frames, rows, columns = x.shape
    images = x.permute(0, 2, 1, 3, 4).reshape(batch * frames, channels, rows, columns)
    query, *own = layer.to_qkv(layer.norm(images)).permute(2, 0, 3, 1).chunk(3, dim=-1)
    both = bands.gather_rows(torch.stack(own, 1), shares)  # all rows, of keys and values
    keys, values = both.permute(1, 2, 0, 3, 4).reshape(2, batch * frames, 1, -1, channels)
    tokens = query.transpose(0, 1).reshape(batch * frames, 1, -1, channels)
    found = F.scaled_dot_product_attention(tokens, keys, values)
    found = found.reshape(batch * frames, rows, columns, channels).permute(0, 3, 1, 2)
    found = layer.proj(found).view(batch, frames, channels, rows, columns)
    return found.permute(0, 2, 1, 3, 4) + x


def _fill_neighbour_rows(padded: torch.Tensor, bands: Bands) -> None:
    """Fill the first and the last row from the neighbours, or with zeros at the edge of the image."""
    edges: Any = bands.exchange(torch.stack([padded[..., 1, :], padded[..., -2, :]]))
    mine = bands.rank
    padded[..., 0, :] = edges[mine - 1, 1] if mine > 0 else 0
    padded[..., -1, :] = edges[mine + 1, 0] if mine + 1 < bands.ranks else 0
