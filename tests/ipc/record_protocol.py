"""Write ``data/protocol_<version>.json``: the bytes of one message of each class, as this version encodes them.

Run it once after an increase of ``PROTOCOL_VERSION``, and commit the file:

    python tests/ipc/record_protocol.py

The values are those of ``messages.py``. An existing file fixes that version of the protocol, so it is
not written again.
"""

from __future__ import annotations

import json
from pathlib import Path

from messages import UNIONS, classes, instance

from xditd.ipc.codec import encode
from xditd.ipc.protocol import PROTOCOL_VERSION

TARGET = Path(__file__).parent / "data" / f"protocol_{PROTOCOL_VERSION}.json"


def main() -> None:
    recorded = {
        name: {cls.__struct_config__.tag: encode(instance(cls)).hex() for cls in classes(union)}
        for name, union in UNIONS.items()
    }
    with TARGET.open("x", encoding="ascii") as file:
        json.dump(recorded, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
