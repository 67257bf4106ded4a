"""docker-compose.yml as Compose itself resolves it, and the scripts that it runs at the first start."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg import sql

from orchestrator.api.auth import key_hash
from orchestrator.database.connection import connect_blocking
from orchestrator.database.migrate import migrate
from orchestrator.dev.postgres import EmbeddedPostgres
from orchestrator.dev.postgres_install import find_installation
from orchestrator.doctor.server import server_findings
from orchestrator.settings import Settings
from tests.conftest import Spawn
from tests.integration.api_support import until
from tests.support.databases import scratch_directory, temporary_server
from tests.support.dockerfile import instructions
from tests.support.processes import ROOT
from tests.support.tools import tool

FILE = ROOT / "docker-compose.yml"
OURS = "scheduled-event-orchestrator:0.1.0"
PROFILES = ("load-balancer", "two-customers")
DATABASES = {"orchestrator": "orchestrator", "ocean": "ocean_events_db", "air": "air_events_db"}
"""Of each deployment."""
WRITABLE = {"kafka", "kafka-ui"}
"""Whose images write to themselves: the file says why at each."""
_EXACT = re.compile(r".+:v?\d+\.\d+(\.\d+)?(-[\w.]+)?|.+@sha256:[0-9a-f]{64}")

Compose = dict[str, Any]


def compose(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Compose as after a clone: without settings of the developer's own."""
    command = [str(tool("docker-compose")), "--file", str(FILE), "--env-file", "/dev/null", *arguments]
    environ = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(command, capture_output=True, text=True, env=environ)


@pytest.fixture(scope="module")
def project() -> Compose:
    """Everything that the file says, with all profiles."""
    result = compose("--profile", "*", "config", "--format", "json")
    assert result.returncode == 0, result.stderr
    resolved: Compose = json.loads(result.stdout)
    return resolved


@pytest.fixture(scope="module")
def services(project: Compose) -> dict[str, Compose]:
    found: dict[str, Compose] = project["services"]
    return found


def waited_for(services: dict[str, Compose], condition: str) -> set[str]:
    dependencies = [each.get("depends_on", {}) for each in services.values()]
    return {name for each in dependencies for name, how in each.items() if how["condition"] == condition}


@pytest.mark.parametrize("profile", ["", *PROFILES])
def test_compose_takes_the_file_as_it_was_cloned(profile: str) -> None:
    result = compose("--profile", profile, "config", "--quiet")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_file_keeps_to_the_schema_of_compose() -> None:
    command = [str(tool("check-jsonschema")), "--builtin-schema", "vendor.compose-spec", str(FILE)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_every_file_that_a_service_mounts_or_reads_is_in_the_checkout(services: dict[str, Compose]) -> None:
    mounts = [mount for each in services.values() for mount in each.get("volumes", []) if mount["type"] == "bind"]
    assert mounts
    assert [mount["source"] for mount in mounts if not Path(mount["source"]).exists()] == []
    assert all(mount["read_only"] for mount in mounts)


def test_every_image_has_an_exact_tag(services: dict[str, Compose]) -> None:
    images = {name: each["image"] for name, each in services.items()}
    assert {name: image for name, image in images.items() if not _EXACT.fullmatch(image)} == {}
    (base,) = [
        rest for name, rest in instructions(ROOT / "ops" / "compose" / "postgres" / "Dockerfile") if name == "FROM"
    ]
    assert _EXACT.fullmatch(base)


def test_every_service_has_a_health_check_or_ends(services: dict[str, Compose]) -> None:
    for name, each in services.items():
        check = each.get("healthcheck", {})
        ends = each["restart"].startswith("on-failure")
        if ends:
            assert check == {"disable": True}, name
        else:
            # The image of the orchestrator has its own.
            assert each["image"] == OURS or check["test"], name


def test_waiting_for_all_services_ends(services: dict[str, Compose]) -> None:
    # `up --wait` takes the end of a service for a failure, unless another one waits for that end.
    ends = {name for name, each in services.items() if each["restart"].startswith("on-failure")}
    assert waited_for(services, "service_completed_successfully") == ends


def test_services_start_in_the_order_of_health(services: dict[str, Compose]) -> None:
    assert waited_for(services, "service_started") == set()
    for name, each in services.items():
        if each["image"] == OURS and not each["restart"].startswith("on-failure"):
            waits = {other: how["condition"] for other, how in each["depends_on"].items()}
            assert any(other.endswith("migrate") for other in waits), name
            assert any(other.endswith("topics") for other in waits), name
            # In production it would end for want of a key, and be started again for ever.
            assert any(other.endswith("key") for other in waits), name


def test_no_service_waits_for_one_of_a_profile_that_it_is_not_in(services: dict[str, Compose]) -> None:
    for each in services.values():
        for other in each.get("depends_on", {}):
            assert set(services[other].get("profiles", [])) <= set(each.get("profiles", []))


def test_every_service_is_confined(services: dict[str, Compose]) -> None:
    for name, each in services.items():
        assert each["cap_drop"] == ["ALL"], name
        assert each["security_opt"] == ["no-new-privileges:true"], name
        assert each.get("read_only", False) is (name not in WRITABLE), name
        assert {"cpus", "memory", "pids"} <= set(each["deploy"]["resources"]["limits"]), name
        assert {"max-size", "max-file"} <= set(each["logging"]["options"]), name
        assert each["logging"]["driver"] == "json-file", name
        assert "privileged" not in each, name


def test_ports_are_open_to_this_machine_alone_and_none_is_taken_twice(services: dict[str, Compose]) -> None:
    ports = [port for each in services.values() for port in each.get("ports", [])]
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}
    published = [int(port["published"]) for port in ports]
    assert len(published) == len(set(published))
    assert {8080, 8081, 9080, 9090, 3000, 9092, 5432, 8443, 8088} <= set(published)


def test_the_process_of_a_service_listens_on_the_port_that_is_published(services: dict[str, Compose]) -> None:
    for name in DATABASES:
        environ = services[name]["environment"]
        assert services[name]["ports"][0]["target"] == int(environ.get("SERVER_PORT", 8080))


def test_secrets_reach_services_as_files(services: dict[str, Compose]) -> None:
    secret = re.compile(r"PASSWORD|SECRET|TOKEN")
    found = {
        (name, variable)
        for name, each in services.items()
        for variable in each.get("environment", {})
        if secret.search(variable) and not variable.endswith("_FILE")
    }
    # Of the requirements: admin with the password admin, on this machine alone.
    assert found == {("grafana", "GF_SECURITY_ADMIN_PASSWORD")}


def test_a_customer_reads_its_own_secrets_alone(services: dict[str, Compose]) -> None:
    for name, each in services.items():
        volumes = {mount["source"] for mount in each.get("volumes", []) if mount["source"].startswith("secrets-")}
        if each["image"] == OURS and name != "secrets":
            customer = name.partition("-")[0] if name.startswith(("ocean", "air")) else "orchestrator"
            assert volumes == {f"secrets-{customer}"}, name
            writable = {mount["source"] for mount in each["volumes"] if not mount.get("read_only")}
            assert writable == (volumes if name.endswith("key") else set()), name


def running(services: dict[str, Compose]) -> dict[str, Compose]:
    """The services of our image that do not end."""
    return {name: each for name, each in services.items() if each.get("command") in (["run"], ["api"])}


def settings_of(service: Compose, made: Path) -> Settings:
    """Those that the service gets, with the secrets in `made`."""
    (source,) = [mount["source"] for mount in service["volumes"] if mount["type"] == "volume"]
    directory = made / source.removeprefix("secrets-")
    environ = service["environment"].items()
    return Settings.from_env({name: value.replace("/run/secrets/", f"{directory}/") for name, value in environ})


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """What the service `secrets` makes."""
    for name in ("postgres", *DATABASES, "nginx"):
        (tmp_path / name).mkdir()
    make_secrets(tmp_path)
    return tmp_path


def make_secrets(directory: Path) -> None:
    result = as_in_a_container("secrets.sh", directory)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def as_in_a_container(script: str, directory: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs a script of ops/compose as the user that owns the directory, who has no capabilities."""
    command = ["bash", str(ROOT / "ops" / "compose" / script), str(directory)]
    if os.geteuid() == 0:
        command = [str(tool("setpriv")), "--bounding-set=-all", *command]
    # The program is the checkout's.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environ, "PATH": path})


def left_by_a_crash(made: Path) -> None:
    """What a run leaves that died before it gave a file its name."""
    for name in ("ocean/database_password", "nginx/tls.crt"):
        (made / f"{name}.new").touch(0o444)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_settings_of_every_service_are_known_and_right(services: dict[str, Compose], made: Path) -> None:
    for name, each in services.items():
        if each["image"] != OURS or name == "secrets":
            continue
        settings = settings_of(each, made)
        # ops/deployments has settings of the schedulers before this one, which are to be reported.
        former = {notice for notice in settings.notices if notice.startswith(("KAFKA_STREAMS_APP_ID", "REDIS_"))}
        assert set(settings.notices) - former == set(), name
        assert (former == set()) is not name.startswith(("ocean", "air")), name
        deployment = name.partition("-")[0] if name.startswith(("ocean", "air")) else "orchestrator"
        password = (made / deployment / "database_password").read_text().strip()
        assert f":{password}@postgres" in settings.database_url, name


def test_a_stopping_service_has_time_to_finish_the_deliveries_under_way(
    services: dict[str, Compose], made: Path
) -> None:
    assert set(running(services)) == {*DATABASES, "api-1", "api-2"}
    for name, each in running(services).items():
        settings = settings_of(each, made)
        # Deliveries have 0.8 of it; then outcomes are recorded.
        assert 0.8 * settings.shutdown_timeout_s > settings.http_timeout_s, name
        assert int(each["stop_grace_period"].removesuffix("s")) >= settings.shutdown_timeout_s + 10, name


def test_the_database_server_has_a_connection_for_everybody(services: dict[str, Compose], made: Path) -> None:
    needed = 0
    for each in running(services).values():
        settings = settings_of(each, made)
        # The rule of ops/deployments/README.md. An instance of the API alone needs fewer.
        needed += settings.pool_max_size + settings.kafka_concurrency + 9
    given = dict(flag.removeprefix("--").split("=", 1) for flag in services["postgres"]["command"][1:])
    most = int(given["max_connections"])
    # Twenty for commands and people, three that PostgreSQL keeps for superusers.
    assert needed + 20 + 3 <= most
    limits = services["postgres"]["deploy"]["resources"]["limits"]
    assert most + int(given["max_worker_processes"]) + 20 <= limits["pids"]


def make_key(directory: Path, environ: dict[str, str]) -> str:
    """What the service `key` prints."""
    result = as_in_a_container("key.sh", directory, **environ)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def key_names(database_url: str) -> set[str]:
    with psycopg.connect(database_url) as connection:
        return {name for (name,) in connection.execute("select name from orchestrator.api_key")}


async def test_a_deployment_in_production_starts_with_the_key_that_compose_made(
    services: dict[str, Compose],
    database_url: str,
    environ: Callable[..., dict[str, str]],
    spawn: Spawn,
    tmp_path: Path,
) -> None:
    assert services["ocean"]["environment"]["ENVIRONMENT"] == "production"
    given = environ(DATABASE_URL=database_url, ENVIRONMENT="production")
    refused = spawn("run", **given)
    assert await refused.wait() != 0
    assert "API keys: expected at least one" in refused.log()

    printed = make_key(tmp_path, given)
    file = tmp_path / "api_key"
    key = file.read_text().strip()
    assert key_hash(key) == stored_hash(database_url)
    assert key not in printed
    assert file.stat().st_mode & 0o777 == 0o400
    process = spawn("run", **given)
    async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
        url = f"http://127.0.0.1:{given['SERVER_PORT']}/api/v1/events/statistics"
        await until(lambda: answers(client, url, None, 401), 60)
        assert await answers(client, url, key, 200)
    assert await process.stop() == 0
    assert make_key(tmp_path, given) == ""
    assert file.read_text().strip() == key


def stored_hash(database_url: str) -> bytes:
    with psycopg.connect(database_url) as connection:
        ((found,),) = connection.execute("select key_hash from orchestrator.api_key").fetchall()
    return bytes(found)


async def answers(client: httpx.AsyncClient, url: str, key: str | None, status: int) -> bool:
    headers = {} if key is None else {"X-API-Key": key}
    try:
        return (await client.get(url, headers=headers)).status_code == status
    except httpx.TransportError:
        return False


def test_a_key_that_was_not_kept_is_made_again_and_those_of_operators_stay(
    database_url: str, environ: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    given = environ(DATABASE_URL=database_url)
    file = tmp_path / "api_key"
    # The process died while it wrote the file: before the key was there, and after that.
    (tmp_path / "api_key.new").touch(0o400)
    make_key(tmp_path, given)
    lost = file.read_text()
    file.unlink()
    make_key(tmp_path, given)
    assert file.read_text() not in ("", lost)
    assert key_hash(file.read_text().strip()) == stored_hash(database_url)
    with psycopg.connect(database_url) as connection:
        connection.execute("select orchestrator.revoke_api_key(name) from orchestrator.api_key")
        connection.execute("select orchestrator.create_api_key('operator', sha256('x'), '{admin}')")
    make_key(tmp_path, given)
    assert key_names(database_url) == {"operator"}
    assert not file.exists()


def test_the_secrets_of_an_installation_stay_and_are_its_own(made: Path, tmp_path: Path) -> None:
    before = contents(made)
    assert set(before) == {
        *(f"{name}/database_password" for name in ("postgres", *DATABASES)),
        *(f"{name}/webhook_secrets" for name in DATABASES),
        "nginx/tls.crt",
        "nginx/tls.key",
    }
    assert len(set(before.values())) == len(before)
    assert {path.stat().st_mode & 0o777 for path in made.rglob("*") if path.is_file()} == {0o444}
    make_secrets(made)
    assert contents(made) == before
    # One that a full disk left empty is made again, and the others stay. Even root without capabilities, as in the
    # container, may not write to what was made read-only before the process died.
    left_by_a_crash(made)
    (made / "ocean" / "database_password").write_bytes(b"")
    (made / "nginx" / "tls.crt").write_bytes(b"")
    make_secrets(made)
    changed = {name for name, content in contents(made).items() if content != before[name]}
    assert changed == {"ocean/database_password", "nginx/tls.crt", "nginx/tls.key"}


def test_the_certificate_of_the_load_balancer_is_good_for_this_machine(made: Path) -> None:
    asked = [str(tool("openssl")), "x509", "-in", str(made / "nginx" / "tls.crt"), "-noout", "-ext", "subjectAltName"]
    result = subprocess.run([*asked, "-checkend", str(300 * 86400)], capture_output=True, text=True)
    assert result.returncode == 0
    assert "DNS:localhost, IP Address:127.0.0.1" in result.stdout


def test_doctor_finds_the_settings_of_the_database_server_well(services: dict[str, Compose]) -> None:
    program, *flags = services["postgres"]["command"]
    assert program == "postgres"
    given = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    # Of an extension that the server here has not.
    assert given.pop("shared_preload_libraries") == "pg_cron"
    assert given.pop("cron.database_name") in DATABASES.values()
    assert given.pop("cron.use_background_workers") == "on"
    with (
        EmbeddedPostgres.temporary(tuning=given, parent=scratch_directory()) as server,
        connect_blocking(server.url(), "doctor") as connection,
    ):
        asked = "select name, current_setting(name) from pg_settings where name = any (%s)"
        assert dict(connection.execute(asked, (list(given),)).fetchall()) == given
        for name in DATABASES:
            settings = Settings.from_env({"DATABASE_URL": server.url(), **bounds(services[name]["environment"])})
            assert {finding.level for finding in server_findings(connection, settings)} == {"ok"}


def bounds(environ: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name.startswith("DB_POOL_")}


@pytest.fixture
def server_url() -> Iterator[str]:
    """The URL of a server whose superuser is named as in the official image, and of whose roles none is taken."""
    with temporary_server() as server:
        (given,) = re.findall("//(.+?):", server.url())
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute("create role helper superuser login password 'helper'")
        helper = psycopg.conninfo.make_conninfo(server.url(), user="helper", password="helper")
        with psycopg.connect(helper, autocommit=True) as connection:
            connection.execute(sql.SQL("alter role {} rename to postgres").format(sql.Identifier(given)))
        yield psycopg.conninfo.make_conninfo(server.url(), user="postgres")


def test_each_deployment_gets_a_database_of_its_own(server_url: str, made: Path, tmp_path: Path) -> None:
    init = (ROOT / "ops" / "compose" / "postgres" / "10-databases.sh").read_text()
    script = tmp_path / "init.sh"
    script.write_text(init.replace("/run/secrets", str(made)))
    info = psycopg.conninfo.conninfo_to_dict(server_url)
    place = f"{info['host']}:{info['port']}"
    environ = {
        "PATH": f"{find_installation().bin_dir}:{os.environ['PATH']}",
        "POSTGRES_USER": str(info["user"]),
        "PGHOST": str(info["host"]),
        "PGPORT": str(info["port"]),
        "PGPASSWORD": str(info["password"]),
    }
    result = subprocess.run(["bash", script], capture_output=True, text=True, env=environ)
    assert (result.returncode, result.stderr) == (0, "")
    for user, database in DATABASES.items():
        login = f"postgresql://{user}:{(made / user / 'database_password').read_text().strip()}@{place}"
        migrate(f"{login}/{database}")
        with psycopg.connect(f"{login}/{database}") as connection:
            may = connection.execute(
                "select rolsuper or rolcreaterole or rolcreatedb from pg_roles where rolname = user"
            )
            assert may.fetchone() == (False,)
        for other in set(DATABASES.values()) - {database}:
            with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
                psycopg.connect(f"{login}/{other}")
