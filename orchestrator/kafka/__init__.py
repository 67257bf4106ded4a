"""Kafka: its clients and topics."""
