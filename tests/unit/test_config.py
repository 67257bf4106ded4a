from __future__ import annotations

import base64
import os
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given as examples
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict

from orchestrator.errors import SettingsError
from orchestrator.settings import DATABASE_PARTS, SETTINGS, Settings, given
from orchestrator.settings.rules import MARGIN_S
from orchestrator.settings.table import render_markdown_table, settings_table

KEY = "whsec_" + base64.b64encode(bytes(range(24))).decode()
ALL = (*SETTINGS.values(), *DATABASE_PARTS.values())

CUSTOMERS: list[tuple[str, int, int, int, int, int, int, int]] = [
    ("ocean", 8080, 1000, 3000, 15, 20, 50, 15),
    ("air", 8081, 750, 4000, 12, 15, 40, 12),
    ("rail", 8082, 600, 5000, 10, 12, 35, 10),
    ("coretrac", 8083, 1500, 2000, 20, 25, 60, 20),
]


def problems(**environ: str) -> list[str]:
    with pytest.raises(SettingsError) as raised:
        Settings.from_env(environ)
    assert str(raised.value) == "\n".join(raised.value.problems)
    return raised.value.problems


def problem(**environ: str) -> str:
    (only,) = problems(**environ)
    return only


def database(**environ: str) -> dict[str, Any]:
    return dict(conninfo_to_dict(Settings.from_env(environ).database_url))


@pytest.mark.parametrize("customer", CUSTOMERS, ids=lambda customer: str(customer[0]))
def test_the_environment_of_an_existing_deployment_is_read_unchanged(
    customer: tuple[str, int, int, int, int, int, int, int],
) -> None:
    name, port, batch, interval, concurrency, parallel, most, idle = customer
    environ = {
        "DEPLOYMENT_NAME": f"event-scheduler-{name}",
        "CUSTOMER_NAME": name,
        "ENVIRONMENT": "staging",
        "SERVER_PORT": str(port),
        "BATCH_SIZE": str(batch),
        "EXECUTION_INTERVAL": str(interval),
        "KAFKA_CONSUMER_CONCURRENCY": str(concurrency),
        "CUSTOMER_MAX_PARALLEL": str(parallel),
        "DB_POOL_MAX_SIZE": str(most),
        "DB_POOL_MIN_IDLE": str(idle),
        "DATABASE_URL": f"jdbc:postgresql://postgres-{name}:5432/{name}_events_db",
        "DATABASE_USERNAME": f"{name}_user",
        "DATABASE_PASSWORD": "p@ss/w:rd?#%",
        "KAFKA_BOOTSTRAP_SERVERS": "kafka-1:9092, kafka-2:9092",
        "KAFKA_TOPIC_SUBMISSION": f"{name}.event.submissions",
        "KAFKA_CONSUMER_GROUP": f"{name}-schedulers",
        "KAFKA_STREAMS_APP_ID": f"event-scheduler-{name}",
        "REDIS_HOST": "redis",
        "LOG_LEVEL": "INFO",
        "LOG_FILE": f"/var/log/{name}.log",
    }
    settings = Settings.from_env(environ)
    assert (settings.deployment, settings.customer) == (f"event-scheduler-{name}", name)
    assert (settings.server_port, settings.batch_size) == (port, batch)
    assert settings.poll_interval_s == interval / 1000
    assert (settings.pool_max_size, settings.pool_min_idle) == (most, idle)
    assert settings.log_file == f"/var/log/{name}.log"
    assert conninfo_to_dict(settings.database_url) == {
        "host": f"postgres-{name}",
        "port": "5432",
        "dbname": f"{name}_events_db",
        "user": f"{name}_user",
        "password": "p@ss/w:rd?#%",
    }
    assert settings.customer_max_parallel == parallel
    assert [notice.partition(":")[0] for notice in settings.notices] == [
        "KAFKA_STREAMS_APP_ID",
        "REDIS_HOST",
    ]
    assert (settings.kafka_servers, settings.kafka_concurrency) == ("kafka-1:9092,kafka-2:9092", concurrency)
    assert (settings.topic_submission, settings.topic_dlq) == (f"{name}.event.submissions", f"{name}.event.dlq")
    assert settings.kafka_group == f"{name}-schedulers"
    assert all("no effect; " in notice for notice in settings.notices)


def test_an_empty_environment_gives_the_documented_defaults() -> None:
    settings = Settings.from_env({})
    assert settings.database_url == "postgresql://localhost:5432/orchestrator"
    assert (settings.server_host, settings.server_port, settings.management_port) == ("0.0.0.0", 8080, None)
    assert (settings.poll_interval_s, settings.lookahead_s, settings.lease_s) == (None, 2.5, 60.0)
    assert (settings.http_allow_networks, settings.webhook_secrets) == ((), ())
    assert (settings.log_level, settings.log_file, settings.log_format) == ("INFO", None, None)
    assert settings.notices == ()
    assert (settings.kafka_servers, settings.submit_fallback, settings.outbox_topics) == (None, None, ("dlq",))
    assert (settings.topic_ready, settings.kafka_group) == ("default.event.ready", "event-scheduler")


@pytest.mark.parametrize("raw", ["kafka", "kafka:0", "kafka:65536", "http://kafka:9092", "a:1,b", ":9092", ","])
def test_bootstrap_servers_are_hosts_with_ports(raw: str) -> None:
    assert problem(KAFKA_BOOTSTRAP_SERVERS=raw).startswith(
        "KAFKA_BOOTSTRAP_SERVERS: expected a comma-separated list of host:port"
    )


@pytest.mark.parametrize("raw", [".", "..", "a b", "a/b", "x" * 250, "ü"])
def test_a_topic_has_a_name_that_kafka_takes(raw: str) -> None:
    assert problem(KAFKA_TOPIC_READY=raw).startswith("KAFKA_TOPIC_READY: expected the name of a topic")


def test_the_kinds_of_outbox_messages_can_be_chosen_or_switched_off() -> None:
    assert Settings.from_env({"OUTBOX_TOPICS": "Timestamp, dlq"}).outbox_topics == ("timestamp", "dlq")
    assert Settings.from_env({"OUTBOX_TOPICS": "none"}).outbox_topics == ()
    assert "item 2" not in problem(OUTBOX_TOPICS="dlq,ready")


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "KAFKA_SASL_PASSWORD": "x"}, "KAFKA_SASL_USERNAME"),
        ({"KAFKA_SECURITY_PROTOCOL": "sasl_plaintext", "KAFKA_SASL_USERNAME": "x"}, "KAFKA_SASL_PASSWORD"),
        ({"KAFKA_SSL_CERT_FILE": "/tls/cert.pem"}, "KAFKA_SSL_CERT_FILE and KAFKA_SSL_KEY_FILE"),
        ({"KAFKA_TOPIC_DLQ": "default.event.submissions"}, "KAFKA_TOPIC_SUBMISSION"),
        ({"KAFKA_TOPIC_PROCESSING": "a", "KAFKA_TOPIC_READY": "a"}, "KAFKA_TOPIC_PROCESSING"),
        ({"SUBMIT_FALLBACK": "database"}, "SUBMIT_FALLBACK"),
    ],
)
def test_settings_of_kafka_that_cannot_go_together_are_refused(environ: dict[str, str], named: str) -> None:
    assert problem(**environ).startswith(f"{named}: ")


def test_a_variable_left_empty_counts_as_unset() -> None:
    assert Settings.from_env({name: " " for setting in ALL for name in setting.names}) == Settings.from_env({})


@pytest.mark.parametrize("setting", ALL, ids=lambda setting: setting.name)
def test_every_setting_takes_its_own_default_under_each_of_its_names(setting: Any) -> None:
    for name in setting.names:
        assert Settings.from_env({name: setting.default or ""}) == Settings.from_env({})


def test_each_setting_is_defined_once() -> None:
    names = [name for setting in ALL for name in setting.names]
    assert len(names) == len(set(names))
    assert sorted(each.name for each in fields(Settings)) == sorted([*SETTINGS, "notices"])


def test_all_wrong_settings_are_reported_at_once() -> None:
    assert problems(SERVER_PORT="x", DB_PORT="0", LOG_LEVEL="loud", ALLOW_ANONYMOUS="maybe") == [
        "SERVER_PORT: expected a whole number from 1 to 65535, got 'x'",
        "ALLOW_ANONYMOUS: expected true or false, got 'maybe'",
        "LOG_LEVEL: expected DEBUG, INFO, WARNING, ERROR or CRITICAL, got 'loud'",
        "DB_PORT: expected a whole number from 1 to 65535, got '0'",
    ]


@pytest.mark.parametrize("raw", ["1_0", "١", "1e3", "0x10", "10.0", "65536", "-1", "9" * 400, "nan"])
def test_a_port_is_digits_within_its_bounds(raw: str) -> None:
    assert problem(SERVER_PORT=raw).startswith("SERVER_PORT: expected a whole number from 1 to 65535, got '")


@pytest.mark.parametrize("raw", ["inf", "nan", "-1", "1e1", "0", "601", "5 s"])
def test_seconds_are_plain_and_bounded(raw: str) -> None:
    assert problem(HTTP_TIMEOUT_SECONDS=raw).startswith("HTTP_TIMEOUT_SECONDS: expected seconds from 0.1 to 600")


def test_seconds_may_have_fractions() -> None:
    assert Settings.from_env({"HTTP_TIMEOUT_SECONDS": "2.5"}).http_timeout_s == 2.5


@examples(st.integers(-100_000, 100_000))
def test_a_batch_size_is_taken_exactly_when_it_is_in_bounds(size: int) -> None:
    environ = {"BATCH_SIZE": str(size), "SCHEDULER_PREFETCH": "10000"}
    if 1 <= size <= 10_000:
        assert Settings.from_env(environ).batch_size == size
    else:
        assert problem(**environ) == f"BATCH_SIZE: expected a whole number from 1 to 10000, got '{size}'"


def test_two_names_of_a_setting_may_agree_but_not_differ() -> None:
    assert Settings.from_env({"BATCH_SIZE": "7", "SCHEDULER_BATCH_SIZE": " 7"}).batch_size == 7
    line = problem(BATCH_SIZE="7", SCHEDULER_BATCH_SIZE="8")
    assert line == "SCHEDULER_BATCH_SIZE and BATCH_SIZE: both are set and differ; keep SCHEDULER_BATCH_SIZE"


@examples(st.integers(0, 10_000), st.integers(1, 600), st.integers(1, 3600))
def test_a_lease_outlasts_look_ahead_and_time_out(lookahead_ms: int, timeout_s: int, lease_s: int) -> None:
    environ = {
        "SCHEDULER_LOOKAHEAD_MS": str(lookahead_ms),
        "HTTP_TIMEOUT_SECONDS": str(timeout_s),
        "SCHEDULER_LEASE_SECONDS": str(lease_s),
    }
    if lease_s > lookahead_ms / 1000 + timeout_s + MARGIN_S:
        assert Settings.from_env(environ).lease_s == lease_s
    else:
        assert problem(**environ).startswith("SCHEDULER_LEASE_SECONDS: expected more than ")


@pytest.mark.parametrize(
    ("environ", "start"),
    [
        ({"DB_POOL_MIN_IDLE": "51"}, "DB_POOL_MIN_IDLE: expected at most DB_POOL_MAX_SIZE (50), got 51"),
        (
            {"BATCH_SIZE": "6000", "SCHEDULER_PREFETCH": "5000"},
            "SCHEDULER_PREFETCH: expected at least SCHEDULER_BATCH_SIZE (6000), got 5000",
        ),
        ({"MAX_BODY_BYTES": "10"}, "MAX_BODY_BYTES: expected at least MAX_PAYLOAD_BYTES (1048576), got 10"),
        (
            {"MANAGEMENT_SERVER_PORT": "8080"},
            "MANAGEMENT_SERVER_PORT: expected another port than SERVER_PORT",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(environ: dict[str, str], start: str) -> None:
    assert problem(**environ).startswith(start)


def test_a_rule_about_a_wrong_value_adds_no_second_complaint() -> None:
    assert problem(DB_POOL_MIN_IDLE="x").startswith("DB_POOL_MIN_IDLE: expected a whole number")


@pytest.mark.parametrize(
    ("environment", "given", "allowed"),
    [
        ("development", "", True),
        ("staging", "", True),
        ("prod", "", False),
        ("Production-eu", "", False),
        ("production", "yes", True),
        ("development", "off", False),
    ],
)
def test_anonymous_callers_are_let_in_outside_production_only(environment: str, given: str, allowed: bool) -> None:
    settings = Settings.from_env({"ENVIRONMENT": environment, "ALLOW_ANONYMOUS": given})
    assert settings.allow_anonymous is allowed


@pytest.mark.parametrize(("raw", "level"), [("debug", "DEBUG"), ("WARN", "WARNING"), ("TRACE", "DEBUG")])
def test_log_levels_go_by_the_names_of_both_worlds(raw: str, level: str) -> None:
    assert Settings.from_env({"LOG_LEVEL": raw}).log_level == level


def test_networks_may_be_addresses_and_a_wrong_one_is_named() -> None:
    settings = Settings.from_env({"HTTP_ALLOW_NETWORKS": "10.1.0.0/16, 127.0.0.1,fd00::/8,"})
    assert settings.http_allow_networks == tuple(map(ip_network, ("10.1.0.0/16", "127.0.0.1/32", "fd00::/8")))
    line = problem(HTTP_ALLOW_NETWORKS="10.1.0.0/16,localhost")
    assert line.startswith("HTTP_ALLOW_NETWORKS: ")
    assert line.endswith("got 'localhost'")


class TestDatabaseUrl:
    @pytest.mark.parametrize("scheme", ["postgresql", "postgres", "jdbc:postgresql", "JDBC:PostgreSQL"])
    def test_every_spelling_of_the_url_scheme_means_the_same(self, scheme: str) -> None:
        settings = Settings.from_env({"DATABASE_URL": f"{scheme}://app:pw@db:6432/events"})
        assert settings.database_url == "postgresql://app:pw@db:6432/events"

    def test_host_port_and_name_make_an_address_when_there_is_no_url(self) -> None:
        settings = Settings.from_env({"DB_HOST": "db", "DB_PORT": "1", "DB_NAME": "a/b", "DB_USER": "me"})
        assert settings.database_url == "postgresql://me@db:1/a%2Fb"

    @pytest.mark.parametrize("host", ["db.example", "::1", "/var/run/postgresql", "10.0.0.1"])
    def test_a_host_may_be_a_name_an_address_or_the_directory_of_a_socket(self, host: str) -> None:
        assert database(DB_HOST=host)["host"] == host

    def test_a_port_in_the_host_is_refused(self) -> None:
        assert problem(DB_HOST="db:5432").startswith("DB_HOST: expected a host name, an address without a port")

    @examples(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n")).filter(str.strip))
    def test_any_password_reaches_libpq_intact(self, password: str) -> None:
        for environ in (
            {"DB_PASSWORD": password, "DB_USER": "u"},
            {
                "DATABASE_URL": "jdbc:postgresql://h/d",
                "DATABASE_PASSWORD": password,
                "DATABASE_USERNAME": "u",
            },
            {"DATABASE_URL": f"postgresql://u:{quote(password, safe='')}@h/d"},
            {"DATABASE_URL": f"jdbc:postgresql://h/d?user=u&password={quote(password, safe='')}"},
        ):
            assert database(**environ)["password"] == password

    def test_the_line_end_of_a_password_file_is_not_part_of_the_password(self) -> None:
        assert database(DB_PASSWORD=" s3cret \r\n")["password"] == " s3cret "

    def test_login_settings_fill_in_only_what_the_url_lacks(self) -> None:
        assert database(DATABASE_URL="postgres://a@h/d", DB_USER="b", DB_PASSWORD="p") == {
            "host": "h",
            "dbname": "d",
            "user": "a",
            "password": "p",
        }
        notices = Settings.from_env({"DATABASE_URL": "postgres://a@h/d", "DB_USER": "b", "DB_HOST": "x"}).notices
        assert notices == (
            "DB_HOST: no effect, because DATABASE_URL replaces it",
            "DB_USER: no effect, because DATABASE_URL replaces it",
        )

    def test_parameters_of_the_java_driver_are_translated_or_named(self) -> None:
        url = (
            "jdbc:postgresql://h1:1,[::1]:2/d?ssl=true&ApplicationName=a+b&targetServerType=primary"
            "&currentSchema=x&prepareThreshold=0"
        )
        assert database(DATABASE_URL=url) == {
            "host": "h1,::1",
            "port": "1,2",
            "dbname": "d",
            "sslmode": "verify-full",
            "application_name": "a b",
            "target_session_attrs": "primary",
        }
        assert [notice.split()[1] for notice in Settings.from_env({"DATABASE_URL": url}).notices] == [
            "currentSchema",
            "prepareThreshold",
        ]

    @pytest.mark.parametrize("ssl", ["ssl=false", "ssl=true&sslmode=require"])
    def test_java_encryption_follows_ssl_unless_sslmode_says_more(self, ssl: str) -> None:
        wanted = "require" if "sslmode" in ssl else None
        assert database(DATABASE_URL=f"jdbc:postgresql://h/d?{ssl}").get("sslmode") == wanted

    @pytest.mark.parametrize(
        "url", ["postgresql://h1,h2:2/d", "jdbc:postgresql://h1:1,[::1]:2/d", "postgresql:///d?host=h1,h2"]
    )
    def test_an_address_of_several_hosts_means_the_one_that_takes_writes(self, url: str) -> None:
        assert database(DATABASE_URL=url)["target_session_attrs"] == "read-write"
        asked = "targetServerType=any" if url.startswith("jdbc") else "target_session_attrs=any"
        joined = "&" if "?" in url else "?"
        assert database(DATABASE_URL=url + joined + asked)["target_session_attrs"] == "any"

    def test_several_hosts_in_the_environment_of_libpq_mean_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PGHOST", "h1,h2")
        assert database(DATABASE_URL="postgresql:///d")["target_session_attrs"] == "read-write"
        assert "target_session_attrs" not in database(DATABASE_URL="postgresql://h/d")

    def test_a_single_host_is_taken_as_it_is(self) -> None:
        assert "target_session_attrs" not in database(DATABASE_URL="postgresql://h/d")

    @pytest.mark.parametrize(
        ("asked", "named"),
        [
            ("postgresql://h/d?target_session_attrs=standby", "standby"),
            ("postgresql://h,i/d?target_session_attrs=read-only", "read-only"),
            ("postgresql://h/d?target_session_attrs=prefer-standby", "prefer-standby"),
            ("jdbc:postgresql://h/d?targetServerType=secondary", "standby"),
        ],
    )
    def test_sessions_that_cannot_write_are_refused(self, asked: str, named: str) -> None:
        assert problem(DATABASE_URL=asked) == (
            "DATABASE_URL: expected target_session_attrs read-write or primary, because all roles write, "
            f"got {named}; leave it out"
        )

    def test_parameters_of_libpq_are_kept(self) -> None:
        found = database(DATABASE_URL="postgresql:///d?host=/tmp/sock&application_name=a+b&options=-c%20x%3D1")
        assert found == {"dbname": "d", "host": "/tmp/sock", "application_name": "a+b", "options": "-c x=1"}

    @pytest.mark.parametrize(
        "url",
        [
            "mysql://app:s3cret@h/d",
            "jdbc:mysql://h/d?password=s3cret",
            "postgresql://app:s3cret@h:x/d",
            "postgresql://app:s3cret@h:0/d",
            "postgresql://app:s3cret/x@h/d",
            "postgresql://app:s3cret@h/d?nonsense=1",
            "h/d",
            "s3cret",
        ],
    )
    def test_an_address_of_another_database_is_refused_without_repeating_its_password(self, url: str) -> None:
        line = problem(DATABASE_URL=url)
        assert line.startswith("DATABASE_URL: expected postgresql://")
        assert "s3cret" not in line
        if "mysql" in url:
            assert line.endswith("mysql://…'")

    @examples(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
    def test_any_other_text_is_an_address_for_libpq_or_a_settings_error(self, rest: str) -> None:
        try:
            settings = Settings.from_env({"DATABASE_URL": f"postgresql://{rest}"})
        except SettingsError:
            return
        conninfo_to_dict(settings.database_url)


SECRETS = {
    "DATABASE_URL": "jdbc:postgresql://h/d?user=u&password=s3cret&sslpassword=s3cret",
    "DB_PASSWORD": "s3cret",
    "WEBHOOK_SECRETS": f"{KEY},{KEY}",
}


def test_secrets_do_not_show_in_the_table_the_repr_or_an_error() -> None:
    settings = Settings.from_env(SECRETS)
    assert settings.webhook_secrets == (KEY, KEY)
    shown = repr(settings) + repr(settings_table(SECRETS)) + repr(settings.notices)
    assert "s3cret" not in shown
    assert KEY not in shown
    short = "whsec_" + base64.b64encode(b"s3cret").decode()
    line = problem(WEBHOOK_SECRETS=f"{KEY},{short}")
    assert line.endswith("item 2 is not one")
    assert KEY not in line
    assert short not in line
    assert "s3cret" not in problem(DB_PASSWORD="s3cret1", DATABASE_PASSWORD="s3cret2")


@pytest.mark.parametrize("secret", ["whsec_", KEY[6:], "whsek_" + KEY[6:], KEY + "é", "whsec_" + "A" * 88 + "AAAA"])
def test_a_key_is_named_and_long_enough(secret: str) -> None:
    assert problem(WEBHOOK_SECRETS=secret).startswith("WEBHOOK_SECRETS: expected a comma-separated list of whsec_")


def test_the_directory_of_secrets_must_be_there(tmp_path: Path) -> None:
    assert Settings.from_env({"SECRETS_DIRECTORY": f" {tmp_path} "}).secrets_directory == str(tmp_path)
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "absent", tmp_path / "file"):
        assert problem(SECRETS_DIRECTORY=str(wrong)).startswith(
            "SECRETS_DIRECTORY: expected a directory that exists, got"
        )


@pytest.mark.parametrize("raw", ["0", "-1", "1.5", "36501", "forever"])
def test_retention_is_whole_days_from_one_upwards(raw: str) -> None:
    assert problem(CLEANUP_RETENTION_DAYS=raw).startswith(
        "CLEANUP_RETENTION_DAYS: expected a whole number from 1 to 36500, got"
    )
    assert Settings.from_env({}).retention_days == 7


def test_a_maximum_ahead_below_the_partitions_is_refused() -> None:
    assert problem(MAX_SCHEDULE_AHEAD_DAYS="29") == (
        "MAX_SCHEDULE_AHEAD_DAYS: expected at least PARTITION_DAYS_AHEAD (30), got 29"
    )
    assert Settings.from_env({"MAX_SCHEDULE_AHEAD_DAYS": "30"}).max_schedule_ahead_days == 30
    assert Settings.from_env({"PARTITION_DAYS_AHEAD": "400"}).max_schedule_ahead_days == 400


@pytest.fixture
def a_directory() -> Iterator[Path]:
    """One that everybody reaches, since root may write anywhere."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def test_the_directory_of_archives_must_be_there_and_take_files(a_directory: Path) -> None:
    complaint = "ARCHIVE_DIRECTORY: expected a directory that exists and can be written to, got"
    (a_directory / "file").write_text("")
    for wrong in (a_directory / "absent", a_directory / "file"):
        assert problem(ARCHIVE_DIRECTORY=str(wrong)).startswith(complaint)
    chosen = {"ARCHIVE_DIRECTORY": str(a_directory)}
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        else:
            a_directory.chmod(0o500)
        assert problem(**chosen).startswith(complaint)
    finally:
        os.seteuid(user)
    a_directory.chmod(0o700)
    assert Settings.from_env(chosen).archive_directory == str(a_directory)
    assert Settings.from_env({}).archive_directory is None


def test_a_format_of_archives_that_cannot_be_written_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.from_env({"ARCHIVE_FORMAT": "Parquet"}).archive_format == "parquet"
    assert problem(ARCHIVE_FORMAT="zip") == "ARCHIVE_FORMAT: expected csv or parquet, got 'zip'"
    monkeypatch.setattr("orchestrator.settings.rules.find_spec", lambda name: None)
    assert problem(ARCHIVE_FORMAT="parquet").startswith("ARCHIVE_FORMAT: parquet needs pyarrow, which is not installed")
    assert Settings.from_env({"ARCHIVE_FORMAT": "csv"}).archive_format == "csv"


def test_the_settings_that_the_environment_gives_are_known() -> None:
    assert given({"BATCH_SIZE": "5", "CLEANUP_RETENTION_DAYS": "7", "LOG_LEVEL": "", "HOME": "/"}) == {
        "batch_size",
        "retention_days",
    }


def test_a_certificate_of_the_api_is_named_as_spring_names_it_too() -> None:
    spring = {
        "SERVER_SSL_CERTIFICATE": "file:/etc/tls/tls.crt",
        "SERVER_SSL_CERTIFICATE_PRIVATE_KEY": "/etc/tls/tls.key",
    }
    settings = Settings.from_env(spring)
    assert (settings.ssl_cert_file, settings.ssl_key_file) == ("/etc/tls/tls.crt", "/etc/tls/tls.key")
    assert Settings.from_env({}).ssl_cert_file is None


def test_a_certificate_and_its_key_come_together_and_before_those_of_clients() -> None:
    both = "SERVER_SSL_CERT_FILE and SERVER_SSL_KEY_FILE: expected both or neither; set the other too"
    assert problem(SERVER_SSL_CERT_FILE="/a") == both
    assert problem(SERVER_SSL_KEY_FILE="/a", SERVER_SSL_CLIENT_CA_FILE="/a") == both
    assert problem(SERVER_SSL_CLIENT_CA_FILE="/a").startswith(
        "SERVER_SSL_CLIENT_CA_FILE: expected SERVER_SSL_CERT_FILE"
    )


@pytest.mark.parametrize("given", ["-----BEGIN PRIVATE KEY-----\nMIIEs3cret", "classpath:tls.key", "file:", "a\nb"])
def test_a_key_is_the_path_of_a_file_and_is_never_repeated(given: str) -> None:
    line = problem(SERVER_SSL_CERT_FILE="/a", SERVER_SSL_KEY_FILE=given)
    assert line.startswith("SERVER_SSL_KEY_FILE: expected the path of a PEM file, got ")
    assert "s3cret" not in line


def test_settings_of_tls_that_spring_knows_and_this_product_does_not_are_pointed_out() -> None:
    given = {"SERVER_SSL_KEY_STORE": "a.p12", "SERVER_SSL_ENABLED": "true", "SERVER_SSL_CLIENT_AUTH": "need"}
    notices = Settings.from_env(given).notices
    assert [notice.split(":")[0] for notice in notices] == sorted(given)
    assert all("no effect; " in notice for notice in notices)
    assert Settings.from_env({"SERVER_SSL_CERTFILE": "/a"}).notices == (
        "SERVER_SSL_CERTFILE: not a setting; did you mean SERVER_SSL_CERT_FILE?",
    )


def test_a_drain_is_shorter_than_the_stop_that_it_is_part_of() -> None:
    assert problem(SHUTDOWN_DRAIN_SECONDS="20") == (
        "SHUTDOWN_DRAIN_SECONDS: expected less than SHUTDOWN_TIMEOUT_SECONDS (20), got 20"
    )
    assert Settings.from_env({"SHUTDOWN_DRAIN_SECONDS": "5"}).shutdown_drain_s == 5
    assert Settings.from_env({"SHUTDOWN_TIMEOUT_SECONDS": "0"}).shutdown_drain_s == 0


@pytest.mark.parametrize("raw", ["0", "-1", "100001", "many"])
def test_the_bound_for_each_destination_is_a_whole_number_from_one_upwards(raw: str) -> None:
    assert problem(CUSTOMER_MAX_PARALLEL=raw).startswith("CUSTOMER_MAX_PARALLEL: expected a whole number from 1")
    assert Settings.from_env({}).customer_max_parallel is None


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("SCHEDULER_BATCHSIZE", "SCHEDULER_BATCH_SIZE"),
        ("DB_USERNAME", "DATABASE_USERNAME"),
        ("WEBHOOK_SECRET", "WEBHOOK_SECRETS"),
        ("LOGLEVEL", "LOG_LEVEL"),
        ("HTTP_MAX_CONNECTION", "HTTP_MAX_CONNECTIONS"),
    ],
)
def test_a_likely_typo_in_a_variable_is_pointed_out(name: str, meant: str) -> None:
    assert Settings.from_env({name: "x"}).notices == (f"{name}: not a setting; did you mean {meant}?",)


def test_an_unknown_variable_with_a_known_prefix_is_pointed_out() -> None:
    assert Settings.from_env({"SCHEDULER_ZZZZZZZZZZZZ": "x"}).notices == ("SCHEDULER_ZZZZZZZZZZZZ: not a setting",)


def test_the_variables_of_other_programs_are_not_remarked_on() -> None:
    names = "PATH HOME HOSTNAME USER LANG SHELL PWD TERM LOGNAME HTTP_PROXY HTTPS_PROXY NO_PROXY PGHOST JAVA_HOME"
    links = "DB_SERVICE_HOST DB_SERVICE_PORT DB_PORT_5432_TCP DB_PORT_5432_TCP_ADDR SCHEDULER_SERVICE_PORT_HTTP"
    assert Settings.from_env(dict.fromkeys((names + " " + links).split(), "x")).notices == ()


def test_the_table_shows_each_value_and_its_origin() -> None:
    environ = {
        "BATCH_SIZE": "250",
        "EXECUTION_INTERVAL": "3000",
        "DATABASE_URL": "postgres://u:p@h/d",
        "DB_USER": "x",
    }
    rows = {row.name: row for row in settings_table(environ)}
    assert list(rows)[:2] == ["DEPLOYMENT_NAME", "CUSTOMER_NAME"]
    assert len(rows) == len(ALL)
    assert rows["SCHEDULER_BATCH_SIZE"][1:4] == ("250", "BATCH_SIZE", "100")
    assert rows["SCHEDULER_POLL_INTERVAL_MS"][1:3] == ("3000", "EXECUTION_INTERVAL")
    assert rows["DATABASE_URL"][1:3] == ("postgresql://u:***@h/d", "DATABASE_URL")
    assert rows["DB_USER"][1:3] == (None, "DATABASE_URL")
    assert rows["SERVER_PORT"][1:3] == ("8080", "default")
    assert rows["LOG_FILE"][1:4] == (None, "default", "standard error")


def test_the_values_in_the_table_would_be_read_back_the_same() -> None:
    environ = {
        "HTTP_ALLOW_NETWORKS": "10.0.0.0/8,::1",
        "SCHEDULER_LOOKAHEAD_MS": "1234",
        "HTTP_TIMEOUT_SECONDS": "2.5",
    }
    again = {row.name: row.value for row in settings_table(environ) if row.value}
    assert Settings.from_env(again) == Settings.from_env(environ)


def test_a_row_of_the_reference_has_as_many_cells_as_its_head() -> None:
    lines = render_markdown_table().splitlines()
    assert {line.count("|") for line in lines} == {5}
    assert len(lines) == len(ALL) + 2
