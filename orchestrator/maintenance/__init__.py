"""The role that maintains the database: run_maintenance() every minute, retention, and the archive."""
