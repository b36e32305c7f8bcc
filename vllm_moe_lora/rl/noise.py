"""AQN, adaptive quantisation noise on norm weights (QeRL, arXiv 2510.11696), in a running engine.

QeRL samples from a quantised model whose norm weights have a little noise, less with each stage of
the training: more answers are explored. The noise is the whole engine's, not one request's.

    llm = LLM(..., worker_extension_cls=...)  # `rl.Worker` of this package, by its full name
    for step in range(total):
        noise.set_noise(llm, step, total)   # after base weights are synchronised
        ...
    noise.clear_noise(llm)                  # before an evaluation; the weights are the old bits

`sigma` is QeRL's schedule. Noise is drawn from (seed, step, name of the norm), so it is the same on
all ranks and in each process. It is always added to the clean weights, never to noise.

In most MoE models the router reads what the norm before the experts puts out, so noise there
changes which experts a token takes. QeRL was published for dense models. Here a router's input is
divided by the noise again, unless ``router="as-published"``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

NORMS = ("input_layernorm", "post_attention_layernorm")
BEFORE_EXPERTS = "post_attention_layernorm"  # the norm whose output routers read
ROUTER = ("compensated", "as-published")
GATES = ("gate", "router")  # what routers are called beside `experts`


# -- the schedule and the draw ---------------------------------------------------------------------


def sigma(step: int, total: int, start: float = 5e-2, end: float = 5e-4, stages: int = 10) -> float:
    """The standard deviation of the noise in one step of a training.

    The first of ``stages`` equal stages has none; from the second to the last it falls from
    ``start`` to ``end`` by equal factors. (NVlabs/QeRL, trl_trainer/noise_scheduler.py and
    grpo_trainer.py)

    Args:
        step: of the training, from 0.
        total: steps of the training.
        start, end: standard deviations, above 0.
        stages: at least 3; QeRL's own formula divides by zero for 2.

    Raises:
        ValueError: an argument is out of its range.
    """
    if step < 0 or total < 1 or stages < 3 or start <= 0 or end <= 0:
        raise ValueError(
            f"noise: step {step} of {total}, {stages} stages from {start} to {end}: expected "
            "step >= 0, total >= 1, stages >= 3, and standard deviations above 0"
        )
    stage = int(min(step, total) // (total / stages))
    if stage == 0:
        return 0.0
    i = min(stage, stages - 1) - 1
    return float(start * (end / start) ** (i / (stages - 2)))


def draw(seed: int, step: int, name: str, size: int, deviation: float) -> torch.Tensor:
    """Draw the noise of one norm: [size] fp32 on the CPU, the same for the same arguments.

    Args:
        seed, step: of the training.
        name: of the norm in the model, such as "model.layers.0.input_layernorm".
        size: of its weight.
        deviation: the standard deviation.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(size, generator=generator, dtype=torch.float32) * deviation


# -- the worker ------------------------------------------------------------------------------------


@dataclass
class Norm:
    """A norm of the model that has noise.

    Attributes:
        weight: its parameter, [hidden].
        offset: what the norm adds to its weight: 1 for Gemma's norms, else 0.
        gates: routers that read the norm's output.
        clean: [hidden], the weight without noise.
        noised: [hidden], the weight as it was written with noise; None while there is none.
    """

    weight: torch.nn.Parameter
    offset: float
    gates: list[torch.nn.Module]
    clean: torch.Tensor
    noised: torch.Tensor | None = None


@dataclass
class State:
    """The noise in one worker's model: its norms by name, and the hooks on routers."""

    norms: dict[str, Norm] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)


def apply(
    model: torch.nn.Module,
    state: State,
    *,
    deviation: float,
    seed: int,
    step: int,
    norms: tuple[str, ...] = NORMS,
    router: str = "compensated",
) -> None:
    """Put noise on the model's norms in place of the noise they have; first all is checked.

    The weights stay where they are, as graphs that were captured need it. Weights that somebody
    has loaded since the last call count as clean.

    Args:
        model: vLLM's model in a worker.
        state: of this worker.
        deviation: the standard deviation; 0 takes the noise away.
        seed, step: see `draw`.
        norms: the last part of the names of the norms.
        router: "compensated" or "as-published".

    Raises:
        ValueError: the model has no such norms, or no router behind them is found.
    """
    if router not in ROUTER:
        raise ValueError(f"noise: router={router!r}; use one of {', '.join(ROUTER)}")
    found = dict(_find(model, norms))
    if not found:
        raise ValueError(
            f"noise: {type(model).__name__} has no norm named {' or '.join(norms)}; choose others "
            "with norms="
        )
    if router == "compensated" and BEFORE_EXPERTS in norms:
        _find_gates(model, found)
    clear(state)
    for norm in found.values():
        norm.clean = norm.weight.data.clone()
    if deviation == 0:
        return
    for name, norm in found.items():
        clean = norm.clean
        drawn = draw(seed, step, name, clean.numel(), deviation)
        noised = clean + drawn.to(clean.device).to(clean.dtype)
        if norm.gates:
            # A factor of 0 cannot be divided out again.
            noised = torch.where(noised.float() + norm.offset == 0, clean, noised)
            ratio = (clean.float() + norm.offset) / (noised.float() + norm.offset)
            state.handles += [gate.register_forward_pre_hook(_divide(ratio)) for gate in norm.gates]
        norm.weight.data.copy_(noised)
        norm.noised = noised
    state.norms = found


def clear(state: State) -> None:
    """Take all noise away: the weights are what they were, bit for bit."""
    for handle in state.handles:
        handle.remove()
    for norm in state.norms.values():
        if norm.noised is not None and torch.equal(norm.weight.data, norm.noised):
            norm.weight.data.copy_(norm.clean)
    state.norms, state.handles = {}, []


def _find(model: torch.nn.Module, norms: tuple[str, ...]) -> Iterator[tuple[str, Norm]]:
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name.rpartition(".")[2] in norms and isinstance(weight, torch.nn.Parameter):
            # Qwen3-Next and Qwen3.5 use Gemma's norm: x * (1 + weight).
            gemma = any("Gemma" in kind.__name__ for kind in type(module).__mro__)
            yield name, Norm(weight, float(gemma), [], weight.data)


def _find_gates(model: torch.nn.Module, found: dict[str, Norm]) -> None:
    """Give each norm the routers behind it. Raises ValueError if a layer's are not found."""
    from vllm.model_executor.layers.fused_moe.layer import MoERunner

    for name, experts in model.named_modules():
        if not isinstance(experts, MoERunner):
            continue
        block = model.get_submodule(name.rpartition(".experts")[0])
        layer = name.rpartition(".experts")[0].rpartition(".")[0]
        norm = found.get(f"{layer}.{BEFORE_EXPERTS}")
        named = [getattr(block, gate, None) for gate in GATES] + [getattr(experts, "gate", None)]
        gates = [gate for gate in named if isinstance(gate, torch.nn.Module)]
        # A LoRA layer calls the layer it wraps, whose input then is divided already.
        wrapped = [getattr(gate, "base_layer", None) for gate in gates]
        gates = [gate for gate in gates if not any(gate is one for one in wrapped)]
        if norm is None or not gates:
            what = f"{BEFORE_EXPERTS} of {layer}" if norm is None else f"router of {name}"
            raise ValueError(
                f'noise: {type(model).__name__} has no {what}. With router="as-published" routers '
                "read noise"
            )
        norm.gates = list({id(gate): gate for gate in gates}.values())


def _divide(ratio: torch.Tensor) -> Any:
    """A hook for a router: its input times ``ratio`` [hidden] fp32."""

    def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        return ((x.float() * ratio).to(x.dtype), *args[1:])

    return hook


class NoiseWorker:
    """Part of `rl.Worker`, for vLLM's ``worker_extension_cls``."""

    model_runner: Any

    def moe_lora_noise(self, how: dict[str, Any]) -> None:
        """Put noise on the model, `apply`'s arguments by name; {} takes it away.

        Raises:
            ValueError: see `apply`. Everything is as it was before the call.
        """
        runner = self.model_runner
        state: State | None = getattr(runner, "moe_lora_noise", None)
        if state is None:
            runner.moe_lora_noise = state = State()
        if not how:
            clear(state)
            return
        how = {**how, "norms": tuple(how.get("norms", NORMS))}
        if (
            how.get("router", "compensated") == "compensated"
            and not runner.model_config.enforce_eager
        ):
            raise ValueError(
                "noise: a compiled model does not run what divides a router's input. Start the "
                'engine with enforce_eager, or use router="as-published"'
            )
        apply(runner.model, state, **how)


# -- the front end ---------------------------------------------------------------------------------


def arguments(
    step: int,
    total: int,
    *,
    seed: int = 0,
    start: float = 5e-2,
    end: float = 5e-4,
    stages: int = 10,
    norms: tuple[str, ...] = NORMS,
    router: str = "compensated",
) -> dict[str, Any]:
    """What `NoiseWorker.moe_lora_noise` gets in one step of a training: numbers and texts only.

    Args:
        step, total, start, end, stages: see `sigma`.
        seed: of the noise.
        norms, router: see `apply`.

    Raises:
        ValueError: an argument is out of its range.
    """
    if router not in ROUTER:
        raise ValueError(f"noise: router={router!r}; use one of {', '.join(ROUTER)}")
    deviation = sigma(step, total, start, end, stages)
    how = {"deviation": deviation, "seed": seed, "step": step, "norms": list(norms)}
    return {**how, "router": router}


BUSY = (
    "noise: requests are running, and their keys and values were computed with other weights. Wait "
    "until they end"
)


def set_noise(engine: Any, step: int, total: int, **more: Any) -> float:
    """Give an engine the noise of a training's step, in place of an earlier one's.

    The prefix cache is emptied: its blocks were computed with other weights.

    Args:
        engine: vLLM's `LLM` or `LLMEngine`. For `AsyncLLM` there is `set_noise_async`.
        step, total, more: see `arguments`.

    Returns:
        The standard deviation of the noise.

    Raises:
        ValueError: an argument is out of its range, or does not fit the model.
        RuntimeError: requests are running; the noise is as it was.
    """
    how = arguments(step, total, **more)
    _change(engine, how)
    return float(how["deviation"])


def clear_noise(engine: Any) -> None:
    """Take the noise away from an engine; see `set_noise`."""
    _change(engine, {})


def _change(engine: Any, how: dict[str, Any]) -> None:
    # Also says whether requests are running.
    if not engine.reset_prefix_cache():
        raise RuntimeError(BUSY)
    engine.collective_rpc("moe_lora_noise", args=(how,))


async def set_noise_async(engine: Any, step: int, total: int, **more: Any) -> float:
    """`set_noise` for vLLM's `AsyncLLM`."""
    how = arguments(step, total, **more)
    await _change_async(engine, how)
    return float(how["deviation"])


async def clear_noise_async(engine: Any) -> None:
    """`clear_noise` for vLLM's `AsyncLLM`."""
    await _change_async(engine, {})


async def _change_async(engine: Any, how: dict[str, Any]) -> None:
    if not await engine.reset_prefix_cache():
        raise RuntimeError(BUSY)
    await engine.collective_rpc("moe_lora_noise", args=(how,))
    # Requests that came meanwhile have keys and values of the old weights: they are computed again.
    await engine.reset_prefix_cache(reset_running_requests=True)
