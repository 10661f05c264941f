"""The migrations of Django: each runs the newest migration of `sql/`."""
