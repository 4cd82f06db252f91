"""Two hosts on one machine: network namespaces with a link, certificates, a token, Ray and xditd on each."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from running_daemon import RunningDaemon, until

from xditd.client.waiting import SERVING
from xditd.ipc.errors import XditdError

XDITD = str(Path(sys.executable).with_name("xditd"))
PORT = 6379


def why_impossible() -> str:
    """Return why this machine cannot have two hosts, or an empty string."""
    try:
        import ray  # noqa: F401
    except ImportError:
        return "ray is not installed"
    if not shutil.which("ip") or not shutil.which("openssl"):
        return "ip or openssl is not installed"
    name = f"xdtry{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "network namespaces cannot be made here"
    run("ip", "netns", "del", name)
    return ""


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"


class Network:
    """Two namespaces, ``10.77.0.1`` and ``10.77.0.2``, and what both have to hold."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        number = os.getpid()
        self.names = [f"xdc{number}a", f"xdc{number}b"]
        self.links = [f"xd{number}a", f"xd{number}b"]
        self.addresses = ["10.77.0.1", "10.77.0.2"]
        self.address = f"{self.addresses[0]}:{PORT}"
        for name in self.names:
            run("ip", "netns", "add", name)
        run("ip", "link", "add", self.links[0], "type", "veth", "peer", "name", self.links[1])
        for name, link, address in zip(self.names, self.links, self.addresses, strict=True):
            run("ip", "link", "set", link, "netns", name)
            self._inside(name, "addr", "add", f"{address}/24", "dev", link)
            self._inside(name, "link", "set", link, "up")
            self._inside(name, "link", "set", "lo", "up")
        self._make_secrets()

    @staticmethod
    def _inside(name: str, *arguments: str) -> None:
        run("ip", "-n", name, *arguments)

    def _make_secrets(self) -> None:
        at = self.folder
        (at / "token").write_text(secrets.token_hex(32))
        (at / "wrong_token").write_text(secrets.token_hex(32))
        (at / "names").write_text("subjectAltName=IP:127.0.0.1," + ",".join(f"IP:{each}" for each in self.addresses))
        new = ("-newkey", "rsa:2048", "-nodes")
        run("openssl", "req", "-x509", *new, "-keyout", f"{at}/ca.key", "-out", f"{at}/ca.crt", "-subj", "/CN=ca")
        run("openssl", "req", *new, "-keyout", f"{at}/host.key", "-out", f"{at}/host.csr", "-subj", "/CN=host")
        run("openssl", "x509", "-req", "-in", f"{at}/host.csr", "-CA", f"{at}/ca.crt", "-CAkey", f"{at}/ca.key",
            "-CAcreateserial", "-out", f"{at}/host.crt", "-extfile", f"{at}/names")  # fmt: skip
        for name in ("token", "wrong_token", "host.key"):
            (at / name).chmod(0o600)

    def environment(self, **changes: str | None) -> dict[str, str]:
        """The environment of a host's processes; ``None`` removes a variable."""
        at = self.folder
        found: dict[str, str | None] = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "XDITD_"))},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": f"{at}/token",
            "RAY_USE_TLS": "1",
            "RAY_TLS_SERVER_CERT": f"{at}/host.crt",
            "RAY_TLS_SERVER_KEY": f"{at}/host.key",
            "RAY_TLS_CA_CERT": f"{at}/ca.crt",
            "XDG_CACHE_HOME": f"{at}/cache",
            **changes,
        }
        return {name: value for name, value in found.items() if value is not None}

    def cut(self) -> None:
        self._inside(self.names[1], "link", "set", self.links[1], "down")

    def mend(self) -> None:
        self._inside(self.names[1], "link", "set", self.links[1], "up")

    def command(self, host: int, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.names[host], *command]

    def ask(self, host: int, *arguments: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
        """Run ``xditd cluster`` on a host."""
        command = self.command(host, XDITD, "cluster", *arguments, "--address", self.address)
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=self.environment(**changes), check=False
        )

    def close(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


class ClusterHost:
    """A host's ``xditd cluster join``."""

    def __init__(self, network: Network, number: int, daemon: RunningDaemon, models: Path) -> None:
        self.network, self.number, self.daemon, self.models = network, number, daemon, models
        self.name = "ab"[number]
        self.log = network.folder / f"join-{self.name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def join(self, **changes: str | None) -> None:
        """Join; ``changes`` are to the environment."""
        flags = ["--address", self.network.address, "--name", self.name, "--search-path", str(self.models)]
        flags += ["--runtime-dir", str(self.daemon.runtime_dir), "--accept-remote-code"]
        if self.number == 0:
            # Socket paths hold 107 bytes.
            flags += ["--head", "--ray-temp-dir", tempfile.mkdtemp(prefix="xdray", dir="/tmp")]
        command = self.network.command(self.number, XDITD, "cluster", "join", *flags)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=self.network.environment(**changes))

    def pids(self) -> dict[int, list[str]]:
        """The processes of this host's membership with their command lines."""
        from xditd.client.demo.daemon_process import descendants

        assert self.process is not None
        found = {}
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        return found

    def victims(self, kind: str) -> list[int]:
        """The pids of the running router, agent or workers; none while they start."""
        if kind == "workers":
            with contextlib.suppress(XditdError):
                found = self.daemon.status()
                return [each.pid for each in found.workers] if found.group_state in SERVING else []
            return []
        word = {"router": "ray::RouterActor", "agent": "ray::HostActor"}[kind]
        return [pid for pid, command in self.pids().items() if word in " ".join(command)]

    def pid_of(self, word: str) -> int:
        found = [pid for pid, command in self.pids().items() if word in " ".join(command)]
        assert found, f"no process with {word!r}: {self.pids()}"
        return found[-1]

    def kill(self) -> None:
        """End all processes of the host at once, as a power cut does, the daemon's and workers' too."""
        from xditd.client.demo.daemon_process import descendants

        daemon = self.daemon.process.pid
        for pid in [*self.pids(), daemon, *descendants(daemon)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self.process is not None
        self.process.wait()
        self.daemon.process.wait()

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=60)


class Driver:
    """``cluster_driver.py`` on a host: a program that uses ``Client(cluster=...)``."""

    def __init__(self, network: Network, number: int, **changes: str | None) -> None:
        script = str(Path(__file__).with_name("cluster_driver.py"))
        self.log = (network.folder / "driver.log").open("ab")
        self.process = subprocess.Popen(
            network.command(number, sys.executable, script, network.address),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env=network.environment(**changes),
        )  # fmt: skip

    def send(self, **request: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def receive(self, within_s: float = 300.0) -> Any:
        assert self.process.stdout is not None
        found, _, _ = select.select([self.process.stdout], [], [], within_s)
        if not found:
            self.process.send_signal(signal.SIGUSR1)
            pytest.fail(f"no answer within {within_s:.0f} s; driver.log has the stacks of the driver's threads")
        line = self.process.stdout.readline()
        assert line, "the driver has ended; see driver.log"
        return json.loads(line)

    def ask(self, **request: Any) -> Any:
        self.send(**request)
        return self.receive()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            assert stream is not None
            stream.close()


Cluster = tuple[Network, list[ClusterHost]]


@contextlib.contextmanager
def two_hosts(folder: Path, daemons: list[RunningDaemon], models: list[Path]) -> Iterator[Cluster]:
    """Join two hosts, and end them."""
    network = Network(folder)
    hosts = [ClusterHost(network, number, daemons[number], models[number]) for number in (0, 1)]
    try:
        for host in hosts:
            host.join()
        until_serving(network, hosts)
        yield network, hosts
    finally:
        for host in hosts:
            host.end()
        network.close()


def states(network: Network) -> Mapping[str, Any]:
    """Each host's report, as ``xditd cluster status --json`` on the head prints it; empty if it fails."""
    done = network.ask(0, "status", "--json")
    return json.loads(done.stdout).get("hosts", {}) if done.returncode == 0 else {}


def until_serving(network: Network, hosts: list[ClusterHost]) -> None:
    def serving() -> bool:
        for host in hosts:
            assert host.process is not None
            if host.process.poll() is not None:
                pytest.fail(host.log.read_text()[-4000:])
        found = states(network)
        return all(found.get(host.name, {}).get("is_serving") and len(found[host.name]["files"]) == 2 for host in hosts)

    until(serving, "both hosts to serve", hosts[1].log)


def other_version(folder: Path, file: str, before: str, after: str) -> dict[str, str]:
    """Make a copy of xditd with a change in one file; returns the environment whose processes import it."""
    import xditd

    installed = Path(xditd.__file__).parent
    copy = folder / "xditd"
    shutil.copytree(installed, copy, ignore=shutil.ignore_patterns("__pycache__"))
    text = (copy / file).read_text()
    assert before in text
    (copy / file).write_text(text.replace(before, after))
    return {"PYTHONPATH": str(folder)}


def other_clocks(folder: Path) -> dict[str, str]:
    """Return the environment of Python processes whose clocks are a day and a million seconds ahead."""
    (folder / "sitecustomize.py").write_text(
        "import time\n"
        "wall, steady = time.time, time.monotonic\n"
        "time.time = lambda: wall() + 86_400.0\n"
        "time.monotonic = lambda: steady() + 1e6\n"
    )
    return {"PYTHONPATH": str(folder)}
