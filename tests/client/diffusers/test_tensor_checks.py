from __future__ import annotations

import pytest
import torch

from xditd.client import Unsupported
from xditd.client.diffusers.tensor_checks import check_tensors


class Quantised(torch.Tensor):
    """As the tensors of libraries that quantise."""


def test_tensor_of_a_subclass_is_named() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    check_tensors(module, "transformer")
    module[1]._parameters["weight"] = torch.zeros(2, 2).as_subclass(Quantised)
    with pytest.raises(Unsupported, match=r"transformer\.1\.weight is a .*Quantised: .*dequantize"):
        check_tensors(module, "transformer")
