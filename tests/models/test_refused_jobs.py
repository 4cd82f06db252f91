"""Jobs of a family with a module that no family runs: the error and the log say why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from flux_pipelines import CONFIG, flux_transformer
from pipeline_parts import seeded
from running_daemon import RunningDaemon

from xditd.client import BadRequest, Client

pytestmark = pytest.mark.slow


def refusal_of(client: Client, module: Any, **arguments: Any) -> str:
    with client.lend(module, **arguments) as loan, pytest.raises(BadRequest) as error:
        client.generate(loan, conditioning={"prompt_embeds": torch.zeros(1, 7, 32)}, height=16, width=16)
    return error.value.detail


def test_module_that_no_family_runs(one_worker: RunningDaemon, client: Client) -> None:
    # As in a config.json, which has lists alone.
    module = seeded(FluxTransformer2DModel(in_channels=16, num_layers=2, **{**CONFIG, "axes_dims_rope": [4, 4, 8]}))
    said = refusal_of(client, module)
    assert "runs as its class FluxTransformer2DModel, by client.call(), since no family runs it as it is" in said
    assert "as_class" not in said
    logged = one_worker.log_text()
    assert "FluxTransformer2DModel runs as its class, since no family runs it: flux1: hidden size 32" in logged


def test_module_that_was_changed(one_worker: RunningDaemon, client: Client) -> None:
    module = flux_transformer()
    module.norm_out.norm.eps = 0.5
    assert "since no family runs it as it is" in refusal_of(client, module)
    logged = one_worker.log_text()
    assert "FluxTransformer2DModel runs as its class: it is not as its class makes it" in logged
    assert "a FluxTransformer2DModel is not as its class makes it: " in logged


def test_module_lent_as_its_class(client: Client) -> None:
    said = refusal_of(client, flux_transformer(), as_class=True)
    assert "since as_class was given" in said
    assert said.endswith("without as_class")


def test_method_that_is_no_name(client: Client) -> None:
    method: Any = 3
    with (
        client.lend(flux_transformer(), as_class=True) as loan,
        pytest.raises(BadRequest, match="method: 3 is of type int, use a name such as 'forward'"),
    ):
        client.call(loan, {"hidden_states": torch.zeros(1, 6, 16)}, method=method)
