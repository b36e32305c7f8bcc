"""Finds the files of this package that a hook needs, so that a patch contains only those.

It reads the import statements in the source files.
"""

from __future__ import annotations

import ast
import functools
import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from vllm_moe_lora import hooks as hooks_package
from vllm_moe_lora.patching import Hook
from vllm_moe_lora.sources import parse

PACKAGE = Path(__file__).resolve().parents[1]
BASE = ("seams.py",)  # every feature needs this file, and what it imports


def closure(roots: Iterable[str]) -> set[str]:
    """Return ``roots`` and all files that they import, directly or not, also inside of functions.

    Args:
        roots: paths below the package, such as "fitting/fit.py". So is the result.

    Raises:
        LookupError: a relative import names no file.
    """
    found: set[str] = set()
    todo = list(roots)
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += _inits(path)
            todo += _imports(path, (PACKAGE / path).read_text(encoding="utf-8"))
    return found


def files_needed(hooks: Iterable[Hook]) -> set[str]:
    """Return the files that ``hooks`` need, as paths below the package.

    A file in hooks/ may also have hooks of other releases. What only those import is left out.
    """
    files, roots = set(), set()
    for hook in hooks:
        # The record may be in another file than its function: lora_models.py has no functions.
        files |= closure(_record_file(hook))
        make = getattr(hook.make, "func", hook.make)  # of a functools.partial
        parts = make.__module__.split(".")
        path = "/".join(parts[parts.index("hooks") :]) + ".py"
        files.add(path)
        tree = parse((PACKAGE / path).read_text(encoding="utf-8"))
        nodes = _reachable(tree, make.__qualname__.split(".")[0])
        roots |= set(_imported(path, nodes)) | set(_inits(path))
    return files | closure(roots)


def _record_file(hook: Hook) -> list[str]:
    """Return the file in hooks/ that has the record; none if the file of its function has it."""
    for module in pkgutil.iter_modules(hooks_package.__path__):
        name = f"{hooks_package.__name__}.{module.name}"
        if name != hook.make.__module__ and hook in importlib.import_module(name).HOOKS:
            return [f"hooks/{module.name}.py"]
    return []


def _reachable(tree: ast.Module, name: str) -> Iterator[ast.AST]:
    """Yield the nodes outside of functions, and those of the functions that ``name`` may call."""
    own = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if name not in own:  # not a plain function, so take everything
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


@functools.lru_cache(maxsize=256)
def _imports(path: str, text: str) -> tuple[str, ...]:
    """Return the files that a file with this text imports anywhere; each feature asks again."""
    return tuple(_imported(path, ast.walk(parse(text))))


def _imported(path: str, nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Yield the files that the relative imports among ``nodes``, of the file ``path``, name."""
    home = path.split("/")[:-1]
    for node in nodes:
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        above = home[: len(home) - node.level + 1]
        parts = [*above, *(node.module.split(".") if node.module else [])]
        if (PACKAGE.joinpath(*parts)).is_dir():
            # As in `from ..layers import x`: x is a file, or a name in the folder's __init__.
            for name in node.names:
                file = "/".join([*parts, f"{name.name}.py"])
                yield file if (PACKAGE / file).is_file() else _file(path, [*parts, "__init__"])
        else:
            yield _file(path, parts)


def _file(path: str, parts: list[str]) -> str:
    """Return the file of a module. Raises LookupError if it does not exist."""
    file = "/".join(parts) + ".py"
    if not (PACKAGE / file).is_file():
        raise LookupError(f"{path} imports {file}, which does not exist")
    return file


def _inits(path: str) -> Iterator[str]:
    """Yield the __init__ of each folder above ``path``, without that of the package itself."""
    parts = path.split("/")[:-1]
    for depth in range(1, len(parts) + 1):
        file = "/".join([*parts[:depth], "__init__.py"])
        if (PACKAGE / file).is_file():
            yield file
