"""Source text of a hook's target read from a tree of vLLM's files, without importing anything."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from pathlib import Path

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def target_text(tree: Path, target: str) -> str:
    """The text of "package.module:Class.method", as `patching.source_text` gives it.

    Methods that a class inherits are looked up in its bases, through the module's own imports.

    Args:
        tree: the folder that holds the package (for example site-packages).
        target: as in `patching.Hook.target`.

    Raises:
        LookupError: the tree has no such module, class or function.
    """
    module, _, path = target.partition(":")
    file, node = _find(tree, module, path.split("."))
    lines = file.read_text().splitlines(keepends=True)
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    # The same function that inspect.getsource uses: comments may end a body, and the tree of
    # the parser does not know them.
    return textwrap.dedent("".join(inspect.getblock(lines[first - 1 :]))).rstrip() + "\n"


@functools.cache
def _parse(tree: Path, module: str) -> tuple[Path, ast.Module]:
    base = tree.joinpath(*module.split("."))
    for file in (base.with_suffix(".py"), base / "__init__.py"):
        if file.is_file():
            return file, ast.parse(file.read_text())
    raise LookupError(f"no module {module} below {tree}")


def _defined(body: list[ast.stmt], name: str) -> Definition | None:
    """What ``name`` is bound to at the end of ``body``: its last definition.

    The setter and deleter of a property are passed over, its source is its getter's.
    """
    found: Definition | None = None
    for node in body:
        if isinstance(node, Definition) and node.name == name:
            marks = {ast.unparse(decorator) for decorator in node.decorator_list}
            if not marks & {f"{name}.setter", f"{name}.deleter"}:
                found = node
    return found


def _find(tree: Path, module: str, path: list[str]) -> tuple[Path, Definition]:
    file, parsed = _parse(tree, module)
    node = _defined(parsed.body, path[0])
    if node is not None:
        if len(path) == 1:
            return file, node
        if isinstance(node, ast.ClassDef):
            return _find_member(tree, module, file, node, path[1:])
    for statement in parsed.body:
        if isinstance(statement, ast.ImportFrom) and statement.module:
            for name in statement.names:
                if (name.asname or name.name) == path[0]:
                    return _find(tree, _absolute(module, statement, file), [name.name, *path[1:]])
    raise LookupError(f"{module} has no {'.'.join(path)}")


def _find_member(
    tree: Path, module: str, file: Path, owner: ast.ClassDef, path: list[str]
) -> tuple[Path, Definition]:
    node = _defined(owner.body, path[0])
    if node is not None:
        return file, node
    for base in owner.bases:
        if isinstance(base, ast.Name):
            try:
                return _find(tree, module, [base.id, *path])
            except LookupError:
                continue
    raise LookupError(f"{module}:{owner.name} has no {'.'.join(path)}")


def _absolute(module: str, node: ast.ImportFrom, file: Path) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    drop = node.level - 1 if file.name == "__init__.py" else node.level
    return ".".join([*parts[: len(parts) - drop], *([node.module] if node.module else [])])
