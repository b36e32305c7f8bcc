"""Source text of a hook's target read from a tree of vLLM's files, without importing anything."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Reader = Callable[[Path], str]


def read(file: Path) -> str:
    """A file's text."""
    return file.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Found:
    """Where a target is defined.

    Attributes:
        file: the file, with the module's name.
        module: of the file; another than the target's where that one imports the name.
        node: the definition.
        inherited: a base of the target's class defines it.
    """

    file: Path
    module: str
    node: Definition
    inherited: bool = False

    @property
    def line(self) -> int:
        """The definition's first line, from 1, decorators included."""
        return min([self.node.lineno, *(d.lineno for d in self.node.decorator_list)])


def target_text(tree: Path, target: str, reader: Reader = read) -> str:
    """The text of "package.module:Class.method", as `patching.source_text` gives it.

    Arguments and errors are those of `find`.
    """
    found = find(tree, target, reader)
    lines = [f"{line}\n" for line in reader(found.file).split("\n")]
    # The same function that inspect.getsource uses: comments may end a body, and the tree of
    # the parser does not know them.
    return textwrap.dedent("".join(inspect.getblock(lines[found.line - 1 :]))).rstrip() + "\n"


def find(tree: Path, target: str, reader: Reader = read) -> Found:
    """The definition of "package.module:Class.method".

    Methods that a class inherits are looked up in its bases, through the module's own imports.

    Args:
        tree: the folder that holds the package (for example site-packages).
        target: as in `patching.Hook.target`.
        reader: gives a file's text.

    Raises:
        LookupError: the tree has no such module, class or function.
    """
    module, _, path = target.partition(":")
    return _Finder(tree, reader).find(module, path.split("."))


def module_file(tree: Path, module: str) -> Path:
    """The file of a module. Raises LookupError."""
    base = tree.joinpath(*module.split("."))
    for file in (base.with_suffix(".py"), base / "__init__.py"):
        if file.is_file():
            return file
    raise LookupError(f"no module {module} below {tree}")


@functools.lru_cache(maxsize=256)
def parse(text: str) -> ast.Module:
    """`ast.parse`, once for each text; the tree is not to be changed."""
    return ast.parse(text)


def defined(body: list[ast.stmt], name: str) -> Definition | None:
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


@dataclass(frozen=True)
class _Finder:
    tree: Path
    reader: Reader

    def find(self, module: str, path: list[str]) -> Found:
        file = module_file(self.tree, module)
        parsed = parse(self.reader(file))
        node = defined(parsed.body, path[0])
        if node is not None:
            if len(path) == 1:
                return Found(file, module, node)
            if isinstance(node, ast.ClassDef):
                return self.member(Found(file, module, node), path[1:])
        for statement in parsed.body:
            if isinstance(statement, ast.ImportFrom) and statement.module:
                for name in statement.names:
                    if (name.asname or name.name) == path[0]:
                        home = _absolute(module, statement, file)
                        return self.find(home, [name.name, *path[1:]])
        raise LookupError(f"{module} has no {'.'.join(path)}")

    def member(self, owner: Found, path: list[str]) -> Found:
        assert isinstance(owner.node, ast.ClassDef)
        node = defined(owner.node.body, path[0])
        if node is not None:
            return replace(owner, node=node)
        for base in owner.node.bases:
            if isinstance(base, ast.Name):
                try:
                    return replace(self.find(owner.module, [base.id, *path]), inherited=True)
                except LookupError:
                    continue
        raise LookupError(f"{owner.module}:{owner.node.name} has no {'.'.join(path)}")


def _absolute(module: str, node: ast.ImportFrom, file: Path) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    drop = node.level - 1 if file.name == "__init__.py" else node.level
    return ".".join([*parts[: len(parts) - drop], *([node.module] if node.module else [])])
