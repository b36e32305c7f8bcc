"""adapter_config.json: rank, alpha and the patterns that override them; layout markers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import AdapterError

# adapter_config.json, "moe_lora_layout": order of the columns of lora_B (and rows of lora_A) of
# fused experts, where shapes cannot tell. name -> (A expert-major, B expert-major). PEFT's own is
# A expert-major (row = expert * r + j), B rank-major (column = j * E + expert).
ORDERS = {
    "peft": (True, False),
    "grouped-by-expert": (True, True),  # Unsloth before zoo #1269
    "megatron-bridge": (True, True),  # save_hf_adapter of packed experts, up to 0.6.2 at least
    "art-converted": (False, True),  # ART's convert_moe_lora.py on a transposed adapter
}


@dataclass
class Config:
    """What of adapter_config.json matters for LoRA.

    Attributes:
        rank, alpha: for modules that no pattern names.
        rslora: scale by alpha / sqrt(rank) (https://arxiv.org/abs/2312.03732).
        rank_pattern, alpha_pattern: PEFT's: regex that a module's name ends with -> value.
        raw: the whole file.
        markers: other files' statements about the layout (NeMo's automodel_peft_config.json).
    """

    rank: int
    alpha: float
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)
    markers: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], markers: Mapping[str, Any] | None = None) -> Config:
        """
        Raises:
            AdapterError: rank or alpha is missing or no usable number, a pattern is no regex, or a
                marker has a value that is not known.
        """
        rank = raw.get("r")
        alpha = raw.get("lora_alpha")
        _number("r", rank, whole=True)
        _number("lora_alpha", alpha)
        config = cls(
            int(rank),  # type: ignore[arg-type]
            float(alpha),  # type: ignore[arg-type]
            bool(raw.get("use_rslora")),
            _pattern(raw, "rank_pattern", whole=True),
            _pattern(raw, "alpha_pattern"),
            raw,
            markers or {},
        )
        config.orders(), config.interleaved(), config.scale("", 1)  # whether they are needed or not
        return config

    @classmethod
    def from_folder(cls, folder: Path) -> Config:
        """
        Raises:
            AdapterError: the file is missing or not a JSON table.
        """
        return cls.from_dict(_read(folder / "adapter_config.json"), markers(folder))

    def scale(self, module: str, rank: int) -> tuple[float, int]:
        """(factor on lora_B @ lora_A of a module, the rank that the config says it has).

        PEFT scales by the rank of the config, which is the tensor's. Megatron-Bridge's
        normalize_moe_lora gives experts a smaller rank than the config has and scales by their
        own, so the tensor's rank counts where the two differ.

        Args:
            module: its name without PEFT's prefix.
            rank: of its tensors.
        """
        alpha = _match(self._alphas, module)
        said = _match(self._ranks, module)
        alpha = self.alpha if alpha is None else float(alpha)
        scale = alpha / (math.sqrt(rank) if self.rslora else rank)
        return scale, self.rank if said is None else int(said)

    def orders(self) -> tuple[bool, bool] | None:
        """(A expert-major, B expert-major) of fused experts where the adapter says so.

        Raises:
            AdapterError: a marker has a value that is not known.
        """
        tag = self._tag()
        if tag:
            return ORDERS[tag[0]]
        order = self.raw.get("lora_B_layout")  # Unsloth from 2026.10 on
        if order is not None:
            known = {"rank_major": ORDERS["peft"], "grouped_by_expert": ORDERS["megatron-bridge"]}
            if order not in known:
                raise AdapterError(f'adapter_config.json: "lora_B_layout": {order!r} is not known')
            return known[order]
        return None

    def transposed(self) -> bool | None:
        """Whether in and out of fused experts are swapped (PEFT up to 0.19.0), where it says so."""
        tag = self._tag()
        if tag and tag[1] is not None:
            return tag[1]
        stamp = str(self.markers.get("paramwrapper_layout", ""))  # NeMo AutoModel
        return {"peft-0.18": True, "peft-0.19.1": False}.get(stamp)

    def interleaved(self) -> bool | None:
        """Whether fused gate_up rows alternate, where "moe_lora_gate_up" says so."""
        value = self.raw.get("moe_lora_gate_up")
        if value is None:
            return None
        if value not in ("interleaved", "concatenated"):
            raise AdapterError(
                f'adapter_config.json: "moe_lora_gate_up": {value!r}; it is "interleaved" or '
                '"concatenated"'
            )
        return bool(value == "interleaved")

    def _tag(self) -> tuple[str, bool | None] | None:
        tag = self.raw.get("moe_lora_layout")
        if tag is None:
            return None
        base, transposed = str(tag), None
        for suffix, value in (("-transposed", True), ("-standard", False)):
            if base.endswith(suffix):
                base, transposed = base.removesuffix(suffix), value
        if base not in ORDERS:
            raise AdapterError(
                f'adapter_config.json: "moe_lora_layout": {tag!r} is not known. It is one of '
                f"{', '.join(ORDERS)}, each also with -standard or -transposed."
            )
        return base, transposed

    def written_by_megatron_bridge(self) -> bool:
        """Megatron-Bridge's save_hf_adapter: full parameter names, and no version of PEFT."""
        names = self.raw.get("target_parameters") or []
        full = [*names, *self.rank_pattern]
        return (
            bool(names)
            and "peft_version" not in self.raw
            and all(re.search(r"\.layers\.\d+\.", name) for name in full)
        )

    @cached_property
    def _ranks(self) -> list[tuple[re.Pattern[str], float]]:
        return _compiled("rank_pattern", self.rank_pattern)

    @cached_property
    def _alphas(self) -> list[tuple[re.Pattern[str], float]]:
        return _compiled("alpha_pattern", self.alpha_pattern)


def markers(folder: Path) -> dict[str, Any]:
    """What NeMo AutoModel says of the layout, in a file of its own."""
    return _read(folder / "automodel_peft_config.json", optional=True)


def _read(file: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not file.is_file():
        return {}
    try:
        raw = json.loads(file.read_text())
    except FileNotFoundError:
        raise AdapterError(f"{file} is missing: is this the folder of a PEFT adapter?") from None
    except (OSError, RecursionError, ValueError) as error:
        raise AdapterError(f"{file} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise AdapterError(f"{file} holds no JSON table")
    return raw


def _pattern(raw: Mapping[str, Any], key: str, whole: bool = False) -> Mapping[str, Any]:
    pattern = raw.get(key) or {}
    if not isinstance(pattern, Mapping):
        raise AdapterError(f"adapter_config.json: {key} is {pattern!r}, not a table")
    for name, value in pattern.items():
        _number(f"{key}[{name!r}]", value, whole=whole)
    return pattern


def _number(what: str, value: object, whole: bool = False) -> None:
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if whole and isinstance(value, (int, float)):
        fine = fine and value == int(value) and value > 0
    if not fine:
        kind = "a positive whole number" if whole else "a finite number"
        raise AdapterError(f"adapter_config.json: {what} is {value!r}, not {kind}")


def _compiled(what: str, pattern: Mapping[str, float]) -> list[tuple[re.Pattern[str], float]]:
    # PEFT's get_pattern_key: a key matches the end of a name, from a dot on; the first one wins.
    try:
        return [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in pattern.items()]
    except re.error as error:
        raise AdapterError(f"adapter_config.json: {what} holds no regex: {error}") from error


def _match(pattern: list[tuple[re.Pattern[str], float]], module: str) -> float | None:
    return next((value for key, value in pattern if key.match(module)), None)
