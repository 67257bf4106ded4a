"""The times of tests/times.json: what every client may write, and what none may."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

_GIVEN = json.loads((Path(__file__).parents[1] / "times.json").read_text(encoding="utf-8"))

READ: dict[str, datetime] = {text: datetime.fromisoformat(at) for text, at in _GIVEN["read"]}
"""Each text, and the time that it is kept as."""
REFUSED: list[Any] = [*_GIVEN["refused"], *_GIVEN["no strings"]]
"""Values that are refused, texts and others."""
TEXTS_REFUSED: list[str] = _GIVEN["refused"]
