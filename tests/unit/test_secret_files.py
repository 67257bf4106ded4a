"""Secrets in files: each secret setting can be read from one; a file that cannot be used is refused by name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict

from orchestrator.settings import DATABASE_PARTS, SETTINGS, Settings, given
from orchestrator.settings.kinds import Setting
from orchestrator.settings.secret_files import MAX_BYTES
from orchestrator.settings.table import settings_table
from tests.unit.test_config import KEY, problem, problems

SECRET: list[Setting] = [each for each in (*SETTINGS.values(), *DATABASE_PARTS.values()) if each.secret]
NAMED = [(setting, name) for setting in SECRET for name in setting.names]
SASL = {"KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "KAFKA_SASL_USERNAME": "u"}
LOGIN = 'org.apache.kafka.common.security.plain.PlainLoginModule required username="u" password="s3cret";'


VALUES = ("jdbc:postgresql://h:1/d?user=u&password=s3cret", KEY, LOGIN, "x-key=s3cret", "s3cret")


def value_of(setting: Setting) -> str:
    """The first of the values that is one of this setting's."""
    for value in VALUES:
        with suppress(ValueError):
            setting.kind.parse(value)
            return value
    raise AssertionError(f"a value of {setting.name} is wanted among VALUES")


@pytest.fixture
def directory() -> Iterator[Path]:
    """One that everybody reaches, since root may read anything."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def written(directory: Path, content: bytes | str) -> str:
    path = directory / "secret"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_the_secrets_are_those_that_are_known() -> None:
    assert {setting.name for setting in SECRET} >= {
        "DATABASE_URL",
        "DB_PASSWORD",
        "KAFKA_SASL_JAAS_CONFIG",
        "KAFKA_SASL_PASSWORD",
        "WEBHOOK_SECRETS",
    }
    ordinary = {name for setting in SETTINGS.values() for name in setting.names}
    assert ordinary.isdisjoint(name for setting in SECRET for name in setting.file_names)


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
@pytest.mark.parametrize(("setting", "name"), NAMED, ids=[name for _, name in NAMED])
def test_a_file_means_what_its_text_would_mean_in_the_environment(
    setting: Setting, name: str, end: str, directory: Path
) -> None:
    path = written(directory, value_of(setting) + end)
    plain, filed = {name: value_of(setting)}, {f"{name}_FILE": f" {path} "}
    settings = Settings.from_env(filed)
    assert settings == Settings.from_env(plain)
    assert settings != Settings.from_env({})
    assert len(settings.notices) == len(Settings.from_env(plain).notices)
    assert given(filed) == given(plain)
    sources = {row.source for row in settings_table(filed)}
    assert sources <= {f"{name}_FILE", "DATABASE_URL", "default"}
    assert f"{name}_FILE" in sources
    assert "s3cret" not in repr(settings_table(filed)) + repr(settings)
    assert KEY not in repr(settings_table(filed)) + repr(settings)


def test_only_one_line_end_is_taken_from_a_file_and_a_mark_at_its_start_is_none_of_it(directory: Path) -> None:
    path = written(directory, b"\xef\xbb\xbf s3cret\twith \xc3\xa4 \n")
    settings = Settings.from_env({"DB_USER": "u", "DB_PASSWORD_FILE": path})
    assert conninfo_to_dict(settings.database_url)["password"] == " s3cret\twith ä "


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty; write the secret into it, or unset the variable"),
        (b" \r\n", "is empty; write the secret into it, or unset the variable"),
        (b"s3cret\xff", "is not text in UTF-8; write it again as plain text"),
        ("s3cret".encode("utf-16"), "is not text in UTF-8; write it again as plain text"),
        (b"s3cret\0", "is not text in UTF-8; write it again as plain text"),
        (b"s3cret" * MAX_BYTES, f"holds more than {MAX_BYTES} bytes; name a file that holds nothing but the secret"),
    ],
    ids=["empty", "blank", "latin-1", "utf-16", "nul", "large"],
)
def test_a_file_without_a_usable_secret_is_refused_by_name(directory: Path, content: bytes, complaint: str) -> None:
    path = written(directory, content)
    assert problem(DB_PASSWORD_FILE=path) == f"DB_PASSWORD_FILE: '{path}' {complaint}"


def test_a_file_that_is_not_there_or_no_file_is_refused_by_name(directory: Path) -> None:
    absent = directory / "absent"
    assert problem(WEBHOOK_SECRETS_FILE=str(absent)) == (
        f"WEBHOOK_SECRETS_FILE: '{absent}' does not exist; mount the secret there, or correct the path"
    )
    remedy = "name a file that holds nothing but the secret"
    assert problem(DATABASE_URL_FILE=str(directory)).endswith(f"is a directory; {remedy}")
    os.mkfifo(directory / "pipe")
    assert problem(DB_PASSWORD_FILE=str(directory / "pipe")).endswith(f"is not a regular file; {remedy}")
    below = written(directory, "x") + "/y"
    assert "cannot be read: Not a directory" in problem(DB_PASSWORD_FILE=below)
    assert "cannot be read: not a path" in problem(DB_PASSWORD_FILE="a\0b")


def test_a_file_that_others_own_is_refused_by_name(directory: Path) -> None:
    path = written(directory, "s3cret")
    Path(path).chmod(0o000 if os.geteuid() else 0o600)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        expected = f"DB_PASSWORD_FILE: '{path}' cannot be read: Permission denied; let user id {os.geteuid()} read it"
        assert problem(DB_PASSWORD_FILE=path) == expected
    finally:
        os.seteuid(user)


def test_what_is_wrong_in_a_file_is_said_without_its_text(directory: Path) -> None:
    path = written(directory, "mysql://u:s3cret@h/d")
    line = problem(DATABASE_URL_FILE=path)
    assert line.startswith("DATABASE_URL_FILE: expected postgresql://")
    assert line.endswith("got 'mysql://…'")
    assert "s3cret" not in line
    assert problem(WEBHOOK_SECRETS_FILE=path) == (
        "WEBHOOK_SECRETS_FILE: expected a comma-separated list of whsec_ followed by the base64 of 24 to 64 random "
        "bytes; item 1 is not one"
    )


def test_a_secret_that_stands_where_its_path_belongs_is_not_repeated() -> None:
    assert KEY not in problem(WEBHOOK_SECRETS_FILE=KEY)
    assert "s3cret" not in problem(DATABASE_URL_FILE="postgresql://u:s3cret@h/d")


def test_a_secret_is_given_once(directory: Path) -> None:
    path = written(directory, "s3cret")
    assert problem(DB_PASSWORD="s3cret", DB_PASSWORD_FILE=path) == (
        "DB_PASSWORD and DB_PASSWORD_FILE: both are set; keep one of them"
    )
    assert problem(DB_PASSWORD="x", DATABASE_PASSWORD_FILE=path) == (
        "DB_PASSWORD and DATABASE_PASSWORD_FILE: both are set and differ; keep DB_PASSWORD"
    )
    assert Settings.from_env({"DB_PASSWORD": "", "DB_PASSWORD_FILE": path}) == Settings.from_env(
        {"DATABASE_PASSWORD": "s3cret"}
    )
    assert Settings.from_env({"DB_PASSWORD": "s3cret", "DB_PASSWORD_FILE": " "}) == Settings.from_env(
        {"DB_PASSWORD": "s3cret"}
    )


def test_a_rule_about_a_lost_secret_adds_no_second_complaint(directory: Path) -> None:
    lost = SASL | {"KAFKA_SASL_PASSWORD_FILE": str(directory / "absent")}
    assert [line.partition(":")[0] for line in problems(**lost)] == ["KAFKA_SASL_PASSWORD_FILE"]
    kept = SASL | {"KAFKA_SASL_PASSWORD_FILE": written(directory, "s3cret\n")}
    assert Settings.from_env(kept).kafka_sasl_password == "s3cret"


@pytest.mark.parametrize(
    ("name", "meant"), [("DB_PASSWORDFILE", "DB_PASSWORD_FILE"), ("WEBHOOK_SECRET_FILE", "WEBHOOK_SECRETS_FILE")]
)
def test_a_likely_typo_in_the_variable_of_a_file_is_pointed_out(name: str, meant: str) -> None:
    assert Settings.from_env({name: "/x"}).notices == (f"{name}: not a setting; did you mean {meant}?",)


def test_a_setting_that_is_no_secret_is_not_read_from_a_file() -> None:
    assert Settings.from_env({"DB_HOST_FILE": "/x"}).notices == ("DB_HOST_FILE: not a setting; did you mean DB_HOST?",)


def test_a_file_that_the_address_replaces_is_pointed_out(directory: Path) -> None:
    path = written(directory, "s3cret")
    settings = Settings.from_env({"DATABASE_URL": "postgresql://u:p@h/d", "DB_PASSWORD_FILE": path})
    assert settings.notices == ("DB_PASSWORD_FILE: no effect, because DATABASE_URL replaces it",)
