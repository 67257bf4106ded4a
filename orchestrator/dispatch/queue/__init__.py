"""Claimed events in memory, by destination, until they are due."""
