"""Put seams into the text of one of vLLM's files, and take them out again."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass

from vllm_moe_lora.sources import defined, parse

IMPORT = "from vllm.lora import moe_lora\n"
WIDTH = 88  # of vLLM's lines

_CALL = r'moe_lora\.seam\("[\w-]+"(?:, (?:__name__|"[\w.]+"))?\)'
# What `weave` puts in, as it does: each form has a pattern here, and `unweave` proves it.
_WOVEN = [
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


class WeaveError(Exception):
    """A file in which a seam has no place; the text says which and why."""


@dataclass(frozen=True)
class Seam:
    """One seam in one file.

    Attributes:
        feature: the hook's.
        name: "Class.method" or "function".
        kind: "def", a decorator above the definition; "override" and "property", a new method or
            property that calls the inherited one; "name", a name that the file imports is bound
            to the replacement.
        module: the target's, where it is not the module of the definition.
    """

    feature: str
    name: str
    kind: str = "def"
    module: str = ""


def weave(text: str, seams: Iterable[Seam]) -> str:
    """``text`` with the import and the seams put in; only whole lines are added.

    Raises:
        WeaveError: a seam has no place in the text, or could not be told from it afterwards.
    """
    seams = list(seams)
    if not seams:
        return text
    tree = parse(text)
    added = [(_import_line(tree), IMPORT), *(_place(tree, seam) for seam in seams)]
    old, new, at = text.split("\n"), [], 0
    # By line alone: at one place, seams keep their order.
    for after, block in sorted(added, key=lambda one: one[0]):
        new += [*old[at:after], block.removesuffix("\n")]
        at = after
    woven = "\n".join(new + old[at:])
    if unweave(woven) != text:
        raise WeaveError("the seams could not be told from the file's own text")
    return woven


def unweave(text: str) -> str:
    """``text`` without what `weave` puts in; a text without seams as it is."""
    if "moe_lora" not in text:
        return text
    for pattern in _WOVEN:
        text = pattern.sub("", text)
    return text


def _place(tree: ast.Module, seam: Seam) -> tuple[int, str]:
    """After which line, and what."""
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
        owner = defined(body, parent)
        if not isinstance(owner, ast.ClassDef):
            raise WeaveError(f"no class {parent} for {seam.name}")
        body = owner.body
    if seam.kind in ("override", "property"):
        if owner is None:
            raise WeaveError(f"{seam.name} is no method")
        pad = " " * body[-1].col_offset
        if seam.kind == "property":
            lines = ["@property", f"def {name}(self):", f"    return super().{name}"]
        else:
            lines = [f"def {name}(self, *args, **kwargs):"]
            lines.append(f"    return super().{name}(*args, **kwargs)")
        return _end(owner), "\n" + "".join(f"{pad}{line}\n" for line in [f"@{call}", *lines])
    node = defined(body, name)
    if node is None:
        raise WeaveError(f"no definition of {seam.name}")
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return first - 1, f"{' ' * node.col_offset}@{call}\n"


def _import_line(tree: ast.Module) -> int:
    """After which line our import goes: where isort puts it, if the file is sorted."""
    before: ast.stmt | None = None
    for node in _imports(tree):
        if _from(node).startswith("vllm.") and _from(node) > "vllm.lora":
            # Not just above it: a comment there is about that import.
            beside = before is not None and _from(before).split(".")[0] == "vllm"
            return _end(before) if before and beside else node.lineno - 1
        before = node
    return _last_import(tree)


def _from(node: ast.stmt) -> str:
    """The module of an absolute ``from module import ...``, "" for another statement."""
    absolute = isinstance(node, ast.ImportFrom) and not node.level
    return str(getattr(node, "module", "")).lower() if absolute else ""


def _last_import(tree: ast.Module) -> int:
    return _end(_imports(tree)[-1])


def _imports(tree: ast.Module) -> list[ast.stmt]:
    """Imports at the top of the file."""
    found: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            break
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
    if not found:
        raise WeaveError("it imports nothing, so there is no place for our import")
    return found


def _end(node: ast.stmt) -> int:
    if node.end_lineno is None:
        raise WeaveError("the parser does not say where a definition ends")
    return node.end_lineno
