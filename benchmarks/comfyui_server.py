"""Run a ComfyUI server in a temporary folder for benchmarks, and time prompts in it."""

from __future__ import annotations

import itertools
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import clean_environment

from xditd.client.cli import comfyui as pack

NODES = Path(__file__).resolve().parent / "comfyui_nodes"
FOLDERS = ("models/diffusion_models", "models/loras", "models/vae", "custom_nodes", "input", "output", "page")
START_DEADLINE_S = 150.0
PROMPT_DEADLINE_S = 120.0


class Failure(Exception):
    """A prompt failed, or the server does not answer."""


def make_base(base: Path) -> None:
    """Make the folders of a ComfyUI, with the node pack and the benchmark's nodes."""
    for folder in FOLDERS:
        (base / folder).mkdir(parents=True, exist_ok=True)
    pack.install(base / "custom_nodes" / pack.FOLDER)
    shutil.copytree(NODES, base / "custom_nodes" / NODES.name)


def error_of(status: dict[str, Any]) -> str:
    """Return the error of a failed prompt, without its node's inputs, which are pages of numbers."""
    detail = status["messages"][-1][1]
    return f"{detail.get('node_type')}: {detail.get('exception_type')}: {detail.get('exception_message')}"[:1500]


class ComfyServer:
    """One ComfyUI process with default flags, without a web page and without API nodes."""

    def __init__(self, root: Path, base: Path, runtime: Path, log: Path, flags: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        command = [sys.executable, "main.py", "--disable-auto-launch", "--disable-api-nodes", "--port", str(port)]
        command += ["--base-directory", str(base), "--front-end-root", str(base / "page")]
        command += ["--database-url", "sqlite:///:memory:", *flags]
        with log.open("w") as out:
            environment = clean_environment(XDITD_RUNTIME_DIR=str(runtime))
            self.process = subprocess.Popen(command, cwd=root, stdout=out, stderr=out, env=environment)

    def wait_up(self) -> None:
        """Wait until the server answers, and check that it has all needed nodes."""
        self._until(self._is_up, START_DEADLINE_S, "ComfyUI to answer")
        offered = self.ask("/object_info")
        missing = {"XDiTUNetLoader", "XDiTAccelerate", "XDiTKSampler", "XDiTVAELoader", "BenchConditioning"} - set(
            offered
        )
        if missing:
            raise Failure(f"ComfyUI lacks the nodes {', '.join(sorted(missing))}\n{self.tail()}")

    def ask(self, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                text = reply.read().decode()
        except urllib.error.HTTPError as error:
            raise Failure(f"{path}: {error.read().decode()[:2000]}") from None
        return json.loads(text) if text.startswith(("{", "[")) else text

    def run(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Run one prompt; returns its times in seconds since just before it was queued."""
        queued = time.time()
        number = self.ask("/prompt", {"prompt": prompt})["prompt_id"]
        found = self._until(lambda: self.ask(f"/history/{number}").get(number), PROMPT_DEADLINE_S, "the prompt to end")
        status = found["status"]
        if status["status_str"] != "success":
            raise Failure(f"{error_of(status)}\n{self.tail()}")
        recorded = self.ask("/xditd_bench")
        outputs = [each for each in found["outputs"].values() if "is_finite" in each]
        if not all(each["is_finite"][0] for each in outputs):
            raise Failure("the picture has values that are not finite")
        stamps = recorded["steps"]
        return {
            "latents_s": recorded["marks"]["latents"] - queued,
            "image_s": recorded["marks"]["image"] - queued,
            "forwards": recorded["forwards"],
            "gaps_ms": [(after - before) * 1e3 for before, after in itertools.pairwise(stamps)],
        }

    def unload(self) -> None:
        self.ask("/free", {"unload_models": True, "free_memory": True})

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout=20)

    def _is_up(self) -> bool:
        try:
            return bool(self.ask("/system_stats"))
        except (urllib.error.URLError, ConnectionError):
            return False

    def _until(self, probe: Callable[[], Any], deadline_s: float, what: str) -> Any:
        ends = time.monotonic() + deadline_s
        while not (found := probe()):
            if self.process.poll() is not None:
                raise Failure(f"ComfyUI ended with status {self.process.returncode}\n{self.tail()}")
            if time.monotonic() > ends:
                raise Failure(f"waited {deadline_s:.0f} s for {what}\n{self.tail()}")
            time.sleep(0.1)  # not shorter: polls take time from the server
        return found
