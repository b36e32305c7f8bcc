"""Reads adapter_config.json: rank, alpha, the patterns that override them, entries on the layout.

PEFT defines the file (https://huggingface.co/docs/peft, LoraConfig). Some trainers add entries that
say in which order they write fused experts, where tensor shapes do not show it.
"""

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

# Values of "moe_lora_layout", an entry of this package's own. A fused tensor holds E experts of
# rank r side by side, and its shape does not show in which order.
# name -> (rows of lora_A are expert-major, columns of lora_B are expert-major).
# Expert-major: index = expert * r + j. Rank-major: index = j * E + expert.
ORDERS = {
    "peft": (True, False),
    "grouped-by-expert": (True, True),  # Unsloth before zoo #1269
    "megatron-bridge": (True, True),  # save_hf_adapter of packed experts, up to 0.6.2 at least
    "art-converted": (False, True),  # ART's convert_moe_lora.py on a transposed adapter
}


@dataclass
class Config:
    """The entries of adapter_config.json that say how to read and scale LoRA.

    Attributes:
        rank, alpha: "r" and "lora_alpha", for modules that no pattern matches.
        rslora: scale by alpha / sqrt(rank) instead of alpha / rank
            (https://arxiv.org/abs/2312.03732).
        rank_pattern, alpha_pattern: PEFT's patterns: a regex that must match the end of a module's
            name -> the rank or alpha of that module.
        raw: the whole file.
        nemo: the contents of NeMo AutoModel's automodel_peft_config.json, {} if there is none.
    """

    rank: int
    alpha: float
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)
    nemo: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], nemo: Mapping[str, Any] | None = None) -> Config:
        """Check the parsed files.

        Raises:
            AdapterError: rank or alpha is missing or is not a usable number, a pattern is not a
                regex, or an entry on the layout has an unknown value.
        """
        _check_fields(raw)
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
            nemo or {},
        )
        # These raise if an entry is wrong. Raise now, even if this adapter never needs the entry.
        config.orders(), config.interleaved(), config.scale("", 1)
        return config

    @classmethod
    def from_folder(cls, folder: Path) -> Config:
        """Read the files in an adapter's folder.

        Raises:
            AdapterError: adapter_config.json is missing, or a file is not a JSON object. Also what
                `from_dict` raises.
        """
        return cls.from_dict(_read(folder / "adapter_config.json"), nemo_config(folder))

    def scale(self, module: str, rank: int) -> tuple[float, int]:
        """The scale of a module's LoRA and the rank that the config gives it.

        The scale is alpha divided by the tensors' rank, not by the config's. The two ranks are the
        same in files of PEFT. Megatron-Bridge's normalize_moe_lora gives experts a smaller rank
        than the config says, and scales by that rank.

        Args:
            module: the module's name without PEFT's prefix.
            rank: rank of the module's tensors.

        Returns:
            What lora_B @ lora_A is multiplied by, and the config's rank. The caller compares that
            rank with the tensors'.
        """
        alpha = _match(self._alphas, module)
        own_rank = _match(self._ranks, module)
        alpha = self.alpha if alpha is None else float(alpha)
        scale = alpha / (math.sqrt(rank) if self.rslora else rank)
        return scale, self.rank if own_rank is None else int(own_rank)

    def orders(self) -> tuple[bool, bool] | None:
        """The order of fused experts, as a value of `ORDERS`; None if no entry gives it.

        Raises:
            AdapterError: the entry has an unknown value.
        """
        entry = self._layout_entry()
        if entry:
            return ORDERS[entry[0]]
        order = self.raw.get("lora_B_layout")  # written by Unsloth since 2026.10
        if order is not None:
            known = {"rank_major": ORDERS["peft"], "grouped_by_expert": ORDERS["megatron-bridge"]}
            if order not in known:
                raise AdapterError(
                    f'adapter_config.json: "lora_B_layout": {order!r} is not known. It is '
                    '"rank_major" or "grouped_by_expert".'
                )
            return known[order]
        return None

    def transposed(self) -> bool | None:
        """Whether in and out of fused experts are swapped, as PEFT up to 0.19.0 writes them.

        None if no entry says so, which is usual: the shapes of the tensors then decide.
        """
        entry = self._layout_entry()
        if entry and entry[1] is not None:
            return entry[1]
        stamp = str(self.nemo.get("paramwrapper_layout", ""))
        return {"peft-0.18": True, "peft-0.19.1": False}.get(stamp)

    def interleaved(self) -> bool | None:
        """Whether the rows of fused gate_up alternate between gate and up.

        None if there is no entry "moe_lora_gate_up", an entry of this package's own.

        Raises:
            AdapterError: the entry has an unknown value.
        """
        value = self.raw.get("moe_lora_gate_up")
        if value is None:
            return None
        if value not in ("interleaved", "concatenated"):
            raise AdapterError(
                f'adapter_config.json: "moe_lora_gate_up": {value!r} is not known. It is '
                '"interleaved" or "concatenated".'
            )
        return bool(value == "interleaved")

    def _layout_entry(self) -> tuple[str, bool | None] | None:
        """The entry "moe_lora_layout" as (key of `ORDERS`, in and out are swapped or not given)."""
        entry = self.raw.get("moe_lora_layout")
        if entry is None:
            return None
        base, transposed = str(entry), None
        for suffix, value in (("-transposed", True), ("-standard", False)):
            if base.endswith(suffix):
                base, transposed = base.removesuffix(suffix), value
        if base not in ORDERS:
            raise AdapterError(
                f'adapter_config.json: "moe_lora_layout": {entry!r} is not known. It is one of '
                f"{', '.join(ORDERS)}, each also with -standard or -transposed appended."
            )
        return base, transposed

    def written_by_megatron_bridge(self) -> bool:
        """Whether Megatron-Bridge's save_hf_adapter wrote the file.

        It does not say so, but it writes full parameter names and no version of PEFT.
        """
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


# Initialisations that change the base model's weights when PEFT loads the adapter:
# peft/tuners/lora/layer.py, `reset_lora_parameters`.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def _check_fields(raw: Mapping[str, Any]) -> None:
    """Refuse entries with which PEFT would compute something else than plain LoRA.

    Raises:
        AdapterError: names the entry.
    """
    kind = raw.get("peft_type", "LORA")
    if kind != "LORA":
        raise AdapterError(
            f'adapter_config.json: "peft_type" is {kind!r}, but only "LORA" can be served. '
            "Merge the adapter into the model with PEFT's merge_and_unload."
        )
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f'adapter_config.json: "init_lora_weights" is {start!r}: PEFT changes the base '
            "model's weights for it, and vLLM does not. Convert the adapter with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    for name, why in (
        ("layer_replication", "PEFT repeats layers of the model for it"),
        ("alora_invocation_tokens", "PEFT applies the adapter only after these tokens"),
        ("use_qalora", "PEFT pools the input of lora_A"),
        ("use_bdlora", "PEFT makes a factor block-diagonal"),
        ("kasa_config", "PEFT truncates the base model's weights"),
        ("monteclora_config", "PEFT samples the factors"),
        ("arrow_config", "PEFT chooses among other adapters for each token"),
    ):
        if raw.get(name):
            raise AdapterError(
                f'adapter_config.json: "{name}" is set: {why}, and vLLM does not. Train without '
                "it, or merge the adapter into the model."
            )


def nemo_config(folder: Path) -> dict[str, Any]:
    """NeMo AutoModel's own file beside adapter_config.json; {} if there is none.

    Its entry "paramwrapper_layout" says whether in and out of fused experts are swapped.

    Raises:
        AdapterError: the file is not a JSON object.
    """
    return _read(folder / "automodel_peft_config.json", optional=True)


def _read(file: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not file.is_file():
        return {}
    try:
        raw = json.loads(file.read_text())
    except FileNotFoundError:
        raise AdapterError(f"{file} is missing: is this the folder of a PEFT adapter?") from None
    except (OSError, RecursionError, ValueError) as error:
        bom = " Save the file without a byte order mark." if "BOM" in str(error) else ""
        raise AdapterError(f"{file} cannot be read: {error}.{bom}") from error
    if not isinstance(raw, dict):
        raise AdapterError(f"{file} is not a JSON object")
    return raw


def _pattern(raw: Mapping[str, Any], key: str, whole: bool = False) -> Mapping[str, Any]:
    pattern = raw.get(key) or {}
    if not isinstance(pattern, Mapping):
        raise AdapterError(f"adapter_config.json: {key} is {pattern!r}, not a JSON object")
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
    # As PEFT's get_pattern_key: a key must match a name's end, from a dot on. The first match wins.
    try:
        return [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in pattern.items()]
    except re.error as error:
        raise AdapterError(f"adapter_config.json: {what} has an invalid regex: {error}") from error


def _match(pattern: list[tuple[re.Pattern[str], float]], module: str) -> float | None:
    return next((value for key, value in pattern if key.match(module)), None)
