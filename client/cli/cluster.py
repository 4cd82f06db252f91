"""``xditd cluster``: join several hosts on Ray, and submit jobs to whichever has the weights and the time."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import socket
import sys
import time
from pathlib import Path
from typing import Final

from xditd.client.cli import exits, flags
from xditd.client.cli.generate_files import record_of_files
from xditd.client.cli.generations import Outputs, sampling_of
from xditd.client.cli.printing import json_text, print_error
from xditd.client.cli.tables import table
from xditd.ipc.addresses import expand_home
from xditd.ipc.settings.generation import ClusterFlags

SUMMARY = "use several hosts, on Ray: join, leave, status, submit, hash"
DESCRIPTION = """\
Use the daemons of several hosts together, on Ray (pip install 'xditd[cluster]').

  join     start Ray on this host, and offer this host's daemon and files to the cluster until Ctrl-C or SIGTERM. Start
           the daemon apart (xditd serve): join neither starts nor stops it, and waits for it if there is none
  leave    take a host (--name) out of the cluster; its `xditd cluster join` then ends
  status   list the hosts: whether they serve, their jobs, and how many files they have
  submit   generate an image on one host of the cluster; flags as of `xditd generate`. --transformer and --vae are files
           of this host or content hashes, --embeds a file. Each host lends its own file of the same content
  hash     print the content hash of a file (BLAKE2b of all its bytes), its name on every host

WHO HOLDS THE TOKEN OF A RAY CLUSTER CAN RUN ANY CODE AS YOU ON EVERY HOST OF IT: join asks for --accept-remote-code,
for Ray's token mode, and beyond loopback for TLS. docs/cluster.md tells how to make a token and certificates."""
EXAMPLES = """\
examples:
  export RAY_AUTH_MODE=token RAY_USE_TLS=1 RAY_TLS_SERVER_CERT=... RAY_TLS_SERVER_KEY=... RAY_TLS_CA_CERT=...
  xditd cluster join --head --address 10.0.0.1:6379 --search-path ~/models --accept-remote-code    # on 10.0.0.1
  xditd cluster join --address 10.0.0.1:6379 --search-path /data/models --accept-remote-code       # on each other
  xditd cluster status --address 10.0.0.1:6379
  xditd cluster submit --address 10.0.0.1:6379 --transformer flux1-dev.safetensors --vae ae.safetensors \\
      --embeds cat.safetensors -o cat.png
  xditd cluster hash flux1-dev.safetensors
"""

_ACTIONS: Final = ("join", "leave", "status", "submit", "hash")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    action = parser.add_argument("action", type=flags.one_of(*_ACTIONS), metavar="ACTION", help=", ".join(_ACTIONS))
    flags.complete(action, _ACTIONS)
    parser.add_argument("file", nargs="?", metavar="FILE", help="the file to hash")
    flags.add_settings(parser, ClusterFlags)
    parser.set_defaults(refuse=parser.error)


def run(parsed: argparse.Namespace) -> int:
    if (parsed.file is None) == (parsed.action == "hash"):
        parsed.refuse("hash FILE is needed" if parsed.file is None else f"{parsed.action} takes no FILE; use flags")
    if parsed.action != "hash" and parsed.address is None:
        parsed.refuse("--address IP:PORT is needed: that of the cluster's head")
    # join serves until it is ended, and its log is that of a service
    usual = "info" if parsed.action == "join" else None
    exits.configure_logging(parsed.log_level or usual, parsed.verbose)
    actions = {"join": _join, "leave": _leave, "status": _status, "submit": _submit, "hash": _hash}
    # Ray prints errors of the cluster to the standard output of any process that is connected, from a thread.
    with contextlib.redirect_stdout(sys.stderr):
        said = actions[parsed.action](parsed)
    if said is not None:
        print(said)
    return exits.DONE


def _hash(parsed: argparse.Namespace) -> str:
    from xditd.client.cluster.content_hashes import ContentHashes

    digest = ContentHashes().of(Path(expand_home(parsed.file)))
    return json_text({"file": parsed.file, "content": digest}) if parsed.json else digest


def _join(parsed: argparse.Namespace) -> str | None:
    import os

    from xditd.client.cluster import joining, security

    if not parsed.search_path:
        parsed.refuse("--search-path DIR:DIR is needed: the folders whose checkpoint files this host lends")
    joining.require_ray()
    head, _ = security.split_address(parsed.address)
    node_ip = head if parsed.head else security.own_address(parsed.address)
    security.check_access(os.environ, [head, node_ip])
    if not parsed.accept_remote_code:
        parsed.refuse(f"--accept-remote-code is needed: {security.WARNING} (docs/security.md)")
    print_error(f"xditd cluster: warning: {security.WARNING}")
    membership = joining.Membership(
        address=parsed.address,
        name=parsed.name or socket.gethostname(),
        node_ip=node_ip,
        is_head=parsed.head,
        search_path=joining.folders(parsed.search_path),
        runtime_dir=None if parsed.runtime_dir is None else Path(parsed.runtime_dir).absolute(),
        temp_dir=None if parsed.ray_temp_dir is None else Path(parsed.ray_temp_dir).absolute(),
    )
    has_left = joining.join(membership)
    return json_text({"host": membership.name, "has_left": has_left}) if parsed.json else None


def _leave(parsed: argparse.Namespace) -> str:
    from xditd.client.cluster import joining

    joining.require_ray()
    from xditd.client.cluster import connection

    connection.connect(parsed.address)
    name = parsed.name or socket.gethostname()
    connection.leave(name)
    return json_text({"host": name, "has_left": True}) if parsed.json else f"host {name} has left"


def _status(parsed: argparse.Namespace) -> str:
    from xditd.client.cluster import joining

    joining.require_ray()
    import msgspec

    from xditd.client.cluster import connection
    from xditd.client.cluster.messages import HostReport

    connection.connect(parsed.address)
    found = connection.status()
    if parsed.json:
        return json_text({"hosts": {name: msgspec.to_builtins(each) for name, each in found.items()}}, indent=2)
    rows = [
        (name, "serving" if each.is_serving else "waiting", len(each.running), each.other_jobs, len(each.files),
         len(each.resident), f"{each.mean_job_s:.2f} s" if each.mean_job_s else "-", each.detail or "-")
        if isinstance(each, HostReport) else (name, "lost", "-", "-", "-", "-", "-", each.detail)
        for name, each in found.items()
    ]  # fmt: skip
    headers = ("HOST", "STATE", "JOBS", "OTHER JOBS", "FILES", "RESIDENT", "A JOB TAKES", "DETAIL")
    return table(headers, rows) if rows else "no host has joined"


def _check_submit(parsed: argparse.Namespace) -> None:
    """Refuse flags that miss one another, or that no cluster has."""
    for flag, needed in (("--transformer", parsed.transformer), ("--embeds", parsed.embeds)):
        if needed is None:
            parsed.refuse(f"submit: {flag} is needed")
    if parsed.vae is None and parsed.save_latents is None:
        parsed.refuse("submit: --vae or --save-latents is needed: without both nothing is written")
    for flag, other in (
        ("--random-embeds", parsed.random_embeds),
        ("--text-tokens", parsed.text_tokens),
        ("--device", parsed.device),
        ("--lora", parsed.lora),
        ("--lora-2", parsed.lora_2),
    ):
        if other is not None:
            parsed.refuse(f"submit: {flag} is for `xditd generate` on one host; leave it out")
    if parsed.fps is not None and (parsed.frames or 1) == 1:
        parsed.refuse("submit: --fps is of a video; give --frames COUNT, or leave it out")


def _submit(parsed: argparse.Namespace) -> str:
    from xditd.client.cluster import joining

    _check_submit(parsed)
    joining.require_ray()
    from xditd.client.client import Client  # noqa: F401 - loads the session's modules before Ray's threads start
    from xditd.client.cluster.client import ClusterClient
    from xditd.client.tensor_files import read_tensors, require_torch

    require_torch()
    outputs = Outputs(parsed)
    lent_ns = time.time_ns()
    with ClusterClient(parsed.address) as cluster:
        result = cluster.generate(
            str(parsed.transformer),
            read_tensors(parsed.embeds),
            has_file_names=True,
            vae=None if parsed.vae is None else str(parsed.vae),
            transformer_2=None if parsed.transformer_2 is None else str(parsed.transformer_2),
            frames=parsed.frames or 1,
            compute_dtype=parsed.compute_dtype,
            **sampling_of(parsed),
        ).result()
    outputs.name_images(0 if result.image is None else len(result.image))
    outputs.write(dataclasses.replace(result, record=record_of_files(parsed, result.record, lent_ns)))
    paths = [str(path) for path in (*outputs.images, outputs.latents) if path is not None]
    if parsed.json:
        report = {
            "videos" if outputs.is_video else "images": [str(path) for path in outputs.images],
            "latents": None if outputs.latents is None else str(outputs.latents),
            "seed": result.seed,
            "host": result.host,
            "runs": result.runs,
            "timings_ms": result.timings_ms,
        }
        return json_text(report, indent=2)
    again = f", run {result.runs} times" if result.runs > 1 else ""
    return f"{', '.join(paths)}: seed {result.seed}, by host {result.host}{again}"
