"""What vLLM will do with a model, asked of vLLM itself: backend, and bytes on one device.

Runs in a fresh process (``python -m vllm_moe_lora.probe JSON``): the model is built without memory
(device "meta") as rank 0 of a group of which the other ranks do not exist, so that no weight is
read and no device is needed for each rank.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from vllm_moe_lora.targets import target_modules
from vllm_moe_lora.targets.supports_lora import takes_lora


@dataclass(frozen=True)
class Question:
    """Settings as `vllm serve` names them."""

    model: str
    tensor_parallel_size: int = 1
    enable_expert_parallel: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16
    dtype: str = "auto"
    lora_target_modules: tuple[str, ...] | None = None
    no_experts: bool = False  # none of the adapters it will be served with has LoRA on them


@dataclass
class Answer:
    """
    Attributes:
        backends: "quantisation method, experts class" -> number of MoE layers.
        takes_lora: whether all of these that an adapter may target apply LoRA on routed experts.
        weights: bytes of the model on one device.
        slot: bytes of one LoRA slot on one device, all modules.
        slot_experts: the routed experts' share of it.
        memory: bytes of a device in all.
        error: why vLLM refuses the model; then nothing else is known.
        wrapped: layers of routed experts that get LoRA.
    """

    backends: dict[str, int]
    takes_lora: bool
    weights: int
    slot: int
    slot_experts: int
    memory: int
    error: str = ""
    wrapped: int = 0


def ask(question: Question, timeout: float = 600) -> Answer:
    """Run the probe in a process of its own; its trouble is in `Answer.error`."""
    command = [sys.executable, "-m", "vllm_moe_lora.probe", json.dumps(asdict(question))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Answer({}, False, 0, 0, 0, 0, f"vLLM gave no answer in {timeout:.0f} s")
    line = next((text for text in done.stdout.splitlines() if text.startswith("@")), None)
    if line is not None:
        return Answer(**json.loads(line[1:]))
    last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    return Answer({}, False, 0, 0, 0, 0, last.removeprefix("[rank0]: "))


def answer(question: Question) -> Answer:
    """In the fresh process. Raises whatever vLLM raises for this model."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    config = _config(question)
    with set_current_vllm_config(config):
        _alone(question.tensor_parallel_size)
        _maps_have_numbers()
        default = torch.get_default_dtype()
        torch.set_default_dtype(config.model_config.dtype)
        try:
            with torch.device("meta"):
                model = initialize_model(vllm_config=config)
            weights = sum(_bytes(model))
            experts = [_experts(m) for m in model.modules() if _is_experts(m)]
            slots, stacks, wrapped = _lora(model, config)
        finally:
            torch.set_default_dtype(default)
    names = Counter(name for name, _ in experts)
    takes = wrapped == 0 or all(takes for _, takes in experts)
    memory = current_platform.get_device_total_memory()
    number = question.max_loras
    slot = (slots + stacks) // number
    return Answer(dict(names), takes, weights, slot, stacks // number, memory, wrapped=wrapped)


def _config(question: Question) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    more: dict[str, Any] = {}
    if question.lora_target_modules is not None:
        more["lora_target_modules"] = list(question.lora_target_modules)
    if question.no_experts:
        more["additional_config"] = {target_modules.KEY: True}
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
    ).create_engine_config()
    # Set afterwards: vLLM compares them with the devices of this machine.
    config.parallel_config.tensor_parallel_size = question.tensor_parallel_size
    config.parallel_config.world_size = question.tensor_parallel_size
    config.parallel_config.enable_expert_parallel = question.enable_expert_parallel
    return config


def _alone(size: int) -> None:
    """vLLM's groups of ``size`` ranks, of which only rank 0 exists and none ever speaks."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from vllm.distributed import parallel_state

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    new_group, coordinator = dist.new_group, parallel_state.GroupCoordinator.__init__

    def fake_group(ranks: Any = None, backend: Any = None, **more: Any) -> Any:
        return new_group(ranks, backend="fake")

    def silent(self: Any, *args: Any, **more: Any) -> None:
        silence = {"use_device_communicator": False, "use_message_queue_broadcaster": False}
        coordinator(self, *args, **{**more, **silence})

    dist.new_group = fake_group
    parallel_state.GroupCoordinator.__init__ = silent
    parallel_state.in_the_same_node_as = lambda *args, **more: [True] * size
    parallel_state.init_distributed_environment(
        world_size=size, rank=0, local_rank=0, distributed_init_method="env://", backend="gloo"
    )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)


def _maps_have_numbers() -> None:
    """Which experts are here is read from a tensor while the model is built."""
    import torch
    from vllm.model_executor.layers.fused_moe import expert_map_manager

    made = expert_map_manager.ExpertMapManager.__init__

    def on_cpu(self: Any, *args: Any, **more: Any) -> None:
        with torch.device("cpu"):
            made(self, *args, **more)

    expert_map_manager.ExpertMapManager.__init__ = on_cpu


def _is_experts(module: Any) -> bool:
    return hasattr(module, "moe_config") and hasattr(module, "quant_method")


def _experts(module: Any) -> tuple[str, bool]:
    """ "method, experts class", and whether it takes LoRA."""
    method = module.quant_method
    experts = getattr(method, "experts_cls", None)
    name = type(method).__name__
    if experts is None:
        return f"{name}, without a class of experts", False
    return f"{name}, {experts.__name__}", takes_lora(experts)


def _bytes(model: Any) -> Iterator[int]:
    seen = set()
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor.nbytes


def _lora(model: Any, config: Any) -> tuple[int, int, int]:
    """Bytes of all slots, of routed experts apart; and how many layers of those there are."""
    import torch
    from vllm.lora import model_manager

    from_layer, found = model_manager.from_layer, []

    def counted(layer: Any, slots: int, lora: Any, packed: list[str], *args: Any) -> Any:
        inner = getattr(layer, "routed_experts", None)
        if inner is None and not _is_experts(layer):
            return from_layer(layer, slots, lora, packed, *args)
        found.append((inner or layer, len(packed)))
        return layer  # its wrapper wants kernels, which want weights

    model_manager.from_layer = counted
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
        # One A for gate and up where the checkpoint has them fused ("w13"), else one each.
        rows = min(packed, slices) * moe.hidden_dim + slices * inner + inner + moe.hidden_dim
        experts += config.lora_config.max_loras * moe.num_local_experts * rank * rows * width
    return dense, experts, len(found)


def main() -> None:
    question = Question(**json.loads(sys.argv[1]))
    try:
        found = answer(question)
    except Exception as error:  # whatever vLLM says is the answer
        text = " ".join(f"{type(error).__name__}: {error}".split())
        found = Answer({}, False, 0, 0, 0, 0, text[:600])
    print("@" + json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
