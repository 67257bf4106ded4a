"""What ops/kubernetes repeats, since Kustomize reads no file outside a component: settings, alert rules and scripts."""

from __future__ import annotations

from pathlib import Path

import yaml

OPS = Path(__file__).parents[2] / "ops"
_WRITTEN = "# Written by `make docs` from ops/prometheus/rules; do not edit.\n"
_SCRIPTS = ("common.sh", "dump", "verify")


def files() -> dict[Path, str]:
    """Each file and what it should hold."""
    kubernetes = OPS / "kubernetes"
    made = {kubernetes / "monitoring-rules" / "rules.yaml": rules(OPS / "prometheus" / "rules")}
    for settings in sorted((OPS / "deployments").glob("*.env")):
        made[kubernetes / "overlays" / settings.stem / "deployment.env"] = settings.read_text(encoding="utf-8")
    for script in _SCRIPTS:
        if (OPS / "backup" / script).exists():
            made[kubernetes / "components" / "backup" / script] = (OPS / "backup" / script).read_text(encoding="utf-8")
    return made


def rules(directory: Path) -> str:
    """The alert rules of all files of a directory as one PrometheusRule."""
    groups = []
    for path in sorted(directory.glob("*.yml")):
        groups += yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    labels = {"app.kubernetes.io/name": "scheduled-event-orchestrator"}
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "orchestrator", "labels": labels},
        "spec": {"groups": groups},
    }
    return _WRITTEN + yaml.dump(rule, Dumper=_Readable, sort_keys=False, width=1000, allow_unicode=True)


class _Readable(yaml.SafeDumper):
    """Keeps the lines of an expression, and indents lists."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Readable.add_representer(str, _text)


def write() -> None:
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
