"""ops/kubernetes: what every overlay renders is valid to the last field, and agrees with the settings in it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.generate import kubernetes as generated
from orchestrator.database.connection import connect_blocking
from orchestrator.dev.postgres import EmbeddedPostgres
from orchestrator.doctor.server import server_findings
from orchestrator.settings.database_url import parse
from tests.support.kubernetes_schemas import MODULES, strict
from tests.support.manifests import (
    KUBERNETES,
    NAMES,
    OURS,
    SCHEMAS,
    SECRET_NAMES,
    Manifest,
    Pod,
    Rendered,
    invalid,
    lets_out_to,
    render,
    selects,
)
from tests.support.tools import ROOT

CUSTOMERS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
FIRST_FOUR = {"air", "coretrac", "ocean", "rail"}

# Kinds of custom resources by the part of the schemas that they are in.
PARTS = {
    "kubernetes": "",
    "keda": "keda.sh",
    "external-secrets": "external-secrets.io",
    "prometheus-operator": "monitoring.coreos.com",
    "cloudnative-pg": "postgresql.cnpg.io",
    "strimzi": "kafka.strimzi.io",
}
# Its definition is not among the schemas; test_the_object_store_… says what it holds.
WITHOUT_SCHEMA = {"barmancloud.cnpg.io/v1 ObjectStore"}

STORES = ["secrets/example", "secrets/aws-secrets-manager", "secrets/azure-key-vault", "secrets/vault"]


def choices() -> dict[str, list[str]]:
    """Sets of components, such that each database meets each secret store, and each pair of others meets too."""
    brokers = ["strimzi", "managed-services", "without-kafka"]
    found = {}
    for number, (database, store) in enumerate(product(["managed-services", "cloudnativepg", "postgres"], STORES)):
        broker = brokers[(number + number // 4) % 3]
        scaling = ["autoscaling/hpa", "autoscaling/keda"][number % 2]
        chosen = dict.fromkeys([database, *([] if broker == "without-kafka" else [broker]), store, scaling])
        more = ["without-kafka"] if broker == "without-kafka" else []
        more += ["maintenance-cronjob"] if number % 3 == 0 else ["private-webhooks"] if number % 3 == 1 else []
        found["+".join([*chosen, *more])] = [*chosen, *more, "backup", "monitoring", "settings"]
    return found


CHOICES = choices()
EVERY = [*CUSTOMERS, *CHOICES]


@cache
def customer(name: str) -> Rendered:
    return Rendered(render(KUBERNETES / "overlays" / name))


_CHOSEN: dict[str, Rendered] = {}


@pytest.fixture
def rendered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    """A customer, or one customer with another choice of components."""
    name: str = request.param
    if name in CUSTOMERS:
        return customer(name)
    if name not in _CHOSEN:
        tree = tmp_path_factory.mktemp("choice") / "kubernetes"
        shutil.copytree(KUBERNETES, tree)
        overlay = tree / "overlays" / "inventory"
        told = yaml.safe_load((overlay / "kustomization.yaml").read_text())
        told["components"] = [f"../../components/{each}" for each in CHOICES[name]]
        (overlay / "kustomization.yaml").write_text(yaml.safe_dump(told))
        with (overlay / "addresses.env").open("a") as addresses:
            addresses.write("KAFKA_BOOTSTRAP_SERVERS=b-1.example.com:9096\nKAFKA_SASL_USERNAME=inventory\n")
        _CHOSEN[name] = Rendered(render(overlay))
    return _CHOSEN[name]


everywhere = pytest.mark.parametrize("rendered", EVERY, indirect=True)
each_customer = pytest.mark.parametrize("rendered", CUSTOMERS, indirect=True)


def part_of(manifest: Manifest) -> str:
    group = manifest["apiVersion"].rpartition("/")[0]
    return next((part for part, of in PARTS.items() if of == group), "kubernetes")


def require_schemas(part: str) -> None:
    if not (SCHEMAS / f"{part}.stamp").exists():
        pytest.skip(f"the schemas of {part} are not there; `make test-tools` makes them")


@everywhere
def test_every_manifest_is_valid_to_the_last_field(rendered: Rendered) -> None:
    require_schemas("kubernetes")
    missing = {part for part in PARTS if not (SCHEMAS / f"{part}.stamp").exists()}  # the next test says so
    known = [each for each in rendered.all if f"{each['apiVersion']} {each['kind']}" not in WITHOUT_SCHEMA]
    assert invalid([each for each in known if part_of(each) not in missing]) == []


@pytest.mark.parametrize("part", PARTS)
def test_the_schemas_of_every_kind_are_there(part: str) -> None:
    require_schemas(part)
    assert list(SCHEMAS.rglob(f"{PARTS[part]}/*.json" if PARTS[part] else "deployment-apps-v1.json"))


@pytest.mark.parametrize(
    ("part", "name", "kind", "path"),
    [
        ("kubernetes", "ocean", "Deployment", ["spec", "template", "spec", "containers", 0, "livenessProbe"]),
        ("kubernetes", "ocean", "NetworkPolicy", ["spec"]),
        ("kubernetes", "school", "StatefulSet", ["spec", "template", "spec", "securityContext"]),
        ("kubernetes", "school", "CronJob", ["spec", "jobTemplate", "spec"]),
        ("keda", "ocean", "ScaledObject", ["spec"]),
        ("external-secrets", "ocean", "SecretStore", ["spec", "provider"]),
        ("prometheus-operator", "ocean", "ServiceMonitor", ["spec", "endpoints", 0]),
        ("cloudnative-pg", "air", "Cluster", ["spec", "bootstrap", "initdb"]),
        ("strimzi", "air", "Kafka", ["spec", "kafka"]),
        ("strimzi", "air", "KafkaUser", ["spec", "authorization"]),
    ],
)
def test_a_misspelt_field_is_found(part: str, name: str, kind: str, path: list[Any]) -> None:
    require_schemas(part)
    broken = deepcopy(customer(name).of(kind)[0])
    place = broken
    for step in path:
        place = place[step]
    place["repilcas"] = 3
    assert "repilcas" in "".join(invalid([broken]))


def test_a_kind_without_a_schema_is_found() -> None:
    require_schemas("kubernetes")
    assert "could not find schema" in "".join(
        invalid([{"apiVersion": "v1", "kind": "ConfigMop", "metadata": {"name": "x"}}])
    )


def test_custom_resources_may_hold_what_their_definition_leaves_open() -> None:
    told = {"type": "object", "properties": {"a": {"x-kubernetes-int-or-string": True}, "b": {"type": "object"}}}
    made = strict(told | {"required": ["a"]})
    assert made["additionalProperties"] is False
    assert made["properties"]["a"]["oneOf"] == [{"type": "string"}, {"type": "integer"}]
    assert "additionalProperties" not in made["properties"]["b"]
    assert strict(told | {"x-kubernetes-preserve-unknown-fields": True}).get("additionalProperties") is None
    assert set(MODULES) < set(PARTS)


# --- pods


@everywhere
def test_pods_keep_to_the_restricted_standard(rendered: Rendered) -> None:
    (namespace,) = rendered.of("Namespace")
    labels = namespace["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for pod in rendered.pods:
        whole = pod.spec["securityContext"]
        assert whole["runAsNonRoot"] is True, pod.name
        assert whole["seccompProfile"] == {"type": "RuntimeDefault"}, pod.name
        assert whole["runAsUser"] > 0, pod.name
        assert not pod.spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}, pod.name
        kinds = {kind for volume in pod.spec["volumes"] for kind in volume.keys() - {"name"}}
        assert kinds <= {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}, pod.name
        for container in pod.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, pod.name
            assert not any("hostPort" in port for port in container.get("ports", [])), pod.name


@everywhere
def test_pods_get_no_token_of_the_api_server(rendered: Rendered) -> None:
    assert {pod.spec["automountServiceAccountToken"] for pod in rendered.pods} == {False}
    assert {each["automountServiceAccountToken"] for each in rendered.of("ServiceAccount")} == {False}


@everywhere
def test_processes_run_as_the_image_does_and_can_read_their_secrets(rendered: Rendered) -> None:
    for pod in rendered.ours:
        context = pod.spec["securityContext"]
        assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (10001, 10001, 10001)
        (tmp,) = [volume for volume in pod.spec["volumes"] if volume["name"] == "tmp"]
        assert "emptyDir" in tmp
        (container,) = pod.containers
        assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]


@everywhere
def test_containers_ask_for_resources_and_have_a_version(rendered: Rendered) -> None:
    for pod in rendered.pods:
        for container in pod.containers:
            resources = container["resources"]
            assert resources["requests"].keys() == resources["limits"].keys() == {"cpu", "memory"}, pod.name
            version = container["image"].rpartition("/")[2].partition(":")[2]
            assert re.match(r"\d+\.\d+", version), f"{pod.name}: {container['image']}"
    for pod in rendered.ours:
        assert pod.containers[0]["resources"] == {
            "requests": {"cpu": "500m", "memory": "1Gi"},
            "limits": {"cpu": "1", "memory": "2Gi"},
        }


@everywhere
def test_processes_have_probes_and_stay_until_their_work_is_done(rendered: Rendered) -> None:
    for pod in (pod for pod in rendered.ours if pod.owner["kind"] == "Deployment"):
        (container,) = pod.containers
        settings = rendered.settings(pod)
        paths = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
        assert {kind: get["path"] for kind, get in paths.items()} == {
            "startup": "/health",
            "liveness": "/health",
            "readiness": "/ready",
        }
        assert {get["port"] for get in paths.values()} == {"management"}
        assert pod.ports()["management"] == settings.management_port == 9080
        before_s = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        grace_s = pod.spec["terminationGracePeriodSeconds"]
        assert grace_s > before_s + settings.shutdown_timeout_s + 5, pod.name  # the runtime takes two more to end
        # A dispatcher waits for its deliveries for four fifths of that time, and then cuts them short.
        assert 0.8 * settings.shutdown_timeout_s > settings.http_timeout_s, pod.name
        if container["args"] == ["api"]:
            assert pod.ports()["http"] == settings.server_port
            assert before_s > 0
    for pod in (pod for pod in rendered.pods if pod.owner["kind"] == "StatefulSet"):
        for container in pod.containers:
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()


@everywhere
def test_a_rollout_takes_no_pod_away_before_another_is_ready(rendered: Rendered) -> None:
    for deployment in rendered.of("Deployment"):
        assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}


@everywhere
def test_replicas_are_spread_over_nodes_and_zones(rendered: Rendered) -> None:
    for pod in (pod for pod in rendered.ours if pod.owner["kind"] == "Deployment"):
        (spread,) = pod.spec["topologySpreadConstraints"]
        (apart,) = pod.spec["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        keys = (spread["topologyKey"], apart["podAffinityTerm"]["topologyKey"])
        assert keys == ("topology.kubernetes.io/zone", "kubernetes.io/hostname")
        for term in (spread, apart["podAffinityTerm"]):
            assert selects(term["labelSelector"], pod.labels)
            assert "app.kubernetes.io/component" in term["matchLabelKeys"]


# --- settings


@everywhere
def test_the_settings_of_every_pod_are_valid_and_known(rendered: Rendered) -> None:
    assert rendered.ours
    for pod in rendered.ours:
        environment = rendered.environment(pod)
        unknown = environment.keys() - NAMES - {f"{name}_FILE" for name in SECRET_NAMES}
        assert not unknown, pod.name
        # Raises what `orchestrator config check` prints; its notices say what has no effect.
        settings = rendered.settings(pod)
        assert settings.notices == (), pod.name
        assert settings.log_file is None
        (container,) = pod.containers
        assert container["args"][0] in {"api", "ingest", "dispatch", "maintain", "migrate", "topics"}


@each_customer
def test_a_customer_has_its_own_namespace_names_and_address(rendered: Rendered) -> None:
    settings = rendered.settings(rendered.ours[0])
    (namespace,) = rendered.of("Namespace")
    assert namespace["metadata"]["name"] == settings.deployment == f"event-scheduler-{settings.customer}"
    spaces = {each["metadata"].get("namespace") for each in rendered.all if each["kind"] != "Namespace"}
    assert spaces == {settings.deployment}
    (ingress,) = rendered.of("Ingress")
    host = f"{settings.customer}.events.example.com"
    assert [rule["host"] for rule in ingress["spec"]["rules"]] == [host]
    assert [tls["hosts"] for tls in ingress["spec"]["tls"]] == [[host]]
    assert settings.environment == "production"
    for secret in rendered.of("ExternalSecret"):
        assert {each["remoteRef"]["key"] for each in secret["spec"]["data"]} == {settings.deployment}


def test_the_first_four_customers_have_the_sizes_asked_for() -> None:
    sizes = {}
    for name in FIRST_FOUR:
        data = customer(name)
        given = data.environment(data.ours[0])
        names = ("SERVER_PORT", "BATCH_SIZE", "EXECUTION_INTERVAL", "KAFKA_CONSUMER_CONCURRENCY")
        more = ("CUSTOMER_MAX_PARALLEL", "DB_POOL_MAX_SIZE", "DB_POOL_MIN_IDLE")
        sizes[name] = [int(given[each]) for each in (*names, *more)]
        assert parse(given["DATABASE_URL"]).name == f"{name}_events_db"
    assert sizes == {
        "ocean": [8080, 1000, 3000, 15, 20, 50, 15],
        "air": [8081, 750, 4000, 12, 15, 40, 12],
        "rail": [8082, 600, 5000, 10, 12, 35, 10],
        "coretrac": [8083, 1500, 2000, 20, 25, 60, 20],
    }


def test_generated_files_are_current() -> None:
    stale = [
        path.relative_to(ROOT)
        for path, text in generated.files().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    assert not stale, "run: make docs"


@each_customer
def test_no_customer_brings_rules_of_its_own(rendered: Rendered) -> None:
    # One Prometheus reads all namespaces: a rule in each would count, and alert, once for each.
    assert rendered.of("ServiceMonitor")
    assert rendered.of("PrometheusRule") == []


def test_the_rules_are_applied_once_for_the_cluster() -> None:
    rendered = Rendered(render(KUBERNETES / "monitoring-rules"))
    (rule,) = rendered.all
    assert (rule["kind"], rule["metadata"]["namespace"]) == ("PrometheusRule", "monitoring")
    files = [yaml.safe_load(path.read_text()) for path in (ROOT / "ops" / "prometheus" / "rules").glob("*.yml")]
    groups = [group["name"] for file in files for group in file["groups"]]
    assert sorted(group["name"] for group in rule["spec"]["groups"]) == sorted(groups)
    require_schemas("prometheus-operator")
    assert invalid(rendered.all) == []
    rule["spec"]["groups"][0]["rules"][0]["exprr"] = "1"
    assert "exprr" in "".join(invalid(rendered.all))


def test_alert_rules_of_all_files_become_one_manifest(tmp_path: Path) -> None:
    (tmp_path / "b.yml").write_text("groups: [{name: b, rules: [{alert: B, expr: up == 0}]}]")
    (tmp_path / "a.yml").write_text("groups: [{name: a, rules: []}]")
    made = yaml.safe_load(generated.rules(tmp_path))
    assert [group["name"] for group in made["spec"]["groups"]] == ["a", "b"]
    assert made["spec"]["groups"][1]["rules"] == [{"alert": "B", "expr": "up == 0"}]


# --- who finds whom


@everywhere
def test_selectors_find_the_pods_that_they_are_meant_for(rendered: Rendered) -> None:
    names = {pod.owner["metadata"]["name"]: pod for pod in rendered.pods}
    for owner in rendered.of("Deployment", "StatefulSet"):
        selector = owner["spec"]["selector"]
        found = [name for name, pod in names.items() if selects(selector, pod.labels)]
        assert found == [owner["metadata"]["name"]]
    for budget in rendered.of("PodDisruptionBudget"):
        selector = budget["spec"]["selector"]
        found = [name for name, pod in names.items() if selects(selector, pod.labels)]
        assert found == [budget["metadata"]["name"]]
        assert budget["spec"]["maxUnavailable"] == 1
    assert {each["metadata"]["name"] for each in rendered.of("PodDisruptionBudget")} == {
        each["metadata"]["name"] for each in rendered.of("Deployment")
    }
    for service in rendered.of("Service"):
        found = [pod for pod in rendered.pods if selects({"matchLabels": service["spec"]["selector"]}, pod.labels)]
        assert found, service["metadata"]["name"]
        serving = [pod for pod in found if pod.owner["kind"] in ("Deployment", "StatefulSet")]
        for port in service["spec"]["ports"]:
            assert all(port["targetPort"] in pod.ports() for pod in serving), service["metadata"]["name"]
    (ingress,) = rendered.of("Ingress")
    (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
    api = rendered.named("Service", path["backend"]["service"]["name"])
    assert api is not None
    assert path["backend"]["service"]["port"]["name"] in {port["name"] for port in api["spec"]["ports"]}


@everywhere
def test_prometheus_finds_every_process(rendered: Rendered) -> None:
    (monitor,) = rendered.of("ServiceMonitor")
    found = [
        each for each in rendered.of("Service") if selects(monitor["spec"]["selector"], each["metadata"]["labels"])
    ]
    (service,) = found
    assert service["metadata"]["name"].startswith("orchestrator-")  # the alert rules expect such a job
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    serving = [pod for pod in rendered.ours if pod.owner["kind"] == "Deployment"]
    assert all(selects({"matchLabels": service["spec"]["selector"]}, pod.labels) for pod in serving)


@everywhere
def test_each_deployment_has_one_that_decides_how_many_there_are(rendered: Rendered) -> None:
    scaled = [name for name, _, _ in rendered.autoscalers()]
    assert len(scaled) == len(set(scaled))
    for deployment in rendered.of("Deployment"):
        fixed = deployment["spec"].get("replicas")
        assert (fixed is None) == (deployment["metadata"]["name"] in scaled), deployment["metadata"]["name"]
        assert fixed is None or fixed >= 2
    assert set(scaled) <= {each["metadata"]["name"] for each in rendered.of("Deployment")}


@everywhere
def test_replicas_follow_cpu_and_memory(rendered: Rendered) -> None:
    least = 3 if rendered.of("Namespace")[0]["metadata"]["name"] == "event-scheduler-onboarding" else 2
    assert {(low, high) for _, low, high in rendered.autoscalers()} == {(least, 10)}
    for each in rendered.of("HorizontalPodAutoscaler"):
        told = {metric["resource"]["name"]: metric["resource"]["target"] for metric in each["spec"]["metrics"]}
        assert told == {
            "cpu": {"type": "Utilization", "averageUtilization": 70},
            "memory": {"type": "Utilization", "averageUtilization": 80},
        }
    for each in rendered.of("ScaledObject"):
        told = {trigger["type"]: trigger["metadata"] for trigger in each["spec"]["triggers"]}
        assert (told["cpu"]["value"], told["memory"]["value"]) == ("70", "80")
        deployment = rendered.settings(rendered.ours[0]).deployment
        assert re.findall(r'deployment="([^"]*)"', told["prometheus"]["query"]) == [deployment]


def test_replicas_follow_series_that_the_program_has() -> None:
    known = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
    queries = re.findall(r"query: '(.*)'", "".join(path.read_text() for path in KUBERNETES.rglob("keda/*.yaml")))
    names = re.findall(r"orchestrator_\w+", "".join(queries))
    assert len(names) == 2
    assert [name for name in names if f"| `{name}` |" not in known] == []


# --- the network

METADATA = ["169.254.169.254", "169.254.170.2", "168.63.129.16", "100.100.100.200", "fd00:ec2::254", "fd20:ce::254"]
MAPPED = ["::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "fe80::a9fe:a9fe"]
PRIVATE = ["10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "127.0.0.1", "::1", "fc00::1"]


@everywhere
def test_no_pod_reaches_the_metadata_of_the_cloud(rendered: Rendered) -> None:
    for policy in rendered.of("NetworkPolicy"):
        for address in (*METADATA, *MAPPED):
            assert lets_out_to(policy, address) == [], f"{policy['metadata']['name']}: {address}"


@everywhere
def test_nothing_goes_in_or_out_unless_a_policy_names_it(rendered: Rendered) -> None:
    closed = rendered.named("NetworkPolicy", "default-deny")
    assert closed is not None
    assert closed["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for policy in rendered.of("NetworkPolicy"):
        spec = policy["spec"]
        told = {kind for kind in ("ingress", "egress") if kind in spec}
        assert told <= {kind.lower() for kind in spec["policyTypes"]}
        for rule in (*spec.get("ingress", []), *spec.get("egress", [])):
            assert rule.get("from") or rule.get("to"), policy["metadata"]["name"]
        covered = [pod for pod in rendered.pods if selects(spec["podSelector"], pod.labels)]
        by_operator = {"cnpg.io/cluster", "strimzi.io/cluster"} & spec["podSelector"].get("matchLabels", {}).keys()
        assert covered or by_operator, policy["metadata"]["name"]


@everywhere
def test_only_the_ingress_controller_and_prometheus_come_in(rendered: Rendered) -> None:
    found = set()
    for policy in rendered.of("NetworkPolicy"):
        if not any(pod.is_ours and selects(policy["spec"]["podSelector"], pod.labels) for pod in rendered.pods):
            continue
        for rule in policy["spec"].get("ingress", []):
            for peer in rule["from"]:
                (space,) = peer["namespaceSelector"]["matchLabels"].values()
                found |= {(space, port["port"]) for port in rule["ports"]}
    assert found == {("ingress-nginx", "http"), ("monitoring", "management")}


@everywhere
def test_webhooks_leave_from_dispatchers_alone_and_to_public_addresses(rendered: Rendered) -> None:
    def reach(pod: Pod, address: str) -> set[int]:
        policies = [each for each in rendered.of("NetworkPolicy") if selects(each["spec"]["podSelector"], pod.labels)]
        return {port["port"] for each in policies for rule in lets_out_to(each, address) for port in rule["ports"]}

    for pod in rendered.ours:
        expected = {80, 443} if pod.containers[0]["args"] == ["dispatch"] else set()
        assert reach(pod, "8.8.8.8") == reach(pod, "2606:4700:4700::1111") == expected, pod.name
        for address in PRIVATE:
            assert reach(pod, address) == set(), f"{pod.name}: {address}"
        if pod.containers[0]["args"] == ["dispatch"]:
            networks = rendered.settings(pod).http_allow_networks
            assert (reach(pod, "10.30.4.5") == {80, 443}) == bool(networks)


@everywhere
def test_processes_reach_their_database_and_brokers(rendered: Rendered) -> None:
    for pod in rendered.pods:
        if pod.owner["kind"] == "StatefulSet":
            continue
        out = [
            (peer, port["port"])
            for policy in rendered.of("NetworkPolicy")
            if selects(policy["spec"]["podSelector"], pod.labels)
            for rule in policy["spec"].get("egress", [])
            for peer in rule["to"]
            for port in rule["ports"]
        ]
        ports = {port for _, port in out}
        assert {53, 5432} <= ports, pod.name
        servers = rendered.environment(pod).get("KAFKA_BOOTSTRAP_SERVERS") if pod.is_ours else None
        if servers:
            assert {int(each.rpartition(":")[2]) for each in servers.split(",")} <= ports, pod.name


# --- the database and the brokers


def _database(rendered: Rendered) -> dict[str, str] | None:
    """The parameters of the database, if the overlay brings one."""
    cluster = rendered.of("Cluster")
    if cluster:
        parameters: dict[str, str] = cluster[0]["spec"]["postgresql"]["parameters"]
        return parameters
    server = rendered.named("StatefulSet", "postgres")
    if server is None:
        return None
    (container,) = server["spec"]["template"]["spec"]["containers"]
    pairs = [argument.removeprefix("--").partition("=") for argument in container["args"]]
    return {name: value for name, _, value in pairs}


@everywhere
def test_all_replicas_together_find_room_in_the_database(rendered: Rendered) -> None:
    parameters = _database(rendered)
    if parameters is None:
        return
    most = {name: high for name, _, high in rendered.autoscalers()}
    needed = 5  # migrate, topics, backup, an operator and a metrics exporter
    for pod in rendered.ours:
        if pod.owner["kind"] == "Deployment":
            name, settings = pod.owner["metadata"]["name"], rendered.settings(pod)
            # As in `runtime`: only the API has the whole pool; a dispatcher has three connections besides it.
            of_one = {"api": settings.pool_max_size, "dispatch": 2 + 3, "ingest": 2 + settings.kafka_concurrency}
            needed += of_one.get(name, 2 + 1) * most.get(name, pod.owner["spec"].get("replicas", 1))
    assert needed <= int(parameters["max_connections"]) - 10


@each_customer
def test_the_program_looks_for_the_database_where_it_is(rendered: Rendered) -> None:
    url = parse(rendered.environment(rendered.ours[0])["DATABASE_URL"])
    cluster = rendered.named("Cluster", "postgres")
    server = rendered.named("StatefulSet", "postgres")
    if cluster is not None:
        made = cluster["spec"]["bootstrap"]["initdb"]
        assert (made["database"], made["owner"]) == (url.name, url.user)
        roles = {role["name"]: role for role in cluster["spec"]["managed"]["roles"]}
        assert roles[url.user]["createrole"] is True
        assert url.parameters["sslmode"] == "verify-full"
        assert "/customer/" not in str(rendered.of("ObjectStore"))
    elif server is not None:
        (container,) = server["spec"]["template"]["spec"]["containers"]
        told = {each["name"]: each for each in container["env"]}
        assert told["POSTGRES_USER"]["value"] == url.user
        reference = told["POSTGRES_DB"]["valueFrom"]["configMapKeyRef"]
        assert rendered.data(reference["name"])[reference["key"]] == url.name
        assert server["spec"]["serviceName"] == url.hosts.partition(":")[0]
        assert rendered.named("Service", url.hosts.partition(":")[0]) is not None
    else:
        assert url.parameters["sslmode"] == "verify-full"


@pytest.mark.parametrize("name", ["air", "school"])
def test_a_server_with_the_parameters_starts_and_doctor_finds_nothing(name: str) -> None:
    rendered = customer(name)
    parameters = _database(rendered)
    assert parameters is not None
    # Less memory than a server of its own has.
    tuning = parameters | {"shared_buffers": "32MB", "max_wal_size": "256MB"}
    with EmbeddedPostgres.temporary(tuning=tuning) as server, connect_blocking(server.url(), "doctor") as connection:
        findings = list(server_findings(connection, rendered.settings(rendered.ours[0])))
    assert {finding.level for finding in findings} == {"ok"}, findings


@everywhere
def test_topics_rights_and_groups_are_those_of_the_settings(rendered: Rendered) -> None:
    if not rendered.of("Kafka"):
        return
    pod = next(pod for pod in rendered.ours if pod.owner["kind"] == "Deployment")
    settings = rendered.settings(pod)
    wanted = {getattr(settings, field.name) for field in fields(settings) if field.name.startswith("topic_")}
    topics = {each["spec"]["topicName"]: each["spec"] for each in rendered.of("KafkaTopic")}
    assert topics.keys() == wanted
    assert {each["partitions"] for each in topics.values()} == {settings.kafka_partitions}
    (user,) = rendered.of("KafkaUser")
    assert user["metadata"]["name"] == settings.kafka_sasl_username
    rules = [rule["resource"] for rule in user["spec"]["authorization"]["acls"]]
    prefix, *literal = [rule["name"] for rule in rules if rule["type"] == "topic"]
    assert all(topic.startswith(prefix) for topic in topics)
    others = [topic for topic in settings.kafka_allow_topics if not topic.startswith(prefix)]
    assert sorted(literal) == sorted(others)
    assert [rule["name"] for rule in rules if rule["type"] == "group"] == [settings.kafka_group]
    assert {each["metadata"]["labels"]["strimzi.io/cluster"] for each in rendered.of("KafkaTopic", "KafkaUser")} == {
        rendered.of("Kafka")[0]["metadata"]["name"]
    }


def test_there_is_one_version_of_postgresql() -> None:
    dockerfile = (ROOT / "ops" / "compose" / "postgres" / "Dockerfile").read_text()
    images = set()
    for name in CUSTOMERS:
        images |= {each["image"] for pod in customer(name).pods if not pod.is_ours for each in pod.containers}
        images |= {each["spec"]["imageName"] for each in customer(name).of("Cluster")}
    assert {image.partition(":")[0] for image in images} == {"postgres", "ghcr.io/cloudnative-pg/postgresql"}
    versions = {re.split("[:-]", image.rpartition("/")[2])[1] for image in images}
    assert versions == set(re.findall(r"^FROM postgres:([\d.]+)", dockerfile, re.M))


def test_backups_are_kept_for_thirty_days() -> None:
    rendered = customer("air")
    backup, verify = (rendered.named("CronJob", name) for name in ("backup", "backup-verify"))
    assert backup is not None
    assert verify is not None
    pods = [each["spec"]["jobTemplate"]["spec"]["template"]["spec"] for each in (backup, verify)]
    assert [pod["containers"][0].pop("command")[1] for pod in deepcopy(pods)] == [
        "/opt/backup/dump",
        "/opt/backup/verify",
    ]
    assert pods[0]["volumes"] == pods[1]["volumes"]
    assert (backup["spec"]["schedule"], backup["spec"]["timeZone"]) == ("0 2 * * *", "Etc/UTC")
    (container,) = backup["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert {"name": "BACKUP_KEEP_DAYS", "value": "30"} in container["env"]
    assert parse(rendered.data(container["envFrom"][0]["configMapRef"]["name"])["DATABASE_URL"]).name


@pytest.mark.parametrize("name", ["air", "inventory", "onboarding"])
def test_the_object_store_is_where_the_cluster_and_the_schedule_look_for_it(name: str) -> None:
    rendered = customer(name)
    (store,), (cluster,), (schedule,) = (rendered.of(kind) for kind in ("ObjectStore", "Cluster", "ScheduledBackup"))
    (told,) = [each["data"] for each in rendered.of("ConfigMap") if "backup-role" in each["data"]]
    # The role that ops/terraform makes for this customer alone, and its bucket.
    role = cluster["spec"]["serviceAccountTemplate"]["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]
    assert role == told["backup-role"]
    assert role.endswith(f":role/event-scheduler-{name}-backup")
    assert told["backup-bucket"].startswith(f"event-scheduler-{name}-backup-")
    (plugin,) = cluster["spec"]["plugins"]
    assert plugin["parameters"] == {"barmanObjectName": store["metadata"]["name"]}
    assert schedule["spec"]["cluster"]["name"] == cluster["metadata"]["name"]
    assert schedule["spec"]["pluginConfiguration"]["name"] == plugin["name"]
    assert store["apiVersion"] == "barmancloud.cnpg.io/v1"
    assert store["spec"].keys() == {"retentionPolicy", "configuration"}
    assert store["spec"]["retentionPolicy"] == "30d"
    assert store["spec"]["configuration"] == {
        "destinationPath": f"s3://{told['backup-bucket']}/{name}/",
        "s3Credentials": {"inheritFromIAMRole": True},
        "wal": {"compression": "gzip"},
        "data": {"compression": "gzip"},
    }


# --- rollout.sh

FAKE = """#!/bin/sh
echo "$*" >>"$CALLS"
case "$1" in
    kustomize) cat "$MANIFESTS" ;;
    wait) case "$*" in *job/"$FAILS"*) exit 1 ;; esac ;;
esac
"""

Rollout = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def rollout(tmp_path: Path) -> Rollout:
    """Runs rollout.sh with a kubectl that writes down how it is called, and in which a Job may fail."""

    def run(name: str, fails: str = "none") -> tuple[int, list[str], str]:
        manifests, calls, kubectl = (tmp_path / name for name in ("manifests", "calls", "kubectl"))
        manifests.write_text(customer(name).text if name in CUSTOMERS else "")
        calls.write_text("")
        kubectl.write_text(FAKE)
        kubectl.chmod(0o755)
        environ = {"PATH": "/usr/bin:/bin", "KUBECTL": str(kubectl), "CALLS": str(calls), "FAILS": fails}
        done = subprocess.run(
            [KUBERNETES / "rollout.sh", name],
            env=environ | {"MANIFESTS": str(manifests)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, calls.read_text().splitlines(), done.stderr

    return run


def test_the_processes_are_replaced_after_the_migration(rollout: Rollout) -> None:
    status, calls, _ = rollout("ocean")
    assert status == 0
    steps = [re.sub(r" -f \S+| --timeout=\S+| --namespace event-scheduler-ocean", "", call) for call in calls[1:]]
    roles = "(api,ingest,dispatch,maintain)"
    assert steps == [
        "delete job migrate topics --ignore-not-found --wait",
        f"apply -l app.kubernetes.io/component notin {roles}",
        "wait --for=condition=Complete job/migrate",
        "wait --for=condition=Complete job/topics",
        f"apply -l app.kubernetes.io/component in {roles}",
        *(f"rollout status deployment/{role}" for role in ("api", "dispatch", "ingest", "maintain")),
    ]


@pytest.mark.parametrize("fails", ["migrate", "topics"])
def test_a_failed_migration_leaves_the_processes_alone(rollout: Rollout, fails: str) -> None:
    status, calls, told = rollout("ocean", fails)
    assert status == 1
    assert f"job {fails} did not complete" in told
    assert not any(" in (" in call or call.startswith("rollout") for call in calls)


def test_a_customer_without_kafka_has_no_job_for_topics(rollout: Rollout) -> None:
    status, calls, _ = rollout("school")
    assert status == 0
    assert [call for call in calls if "job/" in call] == [calls[3]]


def test_an_unknown_customer_is_refused_before_anything_is_done(rollout: Rollout) -> None:
    status, calls, told = rollout("nobody")
    assert (status, calls) == (2, [])
    assert "there is no overlay" in told


@everywhere
def test_only_processes_and_what_scales_them_wait_for_the_migration(rendered: Rendered) -> None:
    later = {"api", "ingest", "dispatch", "maintain"}
    for each in rendered.all:
        component = each["metadata"].get("labels", {}).get("app.kubernetes.io/component")
        if each["kind"] == "Deployment":
            assert component in later
        if each["kind"] in {"Job", "ConfigMap", "Secret", "ExternalSecret", "ServiceAccount", "Cluster", "Kafka"}:
            assert component not in later, f"{each['kind']} {each['metadata']['name']}"
    assert OURS in str(rendered.named("Job", "migrate"))
