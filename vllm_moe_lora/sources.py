"""Finds the source text of a hook's target in a folder of vLLM's files, without importing vLLM.

The scripts in ci/ use it to record hashes, and `patchset` to place seams.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Reader = Callable[[Path], str]  # returns the text of a file


def read(file: Path) -> str:
    """Return the text of a file. Raises OSError or UnicodeError."""
    return file.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Found:
    """The place where a target is defined.

    Attributes:
        file: the file of the definition.
        module: the module of that file. It differs from the target's module if that one only
            imports the name.
        node: the definition in the file's syntax tree.
        inherited: whether a base class defines the target.
    """

    file: Path
    module: str
    node: Definition
    inherited: bool = False

    @property
    def line(self) -> int:
        """The number of the definition's first line, from 1. A decorator counts as part of it."""
        return min([self.node.lineno, *(d.lineno for d in self.node.decorator_list)])


def target_text(tree: Path, target: str, reader: Reader = read) -> str:
    """Return the source of "package.module:Class.method".

    The text is the same as `patching.source_text` returns for the imported object, so both have
    the same hash. Arguments and errors are those of `find`.
    """
    found = find(tree, target, reader)
    lines = [f"{line}\n" for line in reader(found.file).split("\n")]
    # inspect.getsource uses the same function. The syntax tree does not do, because it does not
    # contain the comments at the end of a body.
    return textwrap.dedent("".join(inspect.getblock(lines[found.line - 1 :]))).rstrip() + "\n"


def find(tree: Path, target: str, reader: Reader = read) -> Found:
    """Find the definition of "package.module:Class.method".

    Names that the module imports are followed to their own module. Inherited methods are found in
    the base classes.

    Args:
        tree: the folder that contains the package, for example site-packages.
        target: as in `patching.Hook.target`.
        reader: returns the text of a file.

    Raises:
        LookupError: the tree has no such module, class or function.
    """
    module, _, path = target.partition(":")
    return _Finder(tree, reader).find(module, path.split("."))


def module_file(tree: Path, module: str) -> Path:
    """Return the file of a module below ``tree``. Raises LookupError if there is none."""
    base = tree.joinpath(*module.split("."))
    for file in (base.with_suffix(".py"), base / "__init__.py"):
        if file.is_file():
            return file
    raise LookupError(f"there is no module {module} in {tree}")


@functools.lru_cache(maxsize=256)
def parse(text: str) -> ast.Module:
    """Like `ast.parse`, with a cache. Do not change the tree. Raises SyntaxError."""
    return ast.parse(text)


def find_definition(body: list[ast.stmt], name: str) -> Definition | None:
    """Return the last function or class with this name in ``body``; None if there is none.

    A property's setter and deleter have the property's name. They are skipped, because
    `patching.source_text` takes the getter's source.
    """
    found: Definition | None = None
    for node in body:
        if isinstance(node, Definition) and node.name == name:
            decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
            if not decorators & {f"{name}.setter", f"{name}.deleter"}:
                found = node
    return found


@dataclass(frozen=True)
class _Finder:
    """`find`, which calls itself for imported names and base classes."""

    tree: Path
    reader: Reader

    def find(self, module: str, path: list[str]) -> Found:
        file = module_file(self.tree, module)
        parsed = parse(self.reader(file))
        node = find_definition(parsed.body, path[0])
        if node is not None:
            if len(path) == 1:
                return Found(file, module, node)
            if isinstance(node, ast.ClassDef):
                return self.member(Found(file, module, node), path[1:])
        for statement in parsed.body:
            if isinstance(statement, ast.ImportFrom) and statement.module:
                for name in statement.names:
                    if (name.asname or name.name) == path[0]:
                        source = _imported_module(module, statement, file)
                        return self.find(source, [name.name, *path[1:]])
        raise LookupError(f"{module} does not define {'.'.join(path)}")

    def member(self, owner: Found, path: list[str]) -> Found:
        assert isinstance(owner.node, ast.ClassDef)
        node = find_definition(owner.node.body, path[0])
        if node is not None:
            return replace(owner, node=node)
        for base in owner.node.bases:
            if isinstance(base, ast.Name):
                try:
                    return replace(self.find(owner.module, [base.id, *path]), inherited=True)
                except LookupError:
                    continue
        raise LookupError(f"{owner.module}:{owner.node.name} does not define {'.'.join(path)}")


def _imported_module(module: str, node: ast.ImportFrom, file: Path) -> str:
    """Return the absolute name of the module that ``from ... import`` in ``module`` names."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    drop = node.level - 1 if file.name == "__init__.py" else node.level
    return ".".join([*parts[: len(parts) - drop], *([node.module] if node.module else [])])
