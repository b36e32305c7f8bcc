"""Finds the sentences that a user may see: string literals of the package's code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "vllm_moe_lora"
# Rooms whose errors and warnings end up in a user's log. The commands print cures of their own, and
# what kernels/ raises is caught and logged by layers/gpu.
ROOMS = ("adapters", "fitting", "hooks", "layers", "loading", "models", "platforms", "rl")
ROOMS += ("targets",)
FILES = ("envs.py", "plugin.py", "trigger.py")
CALLERS = ("rl/convert_routes.py",)  # errors of a trainer's own call, shown where it is made
HOOK_DATA = {"why", "upstream", "until", "target", "releases"}
WORDS = 5  # fewer are no sentence


def pieces() -> Iterator[tuple[str, str]]:
    """Yield (file, the longest piece between two placeholders) of each sentence."""
    files = [file for room in ROOMS for file in sorted((PACKAGE / room).rglob("*.py"))]
    for file in [*files, *(PACKAGE / name for name in FILES)]:
        if file.relative_to(PACKAGE).as_posix() in CALLERS:
            continue
        tree = ast.parse(file.read_text())
        skipped = set(_not_shown(tree))
        for node in ast.walk(tree):
            if id(node) in skipped:
                continue
            if isinstance(node, ast.JoinedStr):
                skipped |= {id(one) for one in ast.walk(node)}
                texts = [one.value for one in node.values if isinstance(one, ast.Constant)]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts = re.split(r"%[rds]|%\.\df|\{[^}]*\}", node.value)
            else:
                continue
            longest = max((" ".join(str(text).split()) for text in texts), key=len, default="")
            if len(longest.split()) >= WORDS and "Tensor" not in longest:  # no operator's schema
                yield file.relative_to(PACKAGE).as_posix(), longest


def _not_shown(tree: ast.AST) -> Iterator[int]:
    """Yield the ids of docstrings, of what hooks say of themselves, and of assertions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr | ast.Assert):
            if isinstance(node, ast.Assert) or isinstance(node.value, ast.Constant):
                yield from (id(one) for one in ast.walk(node))
        elif isinstance(node, ast.keyword) and node.arg in HOOK_DATA:
            yield from (id(one) for one in ast.walk(node.value))
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value in HOOK_DATA:
                    yield from (id(one) for one in ast.walk(value))
