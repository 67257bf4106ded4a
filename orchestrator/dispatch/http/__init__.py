"""Deliveries as webhooks."""
