"""What a submitted job gets: variables without secrets, secrets by name, and the code without junk."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env import packaging

from boxinst.errors import InputError
from pipelines import launch, secrets
from pipelines.launch import SubmitConfig

ROOT = Path(__file__).parent.parent


def test_what_is_a_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hunter2hunter2@mlflow")
    for env in (("AWS_SECRET_ACCESS_KEY=x",), ("AWS_SECRET_ACCESS_KEY",), ("MLFLOW_TRACKING_URI",)):
        with pytest.raises(InputError, match=f"--env: {env[0].partition('=')[0]} holds a secret.*--secret"):
            SubmitConfig(address="http://head", env=env)
    for name, remedy in (("NOBODY", "is not set"), ("THE_SECRET=hunter2hunter2", "seen and remembered")):
        with pytest.raises(InputError, match=remedy) as refused:
            SubmitConfig(address="http://head", secret=(name,), env=())
        assert "hunter2hunter2" not in str(refused.value)
    config = SubmitConfig(address="http://head", secret=("MLFLOW_TRACKING_URI",))
    package = secrets.pack(launch.secret_values(config), tmp_path)
    assert "hunter2hunter2" not in repr(launch.runtime_env(config, package))
    (file,) = package.iterdir()
    assert "hunter2hunter2" in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    (tmp_path / "again").mkdir()
    (another,) = secrets.pack(launch.secret_values(config), tmp_path / "again").iterdir()
    assert another.read_text() != file.read_text(), "no job removes what another one needs"


SECRET_NAMES = "A_TOKEN GH_TOKEN_2 AWS_ACCESS_KEY_ID WANDB_APIKEY STRIPE_API_KEY PGPASS DB_PASS MYSQL_PWD HF_AUTH"
SECRET_NAMES += " REGISTRY_AUTH_CONFIG GOOGLE_CREDS GITHUB_PAT SSH_PRIVATE Db_Password GPG_PASSPHRASE"
PLAIN_NAMES = "PATH PWD OLDPWD AUTHOR PASSES NUM_PASSES COMPASS BYPASS MONKEY KEYBOARD TOKENIZERS_PARALLELISM AUTH_MODE"
PLAIN_NAMES += " RAY_AUTH_MODE SSH_AUTH_SOCK PATTERN COMPAT MLFLOW_TRACKING_URI PRIVATE_SUBNET OMP_NUM_THREADS"


def test_a_secret_is_known_by_its_name_or_its_value() -> None:
    for name in SECRET_NAMES.split():
        with pytest.raises(InputError, match=f"--env: {name} holds a secret"):
            SubmitConfig(address="http://head", env=(f"{name}=x",))
    for value in ("https://ghp_token@host/", "postgresql://u:pa/ss@h/db", "https://h/x?X-Amz-Signature=abc"):
        with pytest.raises(InputError, match="--env: X holds a secret") as refused:
            SubmitConfig(address="http://head", env=(f"X={value}",))
        assert value not in str(refused.value)
    plain = dict.fromkeys(PLAIN_NAMES.split(), "x") | {"CORPUS": "s3://bucket/a@b", "AT": "https://host/path@x"}
    config = SubmitConfig(address="http://head", env=tuple(f"{name}={value}" for name, value in plain.items()))
    assert launch.variables(config) == plain


def test_what_the_nodes_have_of_their_own_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOXINST_HOME", "/home/me/boxinst-home")  # a folder of this machine
    monkeypatch.setenv("BOXINST_STORE", "s3://lab/boxinst")
    assert launch.variables(SubmitConfig(address="http://head"))["BOXINST_STORE"] == "s3://lab/boxinst"
    assert "BOXINST_HOME" not in launch.variables(SubmitConfig(address="http://head"))
    named = SubmitConfig(address="http://head", env=("BOXINST_HOME=/data",))
    assert launch.variables(named) == {"BOXINST_HOME": "/data"}


def test_junk_stays_behind(tmp_path: Path) -> None:
    """By Ray's own packing of a folder, as it is called for a job."""
    folder, archive = tmp_path / "folder", tmp_path / "package.zip"
    junk = (".git/config", ".venv/bin/python", "boxinst-home/mlflow.db", "a/__pycache__/b.pyc", "x.egg-info/PKG-INFO")
    for name in ("a/b.py", "recipe.yaml", *junk, ".mypy_cache/a", "a/.ruff_cache/a", "a/.git/config"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    wanted = launch.runtime_env(SubmitConfig(address="http://head", working_dir=str(folder), env=()), None)
    packaging.create_package(wanted["working_dir"], archive, include_gitignore=True, excludes=wanted["excludes"])
    with zipfile.ZipFile(archive) as package:
        assert sorted(name for name in package.namelist() if not name.endswith("/")) == ["a/b.py", "recipe.yaml"]


def test_the_code_shipped_is_this_program_or_the_working_folder(tmp_path: Path) -> None:
    def modules(folder: Path | str) -> list[str]:
        config = SubmitConfig(address="http://head", working_dir=str(folder), env=())
        return [Path(p).name for p in launch.runtime_env(config, None)["py_modules"]]

    assert modules("") == modules(tmp_path) == list(launch.PACKAGES)
    assert modules(ROOT) == [], "it has them"
    assert "working_dir" not in launch.runtime_env(SubmitConfig(address="http://head", env=()), None)
