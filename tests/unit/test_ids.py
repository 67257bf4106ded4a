"""The id of an event is the same with either SHA-256 that Python has. What it is, tests/sql/test_event_id.py says."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

import pytest

from orchestrator.events import ids

AT = datetime(2026, 1, 31, 9, 0, 0, 123456, tzinfo=UTC)
_NAMED = [("s", "j", None), ("orders", "a" * 200, None), ("\u00e9", "\U0001f600", None), ("s", "j", "key")]


def _ids() -> list[str]:
    return [ids.event_id(source, job, AT, key) for source, job, key in _NAMED]


def test_both_implementations_give_the_same_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    found, bucket = _ids(), ids.bucket_of_key("key")
    monkeypatch.setattr(ids, "_sha256", hashlib.sha256)
    assert _ids() == found
    assert ids.bucket_of_key("key") == bucket


def test_a_python_without_its_own_uses_openssl_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(ids, "import_module", missing)
    assert ids._fast_sha256() is hashlib.sha256
