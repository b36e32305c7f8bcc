"""Writes README.md beside it: each kind of bad adapter, upstream's answer and ours.

    python tests/e2e/hostile/table.py

"Upstream" is vLLM with this plugin's CPU experts only (without them it starts no MoE model with
LoRA on a CPU): its own reading, loading and scheduling of adapters.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]

from hostile.kinds import kinds  # noqa: E402
from server import Server  # noqa: E402

from vllm_moe_lora.tiny import adapters, models  # noqa: E402

PROMPT = list(range(3, 23))
UPSTREAM = "-adapters,-safe-loading,-isolation"


def main() -> None:
    import vllm

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = models.build("qwen2_moe", root / "model")
        good = adapters.write(model, root / "good", seed=1, rank=6)
        columns = [dict(_answers(model, good, root, mode)) for mode in (UPSTREAM, "auto")]
    bad = sum("refused" not in answer for answer in columns[0].values())
    lines = [
        "# Bad adapters: upstream's answer and ours",
        "",
        "Written by `python tests/e2e/hostile/table.py`, not by hand. Each kind is posted to",
        "`/v1/load_lora_adapter` of a running server (Qwen2-MoE, tiny, fp32, CPU); if it is",
        "accepted, one request uses it; then the base model and a good adapter are asked again.",
        f'"Upstream" is vLLM {vllm.__version__} with only this package\'s CPU experts, without',
        "which it serves no MoE model with LoRA on a CPU; reading, loading and scheduling are its",
        f"own. Of {len(columns[0])} kinds it does not refuse {bad}.",
        "",
        "| kind | upstream | vllm-moe-lora |",
        "|---|---|---|",
    ]
    for kind in columns[0]:
        lines.append(f"| {kind} | {columns[0][kind]} | {columns[1][kind]} |")
    (HERE / "README.md").write_text("\n".join(lines) + "\n")


def _answers(model: Path, good: Path, root: Path, mode: str) -> Iterator[tuple[str, str]]:
    """What becomes of each kind; a server that does not live through one is started again."""
    todo = list(kinds())
    while todo:
        env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_MOE_LORA": mode}
        with contextlib.suppress(Exception), Server(model, root, {"good": good}, **env) as server:
            want = {name: server.log_probs(name, PROMPT) for name in (None, "good")}
            while todo:
                kind, change = todo.pop(0)
                folder = root / "bad"
                shutil.copytree(good, folder)
                change(folder)
                try:
                    answer, healthy = _answer(server, folder, kind, want)
                except Exception as error:  # the server is gone, or hangs
                    answer, healthy = f"**the server is lost** ({type(error).__name__})", False
                shutil.rmtree(folder)
                print(f"{mode}: {kind}: {answer}", file=sys.stderr)
                yield kind, answer
                if not healthy:
                    break


def _answer(server: Server, folder: Path, kind: str, want: dict) -> tuple[str, bool]:
    status, text = server.load(kind, folder)
    if status != 200:
        text = re.sub(r"\s+", " ", text.replace(str(folder), "DIR")).replace("|", "\\|")
        answer = f"refused, {status}: {text[:150]}{'…' if len(text) > 150 else ''}"
    else:
        said = _ask(server, kind)
        answer = "accepted, **and answers**"
        if isinstance(said, str):
            answer = f"**accepted, then {said}**"
        elif said == want["good"]:
            answer = "accepted, **answers as if it were the good one**"
        elif said == want[None]:
            answer = "**accepted and ignored**"
    changed = [name or "the base model" for name, was in want.items() if _ask(server, name) != was]
    if changed:
        answer += f"; **{' and '.join(changed)} changed**"
    return answer, not changed


def _ask(server: Server, name: str | None) -> dict[int, float] | str:
    """Log-probs, or what is wrong with the answer."""
    try:
        return server.log_probs(name, PROMPT)
    except AssertionError as error:
        text = str(error)
        return "NaN" if "not JSON compliant" in text else json.loads(text)["error"]["message"][:80]


if __name__ == "__main__":
    main()
