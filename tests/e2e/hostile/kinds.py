"""Adapters that no server should meet: name -> what turns a good adapter's folder into it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Change = Callable[[Path], None]

# One module of each kind of an adapter on Qwen2-MoE.
MODULES = {
    "attention": "layers.0.self_attn.q_proj",
    "router": "layers.1.mlp.gate",
    "shared gate": "layers.0.mlp.shared_expert_gate",
    "shared expert": "layers.1.mlp.shared_expert.down_proj",
    "expert up": "layers.1.mlp.experts.3.up_proj",
    "expert down": "layers.0.mlp.experts.7.down_proj",
}


def kinds() -> Iterator[tuple[str, Change]]:
    """Every kind, with a name of its own."""
    for word, module in MODULES.items():
        for side in ("lora_A", "lora_B"):
            for what, change in _TENSORS.items():
                yield f"{word}, {side}: {what}", _on(module, side, change)
        for what, rename in _NAMES.items():
            yield f"{word}: {what}", _renamed(module, rename)
        yield f"{word}: twice, under another prefix", _twice(module)
    for word in ("expert up", "expert down"):
        rename = _expert_99 if word == "expert up" else _expert_minus_1
        yield f"{word}: no such expert", _renamed(MODULES[word], rename)
    for what, edit in _FILES.items():
        yield f"file: {what}", edit
    for what, entries in _CONFIGS.items():
        yield f"config: {what}", _configured(entries)
    for what, edit in _FOLDERS.items():
        yield f"folder: {what}", edit


def harmless() -> Iterator[tuple[str, Change, str]]:
    """What may look hostile and is an adapter all the same: name, change, as whom it answers."""

    def everywhere(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
        def edit(folder: Path) -> None:
            file = folder / "adapter_model.safetensors"
            save_file({k: change(t) for k, t in load_file(file).items()}, file)

        return edit

    yield "float64", everywhere(lambda t: t.double()), "good"
    yield "a denormal", everywhere(_filled(1e-40)), "itself"
    yield "alpha 0", _configured({"lora_alpha": 0}), "base"
    yield "alpha negative", _configured({"lora_alpha": -16}), "itself"
    yield (
        "unknown fields",
        _configured({"corda_config": None, "new_field_of_2027": {"a": [1]}}),
        "good",
    )


def _on(module: str, side: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Change:
    def edit(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        key = next(k for k in tensors if f"{module}.{side}" in k)
        changed = change(tensors.pop(key))
        if changed is not None:
            tensors[key] = changed.contiguous()
        save_file(tensors, file)

    return edit


def _filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


_TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "missing": lambda t: None,
    "a row too few": lambda t: t[:-1],
    "a row too many": lambda t: torch.cat([t, t[:1]]),
    "a column too few": lambda t: t[:, :-1],
    "a column too many": lambda t: torch.cat([t, t[:, :1]], 1),
    "transposed": lambda t: t.T,
    "one dimension": lambda t: t.flatten(),
    "three dimensions": lambda t: t[None],
    "a number": lambda t: t[0, 0],
    "empty": lambda t: t[:0],
    "NaN": _filled(float("nan")),
    "infinite": _filled(float("inf")),
    "minus infinite": _filled(float("-inf")),
    "too large for the slots": lambda t: t.double() * 1e300,
    "int8": lambda t: t.to(torch.int8),
    "int64": lambda t: t.to(torch.int64),
    "bool": lambda t: t > 0,
    "float8": lambda t: t.to(torch.float8_e4m3fn),
}


def _renamed(module: str, rename: Callable[[str], str]) -> Change:
    def edit(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        save_file({rename(k) if module in k else k: t for k, t in tensors.items()}, file)

    return edit


_NAMES: dict[str, Callable[[str], str]] = {
    "layer 99": lambda k: k.replace("layers.0.", "layers.99.").replace("layers.1.", "layers.99."),
    "another word": lambda k: k.replace("_proj", "_prog").replace("gate.", "gape."),
    "no layer": lambda k: k.replace("layers.", "strata."),
    "another model's prefix": lambda k: k.replace("base_model.model.", "base_model.model.mtp."),
    "path tricks": lambda k: "../../" + k,
    "no factor": lambda k: k.replace("lora_A", "lora_C").replace("lora_B", "lora_C"),
    "two adapters": lambda k: k.replace(".weight", ".other.weight"),
    "a bias": lambda k: k.replace("lora_A.weight", "lora_B.bias"),
}


def _expert_99(key: str) -> str:
    return key.replace("experts.3.", "experts.99.")


def _expert_minus_1(key: str) -> str:
    return key.replace("experts.7.", "experts.-1.")


def _twice(module: str) -> Change:
    def edit(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        again = {
            key.replace("base_model.model.", ""): tensor * 2
            for key, tensor in tensors.items()
            if module in key
        }
        save_file({**tensors, **again}, file)

    return edit


def _bytes(change: Callable[[bytes], bytes]) -> Change:
    def edit(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return edit


def _header(change: Callable[[dict], object]) -> Change:
    def bend(data: bytes) -> bytes:
        size = struct.unpack("<Q", data[:8])[0]
        table = json.loads(data[8 : 8 + size])
        out = json.dumps(change(table)).encode()
        return struct.pack("<Q", len(out)) + out + data[8 + size :]

    return _bytes(bend)


def _first(table: dict, **entries: object) -> dict:
    key = next(k for k in table if k != "__metadata__")
    return {**table, key: {**table[key], **entries}}


_FILES: dict[str, Change] = {
    "empty": _bytes(lambda d: b""),
    "eight bytes": _bytes(lambda d: d[:8]),
    "cut in the header": _bytes(lambda d: d[:200]),
    "cut in half": _bytes(lambda d: d[: len(d) // 2]),
    "a byte short": _bytes(lambda d: d[:-1]),
    "a byte too long": _bytes(lambda d: d + b"\0"),
    "wrong magic": _bytes(lambda d: b"\x80\x04" + d[2:]),
    "a header of 2^60 bytes": _bytes(lambda d: struct.pack("<Q", 2**60) + d[8:]),
    "a header of nothing": _bytes(lambda d: struct.pack("<Q", 0) + d[8:]),
    "no JSON": _bytes(lambda d: d[:8] + b"x" * 100 + d[108:]),
    "a list for a header": _header(lambda t: [1, 2, 3]),
    "no tensors": _header(lambda t: {}),
    "an offset past the end": _header(lambda t: _first(t, data_offsets=[0, 2**62])),
    "a negative offset": _header(lambda t: _first(t, data_offsets=[-4, 4])),
    "a huge shape": _header(lambda t: _first(t, shape=[2**40, 2**40])),
    "a negative shape": _header(lambda t: _first(t, shape=[-1, 128])),
    "an unknown dtype": _header(lambda t: _first(t, dtype="F4096")),
    "an entry that is no table": _header(lambda t: {**t, "x.lora_A.weight": 3}),
    "deep nesting": _bytes(lambda d: struct.pack("<Q", 200_000) + b"[" * 200_000),
    "a zip": _bytes(lambda d: b"PK\x03\x04" + d),
    "text": _bytes(lambda d: b"version https://git-lfs.github.com/spec/v1\n"),
}

_CONFIGS: dict[str, dict[str, object] | str] = {
    "no JSON": "{",
    "a list": "[]",
    "empty": "",
    "binary": "\x00\x01",
    "deep nesting": "[" * 100_000,
    "r 0": {"r": 0},
    "r negative": {"r": -8},
    "r missing": {"r": None},
    "r text": {"r": "8"},
    "r a fraction": {"r": 8.5},
    "r too small": {"r": 4},
    "r above the limit": {"r": 512},
    "alpha missing": {"lora_alpha": None},
    "alpha text": {"lora_alpha": "16"},
    "alpha a list": {"lora_alpha": [16]},
    "alpha NaN": {"lora_alpha": float("nan")},
    "alpha infinite": {"lora_alpha": float("inf")},
    "alpha 1e300": {"lora_alpha": 1e300},
    "rank_pattern a list": {"rank_pattern": [1]},
    "rank_pattern no regex": {"rank_pattern": {"(": 8}},
    "rank_pattern of 0": {"rank_pattern": {"q_proj": 0}},
    "rank_pattern too small": {"rank_pattern": {"up_proj": 2}},
    "alpha_pattern NaN": {"alpha_pattern": {"up_proj": float("nan")}},
    "alpha_pattern no regex": {"alpha_pattern": {"[": 8}},
    "layout unknown": {"moe_lora_layout": "sideways"},
    "column order unknown": {"lora_B_layout": "sideways"},
    "rows unknown": {"moe_lora_gate_up": "sideways"},
    "DoRA": {"use_dora": True},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "PiSSA": {"init_lora_weights": "pissa"},
    "aLoRA": {"alora_invocation_tokens": [1, 2]},
    "QALoRA": {"use_qalora": True},
    "layer replication": {"layer_replication": [[0, 1], [0, 1]]},
}


def _configured(entries: dict[str, object] | str) -> Change:
    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        if isinstance(entries, str):
            file.write_text(entries)
            return
        config = {**json.loads(file.read_text()), **entries}
        file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return edit


def _many(folder: Path) -> None:
    tensors = {f"model.layers.{i}.x.lora_A.weight": torch.ones(1, 1) for i in range(20_000)}
    save_file(tensors, folder / "adapter_model.safetensors")


def _a_million(folder: Path) -> None:
    """Written by hand: safetensors takes headers of up to 100 MB."""
    one = '"a.{i}.lora_A.weight":{{"dtype":"F32","shape":[1,1],"data_offsets":[{a},{b}]}}'
    entries = (one.format(i=i, a=4 * i, b=4 * i + 4) for i in range(1_000_000))
    text = ("{" + ",".join(entries) + "}").encode()
    data = struct.pack("<Q", len(text)) + text + bytes(4_000_000)
    (folder / "adapter_model.safetensors").write_bytes(data)


def _two_layouts(folder: Path) -> None:
    """Layer 0's experts once more, as one stack."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.0.mlp.experts.base_layer"
    tensors[f"{name}.lora_A.weight"] = torch.ones(8 * 6, 128)
    tensors[f"{name}.lora_B.weight"] = torch.ones(256, 8 * 6)
    save_file(tensors, file)


def _as_folder(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").mkdir()


def _loop(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    os.symlink("adapter_model.safetensors", folder / "adapter_model.safetensors")


def _pickle(folder: Path) -> None:
    """A pickle that would make a file if it were executed."""
    (folder / "adapter_model.safetensors").unlink()
    code = f"import pathlib; pathlib.Path({str(folder / 'executed')!r}).touch()"

    class Trap:
        def __reduce__(self) -> object:
            return exec, (code,)

    torch.save(
        {"model.layers.0.self_attn.q_proj.lora_A.weight": Trap()}, folder / "adapter_model.bin"
    )


_FOLDERS: dict[str, Change] = {
    "no weights": lambda f: (f / "adapter_model.safetensors").unlink(),
    "no config": lambda f: (f / "adapter_config.json").unlink(),
    "weights a folder": _as_folder,
    "weights a symlink to itself": _loop,
    "a pickle with code": _pickle,
    "20,000 unknown tensors": _many,
    "1,000,000 unknown tensors": _a_million,
    "two layouts in one layer": _two_layouts,
}
