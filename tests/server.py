"""vLLM's OpenAI server in its own processes, on loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path


class Server:
    """``with Server(model, folder, {"name": path}, VARIABLE="1") as server: ...``"""

    def __init__(
        self,
        model: Path,
        folder: Path,
        adapters: dict | None = None,
        options: Sequence[str] = (),
        start: Sequence[str] = ("-m", "vllm.entrypoints.openai.api_server"),
        **env: str,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / "server.log"
        command = [sys.executable, *start, "--model", str(model)]
        command += ["--skip-tokenizer-init", "--dtype", "float32"]
        command += ["--enforce-eager", "--max-model-len", "256", "--max-logprobs", "512"]
        # A block of 32 tokens: a prompt of 40 leaves one in the prefix cache.
        command += ["--block-size", "32"]
        command += ["--enable-lora", "--max-lora-rank", "16", "--max-cpu-loras", "8"]
        if adapters:
            command += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
        command += [*options, "--host", "127.0.0.1", "--port", str(port)]
        env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **env}
        with self._log.open("w") as out:
            self._process = subprocess.Popen(
                command, stdout=out, stderr=out, env={**os.environ, **env}
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Server:
        for _ in range(480):  # a busy machine takes minutes
            if self._process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2)
                return self
            except OSError:
                time.sleep(0.5)
        self._process.kill()
        raise AssertionError(self.log[-9000:])

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=60)

    def post(self, path: str, body: dict) -> tuple[int, str]:
        """Status and text of the answer."""
        try:
            with urllib.request.urlopen(self._request(path, body), timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def _request(self, path: str, body: dict) -> urllib.request.Request:
        return urllib.request.Request(
            f"{self.url}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )

    def load(self, name: str, path: Path, **more: object) -> tuple[int, str]:
        body = {"lora_name": name, "lora_path": str(path), **more}
        status, text = self.post("/v1/load_lora_adapter", body)
        return status, json.loads(text)["error"]["message"] if text.startswith("{") else text

    def log_probs(self, name: str | None, prompt: list[int]) -> dict:
        """Token id -> log-prob of the 20 likeliest tokens after ``prompt``."""
        body = {
            "model": name or self._base(),
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": 20,
            # Without a tokenizer a completion is token ids.
            "return_tokens_as_token_ids": True,
            "detokenize": False,
        }
        status, text = self.post("/v1/completions", body)
        assert status == 200, text
        top = json.loads(text)["choices"][0]["logprobs"]["top_logprobs"][0]
        return {int(key.removeprefix("token_id:")): value for key, value in top.items()}

    def tokens(self, name: str | None, prompt: list[int], number: int) -> Iterator[int]:
        """Greedy tokens after ``prompt``, each when it comes; at the end all of them came."""
        body = {
            "model": name or self._base(),
            "prompt": prompt,
            "max_tokens": number,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            "detokenize": False,
        }
        came = 0
        with urllib.request.urlopen(self._request("/v1/completions", body), timeout=300) as answer:
            for line in answer:
                text = line.decode().removeprefix("data:").strip()
                if not text or text == "[DONE]":
                    continue
                chunk = json.loads(text)
                assert "choices" in chunk, text
                for choice in chunk["choices"]:
                    for token in choice.get("token_ids") or []:
                        came += 1
                        yield token
        assert came == number

    def _base(self) -> str:
        with urllib.request.urlopen(f"{self.url}/v1/models", timeout=10) as answer:
            models = json.loads(answer.read())["data"]
        return next(str(model["id"]) for model in models if not model.get("parent"))
