"""What of data parallelism is refused from vLLM 0.30 on, each by the name of its flag."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from vllm_moe_lora.targets import data_parallel


def wrapper(experts=None, **more):
    parallel = {
        "dp_size": 2,
        "all2all_backend": "allgather_reducescatter",
        "is_sequence_parallel": False,
    }
    config = SimpleNamespace(moe_parallel_config=SimpleNamespace(**{**parallel, **more}))
    kernel = SimpleNamespace(fused_experts=experts)
    routed = SimpleNamespace(quant_method=SimpleNamespace(moe_kernel=kernel))
    return SimpleNamespace(base_layer=SimpleNamespace(moe_config=config, routed_experts=routed))


def experts(quantised, deferred=False):
    config = SimpleNamespace(quant_dtype=quantised)
    return SimpleNamespace(quant_config=config, expects_unquantized_inputs=deferred)


CASES = [
    (wrapper(), {}, ""),
    (wrapper(dp_size=1, all2all_backend="deepep_low_latency"), {}, ""),
    (wrapper(experts(None)), {}, ""),
    (wrapper(experts("fp8", deferred=True)), {}, ""),
    (wrapper(experts("fp8")), {}, "quantises tokens before it sends them"),
    (
        wrapper(all2all_backend="deepep_low_latency"),
        {},
        "--all2all-backend deepep_low_latency .* Start with --all2all-backend allgather_reduce",
    ),
    (
        wrapper(is_sequence_parallel=True),
        {},
        "--tensor-parallel-size and --enable-expert-parallel .* Start without --enable-expert-pa",
    ),
    (wrapper(), {"data_parallel_external_lb": True}, "load balancer outside of vLLM.* Start one"),
    (wrapper(), {"data_parallel_hybrid_lb": True}, "load balancer outside of vLLM.* Start one"),
    (wrapper(), {"enable_dbo": True}, "--enable-dbo"),
    (wrapper(), {"use_v2_model_runner": True}, "Start with VLLM_USE_V2_MODEL_RUNNER=0"),
]


@pytest.mark.parametrize(("layer", "config", "want"), CASES)
def test_refusal(monkeypatch, layer, config, want):
    monkeypatch.setattr(data_parallel, "_supported", lambda: True)
    runner = config.get("use_v2_model_runner", False)
    whole = SimpleNamespace(parallel_config=SimpleNamespace(**config), use_v2_model_runner=runner)
    monkeypatch.setattr(data_parallel, "_config", lambda: whole)
    found = data_parallel.refusal("layers.0", layer)
    if not want:
        assert found == ""
        return
    assert found.startswith("layers.0: with --data-parallel-size 2")
    assert re.search(want, found), found
    # By this select_experts.explained sees that it has a cure.
    assert found.endswith(", or without --enable-lora.")
