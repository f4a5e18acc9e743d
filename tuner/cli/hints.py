"""What to type next, once a job has its winners."""

import shlex

from tuner.job import Job
from tuner.results import JobResult
from tuner.storage import absolute_uri
from tuner.tracking_store import DEFAULT_STORAGE, default_uri, hide_password

__all__ = ["next_commands"]


def next_commands(job: Job, results: JobResult) -> str:
    """Name the commands that browse, print and export a job's results, as they are to be typed."""
    uri = job.tracking.uri or default_uri(absolute_uri(job.storage))
    where = ""
    if uri != default_uri(absolute_uri(DEFAULT_STORAGE)):
        where = f" --tracking {shlex.quote(hide_password(uri))}"
    lines = [f"browse:  pwiser ui{where}", f"results: pwiser best {job.name}{where} --json"]
    lines += [
        f"export:  pwiser export {job.name} --dataset {name} --out exported/{name}{where}"
        for name in results.datasets
    ]
    return "\n".join(lines)
