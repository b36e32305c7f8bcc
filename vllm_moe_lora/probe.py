"""Asks vLLM which backend it would choose for a model, and how much memory the model takes.

The commands `plan` and `doctor --model` use it. `ask` starts a fresh process (``python -m
vllm_moe_lora.probe JSON``), and `answer` runs there. It lets vLLM build the model on torch's "meta"
device, which has shapes but no memory, so no weight is read. For several devices it builds the
share of rank 0 in process groups whose other ranks do not exist, so one machine is enough.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

from vllm_moe_lora import envs, meta_model
from vllm_moe_lora.models.declare import declare
from vllm_moe_lora.plugin import status
from vllm_moe_lora.records import layer_shapes
from vllm_moe_lora.report import one_line
from vllm_moe_lora.targets import data_parallel, target_modules
from vllm_moe_lora.targets.supports_lora import takes_lora


@dataclass(frozen=True)
class Question:
    """What to ask about. The fields are settings of `vllm serve` with its names.

    Attributes:
        no_experts: no adapter that will be served has LoRA on routed experts.
    """

    model: str
    tensor_parallel_size: int = 1
    enable_expert_parallel: bool = False
    data_parallel_size: int = 1
    max_loras: int = 1
    max_lora_rank: int = 16
    dtype: str = "auto"
    lora_target_modules: tuple[str, ...] | None = None
    no_experts: bool = False
    trust_remote_code: bool = False
    quantization: str | None = None
    enable_mixed_moe_lora_format: bool = False
    enable_moe_shared_loras: bool = False


@dataclass
class Answer:
    """What vLLM would do with the model. Sizes are bytes on one device.

    Attributes:
        backends: "quantisation method, experts class" -> how many MoE layers use it.
        takes_lora: whether all experts that an adapter may target can apply LoRA.
        weights: the size of the model's weights.
        slot: the size of one LoRA slot (the buffers for one adapter), over all modules.
        slot_experts: the part of ``slot`` that belongs to routed experts.
        own_rank: whether a slot of routed experts takes only the rank of its adapter, and nothing
            if it is empty (our CPU experts). ``slot_experts`` is then for rank max_lora_rank.
        widened: bytes by which the experts' weights grow for such an adapter.
        pages: "on" if the factors of routed experts are in pages (our kernels on a GPU), "possible"
            if they would be with VLLM_MOE_LORA_KERNELS=ours, or "".
        memory: the device's total memory.
        error: why vLLM refuses the model, or "". If it is set, the other fields mean nothing.
        wrapped: the number of MoE layers whose routed experts get LoRA.
        layers: their distinct shapes: the fields of `records.LayerShape`, and "base", whether the
            experts are unquantised and have no bias.
        model_class: the model's class and how its row in models/rows.py is known; "" without one.
        refused: why adapters on routed experts are refused with these settings, or "".
        placement: with expert parallelism, for each rank the ids of its experts, as text; [] else.
        sent: bytes that a token and its router's choices have, in one MoE layer, where it is sent
            to the experts of other data-parallel ranks; 0 where it is not.
        sent_for_lora: bytes that are sent with it for adapters.
    """

    backends: dict[str, int]
    takes_lora: bool
    weights: int
    slot: int
    slot_experts: int
    memory: int
    error: str = ""
    wrapped: int = 0
    layers: list[dict[str, Any]] = field(default_factory=list)
    model_class: str = ""
    refused: str = ""
    placement: list[str] = field(default_factory=list)
    sent: int = 0
    sent_for_lora: int = 0
    own_rank: bool = False
    widened: int = 0
    pages: str = ""


def ask(question: Question, timeout: float = 600) -> Answer:
    """Answer ``question`` in a process of its own.

    Args:
        question: the model and its settings.
        timeout: seconds to wait.

    Returns:
        The answer. If the process fails or takes too long, `Answer.error` says so.
    """
    command = [sys.executable, "-m", "vllm_moe_lora.probe", json.dumps(asdict(question))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Answer({}, False, 0, 0, 0, 0, f"vLLM did not build the model within {timeout:.0f} s")
    line = next((text for text in done.stdout.splitlines() if text.startswith("@")), None)
    if line is not None:
        return Answer(**json.loads(line[1:]))
    last = (done.stderr.strip().splitlines() or ["the process printed nothing"])[-1]
    return Answer({}, False, 0, 0, 0, 0, last.removeprefix("[rank0]: "))


def answer(question: Question) -> Answer:
    """Answer ``question`` in this process, which must be a fresh one.

    It changes vLLM's and torch's global state. Whatever vLLM raises for this model is raised.
    """
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    config = config_of(question)
    with meta_model.built(config) as model:
        row = declare(model) if status().get("model-classes") == "on" else None
        weights = sum(_tensor_bytes(model))
        experts = [_backend_of(m) for m in model.modules() if _is_experts(m)]
        dense_slots, experts_slots, moe_layers = _slot_bytes(model, config)
        layers = [m for m in model.modules() if hasattr(m, "moe_config")]
        spread = _spread(layers[0]) if layers else {}
    names = Counter(name for name, _ in experts)
    wrapped = len(moe_layers)
    takes = wrapped == 0 or all(takes for _, takes in experts)
    memory = current_platform.get_device_total_memory()
    slot = (dense_slots + experts_slots) // question.max_loras
    slot_experts = experts_slots // question.max_loras
    if not wrapped:
        spread |= {"refused": "", "sent_for_lora": 0}
    sizes = (weights, slot, slot_experts, memory)
    shapes = layer_shapes(moe_layers, config)
    found = Answer(dict(names), takes, *sizes, wrapped=wrapped, layers=shapes, **spread)
    found.model_class = f"{row.name} ({row.known})" if row is not None else ""
    if wrapped and current_platform.is_cpu() and status().get("cpu-experts") == "on":
        from vllm_moe_lora.layers.cpu.slots import widened

        found.own_rank, found.widened = True, widened(moe_layers, config)
    if wrapped and status().get("moe-kernels") == "on" and question.max_lora_rank % 8 == 0:
        kernels = envs.get("VLLM_MOE_LORA_KERNELS")
        found.pages = "on" if kernels in ("ours", "tail") else "possible"
    return found


def moe_layers_of(model: Any, config: Any) -> list[tuple[Any, int]]:
    """Return each layer whose routed experts get LoRA, with the number of its packed modules."""
    return _slot_bytes(model, config)[2]


def config_of(question: Question) -> Any:
    """Return vLLM's config for these settings."""
    from vllm.engine.arg_utils import EngineArgs

    more: dict[str, Any] = {}
    if question.lora_target_modules is not None:
        more["lora_target_modules"] = list(question.lora_target_modules)
    if question.no_experts:
        more["additional_config"] = {target_modules.NO_EXPERTS_KEY: True}
    # Left out where they have vLLM's default: older releases do not know all of them.
    for name in ("quantization", "enable_mixed_moe_lora_format", "enable_moe_shared_loras"):
        if value := getattr(question, name):
            more[name] = value
    config = EngineArgs(
        **more,
        model=question.model,
        skip_tokenizer_init=True,
        load_format="dummy",
        enforce_eager=True,
        enable_lora=True,
        max_loras=question.max_loras,
        max_lora_rank=question.max_lora_rank,
        dtype=question.dtype,
        trust_remote_code=question.trust_remote_code,
    ).create_engine_config()
    # Set these only now: EngineArgs would compare them with the number of devices here.
    config.parallel_config.tensor_parallel_size = question.tensor_parallel_size
    config.parallel_config.world_size = question.tensor_parallel_size
    config.parallel_config.enable_expert_parallel = question.enable_expert_parallel
    config.parallel_config.data_parallel_size = question.data_parallel_size
    return config


def _spread(layer: Any) -> dict[str, Any]:
    """How a MoE layer is spread over all ranks: the last four fields of `Answer`."""
    moe = layer.moe_config
    parallel = moe.moe_parallel_config
    refused = data_parallel.refusal("", SimpleNamespace(base_layer=layer)).removeprefix(": ")
    placement = []
    if parallel.use_ep:
        placement = [_experts_of(rank, layer) for rank in range(parallel.ep_size)]
    sent = 0
    if parallel.dp_size > 1:
        # topk_weights in fp32, topk_ids in int32; the adapter's slot in int32.
        sent = moe.hidden_dim * moe.in_dtype.itemsize + moe.experts_per_token * (4 + 4)
    return {
        "refused": refused,
        "placement": placement,
        "sent": sent,
        "sent_for_lora": 4 if sent else 0,
    }


def _experts_of(rank: int, layer: Any) -> str:
    """The ids of the experts that a rank of expert parallelism holds: "0 to 31", or a list."""
    import torch
    from vllm.model_executor.layers.fused_moe import expert_map_manager

    parallel = layer.moe_config.moe_parallel_config
    routed = getattr(layer, "routed_experts", layer)
    with torch.device("cpu"):
        _, expert_map, _ = expert_map_manager.determine_expert_map(
            parallel.ep_size,
            rank,
            layer.moe_config.num_experts,
            routed.expert_map_manager.placement_strategy,
        )
    ids = (expert_map >= 0).nonzero().flatten().tolist()
    if len(ids) > 1 and ids == list(range(ids[0], ids[-1] + 1)):
        return f"{ids[0]} to {ids[-1]}"
    return ", ".join(map(str, ids))


def _is_experts(module: Any) -> bool:
    """Return whether a module holds the routed experts of a MoE layer."""
    return hasattr(module, "moe_config") and hasattr(module, "quant_method")


def _backend_of(module: Any) -> tuple[str, bool]:
    """Return "quantisation method, experts class", and whether these experts can apply LoRA."""
    method = module.quant_method
    experts = getattr(method, "experts_cls", None)
    name = type(method).__name__
    backend = getattr(getattr(method, "unquantized_backend", None), "name", "")
    if experts is None and backend == "CPU":  # up to 0.27: layers/cpu/torch_experts.py
        return f"{name}, CPUFusedMOE", status().get("cpu-experts") == "on"
    if experts is None:
        return f"{name}, without an experts class", False
    return f"{name}, {experts.__name__}", takes_lora(experts)


def _tensor_bytes(model: Any) -> Iterator[int]:
    """Yield the size of every parameter and buffer; one that has several names only once."""
    seen = set()
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor.nbytes


def _slot_bytes(model: Any, config: Any) -> tuple[int, int, list[tuple[Any, int]]]:
    """Return the bytes of all LoRA slots, and which MoE layers have some.

    Returns:
        Bytes for all modules but routed experts, bytes for routed experts, and each layer whose
        routed experts get LoRA, with the number of its packed modules.
    """
    import torch
    from vllm.lora import model_manager

    from_layer, found = model_manager.from_layer, []

    def collect_experts(layer: Any, slots: int, lora: Any, packed: list[str], *args: Any) -> Any:
        inner = getattr(layer, "routed_experts", None)
        if inner is None and not _is_experts(layer):
            return from_layer(layer, slots, lora, packed, *args)
        found.append((inner or layer, len(packed)))
        # Not wrapped: the wrapper of routed experts needs kernels, and these need weights.
        return layer

    model_manager.from_layer = collect_experts
    try:
        manager = model_manager.LoRAModelManager(
            model=model,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            vocab_size=config.model_config.get_vocab_size(),
            lora_config=config.lora_config,
            device=torch.device("meta"),
            vllm_config=config,
        )
    finally:
        model_manager.from_layer = from_layer
    dense = 0
    for module in manager.modules.values():
        for value in vars(module).values():
            stacks = value if isinstance(value, tuple | list) else (value,)
            dense += sum(one.nbytes for one in stacks if isinstance(one, torch.Tensor))
    rank, width = config.lora_config.max_lora_rank, config.lora_config.lora_dtype.itemsize
    experts = 0
    for layer, packed in found:
        moe = layer.moe_config
        inner, slices = moe.intermediate_size_per_partition, 2 if moe.is_act_and_mul else 1
        # w13 has one lora_a if the checkpoint fuses gate and up, else one for each of them.
        rows = min(packed, slices) * moe.hidden_dim + slices * inner + inner + moe.hidden_dim
        experts += config.lora_config.max_loras * moe.num_local_experts * rank * rows * width
    return dense, experts, found


def main() -> None:
    """Answer the question in ``sys.argv[1]`` (JSON) and print "@" and the answer (JSON)."""
    question = Question(**json.loads(sys.argv[1]))
    try:
        found = answer(question)
    except Exception as error:  # the error is the answer
        found = Answer({}, False, 0, 0, 0, 0, one_line(error)[:600])
    print("@" + json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
