"""Files of variables: what every program reads alike is taken, all else is refused by line, without its value."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import SettingsError
from orchestrator.settings.env_file import MAX_BYTES, read_env_file
from tests.integration.cli_support import answer, invoke, refused, told
from tests.unit.test_config import KEY


def written(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "of.env"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def problems(tmp_path: Path, content: str | bytes) -> list[str]:
    path = written(tmp_path, content)
    with pytest.raises(SettingsError) as caught:
        read_env_file(path)
    assert all(line.startswith(f"{path}") for line in caught.value.problems)
    return [line.removeprefix(f"{path}").removeprefix(", ") for line in caught.value.problems]


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("A=", ""),
        ("A=b", "b"),
        ("  A=b  ", "b"),
        ("export A=b", "b"),
        ("export \t A=b", "b"),
        ("A=b c # why", "b c"),
        ("A=b#c", "b#c"),
        ("A= # why", ""),
        ("A=#c", ""),
        ("A=b=c", "b=c"),
        ("A=it's", "it's"),
        ("A='b # c'", "b # c"),
        ("A='b\\n$C'  # why", "b\\n$C"),
        ('A="b # c" # why', "b # c"),
        ('A="b\\"\\n\\\\\\$C"', 'b"\n\\$C'),
        ("A=''", ""),
        ("A=5$", "5$"),
        ("A=100 $ 5", "100 $ 5"),
        ("A=ä€", "ä€"),
        ("A=jdbc:postgresql://h:1/d?a=b&c=d", "jdbc:postgresql://h:1/d?a=b&c=d"),
    ],
)
def test_a_line_is_a_name_and_a_value(tmp_path: Path, line: str, value: str) -> None:
    for text in (line, f"# first\n\n{line}\r\n#A=other\n", f"\ufeff{line}\n"):
        assert read_env_file(written(tmp_path, text)) == {"A": value}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("s3cret", "expected NAME=value, without blanks around the equals sign"),
        ("A = s3cret", "expected NAME=value, without blanks around the equals sign"),
        ("1A=s3cret", "expected NAME=value, without blanks around the equals sign"),
        ("A-B=s3cret", "expected NAME=value, without blanks around the equals sign"),
        ("set A=s3cret", "expected NAME=value, without blanks around the equals sign"),
        ("A='s3cret", "A: expected one closing quote, and nothing but a comment after it"),
        ('A="s3cret', "A: expected one closing quote, and nothing but a comment after it"),
        ("A='s3cret'x", "A: expected one closing quote, and nothing but a comment after it"),
        ('A="s3cret\\"', "A: expected one closing quote, and nothing but a comment after it"),
        ("A=s3cret\0", "A: holds a control character; remove it"),
        ("A=s3cret\x1b[31m", "A: holds a control character; remove it"),
        ("A=${B}s3cret", "A: not every program replaces variables in a value; write it out, or quote it by '"),
        ('A="s3cret$B"', "A: not every program replaces variables in a value; write it out, or quote it by '"),
        ("A=$(s3cret)", "A: not every program replaces variables in a value; write it out, or quote it by '"),
    ],
)
def test_a_line_that_programs_read_differently_is_refused_by_number(tmp_path: Path, line: str, complaint: str) -> None:
    assert problems(tmp_path, f"# first\n{line}\nC=d\n") == [f"line 2: {complaint}"]


def test_every_wrong_line_is_named(tmp_path: Path) -> None:
    assert problems(tmp_path, "A=1\nB\nA=2\nexport A=3\n") == [
        "line 2: expected NAME=value, without blanks around the equals sign",
        "line 3: A is set in line 1 already; keep one of them",
        "line 4: A is set in line 1 already; keep one of them",
    ]


def test_a_file_that_is_none_of_variables_is_refused(tmp_path: Path) -> None:
    assert problems(tmp_path, b"A=b\nB=\xff\n") == ["line 2: is not text in UTF-8; write the file again as UTF-8"]
    assert problems(tmp_path, b"A" * (MAX_BYTES + 1)) == [
        f": holds more than {MAX_BYTES} bytes; expected a file of variables"
    ]
    assert read_env_file(written(tmp_path, "")) == {}


def test_only_the_file_counts_when_it_is_checked(tmp_path: Path) -> None:
    path = str(written(tmp_path, "BATCH_SIZE=7\n"))
    env = {"BATCH_SIZE": "8", "SERVER_PORT": "nonsense"}
    settings = answer(invoke("config", "check", "--env-file", path, "--json", env=env))["settings"]
    assert (settings["SCHEDULER_BATCH_SIZE"]["value"], settings["SERVER_PORT"]["source"]) == ("7", "default")


def test_a_wrong_value_in_the_file_fails_the_check(tmp_path: Path) -> None:
    path = str(written(tmp_path, "BATCH_SIZE=many\nDB_PASSWORD=s3cret\n"))
    line = refused(invoke("config", "check", "--env-file", path), 2)
    assert line == "BATCH_SIZE: expected a whole number from 1 to 10000, got 'many'"
    line = refused(invoke("config", "check", "--env-file", str(written(tmp_path, "s3cret\n"))), 2)
    assert line.endswith("line 1: expected NAME=value, without blanks around the equals sign")
    assert "does not exist" in refused(invoke("config", "check", "--env-file", str(tmp_path / "absent")), 2)


def test_a_secret_whose_file_is_on_another_machine_is_remarked_on_only(tmp_path: Path) -> None:
    names = ("DATABASE_URL_FILE", "DATABASE_PASSWORD_FILE", "WEBHOOK_SECRETS_FILE", "KAFKA_SASL_PASSWORD_FILE")
    lines = [*(f"{name}={tmp_path}/absent" for name in names), "KAFKA_SECURITY_PROTOCOL=SASL_SSL"]
    path = str(written(tmp_path, "\n".join([*lines, "KAFKA_SASL_USERNAME=u"])))
    found = answer(invoke("config", "check", "--env-file", path, "--json"))
    assert {notice.partition(":")[0] for notice in found["notices"]} == set(names)
    for name, source in (("DATABASE_URL", names[0]), ("DB_PASSWORD", names[1]), ("WEBHOOK_SECRETS", names[2])):
        assert (found["settings"][name]["value"], found["settings"][name]["source"]) == (None, source)
    assert told(invoke("config", "check", "--env-file", path)).count("(not on this machine)") == len(names)


def test_certificates_of_another_machine_are_remarked_on_only(tmp_path: Path) -> None:
    path = str(written(tmp_path, f"OTEL_EXPORTER_OTLP_CERTIFICATE={tmp_path}/absent.pem\n"))
    [notice] = answer(invoke("config", "check", "--env-file", path, "--json"))["notices"]
    assert notice.startswith("OTEL_EXPORTER_OTLP_CERTIFICATE: expected a PEM file")


def test_a_directory_of_another_machine_is_remarked_on_only(tmp_path: Path) -> None:
    path = str(written(tmp_path, f"SECRETS_DIRECTORY={tmp_path}/absent\n"))
    found = answer(invoke("config", "check", "--env-file", path, "--json"))
    assert found["notices"] == [f"SECRETS_DIRECTORY: expected a directory that exists, got '{tmp_path}/absent'"]
    path = str(written(tmp_path, f"ARCHIVE_DIRECTORY={path}\n"))
    assert "ARCHIVE_DIRECTORY: expected a directory" in refused(invoke("config", "check", "--env-file", path), 2)


def test_a_secret_whose_file_is_here_is_checked(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{KEY}\n")
    path = str(written(tmp_path, f"WEBHOOK_SECRETS_FILE={tmp_path}/secret\n"))
    found = answer(invoke("config", "check", "--env-file", path, "--json"))
    assert (found["settings"]["WEBHOOK_SECRETS"]["value"], found["notices"]) == ("whsec_***", [])
    (tmp_path / "secret").write_text("")
    assert "WEBHOOK_SECRETS_FILE: " in refused(invoke("config", "check", "--env-file", path), 2)
