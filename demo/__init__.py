"""The demo: a worker is killed, and PostgreSQL itself brings its job back."""
