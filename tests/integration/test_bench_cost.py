"""What `bench cost` reports of a few events."""

from __future__ import annotations

import sys

import pytest

from orchestrator.bench import cost


@pytest.mark.skipif(sys.platform != "linux", reason="CPU of server processes is read from Linux")
def test_every_step_of_an_event_has_its_cost(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_FLUSH_S", 0.0)
    figures = cost.run(database_url, 1000)
    for step in (*cost.STEPS, "vacuum"):
        assert float(str(figures[f"{step} CPU µs of the server"]).split()[0]) > 0
    for step in cost.STEPS:
        assert float(str(figures[f"{step} CPU µs of the client"]).split()[0]) > 0
    steps = {step: float(str(figures[f"{step} WAL bytes"])) for step in (*cost.STEPS, "vacuum")}
    for step, size in steps.items():
        lines = [float(str(value)) for name, value in figures.items() if name.startswith(f"{step} WAL bytes: ")]
        assert size > 0
        assert sum(lines) == pytest.approx(size, abs=0.1 * len(lines))
    assert figures["WAL bytes"] == pytest.approx(sum(steps.values()), abs=0.5)
    # The payload alone has 261 bytes.
    assert max(float(str(v)) for name, v in figures.items() if name.startswith("submit WAL bytes: event ")) > 261
