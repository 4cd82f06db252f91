"""Two ranks share the rows and parts of calls: every class gives what it gives in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import diffusers
import pytest
import torch
from class_entries import ENTRIES
from class_entry import ClassEntry, Random, fill
from nested_values import tensors_of
from running_daemon import RunningDaemon

from xditd.client import Client
from xditd.client.cli.main import main
from xditd.ipc.errors import BadRequest

WRITES_ITS_CACHE_TENSORS = {"WanAnimate2Transformer3DModel-kv_cached", "AnyFlowFARTransformer3DModel-kv_write"}
"""Refused: they write to tensors of the caller."""

TOLERANCE = 1e-6

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def client(two_workers: RunningDaemon) -> Iterator[Client]:
    with two_workers.connect() as connected:
        yield connected


@pytest.fixture(autouse=True)
def no_gradients(as_many_threads_as_the_worker: None) -> Iterator[None]:
    with torch.no_grad():
        yield


def error(found: Any, expected: Any) -> float:
    assert type(found) is type(expected)
    # What workers hold is read by the first operation.
    pairs = [(a + 0, b + 0) for a, b in zip(tensors_of(found), tensors_of(expected), strict=True)]
    assert [(a.shape, a.dtype) for a, _ in pairs] == [(b.shape, b.dtype) for _, b in pairs]
    return max((_error(a, b) for a, b in pairs if b.numel()), default=0.0)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    largest = float(expected.abs().max())
    return float((found - expected).abs().max()) / (largest or 1.0)


@pytest.mark.parametrize(
    "entry", [each for key, each in ENTRIES.items() if key not in WRITES_ITS_CACHE_TENSORS], ids=lambda each: each.key
)
def test_every_class_by_rows(client: Client, entry: ClassEntry) -> None:
    model = entry.build()
    loan = client.lend(model, as_class=True)
    expected = model(**entry.arguments(Random(1)))
    errors = [error(client.call(loan, entry.arguments(Random(1))), expected) for _ in range(3)]
    loan.return_()
    assert max(errors) <= TOLERANCE, errors


FLUX = ENTRIES["FluxTransformer2DModel"]


def rows_of(arguments: Mapping[str, Any], batch: int, row: int) -> dict[str, Any]:
    return {
        name: value[row : row + 1]
        if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == batch
        else value
        for name, value in arguments.items()
    }


def test_tokens_are_split_and_status_says_so(
    client: Client, two_workers: RunningDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    loan = client.lend(FLUX.build(), as_class=True)
    for _ in range(3):
        client.call(loan, FLUX.arguments(Random(1)))
    status = client.status()
    checks = [each for each in status.split_checks if each.class_name == "FluxTransformer2DModel"][-2:]
    assert [each.split for each in checks] == ["rows", "tokens"]
    for check in checks:
        assert (check.method, check.batch, check.is_used, check.detail) == ("forward", 2, True, "")
        assert check.error is not None
        assert check.error < check.tolerance == 1e-6
    flags = ["--runtime-dir", str(two_workers.runtime_dir)]
    main(["status", *flags])
    lines = capsys.readouterr().out.splitlines()
    (line,) = [each.split() for each in lines if loan.component_id in each.split()]
    (headers,) = [each.split() for each in lines if each.startswith("COMPONENT")]
    assert "tokens" in line
    assert "LAYOUT" in headers
    shown = [each.split() for each in lines if each.endswith("in use")]
    assert ["FluxTransformer2DModel", "forward", "tokens"] in [each[:3] for each in shown]
    main(["status", "--json", *flags])
    shown = json.loads(capsys.readouterr().out)
    (component,) = [each for each in shown["components"] if each["component_id"] == loan.component_id]
    assert component["facts"]["module"]["layout"] == "tokens"
    assert shown["split_checks"][-1]["is_used"] is True
    loan.return_()


def test_several_parts_give_what_each_gives_alone(client: Client) -> None:
    model = FLUX.build()
    loan = client.lend(model, as_class=True)
    parts = [rows_of(FLUX.arguments(Random(seed)), 2, row) for seed in (1, 2) for row in (0, 1)][:3]
    for _ in range(3):
        found = client.call_parts(loan, parts)
        for part, result in zip(parts, found, strict=True):
            assert error(result, model(**part)) <= TOLERANCE
            assert error(result, client.call(loan, part)) <= TOLERANCE
    loan.return_()


def test_parts_of_different_sizes_and_rows(client: Client) -> None:
    model = FLUX.build()
    loan = client.lend(model, as_class=True)
    whole = FLUX.arguments(Random(1))
    parts = [whole, rows_of(whole, 2, 1), FLUX.arguments(Random(3))]
    for _ in range(3):
        for part, result in zip(parts, client.call_parts(loan, parts), strict=True):
            assert error(result, model(**part)) <= TOLERANCE
    loan.return_()


def test_a_class_that_raises_for_one_of_two_parts(client: Client) -> None:
    """The parts run on different ranks; both fail, and the group goes on."""
    model = diffusers.DiTTransformer2DModel.from_config(dict(ENTRIES["DiTTransformer2DModel"].config))
    fill(model, 0)
    loan = client.lend(model.eval(), as_class=True)
    first = rows_of(ENTRIES["DiTTransformer2DModel"].arguments(Random(1)), 2, 0)
    wrong = first | {"class_labels": torch.full_like(first["class_labels"], 10**6)}
    for parts in ([first, first], [first, first], [first, wrong], [wrong, first]):
        if any(part is wrong for part in parts):
            with pytest.raises(BadRequest, match=r"DiTTransformer2DModel\.forward refused its arguments: IndexError"):
                client.call_parts(loan, parts)
        else:
            client.call_parts(loan, parts)
    assert error(client.call(loan, first), model(**first)) == 0.0
    assert client.status().counters.group_starts == 1
    loan.return_()


def test_calls_with_a_cache_share_its_tokens(client: Client) -> None:
    """The client reads what the class itself would have put there, of which each worker has a share."""
    entry = ENTRIES["GlmImageTransformer2DModel-kv_write"]
    model = entry.build()
    loan = client.lend(model, as_class=True)
    for _ in range(3):
        mine, theirs = entry.arguments(Random(1)), entry.arguments(Random(1))
        for _ in range(2):
            assert error(client.call(loan, theirs), model(**mine)) <= TOLERANCE
        assert error(theirs, mine) <= TOLERANCE
    checks = [each for each in client.status().split_checks if each.class_name == entry.name]
    assert checks
    assert all(each.split == "tokens" and each.is_used for each in checks)
    loan.return_()


def test_a_cache_without_a_plan_runs_on_every_rank(client: Client) -> None:
    entry = ENTRIES["WanAnimate2Transformer3DModel"]
    model = entry.build()
    loan = client.lend(model, as_class=True)
    mine, theirs = entry.arguments(Random(1)), entry.arguments(Random(1))
    for _ in range(2):
        assert error(client.call(loan, theirs), model(**mine)) == 0.0
    assert error(theirs, mine) == 0.0
    loan.return_()


def test_held_tensors_of_a_cache_are_whole_as_arguments_of_another_call(client: Client) -> None:
    entry = ENTRIES["GlmImageTransformer2DModel-kv_write"]
    loan = client.lend(entry.build(), as_class=True)
    for _ in range(3):
        arguments = entry.arguments(Random(1))
        client.call(loan, arguments)
    held = arguments["kv_caches"].caches[0].k_caches[0]
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=8)
    fill(vae, 0)
    decoder = client.lend(vae.eval(), as_class=True)
    found = client.call(decoder, {"z": held}, method="decode")
    assert error(found, vae.decode(torch.clone(held))) <= TOLERANCE
    loan.return_()
    decoder.return_()


def test_a_method_of_a_vae_by_rows(client: Client, make_vae: Callable[[], torch.nn.Module]) -> None:
    model: Any = make_vae()
    loan = client.lend(model, as_class=True)
    latents = Random(1).normal(4, 4, 8, 8)
    for _ in range(3):
        assert error(client.call(loan, {"z": latents}, method="decode"), model.decode(latents)) <= TOLERANCE
    (check,) = client.status().split_checks[-1:]
    assert (check.class_name, check.method, check.batch, check.is_used) == ("AutoencoderKL", "decode", 4, True)
    loan.return_()


@pytest.fixture
def make_vae() -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        model = diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1)
        fill(model, 0)
        return model.eval().requires_grad_(False)

    return make
