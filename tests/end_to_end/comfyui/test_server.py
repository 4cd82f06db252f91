"""A whole ComfyUI server with the installed pack: the example workflows, Cancel, and processes that are killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from comfyui_workflows import EXAMPLES, prompt_of, read_example
from diffusers import FluxControlNetModel  # noqa: F401 - before ComfyUI is on the path
from flux1_controlnets import MODES, comfyui_state, diffusers_state
from PIL import Image
from safetensors.torch import save_file

from xditd.client.comfyui.families import adapters, search_words

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]


@pytest.fixture
def prompt(server) -> Callable[..., dict[str, Any]]:
    """Convert an example workflow to the prompt that the page sends, small enough for a CPU."""
    offered = server.ask("/object_info")

    def make(name: str, steps: int = 3, **more: Any) -> dict[str, Any]:
        found = prompt_of(
            read_example(name), lambda kind: offered[kind]["input"], steps=steps, width=128, height=128, **more
        )
        for node in found.values():
            if node["class_type"] == "DualCLIPLoader":  # it takes text encoders of the real sizes only
                node["class_type"] = "XDiTDualCLIPLoader"
                node["inputs"] = {name: node["inputs"][name] for name in ("clip_name1", "clip_name2")}
        return found

    return make


def test_nodes_help_translations_and_examples_are_offered(server):
    offered = server.ask("/object_info")
    ours = {name for name, node in offered.items() if node["category"] == "xDiT"}
    assert len(ours) == 8
    for name, asked in (("XDiTAccelerate", "model"), ("XDiTKSampler", "model"), ("XDiTUNetLoader", "unet_name")):
        tooltip = offered[name]["input"]["required"][asked][1]["tooltip"]
        assert all(adapter.title in tooltip for adapter in adapters())
        assert set(search_words()) <= set(offered[name]["search_aliases"])
    translations = server.ask("/i18n")
    for name in ours:
        assert server.ask(f"/extensions/xditd/docs/{name}.md").startswith("# ")
        assert server.ask(f"/extensions/xditd/docs/{name}/zh.md").startswith("# ")
        for language in ("en", "zh"):
            described = translations[language]["nodeDefs"][name]
            inputs = {**offered[name]["input"].get("required", {}), **offered[name]["input"].get("optional", {})}
            assert described.get("inputs", {}).keys() == inputs.keys()
    assert set(server.ask("/workflow_templates")["xditd"]) == {path.stem for path in EXAMPLES.glob("*.json")}


def test_examples_give_the_same_image_and_again_lend_nothing(server, prompt, wait_until):
    fused = server.picture(server.queue(prompt("flux1_xdit")), wait_until)
    stepwise = server.picture(server.queue(prompt("flux1_accelerate")), wait_until)
    assert fused.shape == (128, 128, 3)
    assert fused.std() > 10
    assert np.abs(fused - stepwise).max() <= 1
    lends = server.log.read_text().count("component lent")
    server.picture(server.queue(prompt("flux1_accelerate", seed=8)), wait_until)
    assert server.log.read_text().count("component lent") == lends


def test_control_by_the_edges_of_an_image(server, prompt, whole_file, wait_until):
    """The example of a ControlNet: the picture of stock, whose ControlNet and transformer run in ComfyUI."""
    name = "FLUX.1-dev-ControlNet-Union-Pro-2.0.safetensors"
    state = diffusers_state(comfyui_state(5, modes=MODES, context_dim=128, pooled_dim=128))
    save_file(state, server.base / "models" / "controlnet" / name)
    (server.base / "models" / "vae" / "whole.safetensors").symlink_to(whole_file)  # with an encoder, for the edges
    Image.radial_gradient("L").resize((128, 128)).convert("RGB").save(server.base / "input" / "example.png")
    given = {"vae_name": "whole.safetensors", "strength": 1.0}
    controlled = prompt("flux1_controlnet", **given)
    found = server.picture(server.queue(controlled), wait_until)
    assert found.shape == (128, 128, 3)
    (accelerate,) = (key for key, node in controlled.items() if node["class_type"] == "XDiTAccelerate")
    (sampler,) = (node for node in controlled.values() if node["class_type"] == "KSampler")
    assert sampler["inputs"]["model"] == [accelerate, 0]
    sampler["inputs"]["model"] = controlled.pop(accelerate)["inputs"]["model"]
    stock = server.picture(server.queue(controlled), wait_until)
    assert np.abs(found - stock).max() <= 1
    without = server.picture(server.queue(prompt("flux1_controlnet", **given | {"strength": 0.0})), wait_until)
    assert np.abs(found - without).max() > 10


@pytest.mark.parametrize("example", ["flux1_xdit", "flux1_accelerate"])
def test_interrupt(example, server, daemon, prompt, wait_until):
    before = server.picture(server.queue(prompt(example, seed=11)), wait_until)
    doomed = server.queue(prompt(example, seed=12, steps=900))
    wait_until(lambda: any(job.ran_s > 0 for job in daemon.status().jobs), "the job to run", server.log)
    server.ask("/interrupt", {})
    name, _ = server.error(doomed, wait_until)
    assert name == "execution_interrupted"
    wait_until(lambda: not daemon.status().jobs, "the workers to be free")
    # Another image first, because ComfyUI answers the same prompt from its cache.
    server.picture(server.queue(prompt(example, seed=13)), wait_until)
    after = server.picture(server.queue(prompt(example, seed=11)), wait_until)
    assert np.array_equal(before, after)


def test_a_worker_killed_in_mid_run(server, daemon, prompt, wait_until):
    before = server.picture(server.queue(prompt("flux1_xdit", seed=21)), wait_until)
    doomed = server.queue(prompt("flux1_xdit", seed=22, steps=900))
    wait_until(lambda: any(job.step for job in daemon.status().jobs), "a step", server.log)
    os.kill(daemon.status().workers[1].pid, signal.SIGKILL)
    name, detail = server.error(doomed, wait_until)
    assert name == "execution_error"
    assert detail["node_type"] == "XDiTKSampler"
    assert "WorkersLost" in detail["exception_type"]
    assert "worker" in detail["exception_message"]
    server.picture(server.queue(prompt("flux1_xdit", seed=23)), wait_until)
    assert np.array_equal(server.picture(server.queue(prompt("flux1_xdit", seed=21)), wait_until), before)


def test_comfyui_killed_in_mid_run_leaves_the_daemon_clean(start_server, server, daemon, prompt, wait_until):
    other = start_server()
    other.queue(prompt("flux1_xdit", seed=31, steps=900))
    wait_until(lambda: any(job.owner_pid == other.process.pid for job in daemon.status().jobs), "the job", other.log)
    other.kill()

    def is_clean() -> bool:
        status = daemon.status()
        return not status.jobs and all(each.owner_pid != other.process.pid for each in status.components)

    wait_until(is_clean, "the dead client's loans to end")


def test_two_servers_share_one_daemon(start_server, server, daemon, prompt, wait_until):
    expected = [server.picture(server.queue(prompt("flux1_accelerate", seed=seed)), wait_until) for seed in (51, 52)]
    other = start_server()
    # Each makes the other's image, because it would answer its own from its cache.
    other.picture(other.queue(prompt("flux1_accelerate", seed=53)), wait_until)
    server.picture(server.queue(prompt("flux1_accelerate", seed=53)), wait_until)
    queued = [
        (each, each.queue(prompt("flux1_accelerate", seed=seed))) for seed in (51, 52) for each in (server, other)
    ]
    for number, (each, prompt_id) in enumerate(queued):
        assert np.array_equal(each.picture(prompt_id, wait_until), expected[number // 2])
    owners = {component.owner_pid for component in daemon.status().components}
    assert {server.process.pid, other.process.pid} <= owners
    other.kill()


def test_free_takes_the_loans_back(server, daemon, prompt, wait_until):
    before = server.picture(server.queue(prompt("flux1_xdit", seed=61)), wait_until)

    def mine() -> list[str]:
        return [each.label for each in daemon.status().components if each.owner_pid == server.process.pid]

    assert mine()

    def is_freed() -> bool:
        server.ask("/free", {"unload_models": True, "free_memory": True})  # overlooked while a prompt is just ending
        return not mine()

    wait_until(is_freed, "the loans to be taken back", server.log)
    assert np.array_equal(server.picture(server.queue(prompt("flux1_xdit", seed=61)), wait_until), before)


def test_a_daemon_that_is_not_there_and_one_that_comes_again(
    start_server, start_daemon, server, prompt, wait_until, tmp_path
):
    expected = {
        seed: server.picture(server.queue(prompt("flux1_accelerate", seed=seed)), wait_until) for seed in (71, 72)
    }
    other = start_server(tmp_path / "run")
    name, detail = other.error(other.queue(prompt("flux1_accelerate", seed=71)), wait_until)
    assert name == "execution_error"
    assert "xditd serve" in detail["exception_message"]
    assert "queue the prompt again" in detail["exception_message"]
    for seed, picture in expected.items():  # started while ComfyUI is open, then killed and started again
        daemon = start_daemon(1, folder=tmp_path)
        daemon.wait_ready()
        found = other.picture(other.queue(prompt("flux1_accelerate", seed=seed)), wait_until)
        assert np.abs(found - picture).max() <= 1
        daemon.process.kill()
        daemon.process.wait(timeout=30)
    name, detail = other.error(other.queue(prompt("flux1_accelerate", seed=73)), wait_until)
    assert name == "execution_error"
    assert "xditd serve" in detail["exception_message"]
    other.kill()
