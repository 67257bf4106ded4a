"""What a developer's machine needs and production does not: its own database, broker and receiver."""
