"""The limits that docs/acceleration.md and docs/formats.md state are those of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from xditd.gpu_workers.kernels import branch_stacks, dense_products, static_branches
from xditd.gpu_workers.models import compiled_graphs, forward_paths, path_choice, split_checks
from xditd.gpu_workers.packed import native_products, product_choice, product_times
from xditd.gpu_workers.parallel.peer_exchange import HEADS_BYTES
from xditd.ipc import limits
from xditd.ipc.packed import GGUF_BLOCKS, MAX_GROUP
from xditd.ipc.transports.tensor_views import VIEW_ALIGNMENT_BYTES

DOCS = Path(__file__).resolve().parents[3] / "docs"
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 9: "nine"}
LEAST_CAPABILITY = ".".join(map(str, native_products._TURING))


def mib_of_heads_and_tokens(heads_bytes: int) -> int:
    """Return the memory of an exchange: results take a third of queries, keys and values."""
    return heads_bytes * 4 // 3 // 2**20


ACCELERATION = [
    f"at most {dense_products._AS_FAST} of torch's time",
    f"at least {path_choice.HOST_SHARE:.0%} of a forward".replace("%", " %"),
    f"needs at least {path_choice.LIMITING_SHARE:.0%} of the time".replace("%", " %"),
    f"{split_checks.TOLERANCE:.0e} in float32".replace("e-0", "e-"),
    f"{split_checks.TOLERANCE_OF_HALVES:.0e} by norm, or {split_checks.NOISES} times".replace("e-0", "e-"),
    f"at most {split_checks.MOST_NOISE}.",
    f"At most {forward_paths.MAX_CAPTURED} graphs stay",
    f"captured again after {NUMBERS[forward_paths.RUNS_AFTER_LOSS + 1]} more calls",
    f"arguments of over {forward_paths.MAX_INPUT_BYTES // 2**30} GiB",
    f"gets at most {NUMBERS[forward_paths.MAX_VALUES]} cases",
    f"at most {compiled_graphs.MAX_ON_DISK} graphs",
    f"not used for {compiled_graphs.UNUSED_DAYS:.0f} days",
    f"{mib_of_heads_and_tokens(HEADS_BYTES[0])} MiB, doubled for larger sizes up to "
    f"{mib_of_heads_and_tokens(HEADS_BYTES[-1])} MiB",
]
FORMATS = [
    f"at most {MAX_GROUP})",
    f"a multiple of {VIEW_ALIGNMENT_BYTES} bytes",
    f"multiples of {native_products._INT8_STEP} (int8, compute capability {LEAST_CAPABILITY})",
    f"or {native_products._FLOAT8_STEP} (float8, ",
    f"multiples of {native_products._ALIGNMENT} bytes",
    f"with {product_times.ROWS} tokens",
    f"powers of 2 from {product_choice._LEAST_SIDE} to {product_choice._MOST_SIDE}",
    f"at most {product_choice._GAIN} times as long as the reference",
    f"more than {limits.MAX_PACKED_REASONS} the rarest together",
]
LORAS = [
    f"at most {static_branches.MAX_LAYOUTS} layouts, whose factors take up to {static_branches.MAX_BYTES // 2**30} GiB",
    f"up to a {static_branches.MAX_SHARE}nd of the GPU's memory",
    f"up to {branch_stacks.MAX_BYTES // 2**30} GiB for each model",
]


@pytest.mark.parametrize(
    ("document", "statement"),
    [
        *(("acceleration.md", each) for each in ACCELERATION),
        *(("formats.md", each) for each in FORMATS),
        *(("lora.md", each) for each in LORAS),
    ],
)
def test_a_document_states_the_limit_of_the_code(document: str, statement: str) -> None:
    text = " ".join((DOCS / document).read_text().split())
    assert statement in text


def test_the_table_of_gguf_types_has_their_blocks() -> None:
    text = (DOCS / "formats.md").read_text()
    documented: dict[str, tuple[int, int]] = {}
    for line in text.partition("| type | numbers in a block |")[2].partition("\n\n")[0].splitlines()[2:]:
        types, numbers, sizes, _ = (cell.strip() for cell in line.strip("|").split("|"))
        if numbers != "plain":
            for name, size in zip(types.split(", "), sizes.split(", "), strict=True):
                documented[name.lower()] = int(numbers), int(size)
    assert documented == GGUF_BLOCKS
