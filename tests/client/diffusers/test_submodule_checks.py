from __future__ import annotations

import pytest
import torch

from xditd.client import Unsupported
from xditd.client.diffusers.submodule_checks import check_submodules


class Quantised(torch.Tensor):
    """As the tensors of libraries that quantise."""


def test_tensor_of_a_subclass_is_named() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    check_submodules(module, "transformer")
    module[1]._parameters["weight"] = torch.zeros(2, 2).as_subclass(Quantised)
    with pytest.raises(Unsupported, match=r"transformer\.1\.weight is a .*Quantised: .*dequantize"):
        check_submodules(module, "transformer")


def test_dropout_counts_in_training_mode() -> None:
    module = torch.nn.Sequential(torch.nn.Dropout(0.1))
    check_submodules(module.eval(), "vae")
    with pytest.raises(Unsupported, match=r"vae\.0 is in training mode"):
        check_submodules(module.train(), "vae")
    module[0].p = 0.0
    check_submodules(module, "vae")
    module = torch.nn.Sequential(torch.nn.Module()).train()
    module[0].attention_dropout = 0.2
    with pytest.raises(Unsupported, match=r"vae\.0 is in training mode"):
        check_submodules(module, "vae")
