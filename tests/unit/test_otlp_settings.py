"""The settings of traces: what is accepted, and what stops the start."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from orchestrator.errors import SettingsError
from orchestrator.settings import Settings
from orchestrator.settings.table import settings_table

URL = "http://collector:4318"


def problem(**environ: str) -> str:
    with pytest.raises(SettingsError) as raised:
        Settings.from_env(environ)
    (only,) = raised.value.problems
    return only


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (URL, URL),
        (" https://c.example/otlp/ ", "https://c.example/otlp"),
        ("http://[::1]:4318", "http://[::1]:4318"),
    ],
)
def test_an_endpoint_is_a_base_url(given: str, kept: str) -> None:
    assert Settings.from_env({"OTEL_EXPORTER_OTLP_ENDPOINT": given}).otlp_endpoint == kept


@pytest.mark.parametrize(
    "given",
    [
        "collector:4318",
        "grpc://collector:4317",
        "http://",
        "http://u:p@c",
        "http://c/?key=1",
        "http://c/#x",
        "http://c:0",
        "http://c:99999",
        "http://c/\x01",
        f"http://{'a' * 64}/",
    ],
)
def test_an_endpoint_of_another_form_stops_the_start(given: str) -> None:
    found = problem(OTEL_EXPORTER_OTLP_ENDPOINT=given)
    assert found.startswith("OTEL_EXPORTER_OTLP_ENDPOINT: expected an http or https URL without a user")
    assert "p@" not in found


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "expected http/protobuf, the only one spoken here (port 4318), got"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s", "expected whole milliseconds from 1 to 60000"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nowhere.pem", "expected a PEM file of certificates that can be read"),
        ("OTEL_TRACES_SAMPLER", "sometimes", "expected always_on, always_off, traceidratio, parentbased_always_on"),
        ("OTEL_TRACES_SAMPLER_ARG", "1.5", "expected a number from 0 to 1, got '1.5'"),
        ("OTEL_TRACES_SAMPLER_ARG", "nan", "expected a number from 0 to 1, got 'nan'"),
        ("OTEL_TRACES_SAMPLER_ARG", "1e-2", "expected a number from 0 to 1"),
    ],
)
def test_a_bad_value_stops_the_start_and_is_named(name: str, given: str, expected: str) -> None:
    assert problem(**{name: given}).startswith(f"{name}: {expected}")


@pytest.mark.parametrize("given", ["0", "1", "0.01", ".5", "1.0", "0.0"])
def test_a_part_of_the_traces_is_a_number_from_0_to_1(given: str) -> None:
    assert Settings.from_env({"OTEL_TRACES_SAMPLER_ARG": given}).traces_sampler_arg == float(given)


@pytest.mark.parametrize("given", ["s3cret", "x-ok=1,a b=s3cret", "x=s3cret\x01", "content-type=s3cret", "=s3cret"])
def test_a_wrong_header_is_refused_by_its_place_and_never_shown(given: str) -> None:
    found = problem(OTEL_EXPORTER_OTLP_HEADERS=given)
    place = 2 if given.startswith("x-ok") else 1
    assert found.endswith(f"with percent-encoded values; item {place} is not one")
    assert "s3cret" not in found


def test_headers_are_masked_wherever_settings_are_shown() -> None:
    environ = {"OTEL_EXPORTER_OTLP_HEADERS": "authorization=Basic%20s3cret,x-scope=a"}
    (row,) = [row for row in settings_table(environ) if row.name == "OTEL_EXPORTER_OTLP_HEADERS"]
    assert row.value == "authorization=***,x-scope=***"
    settings = Settings.from_env(environ)
    assert settings.otlp_headers == (("authorization", "Basic s3cret"), ("x-scope", "a"))
    assert "s3cret" not in repr(settings)


def test_a_misspelt_variable_is_noticed() -> None:
    (notice,) = Settings.from_env({"OTEL_EXPORTER_OTLP_ENDPOINTS": URL}).notices
    assert notice == "OTEL_EXPORTER_OTLP_ENDPOINTS: not a setting; did you mean OTEL_EXPORTER_OTLP_ENDPOINT?"


@pytest.mark.parametrize("module", ["opentelemetry", "opentelemetry.proto"])
def test_an_endpoint_without_the_extra_stops_the_start_with_the_command(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing: Any = None
    monkeypatch.delitem(sys.modules, "opentelemetry.proto", raising=False)
    monkeypatch.setitem(sys.modules, module, missing)
    assert "pip install 'scheduled-event-orchestrator[tracing]'" in problem(OTEL_EXPORTER_OTLP_ENDPOINT=URL)
    assert Settings.from_env({}).otlp_endpoint is None
