"""Write ``data/gguf_blocks.json``: blocks of each GGUF type, and their numbers as the ``gguf`` package has them.

Run it where ``gguf`` can be imported, with ``tests/checkpoints`` on the path:

    PYTHONPATH=tests/checkpoints python tests/gpu_workers/packed/record_gguf_blocks.py
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
from gguf_files import hostile_blocks

from xditd.ipc.packed import GGUF_BLOCKS

TARGET = Path(__file__).parent / "data" / "gguf_blocks.json"


def main() -> None:
    recorded = {}
    for kind, block in GGUF_BLOCKS.items():
        blocks = hostile_blocks(kind, 256 // block.numbers, seed=5).numpy()
        numbers = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind.upper()])
        recorded[kind] = {"blocks": blocks.tobytes().hex(), "numbers": numbers.astype("<f4").tobytes().hex()}
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(json.dumps(recorded, indent=1) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
