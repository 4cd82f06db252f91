"""Values made from their descriptions: each comes out as it was; objects that are more than attributes are refused."""

from __future__ import annotations

import pytest
import torch
from diffusers.models import attention_processor

from xditd.gpu_workers.models.described_values import make_object, make_value
from xditd.ipc.arguments import MapOf, Named, ObjectOf, PairsOf, SetOf, TupleOf
from xditd.ipc.errors import Unsupported


@pytest.mark.parametrize(
    "name",
    [
        "torch.nn.modules.linear:Linear",  # a module
        "torch.nn.parameter:Parameter",
        "diffusers.utils.outputs:BaseOutput",  # has __reduce__
        "diffusers.configuration_utils:FrozenDict",
        "diffusers.models.attention_dispatch:AttentionBackendName",
    ],
)
def test_objects_that_are_more_than_attributes_are_not_made(name: str) -> None:
    with pytest.raises(Unsupported, match=f"class {name}: "):
        make_object(name, {})


def test_values_are_made_as_they_were() -> None:
    top = torch.nn.Sequential(torch.nn.Linear(1, 1))
    node = MapOf(
        items={
            "pairs": PairsOf(items=((TupleOf(items=(1, None)), Named(name="torch.float16")),)),
            "set": SetOf(items=(1, "a")),
            "part": Named(name="submodule:0"),
            "object": ObjectOf(
                class_name="diffusers.models.attention_processor:AttnProcessor2_0", attributes={"x": TupleOf(items=())}
            ),
        }
    )
    found = make_value(node, top, {}, on_host=False)
    assert found["pairs"] == {(1, None): torch.float16}
    assert found["set"] == {1, "a"}
    assert found["part"] is top[0]
    assert type(found["object"]) is attention_processor.AttnProcessor2_0
    assert found["object"].x == ()
