"""Records of `vllm-moe-lora tune`: which kernels were fastest here, by layer shape and batch size.

One JSON file holds what was measured for one layer shape on one device. It counts only where the
device, the driver, Triton, vLLM and the source of our kernels are the same; otherwise `find` says
what differs. This module needs neither torch nor vLLM.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from . import envs

VERSION = 2  # of the file's format; files of other versions are not read
PACKAGE = Path(__file__).parent
SHIPPED = PACKAGE / "kernels" / "triton" / "measured"  # records that come with the package
KINDS = ("upstream", "ours", "tail")
UNQUANTISED = "TritonExperts, UnquantizedFusedMoEMethod"  # `LayerShape.path` of most
# What a quantisation method, or its config, may say of the weights' format.
FORMAT = (
    *("num_bits", "weight_bits", "group_size", "weight_block_size", "strategy", "actorder"),
    *("symmetric", "is_sym", "has_zp", "zero_point", "desc_act"),
)


class RecordError(ValueError):
    """A file is no record; the text names the file and what is wrong with it."""


@dataclass(frozen=True)
class Conditions:
    """Where a record was made. All fields must be the same where it is used.

    Attributes:
        device: the GPU's name, as torch gives it.
        arch: its architecture: "sm_90", "gfx942".
        driver: the major version of its driver.
        triton: the version of Triton.
        vllm: the version of vLLM.
        kernels: `kernels_hash` of our kernels.
    """

    device: str
    arch: str
    driver: str
    triton: str
    vllm: str
    kernels: str


@dataclass(frozen=True)
class LayerShape:
    """The routed experts of one layer on one device, with vLLM's LoRA buffers.

    Attributes:
        experts: experts on this device.
        top_k: experts per token.
        hidden: columns of w13, rows of w2.
        inner: columns of w2, on this device.
        slices: lora_a of w13: 2 for gate and up, 1 if they are fused or there is no gate.
        fused: rows of w13 per column of w2: 2 with a gate, 1 without.
        slots: --max-loras.
        rank: --max-lora-rank, as the buffers have it.
        dtype: of the factors: "bfloat16", "float16" or "float32".
        absent: experts of the model that are on other devices (expert parallelism).
        shared: whether all experts share lora_a of w13 and lora_b of w2.
        path: which of vLLM's experts compute the base GEMMs, and on what weights, see `path_of`.
    """

    experts: int
    top_k: int
    hidden: int
    inner: int
    slices: int
    fused: int
    slots: int
    rank: int
    dtype: str
    absent: int = 0
    shared: bool = False
    path: str = UNQUANTISED

    @property
    def total(self) -> int:
        """Experts of the model."""
        return self.experts + self.absent

    def __str__(self) -> str:
        of = f" of {self.total}" if self.absent else ""
        shared = ", shared factors" if self.shared else ""
        return (
            f"{self.experts}{of} experts, top {self.top_k}, hidden {self.hidden}, inner "
            f"{self.inner}, w13 in {self.slices}, {self.slots} slots of rank {self.rank}{shared}, "
            f"{self.dtype}, {self.path}"
        )


@dataclass(frozen=True)
class Choice:
    """The winner for batches of up to ``tokens`` tokens.

    Attributes:
        tokens: the size of the batch that was measured.
        winner: one of `KINDS`.
        us: kind -> (median, lowest, highest) microseconds of all that LoRA takes in one layer.
    """

    tokens: int
    winner: str
    us: dict[str, tuple[float, float, float]]


@dataclass(frozen=True)
class Record:
    """What was measured for one layer shape.

    Attributes:
        conditions: where.
        shape: of the layer.
        choices: by batch size, ascending.
        tiles: the tile sizes of our kernels that were measured, as `config.Tiles` has its fields;
            empty for those of config.py.
        refused: kind -> the first wrong number of that kind, or why it cannot serve the layer.
        base: whether the times contain the base experts' GEMMs (they do where ``tail`` ran).
    """

    conditions: Conditions
    shape: LayerShape
    choices: tuple[Choice, ...]
    tiles: tuple[tuple[int, ...], ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    base: bool = False

    def winner(self, tokens: int) -> str:
        """Return which kernels to run for a batch of ``tokens`` tokens.

        It is the winner of the smallest measured batch that is not smaller. Beyond all measured
        batches it is the winner of the largest one.
        """
        for choice in self.choices:
            if tokens <= choice.tokens:
                return choice.winner
        return self.choices[-1].winner

    @property
    def kinds(self) -> set[str]:
        """All kernels that win somewhere."""
        return {choice.winner for choice in self.choices}


def folder() -> Path:
    """Return where records are: VLLM_MOE_LORA_TUNED, else a folder under vLLM's config root."""
    named = str(envs.get("VLLM_MOE_LORA_TUNED"))
    if named:
        return Path(named)
    base = os.environ.get("XDG_CONFIG_HOME", str(Path.home() / ".config"))
    return Path(os.environ.get("VLLM_CONFIG_ROOT", f"{base}/vllm")).expanduser() / "moe_lora_tuned"


def file_name(conditions: Conditions, shape: LayerShape) -> str:
    """Return the name of a record's file: what it is about, and a hash of all it depends on."""
    words = json.dumps([VERSION, asdict(conditions), asdict(shape)], sort_keys=True)
    device = "".join(letter if letter.isalnum() else "_" for letter in conditions.device)
    what = f"E{shape.experts}_k{shape.top_k}_{shape.hidden}x{shape.inner}_r{shape.rank}"
    return f"{device}_{what}_s{shape.slots}_{hashlib.sha256(words.encode()).hexdigest()[:12]}.json"


def write(record: Record, where: Path | None = None) -> Path:
    """Write a record, whole or not at all.

    Args:
        record: what was measured.
        where: the folder; None for `folder()`. It is created.

    Returns:
        The file. An older record of the same conditions and shape is replaced.
    """
    where = folder() if where is None else where
    where.mkdir(parents=True, exist_ok=True)
    path = where / file_name(record.conditions, record.shape)
    text = json.dumps({"version": VERSION, **asdict(record)}, indent=1)
    part = path.with_suffix(f".{os.getpid()}.part")  # `files` does not see it
    try:
        part.write_text(text + "\n")
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path


def read(path: Path) -> Record:
    """Read one record.

    Raises:
        RecordError: the file is no record of this version; nothing of it is used.
    """
    try:
        found = json.loads(path.read_text())
        version = found.pop("version")
        if version != VERSION:
            raise RecordError(f"{path} has format {version}, expected {VERSION}; tune again")
        choices = tuple(
            Choice(
                int(one["tokens"]),
                str(one["winner"]),
                {kind: _three(times) for kind, times in one["us"].items()},
            )
            for one in found["choices"]
        )
        tokens = [one.tokens for one in choices]
        if not choices or tokens != sorted(set(tokens)) or tokens[0] < 1:
            raise ValueError("the batch sizes are not ascending")
        if wrong := [one.winner for one in choices if one.winner not in KINDS]:
            raise ValueError(f"no kernels are called {wrong[0]!r}")
        if wrong := [one.winner for one in choices if one.winner in found["refused"]]:
            raise ValueError(f"{wrong[0]} wins and is refused")
        return Record(
            Conditions(**_typed(Conditions, found["conditions"])),
            LayerShape(**_typed(LayerShape, found["shape"])),
            choices,
            tuple(tuple(int(size) for size in tiles) for tiles in found["tiles"]),
            {str(kind): str(why) for kind, why in found["refused"].items()},
            bool(found["base"]),
        )
    except RecordError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise RecordError(f"{path} is no record of `vllm-moe-lora tune` ({why})") from error


def _three(times: Any) -> tuple[float, float, float]:
    median, low, high = (float(one) for one in times)
    return median, low, high


def _typed(kind: type, found: dict[str, Any]) -> dict[str, Any]:
    """Return ``found`` if it has the fields of a dataclass, with their types.

    Raises:
        ValueError: it does not.
    """
    names = {one.name: one.type for one in fields(kind)}
    if set(found) != set(names):
        raise ValueError(f"{kind.__name__} has the fields {sorted(found)}")
    for name, value in found.items():
        if type(value).__name__ != names[name]:
            raise ValueError(f"{name} is {value!r}, expected {names[name]}")
    return found


def files() -> Iterator[Path]:
    """Yield the files of all records: the user's, then the shipped ones."""
    for where in (folder(), SHIPPED):
        if where.is_dir():
            yield from sorted(where.glob("*.json"))


def differs(record: Record, here: Conditions) -> str:
    """Return what is not as it was when the record was made, or "" if nothing is."""
    then, now = asdict(record.conditions), asdict(here)
    what = [f"{name} was {then[name]}, is {now[name]}" for name in then if then[name] != now[name]]
    return ", ".join(what)


def find(here: Conditions, shape: LayerShape) -> tuple[Record | None, str]:
    """Find the record of a layer shape.

    Args:
        here: the conditions of this process.
        shape: of the layer.

    Returns:
        The record and "", or None and why there is none that counts.
    """
    why = f"there is no record for {shape} in {folder()}"
    for path in files():
        try:
            record = read(path)
        except RecordError as error:
            why = str(error)
            continue
        if record.shape != shape:
            continue
        if not (different := differs(record, here)):
            return record, ""
        why = f"the record {path.name} is not of this environment: {different}"
    return None, why


def digest() -> str:
    """Return a hash of all records, as a part of the key of compiled artefacts."""
    found = hashlib.sha256()
    for path in files():
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


@functools.cache
def kernels_hash() -> str:
    """Return a hash of the source of our Triton kernels and of what launches them."""
    found = hashlib.sha256()
    for path in sorted((PACKAGE / "kernels" / "triton").glob("*.py")):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def path_of(layer: Any) -> str:
    """Return `LayerShape.path`: the experts' class, the quantisation method's, and its format.

    Args:
        layer: vLLM's `FusedMoEWithLoRA`; or its `RoutedExperts`, of which only the parameters need
            to exist.
    """
    method = getattr(layer.quant_method, "old_quant_method", layer.quant_method)
    kernel = getattr(layer, "_moe_kernel", None)
    experts = getattr(method, "experts_cls", None) if kernel is None else type(kernel.fused_experts)
    words = [getattr(experts, "__name__", "no experts class"), type(method).__name__]
    for name in FORMAT:
        config = getattr(method, "quant_config", None)
        value = getattr(method, name, getattr(config, name, None))
        if value is not None:
            words.append(f"{name} {getattr(value, 'value', value)}")
    if getattr(layer.moe_config, "has_bias", False):
        words.append("bias")
    return ", ".join(words)


def layer_shapes(layers: list[tuple[Any, int]], config: Any) -> list[dict[str, Any]]:
    """Return the distinct shapes of MoE layers, see `probe.Answer.layers`.

    Args:
        layers: each MoE layer with the number of its packed modules.
        config: vLLM's.
    """
    found: list[dict[str, Any]] = []
    for layer, packed in layers:
        shape = asdict(layer_shape(layer, packed, config)) | {"base": is_plain(layer)}
        if shape not in found:
            found.append(shape)
    return found


def layer_shape(layer: Any, packed: int, config: Any) -> LayerShape:
    """Return the shape that a MoE layer will have as `FusedMoEWithLoRA`.

    Args:
        layer: its `RoutedExperts`; only the parameters need to exist.
        packed: the number of its packed modules.
        config: vLLM's.
    """
    lora, moe = config.lora_config, layer.moe_config
    fused = 2 if moe.is_act_and_mul else 1
    return LayerShape(
        experts=moe.num_local_experts,
        top_k=moe.experts_per_token,
        hidden=moe.hidden_dim,
        inner=moe.intermediate_size_per_partition,
        slices=min(packed, fused),
        fused=fused,
        slots=lora.max_loras,
        rank=lora.max_lora_rank,
        dtype=str(lora.lora_dtype).removeprefix("torch."),
        absent=moe.num_experts - moe.num_local_experts,
        shared=bool(getattr(lora, "enable_moe_shared_loras", False)),
        path=path_of(layer),
    )


def is_plain(layer: Any) -> bool:
    """Return whether a MoE layer's experts are unquantised and have no bias."""
    named = type(layer.quant_method).__name__.startswith("Unquantized")
    return named and not getattr(layer.moe_config, "has_bias", False)
