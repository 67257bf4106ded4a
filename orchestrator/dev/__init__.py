"""What a developer's machine needs and a production deployment does not: a database of its own."""
