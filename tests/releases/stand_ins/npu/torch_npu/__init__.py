"""What stands in for torch_npu, so that vllm-ascend's real Python runs on a CPU.

Streams and events do nothing. The operators that its unquantised experts, its linear layers and its
LoRA call are loops, written from what its code passes and expects back; any other operator fails
when it is called. Operators that are registered for the NPU are registered for the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types

import torch


class Event:
    pass


class Stream:
    def record_event(self, event=None):
        return event or Event()

    def wait_event(self, event):
        assert isinstance(event, Event)

    def wait_stream(self, stream):
        assert isinstance(stream, Stream)


_STREAM = Stream()


def npu_swiglu(x, dim=-1):
    gate, up = x.chunk(2, dim=dim)
    return torch.nn.functional.silu(gate) * up


def npu_grouped_matmul(
    x, weight, *, bias=None, split_item, group_list_type, group_type, group_list
):
    """Rows in groups, one an expert: [rows, in] @ [experts, in, out]. ``group_list`` counts."""
    assert (split_item, group_list_type, group_type) == (2, 1, 0)
    (rows,), (matrices,) = x, weight
    out, start = rows.new_zeros(rows.shape[0], matrices.shape[2]), 0
    for expert, count in enumerate(group_list.tolist()):
        mine = slice(start, start + count)
        out[mine] = rows[mine] @ matrices[expert]
        if bias is not None:
            out[mine] += bias[0][expert]
        start += count
    assert start == rows.shape[0]
    return [out]


def npu_moe_token_unpermute(permuted_tokens, sorted_indices, probs=None, **more):
    """Sum each token's rows, weighted. ``sorted_indices`` [tokens * top_k]: where a row went."""
    tokens, top_k = probs.shape
    out = permuted_tokens.new_zeros(tokens, permuted_tokens.shape[1])
    for pair, row in enumerate(sorted_indices.abs().tolist()):
        token, k = divmod(pair, top_k)
        out[token] += probs[token, k] * permuted_tokens[row]
    return out


def _moe_gating_top_k(
    x,
    *,
    k,
    k_group,
    group_count,
    group_select_mode,
    renorm,
    norm_type,
    out_flag,
    routed_scaling_factor,
    eps,
    bias_opt,
):
    assert (k_group, group_count, norm_type, bias_opt) == (1, 1, 0, None)
    weights, ids = x.float().softmax(-1).topk(k)
    if renorm:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * routed_scaling_factor, ids, None


def _npu_moe_init_routing_custom(
    x,
    topk_ids,
    *,
    scale,
    active_num,
    expert_num,
    expert_tokens_num_type,
    expert_tokens_num_flag,
    active_expert_range,
    quant_mode,
):
    """Rows sorted by expert, where each (token, k) went, and the number of rows of each expert."""
    assert (scale, quant_mode, active_expert_range) == (None, -1, [0, expert_num])
    flat = topk_ids.reshape(-1).tolist()
    order = sorted(range(len(flat)), key=lambda pair: flat[pair])  # stable
    went = torch.empty(len(flat), dtype=torch.int32)
    for row, pair in enumerate(order):
        went[pair] = row
    counts = torch.tensor([flat.count(expert) for expert in range(expert_num)])
    rows = x[torch.tensor(order) // topk_ids.shape[1]]
    return rows, went, counts, None


def _bgmv_shrink(x, weights, indices, y, scale):
    """y[row] = scale * weights[its index] x[row]; rows below zero are left alone."""
    for row, index in enumerate(indices.tolist()):
        if index >= 0:
            y[row] = scale * (weights[index].reshape(-1, x.shape[1]).float() @ x[row].float())


def _bgmv_expand(x, weights, indices, y, start, size):
    """Add weights[its index] x[row] to ``size`` columns of y from ``start`` on."""
    for row, index in enumerate(indices.tolist()):
        if index >= 0:
            matrix = weights[index].reshape(size, -1).float()
            y[row, start : start + size] += (matrix @ x[row].float()).to(y.dtype)


def _by_token(indices, lengths):
    return indices[: len(lengths)].repeat_interleave(lengths.to(indices.device))


def _sgmv_shrink(x, weights, indices, lengths, y, scale):
    _bgmv_shrink(x, weights, _by_token(indices, lengths), y, scale)


def _sgmv_expand(x, weights, indices, lengths, y, start, size):
    _bgmv_expand(x, weights, _by_token(indices, lengths), y, start, size)


def __getattr__(name):
    if not name.startswith(("npu_", "_npu_")):
        raise AttributeError(name)
    return _nothing(name)


def _nothing(name):
    def call(self, *args, **more):
        raise NotImplementedError(f"{name} wants an NPU; nothing stands in for it")

    return type(name, (), {"__init__": call})  # a class, because annotations name some


class _Device(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing(name)


def _unpinned(make, *args, pin_memory=False, **more):
    return make(*args, **more)


npu, _C = _Device("torch.npu"), _Device("torch_npu._C")
npu.Stream, npu.Event = Stream, Event
npu.current_stream = lambda *args: _STREAM
npu.stream = lambda stream: contextlib.nullcontext()
npu.is_available = lambda: False  # asked by others than vllm-ascend
torch.utils.rename_privateuse1_backend("npu")  # torch.device("npu") is known; nothing is put there
torch.npu = sys.modules["torch.npu"] = npu
torch.Tensor.pin_memory = lambda tensor, *args: tensor  # there is no device to pin it for
torch.Tensor.is_pinned = lambda tensor, *args: True
torch.tensor = functools.partial(_unpinned, torch.tensor)
torch.ops._C_ascend = types.SimpleNamespace(
    moe_gating_top_k=_moe_gating_top_k,
    npu_moe_init_routing_custom=_npu_moe_init_routing_custom,
    bgmv_shrink=_bgmv_shrink,
    bgmv_expand=_bgmv_expand,
    sgmv_shrink=_sgmv_shrink,
    sgmv_expand=_sgmv_expand,
)
# A file that is made when vllm-ascend is built: which kind of NPU it is for.
_built = types.ModuleType("vllm_ascend._build_info")
_built.__device_type__ = "A2"
sys.modules[_built.__name__] = _built

_implement = torch.library.Library.impl


def _on_the_cpu(self, name, function, dispatch_key="", **more):
    own = dispatch_key == "PrivateUse1" and self.ns == "vllm"
    key = "CPU" if own else dispatch_key
    return _implement(self, name, function, key, **more)


torch.library.Library.impl = _on_the_cpu
