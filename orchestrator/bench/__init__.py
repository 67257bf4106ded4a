"""Benchmarks of the whole system on real parts: ``orchestrator bench SCENARIO``."""
