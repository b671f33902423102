"""The rules of the house, read from the source by ``ast``: who may import whom, and what a file may hold."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("boxinst", "pipelines", "jobs")

SCIENCE = {"torch", "torchvision", "numpy", "pycocotools", "safetensors", "PIL", "boxinst"}
"""What ``boxinst`` may import besides the standard library."""
STAGES = {f"pipelines.{name}" for name in ("pieces", "shards", "train", "evaluate", "segment", "review", "feedback")}
OWNERS = {
    "ray": {f"pipelines.{n}" for n in ("cluster", "shards", "train", "train_loop", "evaluate", "segment", "records")}
    | {f"pipelines.{n}" for n in ("plan", "observe", "remote_jobs")},
    "mlflow": {"pipelines.registry", "pipelines.tracking", "pipelines.pyfunc_model"},
    "fiftyone": {"pipelines.review", "pipelines.feedback"},
}
"""Each framework, and the only modules that may know it."""
COMMANDS = {
    "cut",
    "shard",
    "train",
    "import_",
    "evaluate",
    "segment",
    "review",
    "feedback",
    "promote",
    "submit",
    "plan",
    "demo",
}
ENTRY_LINES = 80
FILE_LINES = 450
VAGUE = {"utils", "util", "common", "misc", "helpers", "helper", "tools", "shared"}


def modules(root: Path) -> Iterator[tuple[str, ast.Module, str]]:
    """Every module below ``root`` as (dotted name, tree, text)."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            text = path.read_text()
            yield name, ast.parse(text, str(path)), text


def imports(tree: ast.Module, *, of_types: bool = True) -> set[str]:
    """The dotted names that a module imports, at its top or within a function.

    ``from pipelines import coco`` counts as ``pipelines.coco`` too, so that no spelling escapes a rule.
    ``of_types=False`` leaves out what only the type checker sees.
    """
    names: set[str] = set()
    skipped = {id(n) for block in _type_blocks(tree) for n in ast.walk(block)} if not of_types else set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def _type_blocks(tree: ast.Module) -> Iterator[ast.If]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield node


def top(name: str) -> str:
    return name.partition(".")[0]


# The rules. Each takes a root and returns what breaks it there.


def one_way(root: Path) -> list[str]:
    """jobs → pipelines → boxinst, by absolute names."""
    above = {"boxinst": {"pipelines", "jobs", "tests"}, "pipelines": {"jobs", "tests"}, "jobs": {"tests"}}
    return [
        f"{name} imports {other}"
        for name, tree, _ in modules(root)
        for other in sorted(imports(tree))
        if top(other) in above[top(name)] or other.startswith(".")
    ]


def science_is_light(root: Path) -> list[str]:
    """boxinst imports the science libraries and nothing else."""
    return [
        f"{name} imports {other}"
        for name, tree, _ in modules(root)
        if top(name) == "boxinst"
        for other in sorted(imports(tree))
        if top(other) not in SCIENCE | set(sys.stdlib_module_names)
    ]


def frameworks_have_owners(root: Path) -> list[str]:
    """ray, mlflow and fiftyone are each known to few modules."""
    return [
        f"{name} imports {other}"
        for name, tree, _ in modules(root)
        for other in sorted(imports(tree))
        if top(other) in OWNERS and name not in OWNERS[top(other)]
    ]


def stages_keep_apart(root: Path) -> list[str]:
    """Stages meet through artefacts only, and no leaf knows a stage."""
    return [
        f"{name} imports {other}"
        for name, tree, _ in modules(root)
        if top(name) == "pipelines"
        for other in sorted(imports(tree))
        if other in STAGES and other != name
    ]


def no_cycles(root: Path) -> list[str]:
    """No module reaches itself through its imports, wherever they stand."""
    trees = {name: tree for name, tree, _ in modules(root)}
    graph = {name: {o for o in imports(t, of_types=False) if o in trees and o != name} for name, t in trees.items()}
    for package in PACKAGES:  # a package's __init__ gathers names; that alone is no cycle
        graph.pop(package, None)
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        return [" → ".join(error.args[1])]
    return []


def entries_are_thin(root: Path) -> list[str]:
    """A command's file parses, builds, runs and reports; every other file can be read in one sitting."""
    found = []
    for name, _, text in modules(root):
        limit = ENTRY_LINES if top(name) == "jobs" and name.rpartition(".")[2] in COMMANDS else FILE_LINES
        lines = len(text.splitlines())
        if lines > limit:
            found.append(f"{name} has {lines} lines, at most {limit}")
    return found


def names_say_something(root: Path) -> list[str]:
    """No drawer for leftovers."""
    return [name for name, _, _ in modules(root) if name.rpartition(".")[2] in VAGUE]


def purposes_are_stated(root: Path) -> list[str]:
    """Every public module opens with a docstring."""
    return [
        name
        for name, tree, _ in modules(root)
        if not name.rpartition(".")[2].startswith("_") and not (ast.get_docstring(tree) or "").strip()
    ]


def no_code_in_data(root: Path) -> list[str]:
    """Nothing that is read can run: no pickle, and torch.load only with weights_only=True."""
    found = []
    for name, tree, _ in modules(root):
        found += [f"{name} imports {o}" for o in imports(tree) if top(o) in {"pickle", "cloudpickle", "dill", "joblib"}]
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            if ast.unparse(call.func) != "torch.load":
                continue
            safe = [k for k in call.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"]
            if not safe:
                found.append(f"{name}:{call.lineno} torch.load without weights_only=True")
    return found


Rule = Callable[[Path], list[str]]

BREACHES: list[tuple[Rule, str, str]] = [
    (one_way, "boxinst/losses.py", "from pipelines import coco"),
    (one_way, "pipelines/coco.py", "def f():\n    import jobs.cli"),
    (one_way, "pipelines/coco.py", "from . import storage"),
    (science_is_light, "boxinst/losses.py", "import scipy.ndimage"),
    (science_is_light, "boxinst/losses.py", "def f():\n    from ray import data"),
    (frameworks_have_owners, "pipelines/coco.py", "import ray.data"),
    (frameworks_have_owners, "pipelines/train.py", "def f():\n    from mlflow import log_metric"),
    (frameworks_have_owners, "jobs/review.py", "import fiftyone as fo"),
    (stages_keep_apart, "pipelines/train.py", "from pipelines.shards import read"),
    (stages_keep_apart, "pipelines/train.py", "from pipelines import segment"),
    (stages_keep_apart, "pipelines/coco.py", "import pipelines.review"),
    (no_cycles, "pipelines/coco.py", "def f():\n    import pipelines.storage"),
    (entries_are_thin, "jobs/train.py", "x = 1\n" * (ENTRY_LINES + 1)),
    (entries_are_thin, "pipelines/coco.py", "x = 1\n" * (FILE_LINES + 1)),
    (names_say_something, "boxinst/utils.py", ""),
    (names_say_something, "pipelines/common/__init__.py", ""),
    (purposes_are_stated, "boxinst/losses.py", "x = 1"),
    (no_code_in_data, "pipelines/checkpoint.py", "import pickle"),
    (no_code_in_data, "pipelines/checkpoint.py", "import torch\ntorch.load('x')"),
    (no_code_in_data, "pipelines/checkpoint.py", "import torch\ntorch.load('x', weights_only=False)"),
]
"""A rule, and a file that breaks it."""

GOOD = {
    "boxinst/__init__.py": '"""Science."""\n',
    "boxinst/losses.py": '"""Losses."""\nimport math\nimport torch\nfrom boxinst import rle\n',
    "boxinst/rle.py": '"""Masks as text."""\nimport numpy\n',
    "pipelines/storage.py": '"""Files."""\nfrom pipelines import coco\nimport boxinst.rle\n',
    "pipelines/coco.py": '"""Labels."""\nimport pyarrow\n',
    "pipelines/train.py": '"""Training."""\nimport ray\nfrom pipelines.storage import exists\nimport torch\n'
    "torch.load('x', weights_only=True)\n",
    "jobs/train.py": '"""Command."""\ndef main():\n    from pipelines import train\n',
}
"""A small tree that keeps every rule."""

RULES = list(dict.fromkeys(rule for rule, _, _ in BREACHES))


def _write(root: Path, tree: dict[str, str]) -> Path:
    for path, text in tree.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
def test_the_code_keeps_the_rule(rule: Rule) -> None:
    assert rule(ROOT) == [], rule.__doc__


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
def test_the_rule_lets_good_code_pass(rule: Rule, tmp_path: Path) -> None:
    assert rule(_write(tmp_path, GOOD)) == []


@pytest.mark.parametrize(("rule", "path", "text"), BREACHES)
def test_the_rule_can_fail(rule: Rule, path: str, text: str, tmp_path: Path) -> None:
    assert rule(_write(tmp_path, GOOD | {path: text})) != []


def test_every_rule_is_applied() -> None:
    written = {
        node.name
        for node in ast.parse(Path(__file__).read_text()).body
        if isinstance(node, ast.FunctionDef) and ast.unparse(node.args) == "root: Path" and node.name != "modules"
    }
    assert written == {rule.__name__ for rule in RULES}


def test_something_is_read() -> None:
    assert len(list(modules(ROOT))) > 5
