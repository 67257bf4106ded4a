"""The workflows of .github: their form, and that nobody can slip another action, more rights or a script into them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.manifests import KUBERNETES, Rendered, render
from tests.support.processes import ROOT
from tests.support.tools import tool

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def passes(*command: object) -> None:
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_actionlint_finds_nothing() -> None:
    passes(tool("actionlint"), *WORKFLOWS)


def test_zizmor_finds_nothing() -> None:
    passes(tool("zizmor"), "--offline", "--no-progress", ".github")


def test_the_workflows_keep_to_their_schema() -> None:
    passes(tool("check-jsonschema"), "--builtin-schema", "vendor.github-workflows", *WORKFLOWS)
    passes(tool("check-jsonschema"), "--builtin-schema", "vendor.dependabot", ROOT / ".github" / "dependabot.yml")


def test_the_script_of_a_deployment_is_sound() -> None:
    passes(tool("shellcheck"), ROOT / ".github" / "deploy.sh")


@each_workflow
def test_an_action_of_others_is_pinned_by_its_commit_and_alike_everywhere(path: Path) -> None:
    text = path.read_text()
    used = re.findall(r"uses: (\S+)(.*)", text)
    others = [(name, comment) for name, comment in used if not name.startswith("./")]
    for name, comment in others:
        assert re.fullmatch(r"[\w-]+/[\w/-]+@[0-9a-f]{40}", name), name
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), name
    everywhere = {name for each in WORKFLOWS for name in re.findall(r"uses: ([\w-]+/\S+)", each.read_text())}
    assert len({name.partition("@")[0] for name in everywhere}) == len(everywhere)


@each_workflow
def test_a_workflow_has_no_right_but_those_its_jobs_name_and_every_job_ends(path: Path) -> None:
    text = path.read_text()
    assert "\npermissions: {}\n" in text
    assert text.count("uses: actions/checkout@") == text.count("persist-credentials: false")
    jobs = re.findall(r"\n  [\w-]+:\n    name: .*?(?=\n  [\w-]+:\n    name: |\Z)", text.partition("\njobs:")[2], re.S)
    assert jobs
    for job in jobs:
        assert "\n    permissions:\n" in job
        assert "\n    timeout-minutes: " in job or "\n    uses: " in job
    # What an event holds is passed by the environment, never written into a script.
    assert not re.search(r"run: [^\n]*\$\{\{", text)


@pytest.mark.parametrize(
    ("fault", "found_by"),
    [
        ("      - uses: actions/checkout@main\n", "zizmor"),
        ("      - run: echo ${{ github.event.pull_request.title }}\n", "zizmor"),
        ("      - run: echo ${{ githib.ref }}\n", "actionlint"),
    ],
)
def test_a_fault_in_a_workflow_is_found(tmp_path: Path, fault: str, found_by: str) -> None:
    workflow = tmp_path / ".github" / "workflows" / "ci.yml"
    workflow.parent.mkdir(parents=True)
    workflow.write_text((ROOT / ".github" / "workflows" / "ci.yml").read_text().rstrip("\n") + "\n" + fault)
    options = ["--offline", "--no-progress"] if found_by == "zizmor" else []
    with pytest.raises(AssertionError):
        passes(tool(found_by), *options, workflow)


# A deployment, with stand-ins for the programs that reach a cluster.

KUBECTL = """#!/bin/sh
echo "kubectl $*" >>"$CALLS"
case "$*" in
*jsonpath*) cat "$GENERATIONS" ;;
*"--output name"*) echo deployment.apps/api; echo deployment.apps/dispatch ;;
port-forward*) exec sleep 30 ;;
esac
"""


def deployed(
    tmp_path: Path, rollout: str = "exit 0", smoke: str = "exit 0", customer: str = "ocean"
) -> tuple[int, str, str]:
    """The exit code of the script, what was called in order, and what it complained of."""
    scripts = {
        "bin/kubectl": KUBECTL,
        "bin/kustomize": '#!/bin/sh\necho "kustomize $*" >>"$CALLS"\n',
        "bin/curl": '#!/bin/sh\ngrep -q port-forward "$CALLS"\n',
        "bin/orchestrator": f'#!/bin/sh\necho "orchestrator $*" >>"$CALLS"\n{smoke}\n',
        "ops/kubernetes/rollout.sh": f'#!/bin/sh\necho "rollout $*" >>"$CALLS"\n{rollout}\n',
        ".github/deploy.sh": (ROOT / ".github" / "deploy.sh").read_text(),
    }
    for name, text in scripts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    overlay = tmp_path / "ops" / "kubernetes" / "overlays" / customer
    overlay.mkdir(parents=True)
    (overlay / "kustomization.yaml").write_text(f"namespace: of-{customer}\n")
    calls, generations = tmp_path / "calls", tmp_path / "generations"
    generations.write_text("1 1")
    path_variable = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    done = subprocess.run(
        [tmp_path / ".github" / "deploy.sh", customer, "registry/image@sha256:1", "https://receiver/smoke"],
        env={"PATH": path_variable, "CALLS": str(calls), "GENERATIONS": str(generations)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, calls.read_text(), done.stderr


def test_a_deployment_that_passes_its_smoke_test_stays(tmp_path: Path) -> None:
    code, calls, _ = deployed(tmp_path)
    assert code == 0
    assert "kustomize edit set image scheduled-event-orchestrator=registry/image@sha256:1" in calls
    assert "rollout ocean" in calls
    assert "orchestrator smoke http://127.0.0.1:18080 --management-url http://127.0.0.1:19080" in calls
    assert "undo" not in calls


def test_a_deployment_that_fails_its_smoke_test_goes_back(tmp_path: Path) -> None:
    code, calls, complaint = deployed(tmp_path, smoke="exit 1")
    assert code == 1
    for name in ("api", "dispatch"):
        assert f"kubectl rollout undo --namespace of-ocean deployment.apps/{name}" in calls
    assert "ocean: the smoke test failed; going back to the release before" in complaint


def test_a_rollout_that_fails_half_way_goes_back(tmp_path: Path) -> None:
    code, calls, complaint = deployed(tmp_path, rollout='printf "2 1" >"$GENERATIONS"; exit 1')
    assert code == 1
    assert "orchestrator smoke" not in calls
    assert "kubectl rollout undo" in calls
    assert "the rollout failed" in complaint


def test_after_a_failed_migration_nothing_is_undone(tmp_path: Path) -> None:
    code, calls, complaint = deployed(tmp_path, rollout="exit 1")
    assert code == 1
    assert "undo" not in calls
    assert "nothing was rolled out" in complaint


@pytest.mark.parametrize("customer", sorted(path.name for path in (KUBERNETES / "overlays").iterdir()))
def test_the_smoke_test_reaches_the_ports_that_the_customer_has(tmp_path: Path, customer: str) -> None:
    rendered = Rendered(render(KUBERNETES / "overlays" / customer))
    (api,) = [pod for pod in rendered.ours if pod.name == "Deployment api"]
    settings = rendered.settings(api)
    code, calls, _ = deployed(tmp_path, customer=customer)
    assert code == 0
    (forwarded,) = re.findall(rf"^kubectl port-forward --namespace of-{customer} deployment/api (.+)$", calls, re.M)
    ports = dict(each.split(":") for each in forwarded.split())
    reached = {local: api.ports()[name] for local, name in ports.items()}
    assert reached == {"18080": settings.server_port, "19080": settings.management_port}


def all_deployed(tmp_path: Path, customers: object, keys: str) -> tuple[int, list[str], str]:
    """What the last step of the workflow does: exit code, each customer with its key, and what it complained of."""
    if shutil.which("jq") is None:
        pytest.skip("jq is not installed; runners of GitHub have it, and Debian has a package of that name")
    script = yaml.safe_load((ROOT / ".github" / "workflows" / "deploy.yml").read_text())["jobs"]["deploy"]["steps"][-1]
    calls, deploy = tmp_path / "calls", tmp_path / ".github" / "deploy.sh"
    calls.touch()
    deploy.parent.mkdir()
    deploy.write_text(
        '#!/bin/sh\necho "$1 $ORCHESTRATOR_API_KEY${SMOKE_API_KEYS-}" >>"$CALLS"\ngrep -q true "$KUBECONFIG"\n'
    )
    deploy.chmod(0o755)
    given = {"CUSTOMERS": json.dumps(customers), "SMOKE_API_KEYS": keys, "KUBECONFIG_TEXT": "true"}
    done = subprocess.run(
        ["bash", "-e", "-c", script["run"]],
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "RUNNER_TEMP": str(tmp_path), "CALLS": str(calls)}
        | {"IMAGE": "registry/image", "DIGEST": "sha256:1", "SMOKE_DESTINATION": "https://receiver/smoke"}
        | given,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert given.keys() < script["env"].keys()
    assert not (tmp_path / "kubeconfig").exists()
    return done.returncode, calls.read_text().splitlines(), done.stderr


def test_each_customer_is_tested_with_its_own_key(tmp_path: Path) -> None:
    keys = json.dumps({"air": "orch_air", "ocean": "orch_ocean", "rail": "orch_rail"})
    assert all_deployed(tmp_path, ["ocean", "air"], keys) == (0, ["ocean orch_ocean", "air orch_air"], "")


@pytest.mark.parametrize("keys", ['{"ocean": "orch_ocean"}', '{"ocean": "orch_ocean", "air": ""}', "orch_ocean", ""])
def test_without_a_key_of_every_customer_none_is_touched(tmp_path: Path, keys: str) -> None:
    code, calls, complaint = all_deployed(tmp_path, ["ocean", "air"], keys)
    assert (code, calls) == (1, [])
    assert "SMOKE_API_KEYS: expected a key for" in complaint
    assert "orch_ocean" not in complaint
