"""patches/ against the hooks and the payload, for every tag there: equal, and git takes them."""

from __future__ import annotations

import ast
import email
import importlib
import importlib.util
import shutil
import subprocess
import sys

import pytest
import trees
from tool import load
from trees import PATCHES, ROOT, TAGS, seamed

from vllm_moe_lora.patchset import change
from vllm_moe_lora.patchset import tree as look
from vllm_moe_lora.patchset.series import FIRST, HOME, hooks_of

PACKAGE = ROOT / "vllm_moe_lora"


@pytest.fixture(params=TAGS, scope="module")
def case(request, tmp_path_factory):
    """(tag, release, pristine copy, patched copy)."""
    number = trees.known(request.param)
    before = trees.copy(number, tmp_path_factory.mktemp("before"))
    after = tmp_path_factory.mktemp("after")
    shutil.copytree(before, after, dirs_exist_ok=True)
    assert change.apply(look.look(after, number))
    return request.param, number, before, after


def test_the_tags_promised_are_there():
    assert {"v0.11.1", "v0.11.2", "v0.24.0", "v0.32.0", "v0.33.0"} <= set(TAGS)


def test_payload_is_the_package_byte_for_byte(case):
    _, number, _, after = case
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
    _, number, _, after = case
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
    _, number, before, after = case
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
    tag, number, _, _ = case
    names = (PATCHES / tag / "series").read_text().split()
    assert names[0] == f"{FIRST}.patch"
    assert names[1:] == [
        f"{feature}.patch" for feature in sorted({h.feature for h in seamed(number)})
    ]
    assert {file.name for file in (PATCHES / tag).iterdir()} == {*names, "series"}


def test_revert_leaves_no_difference(case, tmp_path):
    _, number, before, after = case
    shutil.copytree(after, tmp_path, dirs_exist_ok=True)
    (tmp_path / HOME / "__pycache__").mkdir()
    (tmp_path / HOME / "__pycache__" / "seams.cpython-311.pyc").write_bytes(b"python was here")
    assert trees.snapshot(tmp_path) != trees.snapshot(before)
    assert change.revert(look.look(tmp_path, number))
    assert trees.snapshot(tmp_path) == trees.snapshot(before)


@pytest.mark.parametrize(
    "how", [["am", "--keep-non-patch"], ["apply", "--index"]], ids=["am", "apply"]
)
def test_git_makes_the_same_tree(case, tmp_path, how):
    tag, _, before, after = case
    shutil.copytree(before, tmp_path, dirs_exist_ok=True)
    trees.repository(tmp_path)
    names = (PATCHES / tag / "series").read_text().split()
    for name in names:
        trees.commit(tmp_path, *how, str(PATCHES / tag / name))
    assert trees.snapshot(tmp_path) == trees.snapshot(after)
    if how[0] == "am":
        log = trees.commit(tmp_path, "log", "--format=%an %s", f"-{len(names)}").splitlines()
        assert all(line.startswith("vllm-moe-lora [") for line in log), log


def test_messages_are_for_upstream(case):
    tag, number, _, _ = case
    for name in (PATCHES / tag / "series").read_text().split():
        head = (PATCHES / tag / name).read_text().partition("\n---\n")[0]
        body = email.message_from_string(head.partition("\n")[2])
        subject = body["Subject"].removeprefix("[PATCH] ")
        assert subject.startswith("["), subject
        assert len(subject) <= 80, subject
        assert "plugin" not in head
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


@pytest.fixture(scope="module")
def refresh():
    return load("refresh_patches")


def test_what_is_committed_is_what_would_be_made(case, refresh, tmp_path, capsys):
    tag, _, before, after = case
    pair = f"{tag}={before}"
    assert refresh.main(["--check", pair]) == 0, capsys.readouterr().err
    # Of a patched tree, the same are made.
    assert refresh.main(["--check", f"{tag}={after}"]) == 0, capsys.readouterr().err
    shutil.copytree(PATCHES, tmp_path, dirs_exist_ok=True)
    for path, edit in [
        (f"{tag}/series", lambda text: text + "\n"),
        (f"{tag}/{FIRST}.patch", lambda text: text.replace("seam", "beam", 1)),
        ("README.md", lambda text: text + "more\n"),
        (f"{tag}/stray.patch", lambda text: "left over"),
    ]:
        file = tmp_path / path
        held = file.read_text() if file.exists() else None
        file.write_text(edit(held or ""))
        assert refresh.main(["--check", "--patches", str(tmp_path), pair]) == 1, path
        assert f"patches/{path} differs" in capsys.readouterr().err
        assert refresh.main(["--patches", str(tmp_path), pair]) == 0
        assert trees.snapshot(tmp_path) == trees.snapshot(PATCHES), "written as committed"


def test_a_tree_of_another_release_is_refused(refresh, tmp_path, capsys):
    tree = trees.copy(trees.HERE, tmp_path)
    file = tree / "vllm" / "lora" / "model_manager.py"
    file.write_text(
        file.read_text().replace("def _add_adapter(self, lora", "def _add_adapter(self, lara")
    )
    before = trees.snapshot(PATCHES)
    assert refresh.main([f"v{trees.HERE}={tree}"]) == 1
    assert "LoRAModelManager._add_adapter is not what vLLM" in capsys.readouterr().err
    assert trees.snapshot(PATCHES) == before
    with pytest.raises(SystemExit) as stop:
        refresh.main(["v9.9.9=/tmp"])
    assert stop.value.code == 2


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
