"""vllm/v1/worker/gpu_model_runner.py: prompt log-probs, new weights, routes, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patching import Hook

_CLASS = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"


def _get_prompt_logprobs_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    def _get_prompt_logprobs_dict(self: Any, hidden_states: Any, *args: Any, **more: Any) -> Any:
        if not self.num_prompt_logprobs or not self.lora_config:
            return original(self, hidden_states, *args, **more)
        from ..layers.prompt_logprobs import rows_of_prompts

        with rows_of_prompts(self, hidden_states):
            return original(self, hidden_states, *args, **more)

    return _get_prompt_logprobs_dict


def _reload_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    def reload_weights(self: Any, *args: Any, **more: Any) -> Any:
        if self.lora_config and self.model_config.is_moe:
            from ..rl.base_weights import suspend_experts

            suspend_experts(self.get_model())
        return original(self, *args, **more)

    return reload_weights


def _bookkeeping_sync(original: Callable[..., Any]) -> Callable[..., Any]:
    def _bookkeeping_sync(self: Any, *args: Any, **more: Any) -> Any:
        moe = self.lora_config and self.model_config.is_moe
        if not moe or not self.input_batch.generators:
            return original(self, *args, **more)
        from ..layers.seeds import offsets

        with offsets(self.input_batch):
            return original(self, *args, **more)

    return _bookkeeping_sync


def _sample(original: Callable[..., Any]) -> Callable[..., Any]:
    def _sample(self: Any, logits: Any, spec_decode_metadata: Any, **more: Any) -> Any:
        moe = self.lora_config and self.model_config.is_moe
        if not moe or spec_decode_metadata is None:
            return original(self, logits, spec_decode_metadata, **more)
        from ..layers.drafts import expanded

        with expanded():
            return original(self, logits, spec_decode_metadata, **more)

    return _sample


def _initialize_kv_cache(original: Callable[..., Any]) -> Callable[..., Any]:
    def initialize_kv_cache(
        self: Any, kv_cache_config: Any, is_profiling: bool = False, **more: Any
    ) -> Any:
        done = original(self, kv_cache_config, is_profiling, **more)
        if not is_profiling:
            from ..rl import replay, routes

            routes.connect(self, self.kv_cache_config)
            replay.connect(self)
        return done

    return initialize_kv_cache


def _execute_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **more: Any) -> Any:
        from ..rl import replay, routes

        routes.begin(self, scheduler_output)
        replay.begin(self, scheduler_output)
        return original(self, scheduler_output, *args, **more)

    return execute_model


def _model_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def _model_forward(self: Any, *args: Any, **more: Any) -> Any:
        from ..rl import replay

        forced = replay.prepare(self)
        try:
            return original(self, *args, **more)
        finally:
            if forced is not None:
                forced.step = None

    return _model_forward


def _sample_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    def sample_tokens(self: Any, *args: Any, **more: Any) -> Any:
        from ..rl import routes

        pending = routes.snapshot(self)
        return routes.attach(pending, original(self, *args, **more))

    return sample_tokens


def _shutdown(original: Callable[..., Any]) -> Callable[..., Any]:
    def shutdown(self: Any) -> None:
        from ..rl import routes

        routes.close(self)
        original(self)

    return shutdown


_ROUTES: dict[str, Any] = {
    "feature": "routes",
    "releases": ">=0.31,<0.34",
    "why": "--enable-return-routed-experts is refused where vLLM uses model runner V1, as on a CPU",
    "upstream": "",
    "until": "upstream has no model runner V1 any more",
}


def _determine_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    def _determine_batch_execution_and_padding(self: Any, *args: Any, **more: Any) -> Any:
        from ..layers.gpu.data_parallel import wants_lora_graph

        if wants_lora_graph(self, more.get("force_has_lora")):
            more["force_has_lora"] = True
            more["force_num_active_loras"] = self.lora_config.max_loras + 1
        return original(self, *args, **more)

    return _determine_batch_execution_and_padding


HOOKS = (
    Hook(target=f"{_CLASS}.initialize_kv_cache", make=_initialize_kv_cache, **_ROUTES),
    Hook(target=f"{_CLASS}.execute_model", make=_execute_model, **_ROUTES),
    Hook(
        target=f"{_CLASS}._model_forward",
        make=_model_forward,
        **{**_ROUTES, "why": "a request cannot bring the routes that its tokens are to take"},
    ),
    Hook(target=f"{_CLASS}.sample_tokens", make=_sample_tokens, **_ROUTES),
    Hook(target=f"{_CLASS}.shutdown", make=_shutdown, **_ROUTES),
    Hook(
        feature="isolation",
        target=f"{_CLASS}._get_prompt_logprobs_dict",
        make=_get_prompt_logprobs_dict,
        releases=">=0.29,<0.34",
        why="prompt log-probs of a request in a batch with an adapter on lm_head are computed with "
        "the adapters of other requests, or stop the engine",
        upstream="",
        until="upstream sets the LoRA mapping of lm_head for the rows of each prompt",
    ),
    Hook(
        feature="data-parallel-gpu",
        target=f"{_CLASS}._determine_batch_execution_and_padding",
        make=_determine_batch,
        releases=">=0.30,<0.34",
        platforms=("cuda",),
        layers=True,
        why="with data parallelism, a batch without adapters runs a CUDA graph without LoRA, which "
        "also computes tokens of other ranks",
        upstream="",
        until="all ranks agree on whether any of them has an adapter in its batch",
    ),
    Hook(
        feature="cpu-experts",
        target=f"{_CLASS}._bookkeeping_sync",
        make=_bookkeeping_sync,
        releases=">=0.30,<0.34",
        platforms=("cpu",),
        why="a request with a seed whose prompt is computed in several steps stops the engine: a "
        "CPU's generator has no offset. So it does without LoRA, and in dense models",
        upstream="",
        until="upstream sets generators back without an offset",
    ),
    Hook(
        feature="cpu-experts",
        target=f"{_CLASS}._sample",
        make=_sample,
        releases=">=0.30,<0.34",
        platforms=("cpu",),
        why="a request with a temperature under speculative decoding gets tokens from "
        "uninitialised memory. So it does without LoRA, and in dense models",
        upstream="",
        until="upstream's _expand_kernel_impl fills the tensor that it is given",
    ),
    Hook(
        feature="cpu-experts",
        target=f"{_CLASS}.reload_weights",
        make=_reload_weights,
        releases=">=0.30,<0.34",
        platforms=("cpu",),
        why="the CPU experts with LoRA have wider weights than those that are loaded, so "
        "reload_weights fails",
        upstream="",
        until="upstream's CPU experts support LoRA",
    ),
)
