"""Routes out of vLLM's OpenAI server, and into it: the replies name Hugging Face's own experts."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from hf_routes import Truth
from routed_cases import LONG, NAMES, PROMPTS, case_of
from server import Server
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from vllm_moe_lora.rl.convert_routes import from_base64, to_base64

pytestmark = [pytest.mark.cpu_engine, pytest.mark.long]
COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/inference/v1/generate"
GREEDY = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
LIMIT = 1e-3  # fp32 against fp32, as in engine_cases


class Client:
    """Requests for routes, and what Hugging Face says to the replies."""

    def __init__(self, case, server):
        self.server, self.base = server, str(case.model)
        self.truth = Truth(case)

    def post(self, path, name, **body):
        status, text = self.server.post(path, {"model": name or self.base, **body})
        assert status == 200, text
        return json.loads(text)

    def complete(self, name, prompt, **more):
        """The choices of a completion of token ids."""
        body = {"prompt": prompt, "return_token_ids": True, **GREEDY, **more}
        return self.post(COMPLETIONS, name, **body)["choices"]

    def stream(self, path, name, **body):
        """The choice of each message of a stream."""
        body |= {"model": name or self.base, "stream": True}
        status, text = self.server.post(path, body)
        assert status == 200, text
        lines = [line.removeprefix("data:").strip() for line in text.splitlines() if line]
        return [json.loads(line)["choices"][0] for line in lines if line != "[DONE]"]

    def generated(self):
        """How many tokens the server has generated."""
        with urlopen(f"{self.server.url}/metrics", timeout=10) as answer:
            found = re.findall(
                r"^vllm:generation_tokens_total\{.*\} (\S+)", answer.read().decode(), re.M
            )
        return sum(map(float, found))

    def check(self, name, prompt, tokens, text, start=0):
        """The routes in a reply, whose rows are those of Hugging Face."""
        routes = from_base64(text)
        assert routes.dtype == np.uint8
        have = torch.from_numpy(routes.astype(np.int64))
        self.truth.check(name, prompt + tokens[:-1], have, start)
        return routes


@pytest.fixture(scope="module")
def case(make_case):
    return case_of(make_case)


@pytest.fixture(scope="module")
def client(case, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    plain = Tokenizer(WordLevel({f"t{i}": i for i in range(512)}, unk_token="t0"))
    plain.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(folder / "tokenizer")
    (folder / "chat.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    options = ["--enable-return-routed-experts", "--max-num-batched-tokens", "32"]
    options += ["--no-skip-tokenizer-init", "--tokenizer", str(folder / "tokenizer")]
    options += ["--chat-template", str(folder / "chat.jinja"), "--max-loras", "2"]
    options += ["--max-num-seqs", "8", "--enable-scale-out"]
    env = {"VLLM_MOE_LORA_REPLAY": "1", "TORCHDYNAMO_DISABLE": "1"}
    with Server(case.model, folder, case.adapters, options, **env) as server:
        yield Client(case, server)


def test_completions(client):
    """Mixed batches, chunks of 32 tokens, prefix hits, a part of the prompt, several answers."""
    asked = [(name, prompt) for prompt in PROMPTS for name in NAMES]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda one: client.complete(*one), asked))
    seen = {}
    for (name, prompt), [choice] in zip(asked, found, strict=True):
        seen[name] = client.check(name, prompt, choice["token_ids"], choice["routed_experts"])
    for one, other in ((None, "a"), (None, "b"), ("a", "b")):
        differs = (np.sort(seen[one][:70], -1) != np.sort(seen[other][:70], -1)).any(-1)
        assert differs.mean() > 0.2, "rows of another adapter would be noticed"
    again = [*LONG[:70], 4, 4]
    for name in NAMES:
        for start in (0, 40):
            [choice] = client.complete(name, again, routed_experts_prompt_start=start)
            text = choice["routed_experts"]
            client.check(name, again, choice["token_ids"], text, start)
    choices = client.complete("a", LONG, n=3, seed=5, temperature=1)
    assert len({tuple(choice["token_ids"]) for choice in choices}) > 1
    for choice in choices:
        client.check("a", LONG, choice["token_ids"], choice["routed_experts"])


def test_chat(client):
    content = " ".join(f"t{i}" for i in PROMPTS[2])
    for name in NAMES:
        reply = client.post(
            CHAT,
            name,
            messages=[{"role": "user", "content": content}],
            return_token_ids=True,
            **GREEDY,
        )
        assert reply["prompt_token_ids"] == PROMPTS[2]
        [choice] = reply["choices"]
        client.check(name, PROMPTS[2], choice["token_ids"], choice["routed_experts"])


def test_token_ids_in_and_out(client):
    """vLLM's scale-out endpoint; it alone has routes in a stream, in the last message."""
    for name in NAMES:
        body = {"token_ids": PROMPTS[2], "sampling_params": GREEDY}
        [choice] = client.post(GENERATE, name, **body)["choices"]
        client.check(name, PROMPTS[2], choice["token_ids"], choice["routed_experts"])
        parts = client.stream(GENERATE, name, **body)
        tokens = [token for part in parts for token in part["token_ids"] or []]
        assert tokens == choice["token_ids"]
        [routes] = [part["routed_experts"] for part in parts if part.get("routed_experts")]
        assert routes == choice["routed_experts"]
    parts = client.stream(COMPLETIONS, "a", prompt=PROMPTS[2], **GREEDY)
    assert parts[-1]["finish_reason"] == "length"
    assert not any("routed_experts" in part for part in parts), "docs/routes-and-noise.md says so"


def test_a_client_that_goes_away(client):
    """Its request is aborted amid its answer; the next ones, on its blocks, have right rows."""
    prompt, before = LONG[5:75], client.generated()
    with closing(client.server.tokens("b", prompt, 180)) as tokens:
        assert len(list(islice(tokens, 3))) == 3
    for name in ("b", "a"):
        [choice] = client.complete(name, prompt)
        client.check(name, prompt, choice["token_ids"], choice["routed_experts"])
    assert 3 <= client.generated() - before - 12 < 180


def test_replay(client):
    """Routes of a reply, changed in one row, go back: log-probs are Hugging Face's with them."""
    for name in NAMES:
        [first] = client.complete(name, PROMPTS[2])
        routes = from_base64(first["routed_experts"]).copy()
        routes[50, 0] = [e for e in range(8) if e not in routes[50, 0]][:2]
        ids = PROMPTS[2] + first["token_ids"][:-1]
        wanted = {"max_tokens": 1, "logprobs": 20, "return_tokens_as_token_ids": True}
        xargs = {"routed_experts": to_base64(routes)}
        [forced] = client.complete(name, ids, vllm_xargs=xargs, **wanted)
        assert np.array_equal(from_base64(forced["routed_experts"]), routes)
        top = forced["logprobs"]["top_logprobs"][0]
        top = {int(key.removeprefix("token_id:")): value for key, value in top.items()}
        model = client.truth.models[name]
        want, free = model(ids, routes)[0][-1], model(ids)[0][-1]
        assert max(abs(want[token].item() - value) for token, value in top.items()) <= LIMIT
        assert (want - free)[[*top]].abs().max() > 20 * LIMIT, "the row matters"
    body = {"model": "a", "prompt": PROMPTS[2], "max_tokens": 1}
    short = {"routed_experts": to_base64(routes[:9])}
    status, text = client.server.post(COMPLETIONS, {**body, "vllm_xargs": short})
    assert status == 400
    assert "there are 9 rows for a prompt of 70 tokens" in text
