"""The task that Procrastinate's guide "Retry stalled jobs" recommends, word for word."""

from procrastinate import App, JobContext, PsycopgConnector

app = App(connector=PsycopgConnector())


@app.periodic(cron="*/10 * * * *")
@app.task(queueing_lock="retry_stalled_jobs", pass_context=True)
async def retry_stalled_jobs(context: JobContext, timestamp: int) -> None:  # noqa: ARG001
    """Retry the stalled jobs one by one."""
    stalled_jobs = await app.job_manager.get_stalled_jobs()
    for job in stalled_jobs:
        await app.job_manager.retry_job(job)
