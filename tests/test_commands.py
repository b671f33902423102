"""Every command in infra/ and the pages is one that exists, by what its own program says of the words."""

from __future__ import annotations

import shlex

import click
import pytest
from commands import OPTIONAL, READERS, UNREAD, everywhere, program, simple

COMMANDS = everywhere()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if command in UNREAD:
        pytest.skip(UNREAD[command])
    words = shlex.split(command)
    assert words[0] in READERS, f"{words[0]}: say in commands.py how it is asked, or name this command as unread"
    READERS[words[0]](words, monkeypatch)


def test_commands_are_found_in_every_file() -> None:
    found = " ".join(COMMANDS)
    for words in ("ray start --head --block", "mlflow server", "fiftyone app launch", "boxinst demo", "ray up"):
        assert words in found
    for words in ("boxinst train --recipe coco_r50_1x", "boxinst segment --recipe", "--autoscaling-config", "ray exec"):
        assert words in found
    for words in (
        "docker login",
        "docker run --ulimit",
        "aws ecr",
        "kubectl --namespace boxinst create",
        "helm install",
    ):
        assert words in found
    for words in ("wget", "mongosh", "pg_isready", "uv pip install --no-deps", "ssh -L", "mlflow ui", "make demo"):
        assert words in found


def test_the_tables_name_nothing_that_is_gone() -> None:
    programs = {shlex.split(command)[0] for command in COMMANDS}
    assert set(UNREAD) <= set(COMMANDS)
    assert READERS.keys() <= programs, "a program that no command calls"
    assert OPTIONAL.keys() - {"buildx", "compose"} <= READERS.keys()


@pytest.mark.parametrize(
    "command",
    [
        "ray start --head --dashbord-host=0.0.0.0",
        "mlflow server --artifact-destination=s3://b",
        "fiftyone app launch --hots=x",
        "boxinst train --recipe coco_r50_1x --shard s",
        "boxinst train --recipe coco_r50_1y --shards s",
        "boxinst plan --price 2.5 segment --model models:/cells/1 --shards s --worker 8",
        "boxinst plan --prize 2.5 segment --model models:/cells/1 --shards s --workers 8",
        "boxinst submit --address http://HOST:8265 -- plan train --shards s --gpus",
        "python -c 'import ray; ray.init('",
        "pip install --no-such mlflow",
        "uv pip install --no-such /src",
        "aws ecr get-login-passwort",
        "aws ec2 authorize-security-group-ingress --group-id sg-0 --protocl tcp",
        "docker build --fil infra/Dockerfile .",
        "docker pusch boxinst:gpu",
        "docker run --ulimits nofile=1 boxinst:gpu",
        "docker compose --file infra/compose.yaml up --detached",
        "kubectl create secret generik boxinst",
        "kubectl apply --filenames infra/kuberay/base.yaml",
        "helm install kuberay-operator --create-namespaces",
        "mongosh --quite --eval 1",
        "pg_isready --user=mlflow --database=mlflow",
        "wget --quiet --output-documents=- http://127.0.0.1/",
        "ssh -Z 5000:127.0.0.1:5000 HOST",
        "openssl rand -hx 24",
        "make demos",
        "mountpoint --quite /mnt",
        "wegt http://127.0.0.1/",
    ],
)
def test_a_wrong_word_is_found(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((SystemExit, SyntaxError, click.UsageError, AssertionError)):
        test_every_command_exists(command, monkeypatch)


def test_a_script_is_taken_apart() -> None:
    script = """
    for name in A B; do
      echo "$name=$(openssl rand -hex 24)"
    done > .env && chmod 600 .env  # for you alone
    mountpoint -q /mnt || sudo mount -t nfs4 \\
      host:/ /mnt; command -v x >/dev/null || { sudo apt-get update; }
    A=1 B=2 docker compose exec head boxinst demo | cat
    """
    found = ["openssl rand -hex 24", "chmod 600 .env", "mountpoint -q /mnt", "mount -t nfs4 host:/ /mnt"]
    found += ["apt-get update", "docker compose exec head boxinst demo", "boxinst demo", "cat"]
    assert [shlex.join(words) for words in simple(script)] == found


def test_a_program_that_is_absent_is_named() -> None:
    with pytest.raises(pytest.skip.Exception, match="no-such is not installed"):
        program("no-such")
