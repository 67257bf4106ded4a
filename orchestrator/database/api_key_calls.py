"""API keys: finding one by its hash, creating, listing and revoking them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from orchestrator.database.pool import Pool


class ApiKey(NamedTuple):
    name: str
    scopes: frozenset[str]


class ApiKeyCalls(Pool):
    """The part of `Database` that looks after API keys."""

    async def api_key(self, key_hash: bytes) -> ApiKey | None:
        rows = await self.rows("select name, scopes from orchestrator.find_api_key(%s)", key_hash)
        return ApiKey(rows[0][0], frozenset(rows[0][1])) if rows else None

    async def count_api_keys(self) -> int:
        return int(await self.value("select orchestrator.count_api_keys()"))

    async def create_api_key(self, name: str, key_hash: bytes, scopes: Sequence[str]) -> None:
        """Raises ValidationError when the name is taken or a scope unknown."""
        await self.once("select orchestrator.create_api_key(%s, %s, %s)", name, key_hash, list(scopes))

    async def list_api_keys(self) -> list[bytes]:
        rows = await self.rows(
            """select json_build_object('name', name, 'scopes', scopes, 'created_at', created_at)
            from orchestrator.api_key order by name"""
        )
        return [row[0].encode() for row in rows]

    async def revoke_api_key(self, name: str) -> bool:
        [(revoked,)] = await self.once("select orchestrator.revoke_api_key(%s)", name)
        return bool(revoked)
