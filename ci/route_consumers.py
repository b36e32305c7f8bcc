#!/usr/bin/env python3
"""Ask the trainers' own code whether it reads the routes that rl/convert_routes.py writes.

    ci/route_consumers.py [FOLDER]    # the wheels are fetched into it from PyPI

Functions of verl, ART and SkyRL are run out of their wheels, without what else those import.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import tempfile
import types
import zipfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vllm_moe_lora.rl import convert_routes as c  # noqa: E402

WHEELS = {"verl": "0.9.1", "openpipe-art": "0.5.23", "skyrl": "0.4.0"}


def fetch(folder: Path, name: str) -> Path:
    """Unpack the wheel of a project; it may be there already."""
    target = folder / name
    if not target.exists():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", folder]
        command += ["--python-version", "3.12", "--only-binary", ":all:"]
        subprocess.run([*command, f"{name}=={WHEELS[name]}"], check=True)
        (wheel,) = folder.glob(f"{name.replace('-', '_')}-*.whl")
        zipfile.ZipFile(wheel).extractall(target)
    return target


def functions(file: Path, *names: str, **known: object) -> types.SimpleNamespace:
    """Some functions and methods of a file, without its imports."""
    tree = ast.parse(file.read_text())
    wanted = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in names]
    space: dict[str, object] = {"torch": torch, "np": np, **known}
    code = ast.Module(body=[*ast.parse("from __future__ import annotations").body, *wanted])
    exec(compile(ast.fix_missing_locations(ast.Module(code.body, [])), str(file), "exec"), space)
    return types.SimpleNamespace(**{name: space[name] for name in names})


def module(name: str, file: Path) -> types.ModuleType:
    """A file as a module, without the packages above it."""
    for parent in (name.rsplit(".", n)[0] for n in range(name.count("."), 0, -1)):
        sys.modules.setdefault(parent, types.ModuleType(parent)).__path__ = []  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def verl(tree: Path, routes: np.ndarray, experts: int) -> None:
    loop = functions(tree / "verl/experimental/agent_loop/agent_loop.py", "as_dict").as_dict
    prompt, tokens = [1] * 5, len(routes) + 1
    answer = [1] * (tokens - 5)
    dumped = {"prompt_ids": prompt, "response_ids": answer, "response_mask": answer}
    dumped |= {"routed_experts": routes, "extra_fields": {}}
    fake = types.SimpleNamespace(
        model_dump=lambda exclude_unset: dict(dumped), reward_score=None, extra_fields={}
    )
    assert torch.equal(loop(fake)["routed_experts"], c.to_verl(routes, tokens))
    replay = functions(
        tree / "verl/utils/megatron/router_replay_utils.py",
        "align_r3_router_replay_data",
        "build_r3_replay_mask",
    )
    nested = torch.nested.as_nested_tensor([torch.arange(tokens)], layout=torch.jagged)
    rows = torch.from_numpy(routes.astype(np.int16))
    aligned = torch.nested.as_nested_tensor([rows], layout=torch.jagged)
    (found,) = replay.align_r3_router_replay_data(aligned, nested).unbind()
    by_layer, mask = c.to_megatron(routes, tokens, range(routes.shape[1]))
    (wanted,) = replay.build_r3_replay_mask(nested, torch.ones(1, len(answer))).unbind()
    assert torch.equal(mask, wanted)
    for layer, ids in by_layer.items():
        assert torch.equal(found[:, layer].to(torch.int64), ids)


def art(tree: Path, routes: np.ndarray, experts: int) -> None:
    fake = types.ModuleType("art.openai")
    fake.ART_MOE_ROUTING_METADATA_KEY = "routing"  # type: ignore[attr-defined]
    sys.modules["art.openai"] = fake
    module("art.preprocessing.moe_routing", tree / "art/preprocessing/moe_routing.py")
    transport = module("art.vllm_route_transport", tree / "art/vllm_route_transport.py")
    json = b'{"id":"a","choices":[],"created":1,"model":"m","object":"chat.completion"}'
    response, found = transport.decode_routed_experts_response(
        c.to_art(json, {0: routes, 1: routes[:4]}, experts)
    )
    assert response.id == "a"
    for index, one in ((0, routes), (1, routes[:4])):
        assert found[index].dtype == one.dtype
        assert (found[index] == one).all()


def skyrl(tree: Path, routes: np.ndarray, experts: int) -> None:
    base = tree / "skyrl/backends/skyrl_train"
    path = "skyrl.backends.skyrl_train"
    for name in ("distributed.megatron.token_metadata", "utils.sample_support"):
        other = types.ModuleType(f"{path}.{name}")
        other.__getattr__ = lambda name: object  # type: ignore[method-assign,assignment]
        sys.modules[other.__name__] = other
    sys.modules.setdefault("orjson", types.ModuleType("orjson"))  # only serialises
    for parent in ("", ".distributed", ".distributed.megatron", ".utils", ".inference_servers"):
        sys.modules.setdefault(path + parent, types.ModuleType(path + parent))
    module(f"{path}.utils.routed_experts", base / "utils/routed_experts.py")
    wire = module(
        f"{path}.inference_servers.generate_wire", base / "inference_servers/generate_wire.py"
    )
    payload = c.to_skyrl(routes)
    assert payload == wire.pack_routed_experts(routes)
    assert (wire.decode_packed_routed_experts(payload) == routes).all()
    assert (c.from_skyrl(wire.pack_routed_experts(routes), experts) == routes).all()
    padding = functions(base / "utils/replay_utils.py", "replay_padding_row").replay_padding_row
    batch = c.to_skyrl_batch([routes], [len(routes) + 1])
    assert torch.equal(batch[0, -1, 0], padding(routes.shape[2], dtype=batch.dtype))


def main(folder: Path) -> None:
    for experts in (8, 256, 300):
        random = np.random.default_rng(experts)
        # ART wants different experts for a token.
        chosen = random.random((13, 3, experts)).argsort(-1)[..., :4]
        routes = chosen.astype(c.dtype_of(experts))
        verl(fetch(folder, "verl"), routes, experts)
        art(fetch(folder, "openpipe-art"), routes, experts)
        skyrl(fetch(folder, "skyrl"), routes, experts)
    print("their own code reads them: " + ", ".join(f"{k} {v}" for k, v in WHEELS.items()))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else made))
