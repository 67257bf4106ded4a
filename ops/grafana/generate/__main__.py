from __future__ import annotations

from ops.grafana.generate import DIRECTORY, files

for name, text in files().items():
    (DIRECTORY / name).write_text(text, encoding="utf-8")
