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


@pytest.mark.filterwarnings("ignore:Sparse CSR")  # torch: beta
@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo], ids=str)
def test_a_sparse_tensor_is_named(layout: torch.layout) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    weight = module[0].weight.detach().to_sparse(layout=layout)
    module[0].weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(Unsupported, match=rf"transformer\.0\.weight has the layout {layout}: .*to_dense\(\)"):
        check_tensors(module, "transformer")
