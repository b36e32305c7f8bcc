"""Turns an adapter's tensors into vLLM's LoRAModel.

vLLM's own code makes the entries of dense modules. The tensors of routed experts are kept aside in
`fit.PendingExperts`, because how to read them depends on the model, which is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from typing import Any

from ..adapters.config import Config
from ..adapters.errors import AdapterError, prefixed
from ..adapters.folder import check_dtype
from ..adapters.group import Grouped, group, refuse_what_is_not_lora
from ..adapters.names import parse
from .again import once
from .fit import PendingExperts
from .memory import PausedGC

_all_adapters: ContextVar[bool] = ContextVar("moe_lora_all_adapters", default=False)


@contextmanager
def all_adapters() -> Iterator[None]:
    """Inside the block, adapters without LoRA on routed experts are read here, too.

    vLLM's own reader does not know which model an adapter is for, and dense models keep it.
    """
    token = _all_adapters.set(True)
    try:
        yield
    finally:
        _all_adapters.reset(token)


def reads_all() -> bool:
    """Whether this is inside `all_adapters`."""
    return _all_adapters.get()


def read(
    cls: type[Any],
    refused: ValueError | None,
    *,
    lora_model_id: int,
    tensors: dict[str, Any],
    peft_helper: Any,
    **more: Any,
) -> Any:
    """Make a LoRAModel whose routed experts are pending until `fit.fit`.

    Args:
        cls: vLLM's `LoRAModel`. Its `from_lora_tensors` reads all other modules.
        refused: the error with which vLLM refused the adapter's names, if it did. It is raised
            later if the model turns out to have no routed experts.
        lora_model_id: the adapter's id.
        tensors: all tensors by name, on the CPU. They are not changed. Those of routed experts are
            kept until `fit.fit`, all others are copied.
        peft_helper: vLLM's `PEFTHelper` of the adapter.
        more: the other arguments of `from_lora_tensors`.

    Raises:
        AdapterError: a tensor is not a LoRA factor, or lora_A is there without lora_B or the
            reverse.
    """
    with PausedGC(), prefixed(lora_model_id):
        return _read(cls, refused, lora_model_id, tensors, peft_helper, more)


def _read(
    cls: type[Any],
    refused: ValueError | None,
    lora_model_id: int,
    tensors: dict[str, Any],
    peft_helper: Any,
    more: dict[str, Any],
) -> Any:
    try:
        found, saved, config = _checked(cls, tensors, peft_helper, more.get("skip_prefixes"))
    except AdapterError as error:
        if refused is None:
            raise
        raise refused from error
    # Copies, because vLLM scales them in place, and these are the caller's or views of a file.
    dense = {key: tensor.clone() for key, tensor in {**found.dense, **saved}.items()}
    # The next call reaches our hook, which sees this and lets vLLM's own code read the tensors.
    peft_helper.moe_lora_ready = True
    try:
        lora = cls.from_lora_tensors(lora_model_id, dense, peft_helper, **more)
    finally:
        peft_helper.moe_lora_ready = False
    mapper = more.get("weights_mapper")
    if not hasattr(peft_helper, "get_rank_and_scaling"):  # vLLM up to 0.31 ignores patterns
        _apply_patterns(lora, found.dense, config, mapper, peft_helper)
    mapped = {p: mapper._map_name(p) if mapper is not None else p for p in found.experts}
    lora.moe_lora = PendingExperts(found.experts, mapped, config, PausedGC(), refused, tensors)
    return lora


def objection(
    cls: type[Any], tensors: dict[str, Any], peft_helper: Any, skipped: Any
) -> AdapterError | None:
    """What `read` would refuse an adapter for that vLLM has read from memory; None if nothing."""
    try:
        _checked(cls, tensors, peft_helper, skipped)
    except AdapterError as error:
        return error
    return None


def _checked(
    cls: type[Any], tensors: dict[str, Any], peft_helper: Any, skipped: Any
) -> tuple[Grouped, dict[str, Any], Config]:
    """Group the tensors of an adapter, and refuse what can be refused without the model.

    Args:
        skipped: the model's ``skip_prefixes``, or None (before vLLM 0.16).

    Returns:
        The groups, the tensors that vLLM reads for ``modules_to_save``, and the config.
    """
    return once(
        tensors,
        ("checked", cls, tuple(skipped or ())),
        lambda: _check(cls, tensors, peft_helper, skipped),
    )


def _check(
    cls: type[Any], tensors: dict[str, Any], peft_helper: Any, skipped: Any
) -> tuple[Grouped, dict[str, Any], Config]:
    raw = getattr(peft_helper, "moe_lora_raw", None) or asdict(peft_helper)
    if skipped:
        tensors = {k: t for k, t in tensors.items() if not cls._should_skip_module(k, skipped)}
    config = Config.from_dict(raw, getattr(peft_helper, "moe_lora_nemo", None))
    for key, tensor in tensors.items():
        check_dtype("the adapter", key, tensor)
    found = group(tensors)
    heads = tuple(f".{name}" for name in getattr(peft_helper, "modules_to_save", None) or ())
    saved = {k: t for k, t in found.full.items() if k.rpartition(".")[0].endswith(heads)}
    found.full = {k: t for k, t in found.full.items() if k not in saved}
    refuse_what_is_not_lora(found)
    if not found.dense and not found.experts and not saved:
        raise AdapterError("it has no tensors. Nothing was loaded.")
    _check_ranks(found.dense, config)
    return found, saved, config


def _check_ranks(dense: dict[str, Any], config: Config) -> None:
    """Refuse a module whose rank is not the one that adapter_config.json gives it.

    PEFT does not load such an adapter, and vLLM would scale it by the config's rank. Routed experts
    are scaled by their tensors' rank, see `Config.scale`.
    """
    for key, tensor in dense.items():
        name = parse(key)
        if name.side != "A" or tensor.ndim != 2 or not tensor.shape[0]:
            continue
        _, rank = config.scale(name.module, tensor.shape[0])
        if rank != tensor.shape[0]:
            raise AdapterError(
                f"{key} has rank {tensor.shape[0]}, but adapter_config.json gives it rank {rank}. "
                'Correct "r", or add the module to "rank_pattern".'
            )


def _apply_patterns(
    lora: Any, dense: dict[str, Any], config: Config, mapper: Any, helper: Any
) -> None:
    """Give each dense module its own scale, where vLLM gave all modules the same one."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    given = helper.vllm_lora_scaling_factor
    for key in dense:
        name = parse(key)
        if name.side != "B":
            continue
        weights = lora.loras[parse_fine_tuned_lora_name(key, mapper)[0]]
        right, _ = config.scale(name.module, weights.lora_b.shape[1])
        if weights.scaling == given != 1:
            weights.scaling = right
        elif right != given:
            weights.lora_b = weights.lora_b * (right / given)  # vLLM 0.11 has multiplied it in
