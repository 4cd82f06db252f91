"""``GetLogs``: recent lines of the daemon and of its workers."""

from __future__ import annotations

from xditd.daemon.front.service import Service
from xditd.daemon.sockets.sessions import Session
from xditd.ipc.replies import LogLines
from xditd.ipc.requests import GetLogs


def read(service: Service, _: Session, request: GetLogs) -> LogLines:
    lines, next_line = service.log_buffer.since(request.after_line)
    return LogLines(request_id=request.request_id, lines=tuple(lines), next_line=next_line)
