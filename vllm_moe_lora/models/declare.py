"""Gives a loaded model what its class does not declare about LoRA.

vLLM asks the model itself, not its class, when the LoRA manager is built: after the weights are
loaded. So it is set on the model. On the class it would change how the base model is quantised,
which reads ``packed_modules_mapping`` from there, and it would get into vLLM's cache of what
classes support, where it would outlive this package.
"""

from __future__ import annotations

import copy
from typing import Any

from .. import envs
from ..log import get_logger, warning_once
from ..patching import digest, source_text
from .hashes import HASHES
from .row import Row, ends_of, target_of
from .rows import ROWS

logger = get_logger(__name__)
ATTRIBUTE = "moe_lora_row"  # of the model: its row


def row_of(kind: type[Any]) -> Row | None:
    """The row for a class of vLLM; None if the table has none for its source.

    A source that the table does not know is taken with VLLM_MOE_LORA_ALLOW_UNVERIFIED=1 only.
    """
    target = target_of(kind)
    rows = [row for row in ROWS if target in row.targets]
    if not rows:
        return None
    try:
        found = digest(source_text(kind))
    except (OSError, TypeError) as error:
        found = f"none, {error}"
    for release in HASHES.get(target, {}).get(found, ()):
        for row in rows:
            if row.made_for(release):
                return row
    if envs.get("VLLM_MOE_LORA_ALLOW_UNVERIFIED"):
        warning_once(f"vllm-moe-lora: the source of {target} is not one that its row was made for")
        return rows[-1]
    if all(row.extends for row in rows):
        logger.debug("%s is used as vLLM declares it (hash %s)", target, found)
        return None
    warning_once(
        f"vllm-moe-lora: {kind.__name__} stays without LoRA as vLLM declares it: the source of "
        f"{target} is not one that was read (hash {found}). Cure: upgrade vllm-moe-lora, or set "
        "VLLM_MOE_LORA_ALLOW_UNVERIFIED=1 to try."
    )
    return None


def named(name: str) -> Row | None:
    """The row that declares LoRA for a class, or refuses it, of which only the name is known.

    This is the last one, if it has several. Its source is checked later, by `declare`.
    """
    rows = (row for row in reversed(ROWS) if name in row.names and not row.extends)
    return next(rows, None)


def declare(model: Any) -> Row | None:
    """Set on a loaded model what vLLM's LoRA manager reads and its class does not declare.

    Nothing is done for a class without a row. Where upstream declares LoRA, only the modules are
    added that its ``packed_modules_mapping`` lacks.

    Args:
        model: vLLM's model with its weights, before its modules are wrapped.

    Returns:
        The row, if there is one. It is also the model's attribute `ATTRIBUTE`.

    Raises:
        ValueError: no adapter can be served on this class; the text says why.
    """
    kind = type(model)
    row = row_of(kind)
    if row is None:
        return None
    if row.refused:
        raise ValueError(f"{kind.__name__} does not support LoRA: {row.refused}")
    known = _declares(kind)
    model.packed_modules_mapping = {
        **_packed(model, row),
        **{whole: list(parts) for whole, parts in _for_config(model, row.packed_if).items()},
        **{whole: list(parts) for whole, parts in row.packed.items()},
    }
    setattr(model, ATTRIBUTE, row)
    # A class that declares LoRA may have towers that upstream already keeps apart.
    if row.language_model and not hasattr(model, "get_mm_mapping"):
        model.get_mm_mapping = lambda: _mm_mapping(row)
    if known:
        logger.debug("%s: packed modules %s", kind.__name__, model.packed_modules_mapping)
        return row
    if not hasattr(model, "config") and row.config:
        model.config = _at(model, row.config)
    # vLLM's manager and ours read it; that of a part of a model may lack it.
    if not getattr(model.config, "architectures", None):
        model.config.architectures = [kind.__name__]
    for name, value in _members().items():
        if not hasattr(model, name):
            setattr(model, name, value)
    logger.info("LoRA on %s: vLLM's class does not declare it, vllm-moe-lora does", kind.__name__)
    return row


def _declares(kind: type[Any]) -> bool:
    """Whether a class of vLLM declares LoRA itself."""
    from vllm.model_executor.models.interfaces import SupportsLoRA

    return SupportsLoRA in kind.__mro__


def _members() -> dict[str, Any]:
    """What vLLM's interface `SupportsLoRA` asks for, in any release, with its defaults."""
    return {
        "supports_lora": True,
        "is_3d_moe_weight": False,
        "is_non_gated_moe": False,
        "embedding_modules": {},
        "embedding_padding_modules": [],  # up to 0.11
        "lora_skip_prefixes": [],
        "lora_manager": None,
    }


def _packed(model: Any, row: Row) -> dict[str, list[str]]:
    """The packed modules that the model's class names, or that of its language model."""
    own = getattr(model, "packed_modules_mapping", None)
    if not own and row.language_model:
        own = getattr(_at(model, row.language_model), "packed_modules_mapping", None)
    return copy.deepcopy(dict(own or {}))


def _for_config(model: Any, table: Any) -> dict[str, Any]:
    """What a table of `Row` by names of the text model's config says for this model."""
    found: dict[str, Any] = {}
    for name, entries in table.items():
        if getattr(_text_config(model), name, None):
            found.update(entries)
    return found


def _text_config(model: Any) -> Any:
    config = model.config
    get = getattr(config, "get_text_config", None)
    return get() if get is not None else config


def _at(model: Any, path: str) -> Any:
    for name in path.split("."):
        model = getattr(model, name)
    return model


def _mm_mapping(row: Row) -> Any:
    from vllm.model_executor.models.module_mapping import MultiModelKeys

    return MultiModelKeys.from_string_field(
        language_model=row.language_model,
        connector=row.connector or None,
        tower_model=list(row.tower) if isinstance(row.tower, tuple) else row.tower or None,
    )


def why_ignored(model: Any, module: str) -> str:
    """Why LoRA on a module would be ignored; "" if its row knows no reason, or if it has no row.

    Args:
        model: as in `declare`, which has been called for it.
        module: the module's name in the model, or what an adapter calls it.
    """
    row: Row | None = getattr(model, ATTRIBUTE, None)
    if row is None:
        return ""
    table = {**row.ignored, **_for_config(model, row.ignored_if)}
    if row.ignored_on:
        table |= row.ignored_on.get(_device_type(), {})
    if row.not_sharded and _tensor_parallel_size() > 1:
        table |= dict.fromkeys(
            row.not_sharded,
            "part of the merged module is replicated on the devices, and LoRA on it was not "
            "checked there. Serve with --tensor-parallel-size 1, or train without this module",
        )
    return next((table[end] for end in ends_of(module) if end in table), "")


def _device_type() -> str:
    """The name of vLLM's platform. ROCm's is "rocm", although torch calls its devices "cuda"."""
    from vllm.platforms import current_platform

    return "rocm" if current_platform.is_rocm() else str(current_platform.device_type)


def _tensor_parallel_size() -> int:
    from vllm.distributed import get_tensor_model_parallel_world_size

    return int(get_tensor_model_parallel_world_size())
