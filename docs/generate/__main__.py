"""Makes the pages, with a database server that lives as long as that takes."""

from __future__ import annotations

from docs.generate import DIRECTORY, kubernetes, pages
from orchestrator.database.migrate import migrate
from orchestrator.dev.postgres import EmbeddedPostgres

kubernetes.write()
with EmbeddedPostgres.temporary() as server:
    database_url = server.ensure_database("orchestrator")
    migrate(database_url)
    for name, text in pages(database_url).items():
        (DIRECTORY / name).write_text(text, encoding="utf-8")
