"""What the Procrastinate of these tests can do: the matrix runs them with several releases of it."""

from importlib import metadata
from typing import LiteralString

import pytest

RELEASE = tuple(int(part) for part in metadata.version("procrastinate").split(".")[:2])

# The functions that a worker of this release calls.
RETRY_JOB: LiteralString = "procrastinate_retry_job_v2" if RELEASE >= (3, 4) else "procrastinate_retry_job_v1"
RETRY_AT_ONCE: LiteralString = f"SELECT {RETRY_JOB}(%s, NULL, NULL, NULL, NULL)"

# Defer a job with the queueing lock `key`.
DEFER: LiteralString = (
    """
    SELECT unnest(procrastinate_defer_jobs_v1(
        ARRAY[ROW('default', 'task', 0, NULL, 'key', '{}', NULL)]::procrastinate_job_to_defer_v1[]
    )) AS id
    """
    if RELEASE >= (3, 2)
    else "SELECT procrastinate_defer_job_v1('default', 'task', 0, NULL, 'key', '{}', NULL) AS id"
)

# Only since then can a failed job be retried, which writes an event "retried".
needs_retry_of_failed_jobs = pytest.mark.skipif(RELEASE < (3, 4), reason="before Procrastinate 3.4 failed is an end")

AS_OF = "3.4 or later" if RELEASE >= (3, 4) else "3.2 or 3.3" if RELEASE >= (3, 2) else "3.1"
"""What `status()` says of it."""
