"""The HTTP API: submitting, reading and cancelling events, health and metrics."""
