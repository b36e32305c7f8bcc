"""A patch as `git format-patch` writes it, the same on every machine."""

from __future__ import annotations

import hashlib
import re
import textwrap
from collections.abc import Callable, Iterable

from vllm_moe_lora.patching import Hook
from vllm_moe_lora.patchset.series import FIRST, Patch

CONTEXT = 3
AUTHOR = "vllm-moe-lora <vllm-moe-lora@localhost>"
DATE = "Thu, 1 Jan 2026 00:00:00 +0000"

# What each patch does, in the style of vLLM's own subjects; at most 80 characters. Every feature in
# supported.toml has one: a feature's name says too little.
SUBJECTS = {
    FIRST: "[Misc][LoRA] Add the decorator that applies LoRA fixes for MoE models",
    "adapters": "[Bugfix][LoRA] Read every layout of routed experts, account for every tensor",
    "base-weights": "[Bugfix][LoRA] Keep adapters of MoE models when base weights are reloaded",
    "compile-cache": "[Bugfix][LoRA] Key compiled artefacts of MoE models by these patches, too",
    "cpu-compile": "[Feature][LoRA][CPU] Compile MoE models with LoRA, too",
    "cpu-dense-lora": "[Bugfix][LoRA][CPU] Add no adapter to base tokens of MoE models",
    "cpu-experts": "[Feature][LoRA][CPU] Apply LoRA to unquantized MoE experts",
    "cpu-int4-experts": "[Feature][LoRA][CPU] Apply LoRA to INT4 MoE experts",
    "data-parallel": "[Bugfix][LoRA] Keep adapters of data-parallel ranks without requests",
    "data-parallel-gpu": "[Bugfix][LoRA] Apply adapters of other data-parallel ranks' tokens",
    "gpu-experts": "[Bugfix][LoRA] Correct LoRA on GPU experts: Llama-4, gpt-oss, TRT-LLM",
    "isolation": "[Bugfix][LoRA] Clear recycled KV cache blocks of engines that run adapters",
    "model-classes": "[LoRA] Declare LoRA for MoE classes that lack it, such as Kimi K2.5's",
    "moe-kernels": "[Kernel][LoRA] Add MoE kernels in Triton behind VLLM_MOE_LORA_KERNELS",
    "parallel-experts": "[Bugfix][LoRA] Correct MoE LoRA under tensor and expert parallelism",
    "quantised-experts": "[Bugfix][LoRA] Wrap quantized MoE layers, apply LoRA in their kernels",
    "routes": "[Feature][MoE] Return routed experts from model runner V1, too",
    "safe-loading": "[Bugfix][LoRA] Load an adapter before its requests are scheduled",
    "shared-experts": "[Bugfix][LoRA] Apply adapters to shared experts and gates of MoE layers",
    "untargeted-experts": "[LoRA] Build experts without LoRA where no adapter can reach them",
}
FIRST_BODY = """\
Adds vllm/lora/moe_lora with `seam`, a decorator that replaces the function it stands above by one
that calls it. It changes nothing by itself: each of the following patches adds one fix, with the
seams it needs and the code behind them. Importing vllm.lora.moe_lora loads nothing of vLLM, so
every module may do so."""


def in_words(feature: str) -> str:
    """Return what a feature does: its subject without vLLM's tags; "" for an unknown one."""
    return re.sub(r"^(\[\w+\])+ ", "", SUBJECTS.get(feature, ""))


def subject(patch: Patch) -> str:
    """Return the patch's first line.

    Raises:
        LookupError: `SUBJECTS` has none for the patch.
    """
    if patch.name not in SUBJECTS:
        raise LookupError(f"patchset/mail.py has no subject for the patch {patch.name}")
    return SUBJECTS[patch.name]


def message(patch: Patch) -> str:
    """What stands below the subject: why, then `Forwarded:`, `Until:` and `Hook:`."""
    if not patch.hooks:
        return textwrap.fill(FIRST_BODY, 72) + "\n"
    parts = []
    for why in _once(patch.hooks, lambda hook: hook.why):
        for hook in patch.hooks:
            if hook.why == why:
                parts.append(hook.target.replace(":", ", "))
        text = why[0].upper() + why[1:] + "."
        parts += [textwrap.fill(text, 72, initial_indent="  ", subsequent_indent="  "), ""]
    for link in _once(patch.hooks, lambda hook: hook.upstream or "not yet"):
        parts.append(f"Forwarded: {link}")
    parts += [f"Until: {until}" for until in _once(patch.hooks, lambda hook: hook.until)]
    parts += [f"Hook: {hook.target}" for hook in patch.hooks]
    return "\n".join(parts) + "\n"


def mail(patch: Patch) -> str:
    """The whole file, for `git am` and `git apply`."""
    head = (
        f"From {'0' * 40} Mon Sep 17 00:00:00 2001\n"
        f"From: {AUTHOR}\n"
        f"Date: {DATE}\n"
        f"Subject: [PATCH] {subject(patch)}\n"
        "MIME-Version: 1.0\n"
        "Content-Type: text/plain; charset=UTF-8\n"
        "Content-Transfer-Encoding: 8bit\n"
        f"\n{message(patch)}---\n\n"
    )
    return head + "".join(diff(path, *texts) for path, texts in sorted(patch.files.items()))


def diff(path: str, before: str | None, after: str) -> str:
    """The change of one file, in git's form, where ``after`` only adds lines.

    Raises:
        ValueError: it does more than that.
    """
    old, new = (_lines(path, text) for text in (before or "", after))
    out = [f"diff --git a/{path} b/{path}\n"]
    if before is None:
        out.append("new file mode 100644\n")
        out.append(f"index {'0' * 40}..{_blob(after)}\n--- /dev/null\n+++ b/{path}\n")
    else:
        out.append(f"index {_blob(before)}..{_blob(after)} 100644\n")
        out.append(f"--- a/{path}\n+++ b/{path}\n")
    for hunk in _hunks(_marked(path, old, new)):
        out += hunk
    return "".join(out)


def _marked(path: str, old: list[str], new: list[str]) -> list[tuple[str, str]]:
    """Each new line with " " or "+"."""
    found, at = [], 0
    for line in new:
        kept = at < len(old) and old[at] == line
        at += kept
        found.append((" " if kept else "+", line))
    if at < len(old):
        raise ValueError(f"{path}: a line is taken away: {old[at]!r}")
    return found


def _hunks(marked: list[tuple[str, str]]) -> Iterable[list[str]]:
    spots = [i for i, (sign, _) in enumerate(marked) if sign == "+"]
    kept = 0  # lines of the old file before `done`
    done = 0
    while spots:
        first = max(0, spots[0] - CONTEXT)
        end = first
        while spots and spots[0] - CONTEXT <= end:
            end = min(len(marked), spots.pop(0) + 1 + CONTEXT)
        kept += sum(sign == " " for sign, _ in marked[done:first])
        old = sum(sign == " " for sign, _ in marked[first:end])
        # A range of no lines is named by the line before it.
        start = kept + 1 if old else kept
        yield [
            f"@@ -{start},{old} +{first + 1},{end - first} @@\n",
            *(sign + line for sign, line in marked[first:end]),
        ]
        kept, done = kept + old, end


def _lines(path: str, text: str) -> list[str]:
    if text and not text.endswith("\n"):
        raise ValueError(f"{path}: no newline at its end")
    return [f"{line}\n" for line in text.split("\n")[:-1]]


def _blob(text: str) -> str:
    """Git's name of a file with this text, by which `git am -3` finds it."""
    data = text.encode()
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()


def _once(hooks: Iterable[Hook], key: Callable[[Hook], str]) -> list[str]:
    return list(dict.fromkeys(key(hook) for hook in hooks))
