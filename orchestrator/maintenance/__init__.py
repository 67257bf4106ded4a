"""The maintaining role: run_maintenance() every minute, and the archive of days that retention ends."""
