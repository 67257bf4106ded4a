"""Settings of the systems that this one replaces: their deployments move over unchanged, or are told what differs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import SettingsError
from orchestrator.settings import Settings, jaas
from orchestrator.settings.table import settings_table

SASL = {"KAFKA_SECURITY_PROTOCOL": "SASL_SSL"}


def problems_of(environ: dict[str, str]) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        Settings.from_env(environ)
    return caught.value.problems


def module(name: str, username: str = '"u"', password: str = '"p"') -> str:
    return f"{name} required username={username} password={password};"


@pytest.mark.parametrize(
    ("name", "value", "attribute", "expected"),
    [
        ("KAFKA_BROKERS", "a:9092,b:9092", "kafka_servers", "a:9092,b:9092"),
        ("SPRING_KAFKA_BOOTSTRAP_SERVERS", "a:9092", "kafka_servers", "a:9092"),
        ("SPRING_KAFKA_CONSUMER_GROUP_ID", "g", "kafka_group", "g"),
        ("SPRING_KAFKA_SECURITY_PROTOCOL", "SSL", "kafka_security_protocol", "SSL"),
        ("SPRING_KAFKA_PROPERTIES_SASL_MECHANISM", "SCRAM-SHA-512", "kafka_sasl_mechanism", "SCRAM-SHA-512"),
        ("SPRING_KAFKA_LISTENER_CONCURRENCY", "4", "kafka_concurrency", 4),
        ("SPRING_DATASOURCE_HIKARI_MAXIMUM_POOL_SIZE", "40", "pool_max_size", 40),
        ("SPRING_DATASOURCE_HIKARI_MINIMUM_IDLE", "12", "pool_min_idle", 12),
        ("LOGGING_LEVEL_ROOT", "warn", "log_level", "WARNING"),
        ("LOGGING_FILE_NAME", "/tmp/x.log", "log_file", "/tmp/x.log"),
        ("SPRING_PROFILES_ACTIVE", "staging", "environment", "staging"),
    ],
)
def test_a_setting_is_known_by_its_other_name(name: str, value: str, attribute: str, expected: Any) -> None:
    settings = Settings.from_env({name: value})
    assert getattr(settings, attribute) == expected
    assert settings.notices == ()


def test_the_database_of_a_java_deployment_is_understood() -> None:
    environ = {
        "SPRING_DATASOURCE_URL": "jdbc:postgresql://db:5433/ocean_events_db?currentSchema=public",
        "SPRING_DATASOURCE_USERNAME": "ocean",
        "SPRING_DATASOURCE_PASSWORD": "p@ss:w/rd",
    }
    settings = Settings.from_env(environ)
    assert settings.database_url == "postgresql://ocean:p%40ss%3Aw%2Frd@db:5433/ocean_events_db"
    rows = {row.name: row for row in settings_table(environ)}
    assert (rows["DATABASE_URL"].value, rows["DATABASE_URL"].source) == (
        "postgresql://ocean:***@db:5433/ocean_events_db",
        "SPRING_DATASOURCE_URL",
    )
    assert (rows["DB_PASSWORD"].value, rows["DB_PASSWORD"].source) == ("***", "SPRING_DATASOURCE_PASSWORD")


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"KAFKA_BOOTSTRAP_SERVERS": "a:1", "KAFKA_BROKERS": "b:1"}, "KAFKA_BOOTSTRAP_SERVERS and KAFKA_BROKERS"),
        (
            {"KAFKA_BROKERS": "a:1", "SPRING_KAFKA_BOOTSTRAP_SERVERS": "b:1"},
            "KAFKA_BROKERS and SPRING_KAFKA_BOOTSTRAP_SERVERS",
        ),
        (
            {"DATABASE_URL": "postgresql://a/d", "SPRING_DATASOURCE_URL": "jdbc:postgresql://b/d"},
            "DATABASE_URL and SPRING_DATASOURCE_URL",
        ),
        ({"DB_USER": "a", "SPRING_DATASOURCE_USERNAME": "b"}, "DB_USER and SPRING_DATASOURCE_USERNAME"),
        ({"DB_PASSWORD": "a", "SPRING_DATASOURCE_PASSWORD": "b"}, "DB_PASSWORD and SPRING_DATASOURCE_PASSWORD"),
        ({"ENVIRONMENT": "test", "SPRING_PROFILES_ACTIVE": "dev"}, "ENVIRONMENT and SPRING_PROFILES_ACTIVE"),
        ({"ENVIRONMENT": "dev", "SPRING_PROFILES_ACTIVE": "dev,prod"}, "ENVIRONMENT and SPRING_PROFILES_ACTIVE"),
        ({"ENVIRONMENT": "production", "SPRING_PROFILES_ACTIVE": "dev"}, "ENVIRONMENT and SPRING_PROFILES_ACTIVE"),
    ],
)
def test_two_names_of_a_setting_that_differ_stop_the_start(environ: dict[str, str], names: str) -> None:
    assert [problem.partition(": ")[0] for problem in problems_of(environ)] == [names]


@pytest.mark.parametrize("prefix", ["", "jdbc:"])
def test_parameters_in_the_form_of_other_drivers_are_refused_unquoted(prefix: str) -> None:
    [problem] = problems_of({"DATABASE_URL": f"{prefix}postgresql://h:5432/db;user=x;password=S3CRET"})
    assert problem.startswith("DATABASE_URL: expected postgresql://")
    assert "S3CRET" not in problem


def test_two_names_of_a_setting_may_say_the_same_in_different_forms() -> None:
    settings = Settings.from_env(
        {
            "DATABASE_URL": "postgresql://h:5432/d",
            "SPRING_DATASOURCE_URL": "jdbc:postgresql://h:5432/d?stringtype=unspecified",
            "KAFKA_BROKERS": "a:1, b:1",
            "KAFKA_BOOTSTRAP_SERVERS": "a:1,b:1",
            "ENVIRONMENT": "production",
            "SPRING_PROFILES_ACTIVE": "kafka,prod",
        }
    )
    assert (settings.kafka_servers, settings.environment) == ("a:1,b:1", "production")


@pytest.mark.parametrize(
    ("profiles", "environment", "anonymous"),
    [
        ("prod", "prod", False),
        ("kafka,prod", "prod", False),
        ("docker, production ,x", "production", False),
        ("PROD", "PROD", False),
        ("staging,kafka", "staging", True),
        (",dev", "dev", True),
    ],
)
def test_a_profile_of_production_makes_keys_obligatory(profiles: str, environment: str, anonymous: bool) -> None:
    settings = Settings.from_env({"SPRING_PROFILES_ACTIVE": profiles})
    assert (settings.environment, settings.allow_anonymous) == (environment, anonymous)
    assert type(settings.environment) is str


@pytest.mark.parametrize(
    ("config", "mechanism"),
    [(module(jaas.PLAIN), "PLAIN"), (module(jaas.SCRAM), "SCRAM-SHA-256"), (module(jaas.SCRAM), "SCRAM-SHA-512")],
)
@pytest.mark.parametrize("name", ["KAFKA_SASL_JAAS_CONFIG", "SPRING_KAFKA_PROPERTIES_SASL_JAAS_CONFIG"])
def test_the_log_in_of_a_java_client_is_understood(name: str, config: str, mechanism: str) -> None:
    environ = {**SASL, name: config, "KAFKA_SASL_MECHANISM": mechanism}
    settings = Settings.from_env(environ)
    assert (settings.kafka_sasl_username, settings.kafka_sasl_password) == ("u", "p")
    rows = {row.name: row for row in settings_table(environ)}
    assert [rows[row].value for row in ("KAFKA_SASL_JAAS_CONFIG", "KAFKA_SASL_PASSWORD")] == ["***", "***"]
    assert (rows["KAFKA_SASL_USERNAME"].value, rows["KAFKA_SASL_USERNAME"].source) == ("u", name)


@pytest.mark.parametrize(
    ("written", "password"),
    [
        ('"p"', "p"),
        ("'p'", "p"),
        ("p-1_x$", "p-1_x$"),
        (r'"a\"b\\c\'d"', "a\"b\\c'd"),
        (r'"\t\101\60x\q"', "\tA0xq"),
        ('"a;b=c // d /* e */"', "a;b=c // d /* e */"),
        ("'say \"hi\"'", 'say "hi"'),
        ('""', ""),
        ('"pä😀"', "pä😀"),
    ],
)
def test_passwords_are_quoted_and_escaped_as_in_java(written: str, password: str) -> None:
    assert jaas.parse(module(jaas.PLAIN, password=written)) == jaas.Jaas(jaas.PLAIN, "u", password)


@given(username=st.text(), password=st.text())
def test_every_log_in_survives_java_quoting(username: str, password: str) -> None:
    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'

    found = jaas.parse(module(jaas.PLAIN, quoted(username), quoted(password)))
    assert (found.username, found.password) == (username, password)


def test_blanks_lines_and_comments_may_stand_between_parts_of_a_log_in() -> None:
    text = f'  {jaas.SCRAM}\n  REQUIRED // why\n username = "u" /* and */\n password="p"\n serviceName=\'kafka\' ; \n'
    assert jaas.parse(text) == jaas.Jaas(jaas.SCRAM, "u", "p")


@pytest.mark.parametrize(
    "wrong",
    [
        "hunter2",
        jaas.PLAIN,
        f"{jaas.PLAIN} required",
        f'{jaas.PLAIN} required username="u" password="p"',
        f'{jaas.PLAIN} username="u" password="p";',
        f'{jaas.PLAIN} required username="u" password=;',
        f'{jaas.PLAIN} required username="u" password="p;',
        module(jaas.PLAIN) + module(jaas.PLAIN),
        f"{jaas.PLAIN} required username:u;",
    ],
)
def test_a_malformed_log_in_is_refused_without_being_quoted(wrong: str) -> None:
    (problem,) = problems_of({"KAFKA_SASL_JAAS_CONFIG": wrong})
    assert problem.startswith("KAFKA_SASL_JAAS_CONFIG: expected a JAAS entry such as org.apache")
    assert "hunter2" not in problem
    assert ", got" not in problem


@pytest.mark.parametrize(
    "name",
    [
        "software.amazon.msk.auth.iam.IAMLoginModule",
        "com.sun.security.auth.module.Krb5LoginModule",
        "org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule",
    ],
)
def test_another_log_in_module_is_refused_by_name(name: str) -> None:
    (problem,) = problems_of({"KAFKA_SASL_JAAS_CONFIG": f"{name} required;"})
    assert problem == (f"KAFKA_SASL_JAAS_CONFIG: expected PlainLoginModule or ScramLoginModule of Kafka's, got {name}")


@pytest.mark.parametrize(
    ("environ", "start"),
    [
        (
            {"KAFKA_SASL_JAAS_CONFIG": module(jaas.SCRAM)},
            "KAFKA_SASL_MECHANISM: expected SCRAM-SHA-256 or SCRAM-SHA-512",
        ),
        (
            {"KAFKA_SASL_JAAS_CONFIG": module(jaas.PLAIN), "KAFKA_SASL_MECHANISM": "SCRAM-SHA-256"},
            "KAFKA_SASL_MECHANISM: expected PLAIN",
        ),
        (
            {"KAFKA_SASL_JAAS_CONFIG": module(jaas.PLAIN), "KAFKA_SASL_USERNAME": "other"},
            "KAFKA_SASL_USERNAME and KAFKA_SASL_JAAS_CONFIG: both are set and differ",
        ),
        (
            {"KAFKA_SASL_JAAS_CONFIG": module(jaas.PLAIN), "KAFKA_SASL_PASSWORD": "other"},
            "KAFKA_SASL_PASSWORD and KAFKA_SASL_JAAS_CONFIG: both are set and differ",
        ),
        (
            {"KAFKA_SASL_JAAS_CONFIG": f"{jaas.PLAIN} required username='u';", **SASL},
            "KAFKA_SASL_PASSWORD: required",
        ),
        (
            {"KAFKA_SASL_JAAS_CONFIG": module(jaas.SCRAM)[:-1] + " tokenauth=true;"},
            "KAFKA_SASL_JAAS_CONFIG: expected PlainLoginModule or ScramLoginModule",
        ),
    ],
)
def test_a_log_in_that_does_not_fit_the_other_settings_is_refused(environ: dict[str, str], start: str) -> None:
    (problem,) = problems_of(environ)
    assert problem.startswith(start)


def test_a_setting_without_counterpart_is_reported_as_unused_and_without_its_value() -> None:
    names = [
        *("REDIS_HOST", "SPRING_REDIS_PASSWORD", "SPRING_DATA_REDIS_URL", "KAFKA_STREAMS_APP_ID", "JAVA_OPTS"),
        *("SPRING_APPLICATION_NAME", "SPRING_JPA_HIBERNATE_DDL_AUTO", "WORKFLOW_RETRY_MAX_ATTEMPTS"),
        *("KAFKA_SSL_TRUSTSTORE_LOCATION", "MANAGEMENT_ENDPOINTS_WEB_EXPOSURE_INCLUDE", "LOGGING_PATTERN_CONSOLE"),
    ]
    notices = Settings.from_env(dict.fromkeys(names, "s3cret-value")).notices
    assert [notice.partition(": no effect; ")[0] for notice in notices] == sorted(names)
    assert "s3cret" not in " ".join(notices)


def test_the_deployment_of_each_customer_moves_over_unchanged() -> None:
    environ = {
        "DEPLOYMENT_NAME": "event-scheduler-ocean",
        "CUSTOMER_NAME": "ocean",
        "SERVER_PORT": "8080",
        "SPRING_PROFILES_ACTIVE": "prod",
        "BATCH_SIZE": "1000",
        "EXECUTION_INTERVAL": "3000",
        "KAFKA_CONSUMER_CONCURRENCY": "15",
        "CUSTOMER_MAX_PARALLEL": "20",
        "DB_POOL_MAX_SIZE": "50",
        "DB_POOL_MIN_IDLE": "15",
        "DATABASE_URL": "jdbc:postgresql://db:5432/ocean_events_db",
        "DATABASE_USERNAME": "ocean",
        "DATABASE_PASSWORD": "secret",
        "KAFKA_BROKERS": "kafka:9093",
        "KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
        "KAFKA_SASL_JAAS_CONFIG": module(jaas.SCRAM, '"ocean"', '"a\\"b"'),
        "KAFKA_TOPIC_SUBMISSION": "ocean.event.submissions",
        "KAFKA_CONSUMER_GROUP": "event-scheduler-ocean",
        "KAFKA_STREAMS_APP_ID": "ocean-streams",
        "REDIS_HOST": "redis",
        "LOG_LEVEL": "INFO",
        "LOG_FILE": "/var/log/ocean.log",
    }
    settings = Settings.from_env(environ)
    assert settings.database_url == "postgresql://ocean:secret@db:5432/ocean_events_db"
    assert (settings.kafka_sasl_username, settings.kafka_sasl_password) == ("ocean", 'a"b')
    assert not settings.allow_anonymous
    assert [notice.partition(":")[0] for notice in settings.notices] == ["KAFKA_STREAMS_APP_ID", "REDIS_HOST"]


def test_a_topic_that_is_named_as_another_customers_is_pointed_out() -> None:
    environ = {"CUSTOMER_NAME": "air", "KAFKA_TOPIC_SUBMISSION": "ocean.event.submissions", "KAFKA_TOPIC_DLQ": "dead"}
    assert Settings.from_env(environ).notices == (
        "KAFKA_TOPIC_SUBMISSION: ocean.event.submissions looks like a topic of ocean, but CUSTOMER_NAME is air",
    )
