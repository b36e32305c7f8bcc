"""Child side: what stands in for a GPU, so that a release's layers can be made and run on a CPU.

Only operators and questions about the device are replaced. What lies between them is the
release's own.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import socket
import sys
import traceback
import types
from unittest import mock

import packages
import torch

SLOTS, TOP_K = 2, 2


def begin(lora_dtype, device="cpu"):
    """Import vLLM, with process groups of one and LoRA in its config. Returns its release.

    Args:
        device: another than "cpu" needs nothing that stands in for it.
    """
    if device == "cpu":
        packages.modules()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import vllm
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.config.lora import LoRAConfig
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    config = VllmConfig()
    config.lora_config = LoRAConfig(
        max_lora_rank=8, max_loras=SLOTS, max_cpu_loras=SLOTS, lora_dtype=lora_dtype
    )
    _kept.append(set_current_vllm_config(config))
    _kept[0].__enter__()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
    initialize_model_parallel(1, 1)
    try:
        from vllm.v1.worker.workspace import init_workspace_manager

        init_workspace_manager(torch.device(device))
    except ImportError:
        pass  # before 0.12 had one
    if device == "cpu":
        _operators()
    return config, vllm.__version__.partition("+")[0]


def attempted(run, *label):
    """What ``run()`` returns. An error is an answer, too; ``label`` says whose it is on stderr."""
    try:
        return run()
    except Exception as error:
        print(*label, file=sys.stderr)
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def hooks_of_a_gpu(release, *features):
    """Apply our hooks of ``features`` as on a GPU. Returns feature -> "on" or why it is not."""
    from vllm_moe_lora import patching, supported
    from vllm_moe_lora.hooks import all_hooks

    hooks = [h for h in supported.made_for(release, all_hooks()) if h.feature in features]
    known = supported.hashes(release)
    return patching.apply(hooks, version=release, platform="cuda", hashes=known).features


def punica_of_a_gpu(slots, count, lora_config, device="cpu"):
    """The release's own, with the metadata of a batch as its runner gives it.

    Args:
        slots: [tokens] of ``count``, -1 for none.
    """
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    punica = PunicaWrapperGPU(32, 32, device, lora_config=lora_config)
    ids = tuple(slot + 1 for slot in slots)
    names = list(range(1, count + 1))
    punica.update_metadata(LoRAMapping(ids, ids, is_prefill=True), names, count + 1, 64)
    return punica


def everywhere(name, value, real=None):
    """Rebind ``name`` in each module of vLLM's that has it, or has ``real`` by it."""
    for key, module in list(sys.modules.items()):
        held = vars(module).get(name) if key.startswith("vllm.") and module else None
        if held is not None and (real is None or held is real):
            setattr(module, name, value)


def bound(function, stand_in):
    """``stand_in(arguments)`` behind the signature of ``function``: a wrong call still fails."""
    signature = inspect.signature(function)

    def call(*args, **more):
        found = signature.bind(*args, **more)
        found.apply_defaults()
        return stand_in(types.SimpleNamespace(**found.arguments))

    # For a stand-in of this one; and its source is what our hooks are made for.
    call.__signature__, call.__wrapped__ = signature, function
    return call


def silu_and_mul(output, input):
    gate, up = input.float().chunk(2, dim=-1)
    output.copy_(torch.nn.functional.silu(gate) * up)


def swigluoai_and_mul(output, input, alpha=1.702, limit=7.0):
    gate, up = input.float()[..., ::2], input.float()[..., 1::2]
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    output.copy_((up + 1) * gate * torch.sigmoid(alpha * gate))


def moe_sum(input, output, topk_ids=None, expert_map=None):
    assert expert_map is None, "one rank holds all experts"
    output.copy_(input.float().sum(1))


_kept = []


def _operators():
    with contextlib.suppress(ImportError):  # the installed release's own, which come first
        importlib.import_module("vllm._C")
    later = "Tensor? topk_ids=None, Tensor? expert_map=None"  # from 0.27 on
    limits, oai = "float alpha=1.702, float limit=7.0", swigluoai_and_mul
    for library, text, function in (
        ("_C", "silu_and_mul(Tensor(a!) out, Tensor input) -> ()", silu_and_mul),
        ("_C", f"swigluoai_and_mul(Tensor(a!) out, Tensor input, {limits}) -> ()", oai),
        ("_moe_C", f"moe_sum(Tensor input, Tensor(a!) output, {later}) -> ()", moe_sum),
    ):
        name = text.partition("(")[0]
        if hasattr(getattr(torch.ops, library), name):
            continue  # the installed release has its own
        made = torch.library.Library(library, "FRAGMENT")
        made.define(text)
        made.impl(name, function, "CPU")
        _kept.append(made)
    import vllm.triton_utils as triton_utils
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability

    type(current_platform).get_device_capability = lambda *args, **more: DeviceCapability(9, 0)
    torch.accelerator.empty_cache = lambda: None
    triton_utils.HAS_TRITON = True
    for name in ("float16", "bfloat16", "float32"):
        if not hasattr(triton_utils.tl, name):
            setattr(triton_utils.tl, name, name)


def align(given):
    """`moe_align_block_size` with blocks of one: pair numbers sorted by their expert."""
    flat = given.topk_ids.flatten()
    order = flat.argsort(stable=True).to(torch.int32)
    return order, flat[order.long()].to(torch.int32), torch.tensor([flat.numel()])


def product(given, tokens, weights, output, size_n):
    """Write each pair's tokens @ its expert's weights; ``weights`` [experts, out, in] in fp32."""
    result = output.view(-1, size_n)
    for pair, expert in zip(
        given.sorted_token_ids.tolist(), given.expert_ids.tolist(), strict=True
    ):
        if expert < 0:  # of another rank
            result[pair] = 0
            continue
        row = tokens[pair // given.top_k].float() @ weights[expert].T
        if given.mul:
            row = row * given.topk_weights.flatten()[pair]
        result[pair] = row.to(result.dtype)
    return output


class Punica:
    """Punica's MoE operators, with the real ones' signatures, in loops.

    Args:
        slots: [tokens] adapter slot of each token, -1 for none.
    """

    def __init__(self, slots):
        from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU as Real

        self.slots, self.topk_ids, self._gives = slots, None, 3
        for name in (
            "add_lora_w13",
            "add_lora_w2",
            "add_lora_fused_moe",
            "moe_lora_align_block_size",
        ):
            real = getattr(Real, name, None)
            if real is None:
                continue
            if "naive_block_assignment" in inspect.signature(real).parameters:
                self._gives = 4
            setattr(self, name, bound(types.MethodType(real, self), getattr(self, f"_{name}")))

    def _add(self, given, weighted):
        given_y = given.y.view(-1, given.y.shape[-1])
        top_k = self.topk_ids.shape[1]
        for pair, expert in enumerate(self.topk_ids.flatten().tolist()):
            slot = self.slots[pair // top_k]
            # An expert below zero is another rank's.
            if min(slot, expert) < 0 or not given.adapter_enabled[slot]:
                continue
            x = given.x[pair if given.x.shape[0] == given_y.shape[0] else pair // top_k].float()
            parts = [
                x @ a[slot, expert].float().T @ b[slot, expert].float().T
                for a, b in zip(given.lora_a_stacked, given.lora_b_stacked, strict=True)
            ]
            row = torch.cat(parts)
            if weighted:
                row = row * given.topk_weights.flatten()[pair]
            given_y[pair] += row.to(given_y.dtype)

    def _add_lora_w13(self, given):
        assert given.num_tokens == given.topk_ids.shape[0]
        self.topk_ids = given.topk_ids
        if given.expert_map is not None:
            self.topk_ids = given.expert_map[given.topk_ids.long()]
        self._add(given, weighted=False)
        return None, None, None, None

    def _add_lora_w2(self, given):
        self._add(given, weighted=True)

    def _moe_lora_align_block_size(self, given):
        self.topk_ids = given.topk_ids
        return (None,) * 4 if self._gives == 4 else (torch.zeros(SLOTS),) * 3

    def _add_lora_fused_moe(self, given):
        self._add(given, weighted=given.mul_routed_weight)


@contextlib.contextmanager
def as_cuda():
    """The plugin is asked for what it does beside a GPU; the CPU has experts of its own."""
    from vllm.platforms import current_platform

    with mock.patch.object(type(current_platform), "device_type", "cuda"):
        yield
