"""Which experts each token took, out of vLLM's V1 model runner (vLLM 0.31 to 0.33).

vLLM has `--enable-return-routed-experts`: each finished `CompletionOutput` then has
``routed_experts``, [prompt + generated - 1, layers, top_k], uint8 for at most 256 experts, else
uint16. Layers without experts are zeros. From 0.31 on vLLM's `AuxOutputWorkerConnector` collects
the rows, with prefix hits, chunked prefill, preemption and aborts, but only model runner V2 calls
it, which needs Triton. The functions here call it from the V1 runner in the same places, so what
users get is the same field of the same object, filled by the same code.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


class RunnerV2Config:
    """A `VllmConfig` that says it uses model runner V2, for vLLM's checks of this flag.

    They refuse everything else that the connector cannot do: pipeline parallelism, context
    parallelism, engines without a prefix cache, models without experts.
    """

    use_v2_model_runner = True

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def connect(runner: Any, kv_cache_config: Any) -> None:
    """Give a V1 runner the connector, if the flag asks for it.

    Call it after the KV cache is made. The adapters' layers are in the model by then; the connector
    finds the routers below them.

    Args:
        runner: vLLM's `GPUModelRunner`, on any platform.
        kv_cache_config: the one it was initialised with.
    """
    from vllm.platforms import current_platform

    # An out-of-tree platform brings its own runner, which may be a subclass of this one.
    if not runner.vllm_config.aux_output_config.enabled or current_platform.is_out_of_tree():
        return
    from vllm.distributed.aux_output_connector.worker import get_aux_output_connector

    close(runner)  # the KV cache is made again after a wake-up
    runner.aux_output_connector = get_aux_output_connector(
        runner.model, runner.vllm_config, kv_cache_config
    )


def close(runner: Any) -> None:
    """End the connector's thread; nothing if there is none."""
    connector = getattr(runner, "aux_output_connector", None)
    if connector is not None:
        runner.aux_output_connector = None
        connector.close()


def begin(runner: Any, scheduler_output: Any) -> None:
    """Tell the connector which requests the next step runs, before its forward pass."""
    connector = getattr(runner, "aux_output_connector", None)
    if connector is not None:
        connector.begin_step(scheduler_output.aux_output_connector_metadata)


def snapshot(runner: Any) -> Any | None:
    """Copy the step's routes, after the forward pass and before its tokens are sampled.

    Returns:
        vLLM's `PendingAuxOutput` for `attach`, or None: there is no connector, no step, or this
        rank does not return outputs.
    """
    connector = getattr(runner, "aux_output_connector", None)
    if connector is None or runner.execute_model_state is None:
        return None
    batch = runner.input_batch
    # The runner changes these arrays before the output is read.
    view = SimpleNamespace(
        req_ids=list(batch.req_ids),
        query_start_loc_np=runner.query_start_loc.np[: batch.num_reqs + 1].copy(),
        num_computed_tokens_np=batch.num_computed_tokens_cpu[: batch.num_reqs].copy(),
    )
    pending = connector.prepare_output(view)
    if pending is not None:
        tokens = runner.execute_model_state.scheduler_output.scheduled_spec_decode_tokens
        pending.draft_tokens = [len(tokens.get(name, ())) for name in view.req_ids]
        if runner.device.type != "cpu":
            pending.copied = torch.Event(device=runner.device)
            pending.copied.record()
    return pending


def attach(pending: Any, output: Any) -> Any:
    """Return ``output`` with the routes of its step.

    Args:
        pending: from `snapshot`; with None nothing happens.
        output: what the runner's `sample_tokens` returned: a `ModelRunnerOutput`, or an
            `AsyncModelRunnerOutput`, whose `get_output` then adds the routes.
    """
    if pending is None:
        return output
    get_output = getattr(output, "get_output", None)
    if get_output is None:
        _fill(pending, output)
        return output

    def get_output_with_routes() -> Any:
        found = get_output()
        _fill(pending, found)
        return found

    output.get_output = get_output_with_routes
    return output


def _fill(pending: Any, output: Any) -> None:
    sampled = [len(tokens) for tokens in output.sampled_token_ids] or [0] * len(pending.request_ids)
    # A chunk of a prompt samples nothing, and then no draft was rejected either.
    rejected = [
        drafts + 1 - count if count and drafts else 0
        for count, drafts in zip(sampled, pending.draft_tokens, strict=True)
    ]
    if getattr(pending, "copied", None) is not None:
        pending.copied.synchronize()
        # Not "non_blocking" as in enqueue_cpu_copy: there is no copy stream to wait for here.
        pending.num_sampled, pending.num_rejected = np.array(sampled), np.array(rejected)
        pending.routed_experts = pending.routed_experts_gpu.cpu().numpy()
    else:
        pending.enqueue_cpu_copy(np.array(sampled), np.array(rejected))
    output.aux_output_connector_output = pending.process_output()
