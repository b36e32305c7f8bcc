"""Which of our files a feature needs, so that a patch carries those and no others."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from vllm_moe_lora import hooks as hooks_room
from vllm_moe_lora.patching import Hook
from vllm_moe_lora.sources import parse

PACKAGE = Path(__file__).resolve().parents[1]
BASE = ("seams.py",)  # what every feature needs, with what that imports


def closure(roots: Iterable[str]) -> set[str]:
    """The files below the package, "fitting/fit.py", that importing and using ``roots`` may load.

    Imports inside functions count. Raises LookupError for an import of ours that is no file.
    """
    found: set[str] = set()
    todo = list(roots)
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            tree = parse((PACKAGE / path).read_text(encoding="utf-8"))
            todo += _inits(path)
            todo += _imported(path, ast.walk(tree))
    return found


def needed(hooks: Iterable[Hook]) -> set[str]:
    """The files that ``hooks`` need.

    Of a hooks file, only the functions of these hooks count: it may hold hooks of other releases,
    whose payload is never called.
    """
    files, roots = set(), set()
    for hook in hooks:
        # The record may lie in another file than its function: lora_models.py has no functions.
        files |= closure(_records(hook))
        make = getattr(hook.make, "func", hook.make)  # a functools.partial
        parts = make.__module__.split(".")
        path = "/".join(parts[parts.index("hooks") :]) + ".py"
        files.add(path)
        tree = parse((PACKAGE / path).read_text(encoding="utf-8"))
        nodes = _reachable(tree, make.__qualname__.split(".")[0])
        roots |= set(_imported(path, nodes)) | set(_inits(path))
    return files | closure(roots)


def _records(hook: Hook) -> list[str]:
    """The file of hooks/ that has the record, unless its function's own has it."""
    for module in pkgutil.iter_modules(hooks_room.__path__):
        name = f"{hooks_room.__name__}.{module.name}"
        if name != hook.make.__module__ and hook in importlib.import_module(name).HOOKS:
            return [f"hooks/{module.name}.py"]
    return []


def _reachable(tree: ast.Module, name: str) -> Iterator[ast.AST]:
    """Nodes of the module's own level, and of the functions that ``name`` may lead to."""
    own = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if name not in own:  # made in a way that is not understood here
        yield from ast.walk(tree)
        return
    yield from (
        node for top in tree.body if not isinstance(top, ast.FunctionDef) for node in ast.walk(top)
    )
    seen, todo = set(), [name]
    while todo:
        one = todo.pop()
        if one in seen:
            continue
        seen.add(one)
        for node in ast.walk(own[one]):
            yield node
            if isinstance(node, ast.Name) and node.id in own:
                todo.append(node.id)


def _imported(path: str, nodes: Iterable[ast.AST]) -> Iterator[str]:
    home = path.split("/")[:-1]
    for node in nodes:
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        above = home[: len(home) - node.level + 1]
        parts = [*above, *(node.module.split(".") if node.module else [])]
        if (PACKAGE.joinpath(*parts)).is_dir():
            # `from ..layers import aliases`: files, or names of the folder's __init__.
            for name in node.names:
                file = "/".join([*parts, f"{name.name}.py"])
                yield file if (PACKAGE / file).is_file() else _file(path, [*parts, "__init__"])
        else:
            yield _file(path, parts)


def _file(path: str, parts: list[str]) -> str:
    file = "/".join(parts) + ".py"
    if not (PACKAGE / file).is_file():
        raise LookupError(f"{path} imports {file}, which does not exist")
    return file


def _inits(path: str) -> Iterator[str]:
    """The __init__ of each folder on the way, the package's own left out."""
    parts = path.split("/")[:-1]
    for depth in range(1, len(parts) + 1):
        file = "/".join([*parts[:depth], "__init__.py"])
        if (PACKAGE / file).is_file():
            yield file
