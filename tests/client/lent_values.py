"""For tests of lending: a state dict, and the values of an offer as a worker reads them."""

from __future__ import annotations

import os

import torch

from xditd.client.lending import Offer
from xditd.ipc import codec
from xditd.ipc.processes import identify
from xditd.ipc.requests import Lend
from xditd.ipc.tensors import ComponentKind, FileBlock, HostShmBlock
from xditd.ipc.transports.file import map_file
from xditd.ipc.transports.fingerprints import check_fingerprint
from xditd.ipc.transports.host_shm import map_shm
from xditd.ipc.transports.tensor_views import BlockViews

State = dict[str, torch.Tensor]
VAE = ComponentKind.VAE


def decoder_state() -> State:
    """Tensors of several dtypes; two of them have whole pages of their own."""
    generator = torch.Generator().manual_seed(5)
    return {
        "decoder.a": torch.randn(40, 50, generator=generator),
        "decoder.b": torch.randn(3000, generator=generator).bfloat16(),
        "decoder.c": torch.randint(-9, 9, (7, 3), generator=generator),
        "decoder.d": torch.randn(2000, 3, generator=generator),
        "decoder.scale": torch.tensor(2.5, dtype=torch.float64),
    }


def values(offer: Offer) -> State:
    """Read an offer as a worker does, with each block mapped and verified; returns copies of the values."""
    me = identify(os.getpid())
    assert offer.manifest.faults() == []
    sent = codec.request_decoder.decode(codec.encode(Lend(request_id="r", manifest=offer.manifest)))
    assert isinstance(sent, Lend)
    assert sent.manifest == offer.manifest
    found: State = {}
    mappings = []
    for number, block in enumerate(sent.manifest.blocks):
        assert isinstance(block, (FileBlock, HostShmBlock))
        mapping = map_file(block, me) if isinstance(block, FileBlock) else map_shm(block, me)
        check_fingerprint(mapping.bytes_tensor(), block.fingerprint, "x")
        mappings.append(mapping)
        for spec in sent.manifest.tensors:
            if spec.block == number:
                whole = mapping.bytes_tensor()
                if spec.offset_bytes % whole.new_empty(0, dtype=getattr(torch, spec.dtype)).element_size():
                    part = whole[spec.offset_bytes : spec.offset_bytes + spec.extent_bytes].clone()
                    found[spec.name] = BlockViews(part).view(spec, 0)
                else:
                    found[spec.name] = BlockViews(whole).view(spec).clone()
                del whole
    for mapping in mappings:
        mapping.close()
    return {name: found[name] for name in (spec.name for spec in sent.manifest.tensors)}


def check(offer: Offer, expected: State) -> None:
    found = values(offer)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
