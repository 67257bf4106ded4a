"""Makes the JSON schemas by which kubeconform checks manifests: ``python kubernetes_schemas.py DIRECTORY``.

It needs the Python packages kubernetes-validate (which brings PyYAML), and for custom resources the programs that
fetch the modules their definitions are in: go, and for Strimzi mvn with Java 21 or newer. What is missing is named,
and the rest is made. What is there in the version named here is left alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

Schema = dict[str, Any]

LOCATIONS = (
    "{directory}/kubernetes/{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json",
    "{directory}/custom/{{{{.Group}}}}/{{{{.ResourceKind}}}}_{{{{.ResourceAPIVersion}}}}.json",
)
"""Where kubeconform finds them (``-schema-location``)."""

KUBERNETES = "1.37.0"
_KINDS = (
    "configmap-v1",
    "cronjob-batch-v1",
    "deployment-apps-v1",
    "horizontalpodautoscaler-autoscaling-v2",
    "ingress-networking-v1",
    "job-batch-v1",
    "namespace-v1",
    "networkpolicy-networking-v1",
    "persistentvolumeclaim-v1",
    "poddisruptionbudget-policy-v1",
    "secret-v1",
    "service-v1",
    "serviceaccount-v1",
    "statefulset-apps-v1",
)
_REFERENCE = re.compile(r'"\$ref": "[^"#]*#/(?:\$defs|definitions)/([^"]+)"')
_MOST_S = 240.0
"""Everything together; what is not there by then is missing."""


class Module(NamedTuple):
    """A Go module whose files hold definitions of custom resources."""

    name: str
    version: str
    files: tuple[str, ...]


MODULES = {
    "keda": Module(
        "github.com/kedacore/keda/v2",
        "v2.21.0",
        ("config/crd/bases/keda.sh_scaledobjects.yaml", "config/crd/bases/keda.sh_triggerauthentications.yaml"),
    ),
    "external-secrets": Module(
        "github.com/external-secrets/external-secrets",
        "v1.3.2",
        (
            "config/crds/bases/external-secrets.io_externalsecrets.yaml",
            "config/crds/bases/external-secrets.io_secretstores.yaml",
        ),
    ),
    "prometheus-operator": Module(
        "github.com/prometheus-operator/prometheus-operator",
        "v0.85.0",
        tuple(
            f"example/prometheus-operator-crd/monitoring.coreos.com_{kind}.yaml"
            for kind in ("podmonitors", "prometheusrules", "servicemonitors")
        ),
    ),
    "cloudnative-pg": Module(
        "github.com/cloudnative-pg/cloudnative-pg",
        "v1.28.0",
        (
            "config/crd/bases/postgresql.cnpg.io_clusters.yaml",
            "config/crd/bases/postgresql.cnpg.io_scheduledbackups.yaml",
        ),
    ),
}

STRIMZI = "1.2.0"
_STRIMZI_KINDS = ("Kafka", "KafkaNodePool", "KafkaTopic", "KafkaUser")
_JAVA = 21
_POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>schemas</groupId><artifactId>schemas</artifactId><version>1</version>
  <dependencies>
    <dependency>
      <groupId>io.strimzi</groupId><artifactId>crd-generator</artifactId><version>{STRIMZI}</version>
      <exclusions><exclusion><groupId>io.strimzi</groupId><artifactId>test</artifactId></exclusion></exclusions>
    </dependency>
    <dependency>
      <groupId>io.strimzi</groupId><artifactId>api</artifactId><version>{STRIMZI}</version>
      <exclusions><exclusion><groupId>io.strimzi</groupId><artifactId>test</artifactId></exclusion></exclusions>
    </dependency>
  </dependencies>
</project>
"""


class UnavailableError(Exception):
    """What is missing, and why."""


class _Deadline:
    def __init__(self, seconds: float) -> None:
        self._end_s = time.monotonic() + seconds

    def run(self, *command: str | Path, cwd: Path | None = None) -> str:
        try:
            done = subprocess.run(
                command, cwd=cwd, capture_output=True, text=True, timeout=max(1.0, self._end_s - time.monotonic())
            )
        except FileNotFoundError:
            raise UnavailableError(f"{command[0]} is not installed") from None
        except subprocess.TimeoutExpired:
            raise UnavailableError(f"{command[0]} had no answer within the time for everything") from None
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise UnavailableError(f"{command[0]} failed: {last[:300]}")
        return done.stdout


def self_contained(schema: Schema, definitions: dict[str, Schema]) -> Schema:
    """The schema with the definitions that it reaches inside it, as kubeconform reads them."""
    made, pending = _local(schema)
    reached: dict[str, Any] = {}
    while pending:
        name = pending.pop()
        if name not in reached:
            reached[name], further = _local(definitions[name])
            pending += further
    return made | {"definitions": reached}


def _local(schema: Schema) -> tuple[Schema, list[str]]:
    """The schema with references to its own definitions, and their names."""
    text = json.dumps(schema)
    return json.loads(_REFERENCE.sub(r'"$ref": "#/definitions/\1"', text)), _REFERENCE.findall(text)


def strict(schema: Any) -> Any:
    """The schema of a custom resource, refusing fields that it does not name as the API server does."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if made.get("x-kubernetes-int-or-string") is True:
        made.pop("type", None)
        made["oneOf"] = [{"type": "string"}, {"type": "integer"}]
    closed = isinstance(made.get("properties"), dict) and made.get("type") == "object"
    if closed and "additionalProperties" not in made and not made.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
    return made


def custom_schemas(documents: Iterable[Any]) -> Iterator[tuple[str, Schema]]:
    """Path and schema of each version in definitions of custom resources."""
    for document in documents:
        if not document or document.get("kind") != "CustomResourceDefinition":
            continue
        spec = document["spec"]
        for version in spec["versions"]:
            schema = strict(version["schema"]["openAPIV3Schema"])
            # The API server knows these of every kind; not every definition names them.
            named = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}}
            schema["properties"] = schema.get("properties", {}) | named
            schema["additionalProperties"] = False
            yield f"{spec['group']}/{spec['names']['kind'].lower()}_{version['name']}.json", schema


def _write(directory: Path, schemas: Iterable[tuple[str, Schema]]) -> None:
    for name, schema in schemas:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Never half a file, even when two of these run.
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as made:
            json.dump(schema, made)
        Path(made.name).chmod(0o644)
        os.replace(made.name, path)


def _kubernetes(directory: Path) -> None:
    found = find_spec("kubernetes_validate")
    if found is None or found.origin is None:
        raise UnavailableError("the Python package kubernetes-validate is not installed")
    source = Path(found.origin).parent / "kubernetes-json-schema" / f"v{KUBERNETES}-local-strict"
    if not source.is_dir():
        raise UnavailableError(f"kubernetes-validate has no schemas of Kubernetes {KUBERNETES}")
    held = json.loads((source / "_definitions.json").read_text())
    definitions = held.get("$defs") or held["definitions"]
    schemas = ((f"{kind}.json", json.loads((source / f"{kind}.json").read_text())) for kind in _KINDS)
    _write(directory / "kubernetes", ((name, self_contained(schema, definitions)) for name, schema in schemas))


def _module(module: Module, directory: Path, deadline: _Deadline) -> None:
    told = deadline.run("go", "mod", "download", "-json", f"{module.name}@{module.version}", cwd=directory)
    source = Path(json.loads(told)["Dir"])
    for name in module.files:
        documents = yaml.load_all((source / name).read_text(encoding="utf-8"), _LOADER)
        _write(directory / "custom", custom_schemas(documents))


def _strimzi(directory: Path, deadline: _Deadline) -> None:
    java = _java(deadline)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "pom.xml").write_text(_POM)
        mvn = ("mvn", "--batch-mode", "--quiet", "dependency:copy-dependencies", "-DoutputDirectory=jars")
        deadline.run(*mvn, cwd=folder)
        arguments = [
            f"io.strimzi.api.kafka.model.{_package(kind)}.{kind}={folder / kind}.yaml" for kind in _STRIMZI_KINDS
        ]
        deadline.run(java, "-cp", "jars/*", "io.strimzi.crdgenerator.CrdGenerator", "--yaml", *arguments, cwd=folder)
        for kind in _STRIMZI_KINDS:
            documents = yaml.load_all((folder / f"{kind}.yaml").read_text(encoding="utf-8"), _LOADER)
            _write(directory / "custom", custom_schemas(documents))


def _package(kind: str) -> str:
    return {"KafkaNodePool": "nodepool"}.get(kind, kind.removeprefix("Kafka").lower() or "kafka")


def _java(deadline: _Deadline) -> Path:
    """The first Java that is new enough."""
    named = os.environ.get("JAVA_HOME")
    homes = [Path(named)] if named else []
    found = [home / "bin" / "java" for home in (*homes, *sorted(Path("/usr/lib/jvm").glob("*")))]
    found += [Path(java)] if (java := shutil.which("java")) else []
    for java_path in found:
        if not java_path.is_file():
            continue
        version = re.search(r"java\.specification\.version = (\d+)", _properties(java_path, deadline))
        if version and int(version[1]) >= _JAVA:
            return java_path
    raise UnavailableError(f"no Java {_JAVA} or newer is installed")


def _properties(java: Path, deadline: _Deadline) -> str:
    # It prints its properties to standard error.
    return deadline.run("sh", "-c", '"$0" -XshowSettings:properties -version 2>&1', java)


def make(directory: Path) -> list[str]:
    """Makes what is not there yet; returns a line for each part that cannot be had."""
    directory.mkdir(parents=True, exist_ok=True)
    deadline = _Deadline(_MOST_S)
    parts: dict[str, tuple[str, Callable[[], None]]] = {
        "kubernetes": (KUBERNETES + " " + " ".join(_KINDS), partial(_kubernetes, directory))
    }
    for name, module in MODULES.items():
        parts[name] = (f"{module.version} {' '.join(module.files)}", partial(_module, module, directory, deadline))
    parts["strimzi"] = (STRIMZI, partial(_strimzi, directory, deadline))
    missing = []
    for name, (wanted, work) in parts.items():
        stamp = directory / f"{name}.stamp"
        if stamp.exists() and stamp.read_text() == wanted:
            continue
        try:
            work()
        except UnavailableError as error:
            missing.append(f"schemas of {name}: {error}")
        else:
            stamp.write_text(wanted)
    return missing


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python kubernetes_schemas.py DIRECTORY")
    sys.exit("; ".join(make(Path(sys.argv[1]).resolve())) or 0)
