"""Claimed events in memory: a queue for each destination, in which they wait until they are due."""
