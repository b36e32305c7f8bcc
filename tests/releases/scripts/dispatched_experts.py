"""Child: routed experts of one release where tokens of several batches meet; prints JSON.

Two ranks of data parallelism, each an engine with a batch, a scheduler and a LoRA manager of its
own; the experts of both are one layer, spread over them (`parallel_experts.py` has the stage). For
each case and each of "bare" and "ours": "error", or for each rank how far its answers are from the
whole layer's with each token's own adapter ("off"), and how far adapters move those ("moved"),
relative to the largest number of all.
"""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import parallel_cases
import parallel_experts
import ranks
import torch
from packaging.version import Version
from parallel_truth import answer

MIXED = [1, 2, 0, 2, 1, 0, 1, 2, 1]


@dataclasses.dataclass
class Case(parallel_cases.Case):
    """
    Attributes:
        batches: numbers of the adapters of each rank's tokens, 0 for none.
        loaded: the order in which each rank was given the adapters.
        before: batches that the ranks had before.
        without: no LoRA at all; whether the stage is right.
        idle: rank 1 has no requests and runs as vLLM has it then; its one token is not looked at.
    """

    size: int = 2
    data_parallel: int = 2
    batches: tuple = (MIXED, MIXED[3:])
    loaded: tuple = ((1, 2), (1, 2))
    before: tuple = ()
    without: bool = False
    idle: bool = False


NOBODY = {"batches": ([0] * 4, [0] * 5), "loaded": ((), ())}
EP = {"expert_parallel": True, "since": "0.21"}
KINDS = {
    "without": {**NOBODY, "without": True},
    "base": NOBODY,
    "same": {},
    "base-beside": {"batches": (MIXED, [0] * 5)},
    "base-after": {"batches": (MIXED, [0] * 5), "before": ([0] * 4, [1] * 5)},
    "one-each": {"batches": ([1] * 4, [2] * 6)},
    "other-slots": {"loaded": ((1, 2), (2, 1))},
    "idle": {"batches": (MIXED, [0]), "idle": True},
}
CASES = [
    *(Case(f"tp-{name}", **more) for name, more in KINDS.items()),
    *(Case(f"ep-{name}", **EP, **more) for name, more in KINDS.items()),
    Case("ep-tp2", **{**EP, "size": 4}, more={"is_sequence_parallel": True}),
]


def routing(hidden_states, gating_output, topk, renormalize, **more):
    """The experts and weights that `routed` wrote where router logits would be."""
    return gating_output[:, topk : 2 * topk].float(), gating_output[:, :topk].to(torch.int32)


def routed(case, ids, weights):
    logits = torch.zeros(len(ids), case.experts)
    logits[:, : case.top_k], logits[:, case.top_k : 2 * case.top_k] = ids, weights
    return logits


def plain(layer, x, router_logits=None, *args, topk_weights=None, topk_ids=None, **more):
    """An unquantised layer's experts in loops."""
    if router_logits is not None:
        topk_weights, topk_ids = routing(x, router_logits, layer.top_k, False)
    out = torch.zeros_like(x)
    for token, experts in enumerate(topk_ids.tolist()):
        for place, expert in enumerate(experts):
            gate, up = (layer.w13_weight[expert] @ x[token]).chunk(2)
            row = layer.w2_weight[expert] @ (torch.nn.functional.silu(gate) * up)
            out[token] += topk_weights[token, place] * row
    return out


class Rank(parallel_experts.Rank):
    """One rank with the batch it is given."""

    def _manager(self):
        if not self.case.without:
            return super()._manager()
        self.wrapper, method = self.layer, self.routed.quant_method
        if getattr(method, "moe_kernel", None) is None:  # up to 0.19, where it is the CPU's
            method.apply = plain
        return None

    def set_batch(self, numbers):
        from vllm.lora.layers import LoRAMapping

        manager = self.worker._adapter_manager
        manager._last_mapping = None
        manager.set_adapter_mapping(LoRAMapping(tuple(numbers), tuple(numbers), is_prefill=True))

    def rest(self):
        """What `_dummy_run` does about LoRA where a rank has no requests and others have."""
        from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

        runner = type("Runner", (LoRAModelRunnerMixin,), {})()
        runner.lora_manager = self.worker
        one = np.ones(1, dtype=np.int32)
        dummy = runner.maybe_dummy_run_with_lora
        wanted = inspect.signature(dummy).parameters
        more = {"activate_lora": False} if "activate_lora" in wanted else {}
        with dummy(self.config.lora_config, one, one, **more):
            pass

    def hooked(self):
        return hasattr(type(self.worker).add_adapter, "__vllm_moe_lora__")

    def load(self, number, path):
        """With our hooks into the slot that the front end sends to all ranks."""
        from vllm.lora.request import LoRARequest

        from vllm_moe_lora.loading.assigned import with_slot

        request = LoRARequest(f"a{number}", number, str(path))
        self.worker.add_adapter(with_slot(request, number - 1) if self.hooked() else request)

    def answer(self, x, logits, counts):
        from vllm.forward_context import set_forward_context

        context = set_forward_context(
            None, self.config, num_tokens=len(x), num_tokens_across_dp=torch.tensor(counts)
        )
        with context, torch.inference_mode():
            return self.wrapper(x.clone(), logits.clone()).float()


def run(case, base, folder):
    case = dataclasses.replace(case)
    whole = case.whole()
    adapters = parallel_experts._adapters(case, whole, folder)
    case.more = {**case.more, "custom_routing_function": routing}
    world = [Rank(case, rank, base, whole) for rank in range(case.size)]
    for one in () if case.without else world:
        one.warm_up()
    g = torch.Generator().manual_seed(1)
    given = []
    for batch in case.batches:
        x = torch.randn(len(batch), case.hidden, generator=g)
        ids = torch.rand(len(batch), case.experts, generator=g).topk(case.top_k).indices
        weights = 0.3 + torch.rand(len(batch), case.top_k, generator=g)
        given.append((x, ids, weights))
    counts = [len(batch) for batch in case.batches]

    def answers():
        logits = [routed(case, ids, weights) for _, ids, weights in given]
        made = zip(world, given, logits, strict=True)
        return ranks.together(
            [lambda o=one, x=x, to=to: o.answer(x, to, counts) for one, (x, *_), to in made]
        )

    def truth(batches):
        per_token = [[adapters[n - 1][0] if n else None for n in batch] for batch in batches]
        return [answer(whole, *one, per) for one, per in zip(given, per_token, strict=True)]

    for one, order in zip(world, case.loaded, strict=True):
        for number in order:
            one.load(number, adapters[number - 1][1])
    for batches in () if case.without else (case.before, case.batches):
        for one, batch in zip(world, batches, strict=False):
            one.set_batch(batch)
    if case.idle:
        world[1].rest()
    outs, want, plain = answers(), truth(case.batches), truth([[0] * count for count in counts])
    size = max(float(one.abs().max()) for one in want)

    def off(found, true):
        return [
            float((a - b).abs().nan_to_num(1e9).max() / size)
            for a, b in zip(found, true, strict=True)
        ]

    return {"off": off(outs, want), "moved": off(want, plain)}


def cases(release):
    return [case for case in CASES if Version(release) >= Version(case.since)]


if __name__ == "__main__":
    parallel_experts.main(cases, run)
