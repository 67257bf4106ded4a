"""Server settings suited to the machine, for a database with many small durable transactions."""

from __future__ import annotations

import os
from pathlib import Path

MIB = 1 << 20
GIB = 1 << 30

# Container limits: cgroup version 2, then version 1. "max" and absurdly large values mean no limit.
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or the container's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in _CGROUP_LIMITS:
        try:
            total = min(total, int(limit.read_text()))
        except (OSError, ValueError):
            continue
    return total


def default_tuning(memory: int, disk_free: int) -> dict[str, str]:
    """Settings for a machine with that much memory and that much free space for the data, both in bytes.

    Durability is PostgreSQL's own: fsync, full_page_writes and synchronous_commit stay on. WAL is not
    compressed, since the wheel has neither lz4 nor zstd and pglz costs more time than the bytes are worth.
    """
    wal = _between(disk_free // 8, 256 * MIB, 8 * GIB)
    return {
        "max_connections": "200",
        "shared_buffers": _mebibytes(_between(memory // 4, 32 * MIB, 2 * GIB)),
        "effective_cache_size": _mebibytes(_between(memory // 2, 64 * MIB, 64 * GIB)),
        "work_mem": _mebibytes(_between(memory // 512, 4 * MIB, 32 * MIB)),
        "maintenance_work_mem": _mebibytes(_between(memory // 32, 32 * MIB, 512 * MIB)),
        # Few checkpoints: each makes every page's next change log the whole page.
        "max_wal_size": _mebibytes(wal),
        "min_wal_size": _mebibytes(wal // 8),
        "checkpoint_timeout": "15min",
        # The timer table turns over completely in minutes: look often, and do not dawdle once there.
        "autovacuum_naptime": "15s",
        "autovacuum_vacuum_cost_limit": "2000",
        "random_page_cost": "1.1",
        "jit": "off",
        "timezone": "UTC",
        "log_timezone": "UTC",
        "log_line_prefix": "%m [%p] %q%u@%d ",
    }


def configuration(settings: dict[str, str]) -> str:
    """The settings as the text of a postgresql.conf."""
    lines = (f"{name} = '{value.replace(chr(39), chr(39) * 2)}'" for name, value in settings.items())
    return "# Written again at every start; use ALTER SYSTEM for your own settings.\n" + "\n".join(lines) + "\n"


def _between(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))


def _mebibytes(value: int) -> str:
    return f"{value // MIB}MB"
