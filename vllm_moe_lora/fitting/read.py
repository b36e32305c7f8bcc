"""Tensors of an adapter -> vLLM's LoRAModel, with the routed experts set apart."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..adapters.config import Config
from ..adapters.errors import AdapterError, about
from ..adapters.group import group, refuse_what_is_not_lora
from ..adapters.names import parse
from .fit import Pending
from .memory import NoCollection


def read(
    cls: type[Any],
    refused: ValueError | None,
    *,
    lora_model_id: int,
    tensors: dict[str, Any],
    peft_helper: Any,
    **more: Any,
) -> Any:
    """A LoRAModel whose routed experts wait for their model (`store.fit`).

    Args:
        cls: vLLM's `LoRAModel`; its `from_lora_tensors` gets all other modules.
        refused: why upstream did not take the names; raised where the model has no experts.
        lora_model_id: of the adapter.
        tensors: by name, on the CPU. They are neither changed nor kept.
        peft_helper: vLLM's `PEFTHelper` of the adapter.
        more: what else `from_lora_tensors` takes.

    Raises:
        AdapterError: a tensor that is no LoRA factor, or has no counterpart.
    """
    with NoCollection(), about(lora_model_id):
        return _read(cls, refused, lora_model_id, tensors, peft_helper, more)


def _read(
    cls: type[Any],
    refused: ValueError | None,
    lora_model_id: int,
    tensors: dict[str, Any],
    peft_helper: Any,
    more: dict[str, Any],
) -> Any:
    raw = getattr(peft_helper, "moe_lora_raw", None) or asdict(peft_helper)
    if skipped := more.get("skip_prefixes"):  # 0.16 and later
        tensors = {k: t for k, t in tensors.items() if not cls._should_skip_module(k, skipped)}
    try:
        config = Config.from_dict(raw, getattr(peft_helper, "moe_lora_markers", None))
        found = group(tensors)
        heads = tuple(f".{name}" for name in getattr(peft_helper, "modules_to_save", None) or ())
        saved = {k: t for k, t in found.full.items() if k.rpartition(".")[0].endswith(heads)}
        found.full = {k: t for k, t in found.full.items() if k not in saved}
        refuse_what_is_not_lora(found)
    except AdapterError as error:
        if refused is None:
            raise
        raise refused from error
    # Copies: upstream scales them in place, and these are the caller's, or views of a file.
    dense = {key: tensor.clone() for key, tensor in {**found.dense, **saved}.items()}
    peft_helper.moe_lora_ready = True  # for the next line, which ends in the hook above
    try:
        lora = cls.from_lora_tensors(lora_model_id, dense, peft_helper, **more)
    finally:
        peft_helper.moe_lora_ready = False
    mapper = more.get("weights_mapper")
    if not hasattr(peft_helper, "get_rank_and_scaling"):  # up to 0.31: no patterns
        _scale(lora, found.dense, config, mapper, peft_helper)
    mapped = {p: mapper._map_name(p) if mapper is not None else p for p in found.experts}
    lora.moe_lora = Pending(found.experts, mapped, config, NoCollection(), refused)
    return lora


def _scale(lora: Any, dense: dict[str, Any], config: Config, mapper: Any, helper: Any) -> None:
    """Each tensor's own scale, where upstream gave all of them the adapter's."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    given = helper.vllm_lora_scaling_factor
    for key in dense:
        word = parse(key)
        if word.side != "B":
            continue
        weights = lora.loras[parse_fine_tuned_lora_name(key, mapper)[0]]
        right, _ = config.scale(word.module, weights.lora_b.shape[1])
        if weights.scaling == given != 1:
            weights.scaling = right
        elif right != given:
            weights.lora_b = weights.lora_b * (right / given)  # 0.11 has folded it in already
