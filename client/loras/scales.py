"""The scale of each layer of a LoRA: its alpha over its rank, or over the root of it (rsLoRA).

diffusers and PEFT keep alpha and rsLoRA in a configuration: in the file's metadata (``lora_adapter_metadata``), or in
``adapter_config.json`` beside it. Others keep alpha as a tensor beside the factors. Without any, the scale is 1.

Sources: PEFT, ``LoraConfig`` and ``get_pattern_key``; diffusers, ``lora_base.py`` (``LORA_ADAPTER_METADATA_KEY``).
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from xditd.client.loras.spelling import LoraName
from xditd.ipc.errors import BadCheckpoint, Unsupported
from xditd.ipc.loras import MAX_SCALE, LoraPart

METADATA: Final = "lora_adapter_metadata"
_FORMATS: Final = {"float32": "<f", "float16": "<e", "float64": "<d", "int64": "<q", "int32": "<i", "int16": "<h"}
_EXPRESSION: Final = re.compile(r"[^\w.-]")
_TEXT_PARTS: Final = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class PeftConfig:
    """The values of PEFT's ``LoraConfig`` on which the scales depend."""

    alpha: float | None = None
    by_root: bool = False
    patterns: Mapping[str, float] = field(default_factory=dict)
    """Alpha of the layers whose names end so."""

    @classmethod
    def of(cls, given: Mapping[str, Any], where: str) -> PeftConfig:
        """Read a configuration.

        Raises:
            Unsupported: it says that the adapter is no LoRA, or changes the weights, too.
            BadCheckpoint: a value that is no number.
        """
        if given.get("use_dora"):
            raise Unsupported(f"{where}: DoRA (use_dora) scales the weights: it cannot be a branch; merge and lend it")
        for key in ("modules_to_save", "bias"):
            if given.get(key) not in (None, [], "none"):
                raise Unsupported(
                    f"{where}: {key} is {given[key]!r:.100}: it trained whole tensors, too, which no branch adds; "
                    "merge and lend it"
                )
        start = given.get("init_lora_weights")
        if isinstance(start, str) and re.match(r"pissa|olora|corda|loftq|lora_ga", start):
            raise Unsupported(
                f"{where}: init_lora_weights is {start!r}, which changes the weights, too: merge and lend it"
            )
        patterns = given.get("alpha_pattern") or {}
        if not isinstance(patterns, Mapping):
            raise BadCheckpoint(f"{where}: alpha_pattern is {patterns!r:.100}, not alphas by name")
        odd = [str(key) for key in patterns if _EXPRESSION.search(str(key))]
        if odd:
            raise Unsupported(
                f"{where}: alpha_pattern has the regular expression {odd[0]!r:.100}; only names of layers are read: "
                "merge and lend it"
            )
        return cls(
            alpha=None if given.get("lora_alpha") is None else _number(given["lora_alpha"], f"{where}: lora_alpha"),
            by_root=bool(given.get("use_rslora", False)),
            patterns={str(key): _number(value, f"{where}: alpha of {key}") for key, value in patterns.items()},
        )

    def alpha_of(self, layer: str) -> float | None:
        """Return the alpha of a layer, by its name as it is spelled."""
        for key, alpha in self.patterns.items():
            if layer == key or layer.endswith("." + key):
                return alpha
        return self.alpha


def read_configs(metadata: Mapping[str, str], where: str) -> dict[LoraPart, PeftConfig]:
    """Read the configurations in the metadata of a file, one for each part.

    Raises:
        BadCheckpoint, Unsupported: see :meth:`PeftConfig.of`; or the text is not JSON.
    """
    if METADATA not in metadata:
        return {}
    return split_configs(parse_config(metadata[METADATA], f"{where}: {METADATA}"), f"{where}: {METADATA}")


def split_configs(given: Mapping[str, Any], where: str) -> dict[LoraPart, PeftConfig]:
    """Split a configuration by part: diffusers joins those of a pipeline's models, with their names in front."""
    found: dict[LoraPart, PeftConfig] = {}
    by_model: dict[str, dict[str, Any]] = {}
    for key, value in given.items():
        model, dot, name = key.partition(".")
        if dot and model in ("transformer", "unet", *_TEXT_PARTS):
            by_model.setdefault(model, {})[name] = value
        else:
            by_model.setdefault("", {})[key] = value
    for model, values in by_model.items():
        found["text_encoder" if model in _TEXT_PARTS else "model"] = PeftConfig.of(values, where)
    return found


def parse_config(text: str, where: str) -> Mapping[str, Any]:
    """Parse the JSON of a configuration.

    Raises:
        BadCheckpoint: it is no JSON object.
    """
    try:
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{where}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadCheckpoint(f"{where}: not a JSON object")
    return found


def scale_of(name: LoraName, rank: int, alpha: float | None, config: PeftConfig | None) -> float:
    """Return the scale of a layer. ``alpha`` is that of its tensor, if it has one.

    Raises:
        BadCheckpoint: alpha is not finite, or too large.
    """
    if alpha is None and config is not None:
        alpha = config.alpha_of(name.layer)
    if alpha is None:
        return 1.0
    scale = alpha / (math.sqrt(rank) if config is not None and config.by_root else rank)
    if not math.isfinite(scale) or abs(scale) > MAX_SCALE:
        raise BadCheckpoint(f"layer {name.layer}: alpha {alpha} with rank {rank} is no scale up to {MAX_SCALE:g}")
    return scale


def decode_scalar(content: bytes, dtype: str, name: str) -> float:
    """Return the only element of a tensor from its bytes.

    Raises:
        BadCheckpoint: it has another number of elements, or a dtype that no alpha has.
    """
    if dtype == "bfloat16" and len(content) == 2:
        return float(struct.unpack("<f", b"\0\0" + content)[0])
    form = _FORMATS.get(dtype)
    if form is None or len(content) != struct.calcsize(form):
        raise BadCheckpoint(f"tensor {name}: {len(content)} bytes of {dtype} are no alpha, which is one number")
    return float(struct.unpack(form, content)[0])


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadCheckpoint(f"{what} is {value!r:.100}, not a number")
    try:
        return float(value)
    except OverflowError:
        raise BadCheckpoint(f"{what} is an integer of {int(value).bit_length()} bits, which is no scale") from None
