"""Which CUDA graph a batch without adapters runs, by each release's own choice.

Under data parallelism a rank's experts also compute tokens of other ranks, which may have adapters.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import unpacked
from packaging.specifiers import SpecifierSet

from vllm_moe_lora.hooks import all_hooks

TARGET = "vllm.v1.worker.gpu_model_runner:GPUModelRunner._determine_batch_execution_and_padding"
RELEASES = [r for r in unpacked.available() if r in SpecifierSet(">=0.30,<0.34")]
WANTED = {"data parallel": (True, 5), "one rank": (False, 0), "dense": (False, 0)}


class Dispatched(Exception):
    """Ends the function where it chooses a graph."""


def dispatch(**asked):
    raise Dispatched(asked["has_lora"], asked["num_active_loras"])


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("case", WANTED)
def test_without_adapters(release, case):
    graphs = SimpleNamespace(NONE=0, FULL=1)
    choose = unpacked.function(unpacked.tree(release), TARGET, CUDAGraphMode=graphs)
    for hook in all_hooks():
        if hook.target == TARGET and hook.made_for(release):
            choose = hook.make(choose)
    runner = SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_size=1 if case == "one rank" else 2),
        lora_config=SimpleNamespace(max_loras=4),
        model_config=SimpleNamespace(is_moe=case != "dense", is_encoder_decoder=False),
        input_batch=SimpleNamespace(lora_id_to_lora_request={}),
        cudagraph_dispatcher=SimpleNamespace(dispatch=dispatch),
        uniform_decode_query_len=1,
        _is_uniform_decode=lambda **_: True,
        _pad_for_sequence_parallelism=lambda tokens: tokens,  # up to 0.31
    )
    batch = dict.fromkeys(("num_tokens", "num_reqs", "max_num_scheduled_tokens"), 1)
    with pytest.raises(Dispatched) as chosen:
        choose(runner, **batch, num_scheduled_tokens_np=None, use_cascade_attn=False)
    assert chosen.value.args == WANTED[case]
