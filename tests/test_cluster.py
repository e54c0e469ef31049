"""What is in cluster/ is checked offline: by schemas, Ray's own validation, shellcheck, and the code's own names."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
MANIFESTS = sorted((CLUSTER / "kuberay").glob("*.yaml"))
RAYS = ("ray_node_gpus_utilization", "ray_node_gram_used")  # Ray's own metrics on the dashboard


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def manifest(kind: str) -> Any:
    [found] = [document for path in MANIFESTS if (document := read(path))["kind"] == kind]
    return found


def groups() -> list[Any]:
    spec = manifest("RayCluster")["spec"]
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def closed(schema: Any) -> Any:
    """A CRD's schema as JSON Schema that refuses what it does not know; defaults make properties optional."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    properties = made.get("properties")
    if isinstance(properties, dict) and made.get("type") == "object":
        if not made.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in made:
            made["additionalProperties"] = False
        if "required" in made:
            made["required"] = [name for name in made["required"] if "default" not in properties.get(name, {})]
    if made.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return made


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_manifests_are_what_kuberay_defines(kind):
    folder = os.environ.get("FEDRAY_KUBERAY_CRDS")
    if not folder:
        pytest.skip(
            "FEDRAY_KUBERAY_CRDS is not set; it names a folder with KubeRay's CRDs (ray-operator/config/crd/bases)"
        )
    definitions = [read(path) for path in Path(folder).glob("*.yaml")]
    [definition] = [d for d in definitions if d["spec"]["names"]["kind"] == kind]
    [schema] = [v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema = closed(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(manifest(kind), schema)
    wrong = {**manifest(kind), "spec": {**manifest(kind)["spec"], "entrypointt": "x"}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


def test_no_pod_may_be_root_or_more_than_it_starts_as():
    for group in groups():
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_pods_ask_for_what_they_may_use_and_have_shared_memory():
    for group in groups():
        pod = group["template"]["spec"]
        for container in pod["containers"]:
            resources = container["resources"]
            assert resources["requests"] == resources["limits"]
            assert {"cpu", "memory"} <= resources["limits"].keys()
            mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
            assert mounted["shm"] == "/dev/shm"
    claims = {v["persistentVolumeClaim"]["claimName"] for g in groups() for v in g["template"]["spec"]["volumes"][1:]}
    assert claims == {manifest("PersistentVolumeClaim")["metadata"]["name"]}


def test_the_head_takes_no_work_and_the_gpu_group_has_gpus():
    head, *workers = groups()
    assert head["rayStartParams"]["num-cpus"] == "0"
    gpus = {
        group["groupName"]: group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
        for group in workers
    }
    assert gpus == {"cpu": None, "gpu": "1"}
    assert all(group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in workers)


def test_a_token_is_asked_for_and_the_network_policy_is_about_these_pods():
    cluster, policy = manifest("RayCluster"), manifest("NetworkPolicy")
    assert cluster["spec"]["authOptions"]["mode"] == "token"
    assert policy["spec"]["podSelector"]["matchLabels"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert manifest("RayJob")["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    assert "backoffLimit" not in manifest("RayJob")["spec"]  # which the operator refuses beside a selector


def test_the_kustomization_names_every_manifest_but_the_job():
    named = set(read(CLUSTER / "kuberay" / "kustomization.yaml")["resources"])
    assert named == {path.name for path in MANIFESTS} - {"kustomization.yaml", "ray-job.yaml"}


def test_versions_agree_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    texts = {path: path.read_text() for path in CLUSTER.rglob("*") if path.is_file()}
    texts[ROOT / "docs" / "clusters.md"] = (ROOT / "docs" / "clusters.md").read_text()
    for path, text in texts.items():
        for found in re.findall(r"\bfedray:([\w.]+)-(?:cpu|gpu)\b", text):
            assert found == project, path
    rays = {found for text in texts.values() for found in re.findall(r"rayproject/ray:([\d.]+)-", text)}
    assert rays == {manifest("RayCluster")["spec"]["rayVersion"]}


@pytest.mark.parametrize("path", sorted((CLUSTER / "autoscaler").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_cluster_launchers_files_pass_rays_own_validation(path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = read(path)
    validate_config(prepare_config(read(path)))
    start = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "/home/ray/token" in config["file_mounts"]
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**read(path), "max_worker": 3}))


@pytest.mark.parametrize("path", [*CLUSTER.rglob("*.sbatch"), ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_shell_scripts_have_no_known_mistakes(path):
    subprocess.run(["bash", "-n", path], check=True)
    checker = shutil.which("shellcheck")
    if checker is None:
        pytest.skip("shellcheck is not installed; bash itself takes the script")
    found = subprocess.run([checker, path], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_the_image_is_pinned_and_not_of_root():
    lines = (CLUSTER / "docker" / "Dockerfile").read_text().splitlines()
    bases = [line.partition("=")[2] for line in lines if line.startswith("ARG BASE")]
    assert bases
    assert all(re.search(r":\d+\.\d+\.\d+", base) for base in bases)
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users
    assert users[-1] not in ("root", "0")
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]]
    assert all((ROOT / name).exists() for name in copied), copied
    assert not any(re.search(r"(?i)token=|password|secret", line) for line in lines)


def test_the_dashboard_shows_what_the_code_tells_and_nothing_else():
    from fedray.backends.ray.metrics import METRICS

    board = json.loads((CLUSTER / "grafana" / "fedray.json").read_text())
    shown = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    names = set(re.findall(r"\bray_\w+", shown))
    endings = {"counter": "_total", "gauge": "", "histogram": "_bucket"}
    told = {f"ray_{name}{endings[kind]}" for name, (kind, _) in METRICS.items()}
    assert names - set(RAYS) == told
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


SCRAPE = """
import re, sys, time, urllib.request
from fedray.backends.ray.environment import prepare
prepare("local")
import ray
port = int(sys.argv[1])
ray.init(address="local", include_dashboard=False, num_cpus=2, _metrics_export_port=port, logging_level="ERROR")
import fedray
fedray.run("quickstart", ["rounds=2", "backend.num_workers=1", "evaluate_every=1"], sys.argv[2])
deadline, names = time.monotonic() + 60, set()
while time.monotonic() < deadline and not names:
    text = urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/metrics").read().decode()
    names = set(re.findall(r'^(ray_fedray_\\w+){.*run="scraped"', text, re.MULTILINE))
    time.sleep(0.2)
print(" ".join(sorted(names)))
"""


@pytest.mark.slow
def test_prometheus_finds_the_names_that_the_dashboard_shows(tmp_path):
    """All but those of what did not happen: deaths, failures, synthetic samples."""
    import socket
    import sys

    from fedray.backends.ray.metrics import METRICS

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SCRAPE, str(port), str(tmp_path / "scraped")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = set(done.stdout.strip().splitlines()[-1].split())
    endings = {"counter": "_total", "gauge": "", "histogram": "_bucket"}
    absent = ("fedray_worker_deaths", "fedray_clients_failed", "fedray_generated_samples")
    expected = {f"ray_{name}{endings[kind]}" for name, (kind, _) in METRICS.items() if name not in absent}
    assert expected <= found
