"""Replay: a request brings its routes, and vLLM's own routers take these experts.

This is for checks: with the same routes, log-probs of the engine and of a trainer have to agree.
``VLLM_MOE_LORA_REPLAY=1`` turns it on. A request then may have routes, as text that
`convert_routes.to_base64` makes and that vLLM's server returns:

    SamplingParams(..., extra_args={"routed_experts": to_base64(output.outputs[0].routed_experts)})
    curl ... -d '{..., "vllm_xargs": {"routed_experts": "..."}}'

Row i is for token i of prompt and answer. There may be one row fewer than the prompt has tokens,
as for a prompt and its answer that are scored together, and up to one for each token of the answer
but the last. Tokens behind the last row are routed by the model, and so are layers whose rows are
all zero, as vLLM returns them for layers without experts. The weight of each expert is computed
from the router's logits, by the router's own rule.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .. import envs
from . import convert_routes

KEY = "routed_experts"  # in a request's extra_args

Weights = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


# -- the front end: what a request asks for --------------------------------------------------------


def admit(config: Any, request: Any) -> None:
    """Check a request's routes, and keep its blocks apart in the prefix cache.

    Args:
        config: vLLM's `VllmConfig`.
        request: vLLM's `EngineCoreRequest`. If it has routes, its ``cache_salt`` changes with them:
            other routes make other keys and values.

    Raises:
        ValueError: the engine does not replay, or the routes are not those of such a request.
    """
    params = request.sampling_params
    text = (params.extra_args or {}).get(KEY) if params is not None else None
    if text is None:
        return
    if not enabled():
        raise ValueError(f"{KEY}: start the engine with VLLM_MOE_LORA_REPLAY=1 to replay routes")
    if config.use_v2_model_runner:
        raise ValueError(f"{KEY}: replay wants model runner V1; set VLLM_USE_V2_MODEL_RUNNER=0")
    if config.speculative_config is not None:
        raise ValueError(f"{KEY}: routes cannot be replayed with speculative decoding")
    if not isinstance(text, str) or request.prompt_token_ids is None:
        raise ValueError(f"{KEY} is base64 text of a .npy file, for a prompt of token ids")
    try:
        routes = convert_routes.from_base64(text)
        _check(config.model_config, routes, len(request.prompt_token_ids), params.max_tokens)
    except ValueError as error:
        raise ValueError(f"{KEY}: {error}") from None
    digest = hashlib.sha256(np.ascontiguousarray(routes, np.int32).tobytes()).hexdigest()
    request.cache_salt = f"{request.cache_salt or ''}|routes {digest}"


def _check(model: Any, routes: convert_routes.Routes, prompt: int, max_tokens: int) -> None:
    shape = (model.get_total_num_hidden_layers(), model.get_num_experts_per_tok())
    convert_routes.checked(routes, model.get_num_experts())
    if routes.shape[1:] != shape:
        raise ValueError(
            f"they are of {routes.shape[1]} layers with {routes.shape[2]} experts for each token; "
            f"the model has {shape[0]} layers and {shape[1]} experts"
        )
    if not prompt - 1 <= len(routes) <= prompt + max_tokens - 1:
        raise ValueError(
            f"there are {len(routes)} rows for a prompt of {prompt} tokens and at most "
            f"{max_tokens} more; expected {prompt - 1} to {prompt + max_tokens - 1} rows"
        )
    ordered = np.sort(routes, axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]).any(-1) & routes.any(axis=(0, 2))
    if twice.any():
        row, layer = np.argwhere(twice)[0]
        raise ValueError(f"row {row}, layer {layer} has an expert twice: {routes[row, layer]}")


def enabled() -> bool:
    """Whether VLLM_MOE_LORA_REPLAY=1."""
    return bool(envs.get("VLLM_MOE_LORA_REPLAY"))


# -- the worker: what its routers do ---------------------------------------------------------------


@dataclass
class Step:
    """The forced tokens of one step.

    Attributes:
        rows: [rows] int64, where in the batch they are.
        ids: [rows, layers, top_k] int64, their experts; -1 in layers that route themselves.
    """

    rows: torch.Tensor
    ids: torch.Tensor


@dataclass
class Replay:
    """The state of one worker: routes of its requests, and the step that runs."""

    requests: dict[str, torch.Tensor] = field(default_factory=dict)
    step: Step | None = None


def connect(runner: Any) -> None:
    """Bind the routers of a V1 runner's model, if VLLM_MOE_LORA_REPLAY=1.

    Raises:
        ValueError: the engine cannot replay; the text says why.
    """
    if not enabled() or not runner.model_config.is_moe:
        return
    if not runner.model_config.enforce_eager:
        raise ValueError("VLLM_MOE_LORA_REPLAY=1 wants enforce_eager: routes change with each step")
    parallel = runner.parallel_config
    if parallel.data_parallel_size > 1 or parallel.enable_eplb:
        raise ValueError("VLLM_MOE_LORA_REPLAY=1 does not work with data parallelism and EPLB")
    from vllm.model_executor.layers.fused_moe.layer import MoERunner

    runner.moe_lora_replay = replay = Replay()
    for name, module in runner.model.named_modules():
        if isinstance(module, MoERunner):
            _bind(replay, name, module)


def _bind(replay: Replay, name: str, module: Any) -> None:
    router = module.router
    if module._quant_method.is_monolithic or not hasattr(router, "_compute_routing"):
        raise ValueError(f"VLLM_MOE_LORA_REPLAY=1: the experts of {name} do their own routing")
    weights_of = find_weights(router, module.moe_config.hidden_dim, next(module.parameters()))
    if weights_of is None:
        raise ValueError(
            f"VLLM_MOE_LORA_REPLAY=1: how {type(router).__name__} of {name} weights its experts "
            "is not known"
        )
    original = type(router)._compute_routing

    def compute_routing(
        hidden: torch.Tensor, logits: torch.Tensor, *args: Any, **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = original(router, hidden, logits, *args, **more)
        step = replay.step
        if step is None:
            return weights, ids
        chosen = step.ids[:, module.layer_id]
        given = chosen[:, 0] >= 0
        rows, chosen = step.rows[given], chosen[given]
        weights[rows] = weights_of(logits[rows], chosen).to(weights.dtype)
        ids[rows] = chosen.to(ids.dtype)
        return weights, ids

    router._compute_routing = compute_routing


def find_weights(router: Any, hidden: int, like: torch.Tensor) -> Weights | None:
    """Find the rule by which a router weights the experts it has chosen.

    It is one of a few, and a trial with random logits shows which.

    Args:
        router: vLLM's `BaseRouter`.
        hidden: size of its input.
        like: a tensor on its device.

    Returns:
        A function of the logits [tokens, experts] and the chosen ids [tokens, top_k] that returns
        the weights [tokens, top_k] fp32; None if no rule gives the router's own weights.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, router.global_num_experts, generator=generator).to(like.device)
    states = torch.zeros(8, hidden, device=like.device)
    try:
        want, ids = router._compute_routing(states, logits, None)
    except Exception:  # a router that needs more than logits
        return None
    for score in (torch.sigmoid, _softmax):
        for renormalise in (True, False):
            for factor in (1.0, getattr(router, "routed_scaling_factor", 1.0)):
                rule = _rule(score, renormalise, factor)
                if torch.allclose(rule(logits, ids.long()), want.float(), rtol=1e-4, atol=1e-6):
                    return rule
    return None


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1)


def _rule(
    score: Callable[[torch.Tensor], torch.Tensor], renormalise: bool, factor: float
) -> Weights:
    def weights(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        found = score(logits.float()).gather(1, ids)
        return (found / found.sum(-1, keepdim=True) if renormalise else found) * factor

    return weights


def begin(runner: Any, scheduler_output: Any) -> None:
    """Take over the routes of requests that are new in this step, and forget those that ended."""
    replay = getattr(runner, "moe_lora_replay", None)
    if replay is None:
        return
    for name in scheduler_output.finished_req_ids:
        replay.requests.pop(name, None)
    for request in scheduler_output.scheduled_new_reqs:
        params = request.sampling_params
        text = (params.extra_args or {}).get(KEY) if params is not None else None
        if text is not None:
            routes = convert_routes.from_base64(text).astype(np.int64)
            routes[:, ~routes.any(axis=(0, 2))] = -1
            replay.requests[request.req_id] = torch.from_numpy(routes).to(runner.device)


def prepare(runner: Any) -> Replay | None:
    """Collect the forced tokens of the step that `_model_forward` is about to run.

    Returns:
        The worker's state with its `Step`; None if the step has no forced token.
    """
    replay: Replay | None = getattr(runner, "moe_lora_replay", None)
    if replay is None or not replay.requests:
        return None
    batch, starts = runner.input_batch, runner.query_start_loc.np
    rows, ids = [], []
    for i, name in enumerate(batch.req_ids):
        routes = replay.requests.get(name)
        if routes is None:
            continue
        first, count = int(batch.num_computed_tokens_cpu[i]), int(starts[i + 1] - starts[i])
        part = routes[first : first + count]
        ids.append(part)
        rows.append(torch.arange(int(starts[i]), int(starts[i]) + len(part), device=part.device))
    if not sum(map(len, rows)):
        return None
    replay.step = Step(torch.cat(rows), torch.cat(ids))
    return replay
