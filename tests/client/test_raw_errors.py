"""Whatever a caller gives to a method, errors are typed: they say what is wrong, and never that of a line in here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

torch = pytest.importorskip("torch")

import sample_facts  # noqa: E402

from xditd.client import Client, RowsOf  # noqa: E402
from xditd.client.jobs.controls import CallControl, Control  # noqa: E402
from xditd.ipc.errors import XditdError  # noqa: E402
from xditd.ipc.facts import ComponentFacts, PromptFacts, TokenizerFacts  # noqa: E402
from xditd.ipc.replies import Failed  # noqa: E402
from xditd.ipc.requests import Adopt, Call, Cancel, Decode, Encode, EncodePrompt, EncodeText, Generate, Lend, Revoke  # noqa: E402
from xditd.ipc.tensors import ComponentKind  # noqa: E402

TEXT = {"prompt_embeds": torch.zeros(1, 3, 8), "pooled_prompt_embeds": torch.zeros(1, 4)}
WEIGHTS = {"double_blocks.0.img_mlp.0.weight": torch.arange(12.0).reshape(3, 4)}
LORA = {
    "lora_unet_double_blocks_0_img_mlp_0.lora_down.weight": torch.ones(2, 4),
    "lora_unet_double_blocks_0_img_mlp_0.lora_up.weight": torch.ones(3, 2),
}


class Odd:
    """An object that can do nothing."""

    def __repr__(self) -> str:
        return "<an odd object>"


class OddNumber:
    """An object that is no number, though it says so."""

    def __float__(self) -> float:
        raise ValueError("not a number")

    def __len__(self) -> int:
        return 1


UNKNOWN = (ComponentKind.LORA, ComponentKind.TOKENIZER)
"""Kinds that the scripted daemon does not lend."""
TOKENIZER = ComponentFacts(
    family="tokenizer", class_name="BertTokenizer", kind=ComponentKind.TOKENIZER, dtype="uint8", bytes_by_dtype={},
    tokenizer=TokenizerFacts(vocabulary=9, files=(), takes_images=False, has_chat_template=False),
)  # fmt: skip


def words() -> ComponentFacts:
    """A transformer whose family encodes prompts."""
    facts = sample_facts.TRANSFORMER
    assert facts.transformer is not None
    prompt = PromptFacts(
        encoders={"text_encoder": ("clip_l",)}, tokenizers={"tokenizer": ("BertTokenizer",)}, image_tokenizers={},
        max_images=0, takes_negative=True, options=("max_sequence_length",),
    )  # fmt: skip
    return replace(facts, transformer=replace(facts.transformer, prompt=prompt))


VALUES: dict[str, Any] = {
    "none": None,
    "true": True,
    "int": 5,
    "huge": 2**70,
    "negative": -1,
    "float": 0.5,
    "nan": float("nan"),
    "text": "x",
    "surrogate": "\ud800",
    "null byte": "a\0b",
    "bytes": b"\xff",
    "list": [1, "a"],
    "nested": [[[]]],
    "tuple": (None,),
    "dict": {"a": 1},
    "other keys": {1: 2, None: 3},
    "set": {1, 2},
    "object": Odd(),
    "no number": OddNumber(),
    "class": Odd,
    "function": lambda: 1,
    "iterator": iter([1]),
    "tensor": torch.zeros(2, 2),
    "scalar": torch.tensor(1.5),
    "meta": torch.empty(2, device="meta"),
    "dtype": torch.float32,
    "device": torch.device("cpu"),
    "path": Path("no-such-file.safetensors"),
    "tensors": [torch.zeros(1), None],
}


@pytest.fixture
def client(daemon: Any, folder: Path) -> Iterator[Client]:
    def failed(request: Any) -> list[Failed]:
        return [Failed(request_id=request.request_id, code="bad_request", detail="the scripted daemon runs no jobs")]

    for kind in (Call, Generate, Encode, Decode, EncodeText, EncodePrompt, Cancel, Adopt, Revoke):
        daemon.answers[kind] = failed
    lent = daemon.answers[Lend]
    daemon.answers[Lend] = lambda request: failed(request) if request.manifest.kind in UNKNOWN else lent(request)
    daemon.facts |= {"words": words(), "tokens": TOKENIZER}
    with Client(folder, deadline_s=2.0) as client:
        yield client


def calls(client: Client) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Return the methods, each with arguments that it takes."""
    loan = client.lend(WEIGHTS)
    vae, encoder = (client.lend(WEIGHTS, kind=kind) for kind in ("vae", "text_encoder"))
    latents = torch.zeros(1, 16, 4, 4)
    prompt = {"transformer": "words", "prompt": "a cat", "tokenizers": {"tokenizer": "tokens"}}
    return {
        "lend": (client.lend, {"source": WEIGHTS}),
        "lend_lora": (client.lend_lora, {"source": LORA}),
        "generate": (client.generate, {"transformer": loan, "conditioning": TEXT, "height": 16, "width": 16}),
        "call": (client.call, {"component": loan, "arguments": {"hidden_states": torch.zeros(1, 2, 64)}}),
        "call_parts": (client.call_parts, {"component": loan, "parts": [{"hidden_states": torch.zeros(1, 2, 64)}]}),
        "encode_text": (client.encode_text, {"encoder": encoder, "token_ids": [[1, 2]]}),
        "decode": (client.decode, {"vae": vae, "latents": latents}),
        "encode": (client.encode, {"vae": vae, "image": torch.zeros(1, 3, 16, 16)}),
        "lend_tokenizer": (client.lend_tokenizer, {"source": "no such folder"}),
        "encode_prompt": (client.encode_prompt, {**prompt, "encoders": {"text_encoder": encoder}}),
        "tokenize": (client.tokenize, prompt),
        "keep": (client.keep, {"tensor": latents}),
        "facts": (client.facts, {"component": loan}),
        "return_": (client.return_, {"loan": loan}),
        "adopt": (client.adopt, {"component_id": "c1"}),
        "revoke": (client.revoke, {"component": "c1"}),
        "with_loras": (loan.with_loras, {"loras": []}),
        "logs": (client.logs, {}),
        "status": (client.status, {}),
        "wait_ready": (client.wait_ready, {"wait_s": 0.0}),
        "check_memory": (client.check_memory, {}),
    }


METHODS = (
    "lend", "lend_lora", "generate", "call", "call_parts", "encode_text", "decode", "encode", "keep", "facts",
    "return_",
    "lend_tokenizer", "encode_prompt", "tokenize", "adopt", "revoke", "with_loras", "status", "check_memory",
)  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_argument_may_be_anything(client: Client, method: str) -> None:
    function, usual = calls(client)[method]
    raw = []
    for name in inspect.signature(function).parameters:
        for label, value in VALUES.items():
            if method == "call_parts" and name == "parts" and label == "none":
                continue
            try:
                found = function(**{**usual, name: value})
            except XditdError:
                continue
            except Exception as error:  # noqa: BLE001 - the test is about whatever comes
                raw.append(f"{method}({name}={label}): {type(error).__name__}: {error}")
                continue
            if hasattr(found, "cancel"):
                found.cancel()
    assert raw == [], "\n".join(raw)


@pytest.mark.parametrize("kind", [Control, CallControl, RowsOf])
def test_parts_of_jobs_may_be_anything(client: Client, kind: Any) -> None:
    made = calls(client)
    usual = {Control: {"controlnet": "c4"}, CallControl: {"controlnet": "c4", "arguments": {}}, RowsOf: {}}[kind]
    raw = []
    for name in inspect.signature(kind).parameters:
        for label, value in VALUES.items():
            try:
                part = kind(**{**usual, name: value})
                if kind is Control:
                    made["generate"][0](**made["generate"][1], controls=[part])
                elif kind is CallControl:
                    made["call"][0](**made["call"][1], controls=[part])
                else:
                    made["call"][0](made["call"][1]["component"], {"hidden_states": part})
            except XditdError:
                continue
            except Exception as error:  # noqa: BLE001
                raw.append(f"{kind.__name__}({name}={label}): {type(error).__name__}: {error}")
    assert raw == [], "\n".join(raw)


def test_arguments_of_the_client_itself(folder: Path, daemon: Any) -> None:
    import asyncio

    from xditd.client import AsyncClient, BadRequest

    def refuses(says: str, make: Callable[[], Any]) -> None:
        with pytest.raises(BadRequest, match=says):
            make()

    numbers = [VALUES[name] for name in ("none", "text", "list", "object", "tensor", "meta", "nan", "negative")]
    for value in numbers:
        refuses("wait_s: ", lambda value=value: Client(folder, wait_s=value))  # type: ignore[misc]
        refuses("deadline_s: ", lambda value=value: Client(folder, deadline_s=value))  # type: ignore[misc]
    for value in (5, b"x", [], Odd(), torch.zeros(2), "", "x" * 600):
        refuses("name: ", lambda value=value: Client(folder, name=value))  # type: ignore[misc]
    for value in (5, b"x", [], Odd(), torch.zeros(2), "\ud800", "a\0b"):
        refuses("runtime_dir: .* is no folder's path", lambda value=value: Client(value))  # type: ignore[misc]
    for value in (5, b"x", [], torch.zeros(2)):
        refuses("address .*: give the head's IP address", lambda value=value: Client(cluster=value))  # type: ignore[misc]
    refuses("Hello cannot be sent: ", lambda: Client(folder, name="\ud800"))

    async def use() -> None:
        async with AsyncClient(folder) as client:
            await client.run("x")  # type: ignore[arg-type]

    refuses("run: 'x' of type str cannot be called", lambda: asyncio.run(use()))
    with Client(folder) as client:
        for value in (True, -1, 2**70, 0.5, "x", Odd(), torch.zeros(2)):
            refuses("after: .* is not the number of a line", lambda value=value: client.logs(value))  # type: ignore[misc]
            if not isinstance(value, str):
                refuses("name: .*; give the name of a pipeline", lambda value=value: client.unload(value))  # type: ignore[misc]
        refuses("Revoke cannot be sent: ", lambda: client.revoke("\ud800"))
        for name in ("compute_dtype", "acceleration"):
            refuses(f"{name}: ", lambda name=name: client.lend(WEIGHTS, **{name: torch.zeros(2)}))  # type: ignore[misc]


def test_arguments_of_calls_that_are_arrays_are_given() -> None:
    from xditd.client.pipeline.calls import is_given

    for name in ("weights", "references", "num_images", "step_cache", "loras"):
        assert is_given(name, torch.tensor(1.5))
        assert is_given(name, torch.zeros(2, 2))
    assert not is_given("references", [])
    assert not is_given("num_images", 1)
