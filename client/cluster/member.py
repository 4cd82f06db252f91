"""The process that ``xditd cluster join`` keeps beside this host's Ray: it makes the host's actor, and watches it.

Usage: ``python -m xditd.client.cluster.member ADDRESS NAME RUNTIME_DIR FOLDER...``. Exits with 0 when the host has
left, with 2 if it must not join, and with 1 when the cluster is lost. Ray ends it, too, when this host's Ray ends.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from typing import Final

import ray

from xditd.client.cluster.actors import make_host, make_router
from xditd.client.cluster.connection import connect, router
from xditd.client.cluster.errors import ClusterUnreachable
from xditd.client.cluster.messages import HostReport, decode
from xditd.client.cluster.names import LOST, NAMESPACE, host_actor_name, host_resource
from xditd.ipc.errors import BadRequest, PeerError, XditdError

logger = logging.getLogger(__name__)

LEFT, LOST_CLUSTER, REFUSED = 0, 1, 2
_CONNECT_DEADLINE_S: Final = 60.0
_NAME_DEADLINE_S: Final = 20.0
_LOOK_EVERY_S: Final = 1.0
_REPORT_DEADLINE_S: Final = 60.0


def main(arguments: Sequence[str]) -> int:
    address, name, runtime_dir, *search_path = arguments
    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    try:
        _connect(address)
        _make_actors(name, search_path, runtime_dir or None)
    except PeerError as error:
        logger.error("host not joined: %s", error.detail)
        return LOST_CLUSTER
    except XditdError as error:
        logger.error("host refused code=%s: %s", error.code, error.detail)
        return REFUSED
    logger.info("host joined name=%s address=%s", name, address)
    return _watch(name)


def _connect(address: str) -> None:
    ends_s = time.monotonic() + _CONNECT_DEADLINE_S
    while True:
        try:
            connect(address)
            return
        except ClusterUnreachable:
            if time.monotonic() > ends_s:
                raise
            time.sleep(0.5)  # this host's Ray is starting


def _make_actors(name: str, search_path: list[str], runtime_dir: str | None) -> None:
    ends_s = time.monotonic() + _NAME_DEADLINE_S
    while (where := _other_host(name)) is not None:
        if time.monotonic() > ends_s:
            raise BadRequest(f"name {name!r}: the host at {where} has it; choose another one by --name")
        time.sleep(0.5)  # it may be this host, whose last Ray the head has not given up yet
    make_router()
    router()  # refuses other versions
    ends_s = time.monotonic() + _CONNECT_DEADLINE_S
    while True:
        try:
            # The last one may wait for a Ray that is gone, and may have another search path.
            ray.kill(ray.get_actor(host_actor_name(name), namespace=NAMESPACE), no_restart=True)
        except (ValueError, *LOST):
            pass
        try:
            actor = make_host(name, search_path, runtime_dir)
            decode(ray.get(actor.report.remote(), timeout=_REPORT_DEADLINE_S), HostReport)
            return
        except (ValueError, *LOST) as error:
            if time.monotonic() > ends_s:
                raise ClusterUnreachable(f"host {name}: its agent does not start: {error}") from None
            time.sleep(0.2)  # a name is free only some time after its actor's end


def _other_host(name: str) -> str | None:
    node = ray.get_runtime_context().get_node_id()
    for each in ray.nodes():
        if each["Alive"] and each["NodeID"] != node and host_resource(name) in each["Resources"]:
            return str(each["NodeManagerAddress"])
    return None


def _watch(name: str) -> int:
    while True:
        time.sleep(_LOOK_EVERY_S)
        try:
            ray.get_actor(host_actor_name(name), namespace=NAMESPACE)
        except ValueError:
            logger.info("host left name=%s", name)
            return LEFT
        except LOST as error:
            logger.warning("cluster lost: %s", error)
            return LOST_CLUSTER


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
