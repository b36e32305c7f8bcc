"""The patches of several releases: equal to hooks and payload, and git takes them."""

from __future__ import annotations

import ast
import email
import importlib
import os
import shutil
import subprocess
import sys

import pytest
import trees
from trees import RELEASES, ROOT, seamed

from vllm_moe_lora.patchset import change, export
from vllm_moe_lora.patchset import tree as look
from vllm_moe_lora.patchset.series import FIRST, HOME, hooks_of

PACKAGE = ROOT / "vllm_moe_lora"


@pytest.fixture(params=RELEASES, scope="module")
def case(request, tmp_path_factory):
    """(release, pristine copy, patched copy, the series as files)."""
    number = request.param
    before = trees.copy(number, tmp_path_factory.mktemp("before"))
    after = tmp_path_factory.mktemp("after")
    shutil.copytree(before, after, dirs_exist_ok=True)
    out = tmp_path_factory.mktemp("out")
    export.export(look.look(before, number), out)
    assert change.apply(look.look(after, number))
    return number, before, after, out


def _names(out):
    return (out / "series").read_text().split()


def test_payload_is_the_package_byte_for_byte(case):
    number, _, after, _ = case
    found = [path.relative_to(after / HOME) for path in sorted((after / HOME).rglob("*.py"))]
    assert len(found) > 8
    for path in found:
        if str(path) != "__init__.py":
            assert (after / HOME / path).read_bytes() == (PACKAGE / path).read_bytes(), path
    needed = {hook.make.__module__.rpartition(".")[2] for hook in seamed(number)}
    have = {path.stem for path in found if path.parts[0] == "hooks"} - {"__init__"}
    # lora_models.py has records of functions that are in other files.
    wanted = {(hook.target, hook.releases) for hook in seamed(number)}
    records = {name for name in have if _records_in(name) & wanted}
    assert have == needed | records, "the hooks of this release and no others"
    assert wanted <= set().union(*map(_records_in, have))


def _records_in(name):
    found = importlib.import_module(f"vllm_moe_lora.hooks.{name}").HOOKS
    return {(hook.target, hook.releases) for hook in found}


def test_payload_is_complete(case):
    """Every import of a file that is there finds one; of hooks files, what their make uses."""
    number, _, after, _ = case
    makes = {
        (hook.make.__module__.rpartition(".")[2], hook.make.__name__) for hook in hooks_of(number)
    }
    for file in sorted((after / HOME).rglob("*.py")):
        module = ast.parse(file.read_text())
        nodes = list(ast.walk(module))
        if file.parent.name == "hooks":
            unused = [
                node
                for node in module.body
                if isinstance(node, ast.FunctionDef)
                and any(hook.make.__name__ == node.name for hook in _hooks_in(file.stem))
                and (file.stem, node.name) not in makes
            ]
            skip = {id(one) for node in unused for one in ast.walk(node)}
            nodes = [node for node in nodes if id(node) not in skip]
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.level:
                folder = file.parents[node.level - 1]
                base = folder.joinpath(*(node.module or "").split("."))
                if base.is_dir():
                    for name in node.names:
                        there = (base / f"{name.name}.py").is_file()
                        text = (base / "__init__.py").read_text() if not there else ""
                        assert there or name.name in text, (file, ast.unparse(node))
                else:
                    assert base.with_suffix(".py").is_file(), (file, ast.unparse(node))


def test_hooks_import_nothing_heavy_when_they_are_imported():
    """Any module of vLLM may import vllm.lora.moe_lora, whatever is half imported by then."""
    code = (
        "import sys; from vllm_moe_lora import seams; seams.all_hooks();"
        "print([m for m in ('vllm', 'torch', 'packaging') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_changed_functions_are_the_hooks_targets(case):
    number, before, after, _ = case
    changed = set()
    for file in sorted((after / "vllm").rglob("*.py")):
        path = file.relative_to(after)
        if path.is_relative_to(HOME):
            continue
        old, new = (before / path).read_text(), file.read_text()
        if old == new:
            continue
        module = ".".join(path.with_suffix("").parts)
        have, want = _pieces(old), _pieces(new)
        assert set(have) <= set(want)
        for name in want:
            if have.get(name) != want[name]:
                changed.add(f"{module}:{name}")
        have, want = _statements(old), _statements(new)
        assert [one for one in want if one in have] == have
        added = [one for one in want if one not in have]
        assert added[0] == "from vllm.lora import moe_lora"
        for statement in added[1:]:  # names that are bound again
            name, _, value = statement.partition(" = ")
            assert value.startswith("moe_lora.seam("), statement
            assert value.endswith(f")({name})"), statement
            changed.add(f"{module}:{name}")
    assert changed == {hook.target for hook in seamed(number)}


def test_all_patches_together_are_the_recorded_features(case):
    number, _, _, out = case
    names = _names(out)
    assert names[0] == f"{FIRST}.patch"
    assert names[1:] == [
        f"{feature}.patch" for feature in sorted({h.feature for h in seamed(number)})
    ]
    assert {file.name for file in out.iterdir()} == {*names, "series"}


def test_a_patched_tree_has_the_same_series(case, tmp_path):
    number, _, after, out = case
    export.export(look.look(after, number), tmp_path)
    assert trees.snapshot(tmp_path) == trees.snapshot(out)


def test_revert_leaves_no_difference(case, tmp_path):
    number, before, after, _ = case
    shutil.copytree(after, tmp_path, dirs_exist_ok=True)
    (tmp_path / HOME / "__pycache__").mkdir()
    (tmp_path / HOME / "__pycache__" / "seams.cpython-311.pyc").write_bytes(b"python was here")
    assert trees.snapshot(tmp_path) != trees.snapshot(before)
    assert change.revert(look.look(tmp_path, number))
    assert trees.snapshot(tmp_path) == trees.snapshot(before)


def _line_of_the_readme():
    """What patches/README.md says to do with a written folder, $dir."""
    text = (ROOT / "patches" / "README.md").read_text()
    return next(line.strip() for line in text.splitlines() if "xargs git am" in line)


@pytest.mark.parametrize("how", ["am", "apply"])
def test_git_makes_the_same_tree(case, tmp_path, how):
    _, before, after, out = case
    shutil.copytree(before, tmp_path, dirs_exist_ok=True)
    trees.repository(tmp_path)
    if how == "am":
        for key, value in (("user.name", "a"), ("user.email", "a@b"), ("commit.gpgsign", "false")):
            trees.commit(tmp_path, "config", key, value)
        command = ["bash", "-euo", "pipefail", "-c", _line_of_the_readme()]
        env = {**os.environ, "dir": str(out)}
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        names = _names(out)
        log = trees.commit(tmp_path, "log", "--format=%an %s", f"-{len(names)}").splitlines()
        assert all(line.startswith("vllm-moe-lora [") for line in log), log
    else:
        trees.commit(tmp_path, "apply", "--index", *(str(out / name) for name in _names(out)))
    assert trees.snapshot(tmp_path) == trees.snapshot(after)


def test_messages_are_for_upstream(case):
    number, _, _, out = case
    for name in _names(out):
        head = (out / name).read_text().partition("\n---\n")[0]
        body = email.message_from_string(head.partition("\n")[2])
        subject = body["Subject"].removeprefix("[PATCH] ")
        assert subject.startswith("["), subject
        assert len(subject) <= 80, subject
        assert "plugin" not in head.replace("vllm.plugins.", "")
        text = body.get_payload()
        if name != f"{FIRST}.patch":
            mine = [h for h in seamed(number) if f"{h.feature}.patch" == name]
            said = [
                line.removeprefix("Hook: ")
                for line in text.splitlines()
                if line.startswith("Hook: ")
            ]
            assert sorted(said) == sorted(hook.target for hook in mine)
            flat = " ".join(text.split())
            for hook in mine:
                assert " ".join(hook.why.split())[1:] in flat
                assert f"Until: {hook.until}" in flat
                assert f"Forwarded: {hook.upstream or 'not yet'}" in flat


def _hooks_in(stem):
    from vllm_moe_lora.hooks import all_hooks

    return [hook for hook in all_hooks() if hook.make.__module__.endswith(f".{stem}")]


def _pieces(text):
    """Qualified name -> own lines of each function and class."""
    lines = text.splitlines()
    owner = [""] * len(lines)

    def visit(body, prefix):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                name = f"{prefix}{node.name}"
                owner[first - 1 : node.end_lineno] = [name] * (node.end_lineno - first + 1)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{name}.")

    visit(ast.parse(text).body, "")
    found = {}
    for line, name in zip(lines, owner, strict=True):
        if line.strip() and name:
            found.setdefault(name, []).append(line)
    return found


def _statements(text):
    """The module's own statements, but for functions and classes."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return [ast.unparse(node) for node in ast.parse(text).body if not isinstance(node, kinds)]
