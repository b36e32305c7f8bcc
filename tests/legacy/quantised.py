"""INT4 MoE layers of the real release, and numbers for them in each checkpoint's own packing."""

from __future__ import annotations

import itertools
import os
import socket
from contextlib import contextmanager

import one_method
import torch

EXPERTS, HIDDEN, INNER, GROUP = 8, 128, 64, 32
# kind -> (quantisation, what differs in its configuration). The first word is the method's.
KINDS = {
    "gptq": {},
    "gptq act-order": {"desc_act": True},
    "gptq channel": {"group_size": -1},
    "awq": {},
    "ct": {},
    "ct act-order": {"actorder": "group"},
    "ct channel": {"strategy": "channel", "group_size": None},
    "ct-triton": {},
    "moe_wna16": {},
    "moe_wna16 zeros": {"sym": False},
    "moe_wna16 awq": {"quant_method": "awq", "zero_point": True},
}
_number = itertools.count()


@contextmanager
def parallel():
    """One rank that is its own group; gives the configuration that layers register with."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    config = VllmConfig()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        yield config


def _method(kind):
    """layer -> upstream's method for it."""
    from vllm.model_executor.layers.quantization import awq_marlin, gptq_marlin, moe_wna16
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors as ct
    from vllm.model_executor.layers.quantization.compressed_tensors import (
        compressed_tensors_moe as ct_moe,
    )

    name, more = kind.split()[0], KINDS[kind]
    flat = {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False}
    flat |= {"quant_method": "gptq", **more}
    if name == "gptq":
        config = gptq_marlin.GPTQMarlinConfig.from_config(flat)
        return lambda layer: gptq_marlin.GPTQMarlinMoEMethod(config, layer.moe_config)
    if name == "awq":
        flat |= {"quant_method": "awq", "zero_point": True}
        config = awq_marlin.AWQMarlinConfig.from_config(flat)
        return lambda layer: awq_marlin.AWQMoEMethod(config, layer.moe_config)
    if name == "moe_wna16":
        config = moe_wna16.MoeWNA16Config.from_config(flat)
        return lambda layer: moe_wna16.MoeWNA16Method(config, layer.moe_config)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    weights |= {"group_size": GROUP, **more}
    config = ct.CompressedTensorsConfig.from_config(
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        }
    )
    which = "WNA16MarlinMoEMethod" if name == "ct" else "WNA16MoEMethod"
    return lambda layer: getattr(ct_moe, f"CompressedTensors{which}")(config, layer.moe_config)


def layer(kind, monkeypatch, dtype=torch.bfloat16, shared=None):
    """A `SharedFusedMoE` with upstream's own method for ``kind``, its weights not yet loaded."""
    from vllm.model_executor.layers.fused_moe import FusedMoE, SharedFusedMoE
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability

    quantization = "vllm.model_executor.layers.quantization"
    for name in (  # these ask which GPU this is
        "awq_marlin.verify_marlin_supported",
        "awq_marlin.marlin_make_workspace_new",
        "gptq_marlin.marlin_make_workspace_new",
        "compressed_tensors.compressed_tensors_moe.marlin_make_workspace_new",
    ):
        monkeypatch.setattr(f"{quantization}.{name}", lambda *args, **more: None)
    with monkeypatch.context() as patched:
        cuda = classmethod(lambda cls, device_id=0: DeviceCapability(8, 0))
        patched.setattr(type(current_platform), "get_device_capability", cuda)
        make = _method(kind)

    assert issubclass(SharedFusedMoE, FusedMoE)
    torch.set_default_dtype(dtype)
    try:
        return SharedFusedMoE(
            shared_experts=torch.nn.Identity() if shared is None else shared,
            num_experts=EXPERTS,
            top_k=2,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            params_dtype=dtype,
            quant_config=one_method.config(kind, make),
            prefix=f"model.layers.{next(_number)}.mlp.experts",
            renormalize=True,
        )
    finally:
        torch.set_default_dtype(torch.float32)


def on_a_gpu(monkeypatch):
    """Let wrappers take upstream's way for GPUs, though their weights are on the CPU."""
    monkeypatch.setattr("vllm_moe_lora.layers.quantised.vllm_0_11.on_cpu", lambda wrapper: False)


class Numbers:
    """INT4 numbers of one layer: what they stand for, and how a checkpoint of ``kind`` has them.

    self.dense[expert][w1, w3 or w2] is [out, in] in fp64.
    """

    def __init__(self, kind, seed=0):
        self.kind, self.generator = kind, torch.Generator().manual_seed(seed)
        zeros = "zeros" in kind or "awq" in kind
        self.dense, self.files = [], []
        for _ in range(EXPERTS):
            dense, files = {}, {}
            # Gate and up have the same input, so GPTQ finds one order for both; vLLM keeps one.
            mixed = {n: torch.randperm(n, generator=self.generator) for n in (HIDDEN, INNER)}
            for name in ("w1", "w3", "w2"):
                rows, columns = (HIDDEN, INNER) if name == "w2" else (INNER, HIDDEN)
                groups = 1 if "channel" in kind else columns // GROUP
                q = self._integers(0, 16, rows, columns)
                # GPTQ's files store them less one, in four bits.
                zero = (
                    self._integers(1, 16, rows, groups) if zeros else torch.full((rows, groups), 8)
                )
                scale = torch.rand(rows, groups, generator=self.generator) * 0.02 + 0.01
                scale = scale.to(torch.float16)
                of = torch.arange(columns) // (columns // groups)
                if "act-order" in kind:
                    of = of[mixed[columns]]
                dense[name] = (q - zero[:, of]).double() * scale[:, of].double()
                files[name] = self._file(q, zero, scale, of)
            self.dense.append(dense)
            self.files.append(files)

    def _integers(self, low, high, *shape):
        return torch.randint(low, high, shape, generator=self.generator)

    def _file(self, q, zero, scale, of):
        """The tensors of one matrix as its checkpoint has them."""
        if self.kind.startswith("ct"):
            file = {"weight_packed": _pack(q), "weight_scale": scale}
            return file | ({"weight_g_idx": of} if "act-order" in self.kind else {})
        if "awq" in self.kind:  # columns of each eight out of order
            order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
            q, zero = (t.t().unflatten(1, (-1, 8))[..., order].flatten(1) for t in (q, zero))
            return {"qweight": _pack(q), "qzeros": _pack(zero), "scales": scale.t()}
        file = {"qweight": _pack(q).t(), "scales": scale.t(), "g_idx": of.to(torch.int32)}
        if "zeros" in self.kind:
            file["qzeros"] = _pack(zero.t() - 1)
        return file

    def load(self, layer):
        """By upstream's own loaders, then its work after loading."""
        parameters = dict(layer.named_parameters())
        for expert, files in enumerate(self.files):
            for name, file in files.items():
                for part, tensor in file.items():
                    full = f"{'w2' if name == 'w2' else 'w13'}_{part}"
                    one = parameters[full]
                    one.weight_loader(one, tensor.contiguous(), full, name, expert)
        layer.quant_method.process_weights_after_loading(layer)


def _pack(values):
    """Eight 4-bit values of the last axis into one int32, first value lowest."""
    words = (values.long().unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
