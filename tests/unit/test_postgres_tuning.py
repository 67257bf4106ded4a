"""The embedded server's settings follow from the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.dev import postgres_tuning
from orchestrator.dev.postgres_tuning import GIB, MIB, configuration, default_tuning, memory_bytes


@pytest.mark.parametrize(
    ("memory", "disk_free", "shared_buffers", "max_wal_size"),
    [
        (64 * GIB, 500 * GIB, "2048MB", "8192MB"),
        (4 * GIB, 16 * GIB, "1024MB", "2048MB"),
        (64 * MIB, 100 * MIB, "32MB", "256MB"),
    ],
)
def test_buffers_follow_the_memory_and_wal_follows_the_disk_within_bounds(
    memory: int, disk_free: int, shared_buffers: str, max_wal_size: str
) -> None:
    tuning = default_tuning(memory, disk_free)
    assert (tuning["shared_buffers"], tuning["max_wal_size"]) == (shared_buffers, max_wal_size)


def test_no_tuned_setting_trades_durability_for_speed() -> None:
    assert default_tuning(GIB, GIB).keys().isdisjoint({"fsync", "synchronous_commit", "full_page_writes"})


def test_a_containers_limit_counts_where_it_is_lower_than_the_machines_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlimited, limited = tmp_path / "unlimited", tmp_path / "limited"
    unlimited.write_text("max\n")
    limited.write_text(f"{64 * MIB}\n")
    monkeypatch.setattr(postgres_tuning, "_CGROUP_LIMITS", (tmp_path / "missing", unlimited))
    assert memory_bytes() > 64 * MIB
    monkeypatch.setattr(postgres_tuning, "_CGROUP_LIMITS", (tmp_path / "missing", unlimited, limited))
    assert memory_bytes() == 64 * MIB


def test_a_quote_in_a_setting_is_doubled() -> None:
    assert "log_line_prefix = 'it''s '\n" in configuration({"log_line_prefix": "it's "})
