"""The Kubernetes manifests of ops/kubernetes as Kustomize renders them, and questions about them."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from orchestrator.settings import DATABASE_PARTS, SETTINGS, Settings
from tests.support.kubernetes_schemas import LOCATIONS
from tests.support.tools import BIN, ROOT, tool

Manifest = dict[str, Any]

KUBERNETES = ROOT / "ops" / "kubernetes"
SCHEMAS = ROOT / ".tools" / "kubernetes-schemas"
OURS = "scheduled-event-orchestrator"
WORKLOADS = ("Deployment", "StatefulSet", "Job", "CronJob")
STORE = {
    "database-password": "a-password",
    "kafka-password": "another-password",
    "webhook-secrets": "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=",
}
"""What a secret store would hold, by its key."""


def render(directory: Path) -> str:
    """What Kustomize makes of a directory. Skips the test when neither program is there that can."""
    for name, arguments in (("kubectl", ["kustomize"]), ("kustomize", ["build"])):
        if shutil.which(name, path=str(BIN)) or shutil.which(name):
            done = subprocess.run([tool(name), *arguments, directory], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            return done.stdout
    pytest.skip("neither kubectl nor kustomize is installed; `make test-tools` installs one")


def invalid(manifests: list[Manifest]) -> list[str]:
    """What kubeconform finds wrong, unknown fields and kinds included."""
    locations = [part for place in LOCATIONS for part in ("-schema-location", place.format(directory=SCHEMAS))]
    done = subprocess.run(
        [tool("kubeconform"), "-strict", "-output", "json", "-verbose", *locations, "-"],
        input="\n---\n".join(map(json.dumps, manifests)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    resources = json.loads(done.stdout)["resources"]
    assert len(resources) == len(manifests), done.stdout
    return [f"{each['kind']} {each['name']}: {each['msg']}" for each in resources if each["status"] != "statusValid"]


class Pod(NamedTuple):
    """A pod template, and what makes pods of it."""

    owner: Manifest
    template: Manifest

    @property
    def name(self) -> str:
        return f"{self.owner['kind']} {self.owner['metadata']['name']}"

    @property
    def spec(self) -> Manifest:
        spec: Manifest = self.template["spec"]
        return spec

    @property
    def labels(self) -> Manifest:
        labels: Manifest = self.template["metadata"]["labels"]
        return labels

    @property
    def containers(self) -> list[Manifest]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def is_ours(self) -> bool:
        return bool(self.labels["app.kubernetes.io/name"] == OURS)

    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for each in self.containers for port in each.get("ports", [])}


class Rendered:
    """The manifests of one customer."""

    def __init__(self, text: str) -> None:
        self.text = text
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        self.all: list[Manifest] = [document for document in yaml.load_all(text, loader) if document]

    def of(self, *kinds: str) -> list[Manifest]:
        return [each for each in self.all if each["kind"] in kinds]

    def named(self, kind: str, name: str) -> Manifest | None:
        return next((each for each in self.of(kind) if each["metadata"]["name"] == name), None)

    @cached_property
    def pods(self) -> list[Pod]:
        found = []
        for owner in self.of(*WORKLOADS):
            spec = owner["spec"]["jobTemplate"]["spec"] if owner["kind"] == "CronJob" else owner["spec"]
            found.append(Pod(owner, spec["template"]))
        return found

    @property
    def ours(self) -> list[Pod]:
        return [pod for pod in self.pods if pod.is_ours]

    def data(self, reference: str) -> dict[str, str]:
        found = self.named("ConfigMap", reference)
        assert found is not None, f"there is no ConfigMap {reference}"
        data: dict[str, str] = found["data"]
        return data

    def environment(self, pod: Pod) -> dict[str, str]:
        """What the program in a pod reads; secrets are in files of the pod."""
        given: dict[str, str] = {}
        for container in pod.containers:
            for source in container.get("envFrom", []):
                given |= self.data(source["configMapRef"]["name"])
            given |= {each["name"]: each["value"] for each in container.get("env", []) if "value" in each}
        return {name: value for name, value in given.items() if value}

    def secret(self, name: str, key: str) -> str:
        """What a Secret holds: what the overlay says, or else what a store would."""
        if (found := self.named("Secret", name)) is None:
            return STORE[key]
        return base64.b64decode(found["data"][key]).decode()

    def settings(self, pod: Pod) -> Settings:
        """The settings as the program finds them, which refuses the file of a secret that is empty."""
        environment = self.environment(pod)
        with tempfile.TemporaryDirectory() as directory:
            for name, path in environment.items():
                if name.removesuffix("_FILE") in SECRET_NAMES - {name}:
                    file = Path(directory, name)
                    file.write_text(self.secret(*mounted_secrets(pod)[path]))
                    environment[name] = str(file)
            return Settings.from_env(environment)

    def autoscalers(self) -> Iterator[tuple[str, int, int]]:
        """Name of a Deployment, and its least and most replicas."""
        for each in self.of("HorizontalPodAutoscaler", "ScaledObject"):
            spec = each["spec"]
            assert spec["scaleTargetRef"]["kind"] == "Deployment"
            low = spec.get("minReplicas", spec.get("minReplicaCount"))
            yield spec["scaleTargetRef"]["name"], low, spec.get("maxReplicas", spec.get("maxReplicaCount"))


NAMES = {name for setting in (*SETTINGS.values(), *DATABASE_PARTS.values()) for name in setting.names}
SECRET_NAMES = {
    name for setting in (*SETTINGS.values(), *DATABASE_PARTS.values()) if setting.secret for name in setting.names
}


def mounted_secrets(pod: Pod) -> dict[str, tuple[str, str]]:
    """Path in the pod of each file of a secret, and the name of its Secret and its key."""
    volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
    found: dict[str, tuple[str, str]] = {}
    for mount in (mount for each in pod.containers for mount in each.get("volumeMounts", [])):
        volume = volumes[mount["name"]]
        sources = [source["secret"] for source in volume.get("projected", {}).get("sources", []) if "secret" in source]
        for secret in (*sources, *([volume["secret"]] if "secret" in volume else [])):
            name = secret.get("name", secret.get("secretName"))
            found |= {f"{mount['mountPath']}/{item['path']}": (name, item["key"]) for item in secret["items"]}
    return found


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] == "In", rule
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    return all(labels.get(name) == value for name, value in selector.get("matchLabels", {}).items())


def lets_out_to(policy: Manifest, address: str) -> list[dict[str, Any]]:
    """The rules of a NetworkPolicy under which pods may connect to an address outside of the cluster."""
    return [
        rule
        for rule in policy["spec"].get("egress", [])
        if "to" not in rule or any("ipBlock" in peer and _holds(peer["ipBlock"], address) for peer in rule["to"])
    ]


def _holds(block: Manifest, address: str) -> bool:
    ip = ip_address(address)

    def within(network: str) -> bool:
        return ip in ip_network(network)  # which is false for the other version

    return within(block["cidr"]) and not any(map(within, block.get("except", [])))
