"""Read the record of a picture or a video."""

from __future__ import annotations

import os

from xditd.client.metadata.containers import find_text
from xditd.client.metadata.record import Record, decode
from xditd.ipc.addresses import user_path


def read_record(path: str | os.PathLike[str]) -> Record:
    """Return how a PNG, JPEG, WebP or MP4 file was made, by the record that xditd has written into it.

    Raises:
        BadRequest: the file cannot be read, has no record, or a malformed one; the message names it.
    """
    return decode(find_text(path), str(user_path(path)))
