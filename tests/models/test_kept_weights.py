"""``accelerate(pipe, keep="daemon")``: this process has no weights until the block ends."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from fault_parts import embedded_call, fail, restart, same
from flux_pipelines import flux, lora_weights, run_plain
from peft import LoraConfig
from pipeline_parts import seeded
from running_daemon import RunningDaemon

from xditd.client import Client, LeaseLost, OutOfMemory, Unsupported, accelerate
from xditd.client.loans import Loan

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("as_many_threads_as_the_worker")]


def rss_bytes() -> int:
    with open("/proc/self/statm", encoding="utf-8") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def big_transformer() -> Any:
    """Return a model of about 200 MB."""
    return seeded(
        FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=128,
            num_attention_heads=8,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(32, 48, 48),
            guidance_embeds=True,
        )
    )


@torch.no_grad()
def test_weights_are_freed_and_come_back(client: Client) -> None:
    transformer = big_transformer()
    size = sum(each.nbytes for each in transformer.parameters())
    assert size > 180 << 20
    before = {name: each.clone() for name, each in transformer.state_dict().items()}
    expected = transformer(**embedded_call())[0]
    gc.collect()
    full = rss_bytes()
    with accelerate(transformer, client=client, keep="daemon"):
        gc.collect()
        assert full - rss_bytes() > 0.9 * size
        for name, each in transformer.named_parameters():
            assert (each.shape, each.dtype, each.device) == (before[name].shape, torch.float32, torch.device("cpu"))
            assert each.untyped_storage().nbytes() == 4
            assert each.isnan().all()
        assert (transformer.dtype, transformer.device) == (torch.float32, torch.device("cpu"))
        assert torch.equal(transformer(**embedded_call())[0], expected)
    for name, each in transformer.state_dict().items():
        assert torch.equal(each, before[name])
        assert each.is_contiguous()
    assert torch.equal(transformer(**embedded_call())[0], expected)
    assert not client.status().components


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("state_dict", lambda pipe: pipe.transformer.state_dict()),
        ("load_state_dict", lambda pipe: pipe.transformer.load_state_dict({})),
        ("save_pretrained", lambda pipe: pipe.save_pretrained("/nonexistent/never-written")),
        ("to", lambda pipe: pipe.to(torch.bfloat16)),
        ("to", lambda pipe: pipe.transformer.to("cpu")),
        ("half", lambda pipe: pipe.transformer.half()),
        ("_apply", lambda pipe: torch.nn.ModuleList([pipe.transformer]).bfloat16()),
        ("__deepcopy__", lambda pipe: copy.deepcopy(pipe.transformer)),
        ("fuse_qkv_projections", lambda pipe: pipe.transformer.fuse_qkv_projections()),
        ("fuse_lora", lambda pipe: pipe.transformer.fuse_lora()),
    ],
)
def test_use_of_kept_weights_is_refused(client: Client, name: str, use: Callable[[Any], object], tmp_path) -> None:
    pipe = flux()
    with accelerate(pipe, client=client, keep="daemon"):
        with contextlib.chdir(tmp_path), pytest.raises(Unsupported, match=rf"transformer\.{name}: the weights are in"):
            use(pipe)
        assert same(run_plain(pipe), run_plain(flux()))
    pipe.to(torch.bfloat16)
    pipe.transformer.state_dict()


def test_change_of_a_kept_module_is_refused(client: Client) -> None:
    pipe = flux()
    with accelerate(pipe, client=client, keep="daemon"):
        with pytest.raises(Unsupported, match="the weights are in the daemon"):
            pipe.load_lora_weights(lora_weights(seed=31, rank=2), adapter_name="style")
        norm = pipe.transformer.norm_out.norm
        before, norm.eps = norm.eps, 0.5
        with pytest.raises(Unsupported, match=r"norm_out.norm changed.* use keep='client'"):
            run_plain(pipe)
        norm.eps = before
        assert same(run_plain(pipe), run_plain(flux()))


def test_weights_come_back_to_a_module_whose_parameters_have_other_names(client: Client) -> None:
    pipe = flux()
    with accelerate(pipe, client=client, keep="daemon"):
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="style")
        pipe.transformer.transformer_blocks.append(pipe.transformer.transformer_blocks.pop(0))
        with pytest.raises(Unsupported, match=r"changed.* use keep='client'"):
            run_plain(pipe)
    pipe.transformer.delete_adapters("style")
    pipe.transformer.unload_lora()
    pipe.transformer.transformer_blocks.append(pipe.transformer.transformer_blocks.pop(0))
    assert same(run_plain(pipe), run_plain(flux()))
    assert not client.status().components


def test_kept_weights_outlive_a_closed_client(one_worker: RunningDaemon) -> None:
    pipe = flux()
    client = one_worker.connect()
    with accelerate(pipe, client=client, keep="daemon"):
        client.close()
    assert same(run_plain(pipe), run_plain(flux()))
    assert not one_worker.status().components


def test_kept_weights_of_a_daemon_that_was_lost(own_daemon: RunningDaemon, start_daemon) -> None:
    pipe = flux()
    with own_daemon.connect() as client:
        fast = accelerate(pipe, client=client, keep="daemon", wait_s=60)
        assert same(run_plain(pipe), run_plain(flux()))
        other = restart(own_daemon, start_daemon, force=True)
        other.wait_ready()
        with pytest.raises(LeaseLost):
            run_plain(pipe)
        with pytest.raises(LeaseLost, match=r"transformer: its weights were in the daemon alone .* load the model"):
            fast.close()
    # Nothing computes with placeholders, or saves them.
    for use in (run_plain, lambda pipe: pipe.transformer.state_dict(), lambda pipe: pipe.to(torch.bfloat16)):
        with pytest.raises(Unsupported, match="its weights were in the daemon alone"):
            use(pipe)
    other.stop()


@pytest.mark.parametrize("keep", ["client", "daemon"])
def test_weights_that_another_model_shares(client: Client, keep: Any) -> None:
    """They have no values here while the daemon keeps them."""
    first, second = flux(), flux()
    second.transformer.proj_out = first.transformer.proj_out
    with accelerate(first, client=client, keep="daemon"):
        with pytest.raises(
            Unsupported, match=r"transformer\.proj_out\.weight is shared with a model whose weights are in"
        ):
            accelerate(second, client=client, keep=keep)
        assert same(run_plain(first), run_plain(flux()))
    with accelerate(second, client=client, keep=keep):
        assert same(run_plain(second), run_plain(flux()))


def test_an_interrupt_while_weights_are_copied_back(one_worker: RunningDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = flux()
    fast = accelerate(pipe, runtime_dir=one_worker.runtime_dir, keep="daemon")
    with monkeypatch.context() as patch:
        patch.setattr(fast.client._runner, "read_tensor", lambda *_: fail(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fast.close()
    with pytest.raises(Unsupported, match="the weights are in the daemon"):
        pipe.transformer.state_dict()
    fast.close()
    assert same(run_plain(pipe), run_plain(flux()))
    assert not one_worker.status().components


def test_weights_stay_if_the_daemon_has_no_room(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = flux()
    with monkeypatch.context() as patch:
        patch.setattr(Loan, "adopt", lambda _: fail(OutOfMemory))
        with pytest.raises(OutOfMemory):
            accelerate(pipe, client=client, keep="daemon")
    assert not client.status().components
    assert same(run_plain(pipe), run_plain(flux()))
