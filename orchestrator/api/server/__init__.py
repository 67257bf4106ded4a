"""The HTTP server: its process, its listeners and connections, and what it refuses before it reads it."""
