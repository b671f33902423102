"""What infra/ and its page say: valid by the schemas of those who read it, and what it describes runs as it says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from commands import BIN, INFRA, ROOT, compose, config_of

PAGE = (ROOT / "docs" / "infrastructure.md").read_text()

COMPOSE_FILES = ("compose.yaml", "compose.gpu.yaml")
MANIFESTS = {
    (path.name, content["kind"], content["metadata"]["name"]): content
    for path in sorted((INFRA / "kuberay").glob("*.yaml"))
    for content in yaml.safe_load_all(path.read_text())
}
RAY = {key: content for key, content in MANIFESTS.items() if content["apiVersion"] == "ray.io/v1"}
KUBERAY = json.loads((ROOT / "tests" / "schemas" / "kuberay.json").read_text())
JOBS = {name: content["spec"] for (_, kind, name), content in RAY.items() if kind == "RayJob"}


def cluster_spec(resource: dict[str, Any]) -> dict[str, Any]:
    """The cluster of a RayCluster, or the one that a RayJob makes."""
    return resource["spec"].get("rayClusterSpec", resource["spec"])


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def templates(resource: dict[str, Any]) -> list[dict[str, Any]]:
    """Every pod template: the head's, the workers', the submitter's."""
    submitter = resource["spec"].get("submitterPodTemplate")
    return [g["template"] for g in groups(cluster_spec(resource))] + ([submitter] if submitter else [])


def size(quantity: str) -> int:
    """Bytes, as Compose (2gb) and Kubernetes (2Gi) write them."""
    number, unit = re.fullmatch(r"(\d+)([a-z]+)", quantity.lower()).groups()  # type: ignore[union-attr]
    return int(number) << {"mb": 20, "mi": 20, "gb": 30, "gi": 30}[unit]


def option(command: list[str], name: str) -> str | None:
    """The value of ``--name=VALUE`` among the words."""
    return next((word.partition("=")[2] for word in command if word.startswith(f"--{name}=")), None)


def object_store(shared: int, memory: int, asked: str | None, monkeypatch: pytest.MonkeyPatch) -> int:
    """The most that Ray's object store takes where ``shared`` bytes of shared memory are free, by Ray's own rule."""
    from ray._private import utils

    with monkeypatch.context() as patch:
        patch.setattr(utils, "get_shared_memory_bytes", lambda: shared)
        return utils.resolve_object_store_memory(memory, int(asked) if asked else None)


# --- compose --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_compose_files_meet_the_specification(name: str) -> None:
    check = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", INFRA / name]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_publishes_nothing_beyond_loopback() -> None:
    content = compose()
    services = content["services"]
    published = {name: port for name, s in services.items() for port in s.get("ports", [])}
    assert all(port.startswith("127.0.0.1:") for port in published.values()), published
    assert not {"postgres", "mongo", "worker"} & published.keys()
    assert all("network_mode" not in s and "privileged" not in s for s in services.values())
    for service in (s for s in services.values() if "boxinst" in s["image"]):
        assert service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in service["security_opt"]
    for node in (services["head"], services["worker"]):
        assert node["environment"]["RAY_AUTH_MODE"] == "token"
        assert node["environment"]["RAY_AUTH_TOKEN"] == "secret"


def test_compose_holds_together() -> None:
    content = compose()
    services = content["services"]
    assert services["worker"]["deploy"]["replicas"] == 2
    for name, service in services.items():
        assert service["healthcheck"]["test"], name
        assert service.get("depends_on", {}).keys() <= services.keys()
        assert {v.split(":")[0] for v in service.get("volumes", [])} <= content["volumes"].keys()
        for word in shlex.join(map(str, (service.get("environment") or {}).values())).split():
            for host in re.findall(r"(?:://|@)(?:\w+:\w+@)?(\w+):\d+", word):
                assert host in services, f"{name} looks for {host}"
        conditions = [needed["condition"] for needed in service.get("depends_on", {}).values()]
        assert set(conditions) <= {"service_healthy"}, f"{name} would find a server that is not ready"
    head, worker = (services[name]["command"] for name in ("head", "worker"))
    assert "head" in services["worker"]["depends_on"]
    assert option(worker, "address") == f"head:{option(head, 'port')}"
    every = {name for text in [(INFRA / "compose.yaml").read_text()] for name in re.findall(r"\$\{(\w+):\?", text)}
    assert all(name in PAGE for name in every), "the page's line makes every password"
    assert ".env" in (INFRA / ".gitignore").read_text().split()


@pytest.mark.parametrize("name", ["head", "worker"])
def test_compose_asks_a_node_what_it_answers_without_a_token(name: str) -> None:
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    node = compose()["services"][name]
    asked = urllib.parse.urlsplit(node["healthcheck"]["test"][-1])
    assert asked.path in PUBLIC_EXACT_PATHS
    assert asked.netloc == f"127.0.0.1:{option(node['command'], 'dashboard-agent-listen-port')}"


@pytest.mark.parametrize("name", ["head", "worker"])
def test_composes_objects_live_in_shared_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the store is larger than the shared memory, Ray lays it on disk with no more than a warning."""
    node = compose()["services"][name]
    shared = size(node["shm_size"])
    assert 0 < object_store(shared, 1 << 40, option(node["command"], "object-store-memory"), monkeypatch) <= shared


# --- Ray's launcher -------------------------------------------------------------------------------------------------


def test_the_launchers_file_meets_rays_schema() -> None:
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    content = yaml.safe_load((INFRA / "cluster.yaml").read_text())
    schema = Path(ray.autoscaler.__path__[0], "ray-schema.json").read_text()
    jsonschema.validate(content, json.loads(schema))
    filled = prepare_config(content)
    validate_config(filled)
    everything = json.dumps(filled)
    assert "pip install" not in everything, "Ray's defaults install a Ray of their own"
    workers = {name: t for name, t in filled["available_node_types"].items() if name != filled["head_node_type"]}
    assert sum(t["max_workers"] for t in workers.values()) <= filled["max_workers"]
    for name, node_type in filled["available_node_types"].items():
        node = node_type["node_config"]
        assert node["SecurityGroupIds"], f"{name}: Ray would make a group that opens SSH to everybody"
        assert node["IamInstanceProfile"], f"{name}: Ray would give the head every right on EC2 and S3"
        assert node["MetadataOptions"] == {"HttpTokens": "required"}
        assert (node.get("InstanceMarketOptions") == {"MarketType": "spot"}) == (name in workers)


def test_aws_understands_the_launchers_machines() -> None:
    import botocore.session
    from botocore.validate import ParamValidator

    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, node_type in yaml.safe_load((INFRA / "cluster.yaml").read_text())["available_node_types"].items():
        asked = node_type["node_config"] | {"MinCount": 1, "MaxCount": 1}
        del asked["SubnetIds"]  # Ray's own: it takes one of them
        errors = ParamValidator().validate(asked, shape)
        assert not errors.has_errors(), f"{name}: {errors.generate_report()}"


# --- Kubernetes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", MANIFESTS, ids="-".join)
def test_manifests_meet_their_schemas(key: tuple[str, str, str]) -> None:
    import kubernetes_validate

    content = MANIFESTS[key]
    if key not in RAY:
        kubernetes_validate.validate(content, "1.37", strict=True)
        return
    jsonschema.validate(content, KUBERAY)
    for template in templates(content):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        kubernetes_validate.validate(pod, "1.37", strict=True)
    assert f"ray=={cluster_spec(content)['rayVersion']}" in (ROOT / "requirements.lock").read_text().splitlines()
    assert cluster_spec(content)["authOptions"] == {"mode": "token"}


def changed(resource: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with ``value`` at ``path``, words and numbers with dots between."""
    copy = json.loads(json.dumps(resource))
    *inner, last = [int(word) if word.isdigit() else word for word in path.split(".")]
    place = copy
    for word in inner:
        place = place[word]
    place[last] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value", "valid"),
    [
        ("spec.rayClusterSpec.workerGroupSpecs.0.priority", 1, True),
        ("spec.rayClusterSpec.headGroupSpec.ingressOptions", {"host": "ray.lab", "pathType": "Prefix"}, True),
        ("spec.rayClusterSpec.autoscalerOptions", {"command": ["sh"], "args": ["-c", "true"]}, True),
        ("spec.rayClusterSpec.headGroupSpec", {"template": {"spec": {}}}, True),
        ("metadata.name", "a" * 47, True),
        ("metadata.name", "a" * 48, False),
        ("metadata.name", "1st", False),
        ("metadata.name", "train.coco", False),
        ("spec.shutdownAfterJobFinishes", False, False),
        ("spec.rayClusterSpec.headGroupSpec.ingressOptions", {"hosts": ["ray.lab"]}, False),
        ("spec.rayClusterSpec.workerGroupSpecs.0.rayStartParams", {"num-cpus": 1}, False),
    ],
)
def test_the_schema_knows_what_kuberay_takes(path: str, value: Any, valid: bool) -> None:
    (job,) = (content for key, content in RAY.items() if key[1:] == ("RayJob", "train"))
    assert jsonschema.Draft202012Validator(KUBERAY).is_valid(job)
    assert jsonschema.Draft202012Validator(KUBERAY).is_valid(changed(job, path, value)) == valid


@pytest.mark.parametrize("key", RAY, ids="-".join)
def test_pods_are_admitted_where_rights_are_restricted(key: tuple[str, str, str]) -> None:
    """Kubernetes' Pod Security Standard `restricted`, which the namespace enforces; its other rules forbid what is not
    asked for here, such as the host's network."""
    (namespace,) = (m for (_, kind, _), m in MANIFESTS.items() if kind == "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    cluster = cluster_spec(RAY[key])
    pods = [template["spec"] for template in templates(RAY[key])]
    contexts = [container["securityContext"] for pod in pods for container in pod["containers"]]
    if cluster.get("enableInTreeAutoscaling"):  # KubeRay puts a container of its own beside the head's
        contexts.append(cluster["autoscalerOptions"]["securityContext"])
    for context in contexts:
        assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    for pod in pods:
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC", "initContainers"}
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert all({"persistentVolumeClaim", "emptyDir"} & volume.keys() for volume in pod.get("volumes", []))


def test_the_network_admits_the_operator_and_prometheus() -> None:
    (network,) = (m["spec"] for (_, kind, _), m in MANIFESTS.items() if kind == "NetworkPolicy")
    admitted: dict[str, list[int]] = {}
    for rule in network["ingress"]:
        (source,) = rule["from"]
        labels = source.get("namespaceSelector", {}).get("matchLabels", {"kubernetes.io/metadata.name": "boxinst"})
        admitted[labels["kubernetes.io/metadata.name"]] = [port["port"] for port in rule.get("ports", [])]
    assert admitted == {"boxinst": [], "kuberay-operator": [8265, 52365], "monitoring": [8080]}
    assert network["ingress"][0]["from"] == [{"podSelector": {}}]
    assert "--namespace kuberay-operator" in PAGE
    assert "in the namespace `monitoring`" in PAGE


@pytest.mark.parametrize("name", JOBS)
def test_a_job_leaves_no_cluster_behind(name: str) -> None:
    assert JOBS[name]["shutdownAfterJobFinishes"] is True
    assert 1 <= JOBS[name]["backoffLimit"] <= 2, "a lost head is made up for; bad input is not repeated for ever"


def test_manifests_hold_together() -> None:
    there = {(kind, name) for _, kind, name in MANIFESTS}
    (network,) = (m["spec"] for (_, kind, _), m in MANIFESTS.items() if kind == "NetworkPolicy")
    (home,) = re.findall(r"BOXINST_HOME=(\S+)", (INFRA / "Dockerfile").read_text())
    assert {m["metadata"].get("namespace") for (_, kind, _), m in MANIFESTS.items() if kind != "Namespace"} == {
        "boxinst"
    }
    assert ("Namespace", "boxinst") in there
    images, heads = set(), []
    for content in RAY.values():
        heads.append(cluster_spec(content)["headGroupSpec"]["template"]["metadata"]["labels"])
        for group in groups(cluster_spec(content)):
            assert network["podSelector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()
            assert group["template"]["spec"]["serviceAccountName"] == "boxinst"
        for template in templates(content):
            pod = template["spec"]
            assert ("ServiceAccount", pod.get("serviceAccountName", "boxinst")) in there
            volumes = {v["name"]: v for v in pod.get("volumes", [])}
            if "home" in volumes:
                assert ("PersistentVolumeClaim", volumes["home"]["persistentVolumeClaim"]["claimName"]) in there
            for container in pod["containers"]:
                images.add(container["image"])
                requests, limits = container["resources"]["requests"], container["resources"]["limits"]
                assert requests.keys() == limits.keys()
                assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu"), "Kubernetes takes no others"
                paths = {m["name"]: m["mountPath"] for m in container.get("volumeMounts", [])}
                assert paths in ({}, {"home": home, "shm": "/dev/shm"})
                assert {m["name"] for m in container.get("volumeMounts", [])} == volumes.keys()
                assert all(("ConfigMap", e["configMapRef"]["name"]) in there for e in container.get("envFrom", []))
                assert all(e["valueFrom"]["secretKeyRef"]["optional"] for e in container.get("env", []))
                for variable in container.get("env", []):
                    assert f"--from-literal={variable['valueFrom']['secretKeyRef']['key']}=" in PAGE
    assert len(images) == 1
    for budget in (m["spec"] for (_, kind, _), m in MANIFESTS.items() if kind == "PodDisruptionBudget"):
        matched = [labels for labels in heads if budget["selector"]["matchLabels"].items() <= labels.items()]
        assert len(matched) == budget["minAvailable"] == 1


def ray_resources(resource: dict[str, Any]) -> dict[str, float]:
    """What the cluster has at its smallest, by Ray's own reading of the manifest."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr as derive

    types = derive({"metadata": resource["metadata"], "spec": cluster_spec(resource)})["available_node_types"]
    total: dict[str, float] = {}
    for node_type in types.values():
        for name, amount in node_type["resources"].items():
            total[name] = total.get(name, 0) + amount * node_type["min_workers"]
    return total


@pytest.mark.parametrize("name", JOBS)
def test_a_jobs_cluster_is_what_its_command_asks_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (resource,) = (content for (_, kind, n), content in RAY.items() if (kind, n) == ("RayJob", name))
    program, *words = shlex.split(JOBS[name]["entrypoint"])
    assert program == "boxinst"
    config = config_of(words, monkeypatch)
    have = ray_resources(resource)
    each = max(getattr(config, "cpus_per_worker", 1), 1)
    assert config.gpu
    assert have["GPU"] == config.workers, "no GPU is short, and none idle"
    assert have["CPU"] >= config.workers * each + 2, "some must be left to read, decode and write"
    for group in cluster_spec(resource)["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"], "the command wants all from the start"
    for group in groups(cluster_spec(resource)):
        pod = group["template"]["spec"]
        limits = pod["containers"][0]["resources"]["limits"]
        if "nvidia.com/gpu" in limits:
            assert size(limits["memory"]) * 0.7 >= limits["nvidia.com/gpu"] * size("16Gi"), "as the page says"
            assert any(t["key"] == "nvidia.com/gpu" for t in pod["tolerations"])


@pytest.mark.parametrize("key", RAY, ids="-".join)
def test_the_pods_objects_live_in_shared_memory(key: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for group in groups(cluster_spec(RAY[key])):
        pod = group["template"]["spec"]
        (shared,) = (size(v["emptyDir"]["sizeLimit"]) for v in pod["volumes"] if v["name"] == "shm")
        memory = size(pod["containers"][0]["resources"]["limits"]["memory"])
        asked = group.get("rayStartParams", {}).get("object-store-memory")
        assert 0 < object_store(shared, memory, asked, monkeypatch) <= shared, group.get("groupName", "head")


def test_the_cluster_to_work_on_grows() -> None:
    ((_, content),) = ((key, c) for key, c in RAY.items() if key[1] == "RayCluster")
    assert content["spec"]["enableInTreeAutoscaling"]
    have = ray_resources(content)
    assert have["CPU"] >= 4, "a few at once, so that a command can begin"
    assert have["GPU"] == 0, "none that cost money while nobody works"
    assert all(g["maxReplicas"] > g["minReplicas"] for g in content["spec"]["workerGroupSpecs"])


# --- who may reach what ---------------------------------------------------------------------------------------------


def test_the_named_ways_to_protect_a_server_exist() -> None:
    import mlflow.environment_variables
    from ray._common import tls_utils

    names = set(re.findall(r"`(RAY_\w*TLS\w*)", PAGE))
    assert len(names) == 4
    assert all(name in Path(tls_utils.__file__).read_text() for name in names)
    assert "auth" in (metadata("mlflow").get_all("Provides-Extra") or [])
    assert {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_SERVER_CERT_PATH"} <= vars(mlflow.environment_variables).keys()


POLICIES = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]


@contextmanager
def enforcing(address: str) -> Iterator[None]:
    """Have the test's S3 server check rights, which it otherwise does not."""

    def switch(uncounted: str) -> None:
        plain = {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"{address}/moto-api/reset-auth", uncounted.encode(), plain)
        urllib.request.urlopen(request).close()

    switch("0")
    try:
        yield
    finally:
        switch("inf")


def test_the_rights_are_enough_and_no_more(s3: str, s3_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3
    import pyarrow as pa
    from botocore.exceptions import ClientError

    from pipelines import storage
    from pipelines.schema import Manifest

    bucket = s3.removeprefix("s3://")
    plain = boto3.client("s3")
    plain.create_bucket(Bucket=f"{bucket}-corpora")
    plain.put_object(Bucket=f"{bucket}-corpora", Key="train.json", Body=b"{}")
    for number, policy in enumerate(POLICIES):
        text = json.dumps(policy).replace("lab-corpora", f"{bucket}-corpora").replace("lab-boxinst", bucket)
        # Who deletes many objects at once needs the right for each of them on AWS, and for the bucket in moto.
        results = f"arn:aws:s3:::{bucket}"
        text = text.replace(f'"{results}/*"', json.dumps([f"{results}/*", results]))
        made = boto3.client("iam").create_policy(PolicyName=f"{bucket}-{number}", PolicyDocument=text)["Policy"]["Arn"]
        if number == 0:
            data_policy = made
    iam = boto3.client("iam")
    iam.create_user(UserName=bucket)
    iam.attach_user_policy(UserName=bucket, PolicyArn=data_policy)
    key = iam.create_access_key(UserName=bucket)["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    monkeypatch.setattr("pipelines.s3.PART", 5 << 20)  # so that there are several
    with enforcing(s3_address):
        storage.check_readable(f"s3://{bucket}-corpora/train.json", "corpus")
        out = f"{s3}/shards"
        storage.ensure_output(out, "shards", {"a": 1})
        table = pa.table({"image_id": [1, 2]})
        file = storage.write_parquet(f"{out}/0.parquet", [table], table.schema)
        big = os.urandom(11 << 20)
        with storage.writing(f"{out}/big") as stream:
            stream.write(big)
        storage.write_manifest(out, Manifest(kind="shards", source={"a": 1}, categories=[], files=[file], counts={}))
        assert storage.read_manifest(out).files == [file]
        assert storage.read_bytes(f"{out}/big") == big
        storage.clear(out)
        client = boto3.Session().client("s3")
        for refused in (
            lambda: client.put_object(Bucket=f"{bucket}-corpora", Key="train.json", Body=b""),
            lambda: client.delete_object(Bucket=f"{bucket}-corpora", Key="train.json"),
            lambda: client.delete_bucket(Bucket=bucket),
            lambda: client.list_buckets(),
        ):
            with pytest.raises(ClientError, match="AccessDenied"):
                refused()
