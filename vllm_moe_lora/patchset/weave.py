"""Adds seams to the text of one of vLLM's files, and removes them again.

A seam is a decorator that applies a hook; see seams.py.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

from vllm_moe_lora.sources import find_definition, parse

IMPORT = "from vllm.lora import moe_lora\n"
WIDTH = 88  # the longest line in vLLM's code style

_CALL = r'moe_lora\.seam\("[\w-]+"(?:, (?:__name__|"[\w.]+"))?\)'
# The forms of text that `add_seams` adds; `remove_seams` deletes what these patterns match.
_PATTERNS = [
    re.compile(rf"^{re.escape(IMPORT)}", re.MULTILINE),
    re.compile(rf"^\n(\w+) = {_CALL}\((?:\1|\n    \1\n)\)\n", re.MULTILINE),
    re.compile(
        rf"^\n +@{_CALL}\n +def (\w+)\(self, \*args, \*\*kwargs\):\n"
        r" +return super\(\)\.\1\(\*args, \*\*kwargs\)\n",
        re.MULTILINE,
    ),
    re.compile(
        rf"^\n +@{_CALL}\n +@property\n +def (\w+)\(self\):\n +return super\(\)\.\1\n", re.MULTILINE
    ),
    re.compile(rf"^ *@{_CALL}\n", re.MULTILINE),
]


class SeamError(Exception):
    """A seam cannot be added to a file. The text says which seam, and why."""


@dataclass(frozen=True)
class Seam:
    """One seam in one file.

    Attributes:
        feature: the hook's feature.
        name: what is decorated: "Class.method" or "function".
        kind: the form of the seam. "def": a decorator above the definition. "override" or
            "property": a new, decorated method or property that calls the inherited one. "name":
            an assignment after the imports, which replaces an imported name.
        module: the module in the hook's target; "" if that is where the definition is.
    """

    feature: str
    name: str
    kind: str = "def"
    module: str = ""


def add_seams(text: str, seams: Iterable[Seam]) -> str:
    """Return ``text`` with the seams and the import that they need. Only whole lines are added.

    Raises:
        SeamError: there is no place for a seam, or `remove_seams` could not remove it again.
    """
    seams = list(seams)
    if not seams:
        return text
    tree = parse(text)
    added = [(_import_line(tree), IMPORT), *(_position(tree, seam) for seam in seams)]
    old, new, at = text.split("\n"), [], 0
    # Sort by the line only, so that seams in one place keep their order.
    for after, block in sorted(added, key=lambda one: one[0]):
        new += [*old[at:after], block.removesuffix("\n")]
        at = after
    result = "\n".join(new + old[at:])
    if remove_seams(result) != text:
        raise SeamError("the seams could not be removed again, as the file has similar text")
    return result


@functools.lru_cache(maxsize=128)  # the same files are read for each of their hooks
def remove_seams(text: str) -> str:
    """Return ``text`` without what `add_seams` added."""
    if "moe_lora" not in text:
        return text
    for pattern in _PATTERNS:
        text = pattern.sub("", text)
    return text


def _position(tree: ast.Module, seam: Seam) -> tuple[int, str]:
    """Return the number of the line after which to add text, and the text."""
    where = {"name": "__name__", "def": f'"{seam.module}"'}.get(seam.kind, "")
    call = f'moe_lora.seam("{seam.feature}"' + (f", {where})" if seam.module else ")")
    if seam.kind == "name":
        block = f"\n{seam.name} = {call}({seam.name})\n"
        if len(block) > WIDTH + 2:
            block = f"\n{seam.name} = {call}(\n    {seam.name}\n)\n"
        return _last_import(tree), block
    *parents, name = seam.name.split(".")
    body, owner = tree.body, None
    for parent in parents:
        owner = find_definition(body, parent)
        if not isinstance(owner, ast.ClassDef):
            raise SeamError(f"{seam.name}: there is no class {parent}")
        body = owner.body
    if seam.kind in ("override", "property"):
        if owner is None:
            raise SeamError(f"{seam.name} is not a method of a class")
        pad = " " * body[-1].col_offset
        if seam.kind == "property":
            lines = ["@property", f"def {name}(self):", f"    return super().{name}"]
        else:
            lines = [f"def {name}(self, *args, **kwargs):"]
            lines.append(f"    return super().{name}(*args, **kwargs)")
        return _end(owner), "\n" + "".join(f"{pad}{line}\n" for line in [f"@{call}", *lines])
    node = find_definition(body, name)
    if node is None:
        raise SeamError(f"{seam.name} is not defined in this file")
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return first - 1, f"{' ' * node.col_offset}@{call}\n"


def _import_line(tree: ast.Module) -> int:
    """Return the number of the line after which isort would put our import."""
    before: ast.stmt | None = None
    for node in _imports(tree):
        if _from(node).startswith("vllm.") and _from(node) > "vllm.lora":
            # After the import before it, not above this one: there may be a comment about it.
            beside = before is not None and _from(before).split(".")[0] == "vllm"
            return _end(before) if before and beside else node.lineno - 1
        before = node
    return _last_import(tree)


def _from(node: ast.stmt) -> str:
    """Return the module of an absolute ``from module import ...``, "" for other statements."""
    absolute = isinstance(node, ast.ImportFrom) and not node.level
    return str(getattr(node, "module", "")).lower() if absolute else ""


def _last_import(tree: ast.Module) -> int:
    return _end(_imports(tree)[-1])


def _imports(tree: ast.Module) -> list[ast.stmt]:
    """Return the import statements above the first function or class. Raises SeamError."""
    found: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            break
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
    if not found:
        raise SeamError("the file imports nothing, so there is no place for our import")
    return found


def _end(node: ast.stmt) -> int:
    if node.end_lineno is None:
        raise SeamError("Python's parser does not say where a definition ends")
    return node.end_lineno
