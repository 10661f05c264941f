"""Real workers, real pg_cron and more sweeps against a seeded adversary: `python -m tests.chaos`, or `make chaos`."""
