"""infra/Dockerfile: clean, the same for both devices but for torch, and its steps make a working environment."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from commands import BIN, INFRA, ROOT
from packaging.specifiers import SpecifierSet

LOCK = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)


def test_the_dockerfile_is_clean() -> None:
    done = subprocess.run([BIN / "hadolint", INFRA / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    text = (INFRA / "Dockerfile").read_text()
    assert re.findall(r"(?m)^USER (.*)", text) == ["1000"]
    assert f"--python-version {python_of_the_image()} " in (ROOT / "Makefile").read_text(), "the Python of the lock"
    allowed = {
        line[1:] for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    assert all((ROOT / name).exists() for name in allowed)
    assert {"pyproject.toml", "requirements.lock", "boxinst", "pipelines", "jobs"} <= allowed


def python_of_the_image() -> str:
    """Its version, such as 3.11."""
    (version,) = re.findall(r"ARG BASE=python:([\d.]+)-", (INFRA / "Dockerfile").read_text())
    return str(version)


def install_steps(prefix: Path) -> list[str]:
    """The Dockerfile's steps that install with uv, as a shell runs them, with ``prefix`` for the image's Python."""
    text = re.sub(r"(?m)^#.*\n", "", (INFRA / "Dockerfile").read_text()).replace("\\\n", " ")
    steps = [line.removeprefix("RUN ") for line in text.splitlines() if line.startswith("RUN ") and "uv pip" in line]
    return [re.sub(r"--mount=\S+", "", step).strip().replace("/usr/local/", f"{prefix}/") for step in steps]


def third_party() -> set[str]:
    """Every package that our code imports anywhere when it runs; what only the type checker reads is left out."""
    names = set()
    for path in (p for folder in ("boxinst", "pipelines", "jobs") for p in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text())
        guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
        unread = {id(inner) for guard in guards for inner in ast.walk(guard)}
        for node in ast.walk(tree):
            if id(node) in unread:
                continue
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").split(".")[0])
    return names - set(sys.stdlib_module_names)


def test_the_cpu_image_differs_in_the_index_of_torch_alone(tmp_path: Path) -> None:
    """What the CPU's branch hands to uv. That PyTorch's own index, where uv then looks, has these versions without
    CUDA is not tested: tests reach the usual index at most. The packages of the other branch are installed below.
    """
    uv = tmp_path / "uv"
    uv.write_text('#!/bin/sh\nprintf "%s\\n" "${UV_TORCH_BACKEND-none}" "$@"\n')
    uv.chmod(0o755)

    def handed(device: str) -> list[str]:
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DEVICE": device}
        step = subprocess.run(
            ["sh", "-ec", install_steps(tmp_path)[0]], env=environment, capture_output=True, text=True
        )
        return step.stdout.splitlines()

    database = tmp_path / "lib" / f"python{python_of_the_image()}" / "site-packages" / "fiftyone" / "db" / "bin"
    database.mkdir(parents=True)
    for name in ("mongod", "exception.txt"):
        (database / name).touch()
    assert handed("cpu")[0] == "cpu"
    assert [path.name for path in database.iterdir()] == ["exception.txt"], "the image has no MongoDB, as the page says"
    assert handed("gpu")[0] == "none"
    assert handed("cpu")[1:] == handed("gpu")[1:]
    assert handed("tpu") == []
    (tmp_path / "nothing.in").touch()
    real = BIN / "uv" if (BIN / "uv").exists() else Path(shutil.which("uv") or pytest.skip("uv is not installed"))
    for backend, known in (("cpu", True), ("cpus", False)):
        environment = os.environ | {"UV_TORCH_BACKEND": backend, "UV_OFFLINE": "1"}
        read = [real, "pip", "compile", tmp_path / "nothing.in"]
        assert (subprocess.run(read, env=environment, capture_output=True).returncode == 0) == known
    for name in ("torch", "torchvision"):
        assert SpecifierSet(f"=={LOCK[name]}").contains(f"{LOCK[name]}+cpu"), "the lock admits the build without CUDA"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_images_steps_make_a_working_environment(tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    uv = BIN / "uv" if (BIN / "uv").exists() else Path(shutil.which("uv") or pytest.skip("uv is not installed"))
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, python.parent.parent], check=True)
    source = tmp_path / "src"
    source.mkdir()
    for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines():
        if line.startswith("!"):
            copy = shutil.copytree if (ROOT / line[1:]).is_dir() else shutil.copy
            copy(ROOT / line[1:], source / line[1:])
    steps = install_steps(python.parent.parent)
    assert len(steps) == 2
    path = f"{uv.parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "VIRTUAL_ENV": str(python.parent.parent), "DEVICE": "gpu"}
    environment.pop("PYTHONPATH", None)  # it may lead to this folder
    for step in steps:
        step = step.replace("/src", str(source))
        # What `make setup` has fetched is enough; where its cache is gone, the index is asked.
        if subprocess.run(["sh", "-ec", step], env=environment | {"UV_OFFLINE": "1"}, cwd=tmp_path).returncode:
            subprocess.run(["sh", "-ec", step], env=environment, cwd=tmp_path, check=True)

    def output(*command: str | Path) -> str:
        return subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    installed = dict(
        line.split("==") for line in output(uv, "pip", "freeze", "--python", python).splitlines() if "==" in line
    )
    assert {name: LOCK.get(name) for name in installed} == installed, "the versions of the lock"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for_development = {re.split(r"[^\w-]", requirement)[0].lower() for requirement in extras["dev"]}
    assert not for_development & installed.keys()
    assert {"torch", "ray", "psycopg2-binary"} <= installed.keys()
    assert not list(python.parent.parent.rglob("mongod"))
    found = "import importlib.util, sys; print([n for n in sys.argv[1:] if not importlib.util.find_spec(n)])"
    assert output(python, "-c", found, *third_party()).strip() == "[]"
    assert "usage: boxinst" in output(python.parent / "boxinst", "--help")
    assert output(python, "-c", "import boxinst, jobs.train; print(boxinst.__file__)").startswith(
        str(tmp_path / "venv")
    )
    assert (
        subprocess.run(["sh", "-ec", steps[0]], env=environment | {"DEVICE": "tpu"}, capture_output=True).returncode
        == 2
    )
