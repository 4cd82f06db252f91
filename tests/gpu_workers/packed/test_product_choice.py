"""The choice of products: measured once, kept on disk, overridden by the setting, the same on all ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from xditd.gpu_workers.packed import kept_times, product_choice, product_times
from xditd.gpu_workers.packed.kitchen import kitchen, kitchen_product
from xditd.gpu_workers.packed.native_products import native_product
from xditd.gpu_workers.packed.product_choice import ProductChoice, class_of
from xditd.gpu_workers.packed.product_times import ProductKind
from xditd.gpu_workers.packed.tensors import PackedTensor

CPU, GPU = torch.device("cpu"), torch.device("cuda")
INT8 = ProductKind("int8_convrot", 3072, 12288, 256, torch.bfloat16)
FLOAT8 = ProductKind("float8", 3072, 3072, 0, torch.bfloat16)
GGUF = ProductKind("q4_k", 3072, 3072, 0, torch.bfloat16)
WEIGHT = PackedTensor("int8", (8, 16), torch.zeros(8, 16, dtype=torch.int8), torch.ones(()))


class Measurements:
    """Stands in for the clock: says what products take, and counts what was measured."""

    def __init__(self) -> None:
        self.took = {"reference": 1.0, "native": 0.5}
        self.kinds: list[ProductKind] = []
        self.error: Exception | None = None

    def measure(self, kind: ProductKind, device: torch.device) -> dict[str, float]:
        self.kinds.append(kind)
        if self.error is not None:
            raise self.error
        return self.took


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measurements:
    """A machine with a card on which everything qualifies but GGUF."""
    found = Measurements()
    monkeypatch.setattr(product_times, "measure", found.measure)
    monkeypatch.setattr(kept_times, "_versions", lambda device: "versions")
    monkeypatch.setattr(
        product_choice, "qualifies", lambda name, *_: None if name in ("int8_convrot", "float8") else f"no {name}"
    )
    return found


def test_the_faster_product_is_chosen_and_measured_once_for_a_class(tmp_path: Path, measured: Measurements) -> None:
    choice = ProductChoice("auto", GPU, tmp_path / "products")
    wider = INT8._replace(n=9216)
    found = choice.choose([INT8, wider, FLOAT8, GGUF])
    assert [each.product for each in found.values()] == ["native", "native", "native", "reference"]
    assert found[INT8].function_for(WEIGHT) is native_product
    assert found[GGUF].function_for(WEIGHT) is None
    assert found[GGUF].reason == "no q4_k"
    assert measured.kinds == [INT8._replace(k=2048, n=8192), FLOAT8._replace(k=2048, n=2048)]
    measured.took = {"reference": 1.0, "native": 5.0}
    again = ProductChoice("auto", GPU, tmp_path / "products").choose([INT8, FLOAT8])
    assert {each.product for each in again.values()} == {"native"}  # from the disk
    assert len(measured.kinds) == 2


def test_the_reference_stays_unless_another_is_clearly_faster(tmp_path: Path, measured: Measurements) -> None:
    measured.took = {"reference": 1.0, "native": 0.99, "kitchen": 1.5}
    found = ProductChoice("auto", GPU, tmp_path / "products").choose([INT8])[INT8]
    assert found.product == "reference"
    kind = "int8_convrot bfloat16 k 2048 n 8192 group 256"
    assert found.reason == f"measured: 1.00 ms dequantised, 0.99 ms native ({kind})"
    measured.took = {"reference": 1.0, "native": 0.9, "kitchen": 0.5}
    found = ProductChoice("auto", GPU, tmp_path / "others").choose([INT8])[INT8]
    assert found.function_for(WEIGHT) is kitchen_product
    turned = replace(WEIGHT, values=WEIGHT.values.t())
    assert found.function_for(turned) is None


def test_with_a_folder_of_others_the_reference_runs(tmp_path: Path, measured: Measurements) -> None:
    """On all ranks: those that do not measure wait for the one that does."""
    tmp_path.chmod(0o777)
    found = ProductChoice("auto", GPU, tmp_path).choose([INT8])[INT8]
    assert found.product == "reference"
    assert "has to be a folder of this user alone" in found.reason
    (tmp_path / "file").touch()
    found = ProductChoice("auto", GPU, tmp_path / "file" / "products").choose([INT8])[INT8]
    assert found.product == "reference"
    assert "Not a directory" in found.reason
    assert measured.kinds == []


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), TypeError("a compiler's")])
def test_what_cannot_be_measured_is_the_reference_and_not_kept(
    tmp_path: Path, measured: Measurements, error: Exception
) -> None:
    measured.error = error
    found = ProductChoice("auto", GPU, tmp_path / "products").choose([INT8])[INT8]
    assert found == ("reference", "products could not be measured; the log says why")
    measured.error = None
    assert ProductChoice("auto", GPU, tmp_path / "products").choose([INT8])[INT8].product == "native"


def test_the_setting_overrides_what_is_measured(tmp_path: Path, measured: Measurements) -> None:
    always = ProductChoice("always", GPU, tmp_path / "products").choose([INT8, GGUF])
    assert [each.product for each in always.values()] == ["native", "reference"]
    assert ProductChoice("always", CPU, tmp_path).choose([INT8])[INT8].product == "native"
    never = ProductChoice("never", GPU, tmp_path / "products").choose([INT8])[INT8]
    assert never == ("reference", "the setting native_products is never")
    on_cpu = ProductChoice("auto", CPU, tmp_path).choose([INT8, GGUF])
    assert on_cpu[INT8] == ("reference", "on the CPU the setting native_products has to be always")
    assert on_cpu[GGUF] == ("reference", "no q4_k")  # which no setting changes
    assert not measured.kinds
    assert not (tmp_path / "products").exists()


class Exchange:
    """What ``rank_sync.share_value`` does, for threads."""

    def __init__(self, ranks: int) -> None:
        self._values = [0] * ranks
        self._barrier = threading.Barrier(ranks, timeout=60)

    def of(self, rank: int) -> Callable[[int], list[int]]:
        def exchange(value: int) -> list[int]:
            self._values[rank] = value
            self._barrier.wait()
            found = list(self._values)
            self._barrier.wait()
            return found

        return exchange


@pytest.mark.parametrize("native_ms", [0.5, 2.0])
def test_all_ranks_follow_what_rank_0_measures(tmp_path: Path, measured: Measurements, native_ms: float) -> None:
    measured.took = {"reference": 1.0, "native": native_ms}
    exchange, found = Exchange(3), {}

    def run(rank: int) -> None:
        choice = ProductChoice("auto", GPU, tmp_path / "products", exchange=exchange.of(rank), is_leader=rank == 0)
        found[rank] = [each.product for each in choice.choose([INT8, GGUF, FLOAT8, INT8]).values()]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    product = "native" if native_ms < 1 else "reference"
    assert found == {rank: [product, "reference", product] for rank in range(3)}
    assert len(measured.kinds) == 2  # by rank 0


def test_a_product_that_one_rank_does_not_have_runs_on_none(tmp_path: Path, measured: Measurements) -> None:
    choice = ProductChoice("auto", GPU, tmp_path / "products", exchange=lambda value: [value, 0])
    assert choice.choose([INT8])[INT8].product == "reference"


def test_ranks_whose_cards_differ_exchange_as_often(
    tmp_path: Path, measured: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kinds of one class: the rank that has no such product must not wait for an exchange that others leave out."""
    exchange, found = Exchange(2), {}
    monkeypatch.setattr(
        product_choice, "qualifies", lambda *_: "too old" if threading.current_thread().name == "1" else None
    )
    kinds = [FLOAT8, FLOAT8._replace(n=3584), INT8, FLOAT8]

    def run(rank: int) -> None:
        choice = ProductChoice("auto", GPU, tmp_path / "products", exchange=exchange.of(rank), is_leader=rank == 0)
        found[rank] = [each.product for each in choice.choose(kinds).values()]

    threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {rank: ["reference"] * 3 for rank in range(2)}


def test_a_file_can_rule_native_products_out(tmp_path: Path, measured: Measurements) -> None:
    eight = replace(WEIGHT, format="float8", values=WEIGHT.values.to(torch.float8_e4m3fn))
    kinds = [
        ProductKind.of(each, torch.bfloat16)
        for each in (
            eight,
            replace(eight, quantises_input=False),
            replace(eight, values=WEIGHT.values.to(torch.float8_e5m2)),
            replace(eight, input_scale=torch.ones(())),
        )
    ]
    assert kinds[0] == ProductKind("float8", 16, 8, 0, torch.bfloat16)
    found = ProductChoice("always", GPU, tmp_path).choose(kinds)
    assert [each.product for each in found.values()] == ["native", "reference", "reference", "native"]
    assert found[kinds[1]].reason == "the file does not allow that the input is rounded"
    assert found[kinds[2]].reason == "float8_e5m2 has no native product"


def test_sides_of_a_class_are_powers_of_two_within_limits() -> None:
    assert class_of(INT8._replace(k=15360, n=64))[1:3] == (8192, 1024)
    assert class_of(INT8._replace(k=4096, n=4095))[1:3] == (4096, 2048)


@pytest.mark.parametrize("kind", [INT8, FLOAT8, FLOAT8._replace(has_input_scale=True)])
def test_products_are_timed(kind: ProductKind) -> None:
    took = product_times.measure(kind._replace(k=256, n=64), CPU)
    assert took.keys() == {"reference", "native"}
    assert all(each > 0 for each in took.values())


@pytest.mark.gpu
def test_the_choice_is_measured_on_a_gpu(tmp_path: Path) -> None:
    kinds = [INT8, INT8._replace(format="int8", group=0), FLOAT8, FLOAT8._replace(has_input_scale=True)]
    found = ProductChoice("auto", torch.device("cuda", 0), tmp_path / "products").choose(kinds)
    for kind, each in found.items():
        assert each.product != "reference" or "measured" in each.reason or "older" in each.reason, (kind, each)
    if kitchen() is not None:
        took = product_times.measure(class_of(INT8), torch.device("cuda", 0))
        assert took["reference"] > 0
