"""A cluster's jobs from anywhere: a typed client of Ray's Jobs API, which is the service's door.

Ray knows whether a job's driver runs; what the job has found so far comes from MLflow.
"""

import os
import secrets
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError
from ray.dashboard.modules.job.pydantic_models import JobDetails

from datasets.errors import one_line
from tuner.errors import ClusterError, JobFileError, JobNotFoundError, TrackingError
from tuner.job_progress import JobProgress
from tuner.jobs_api import JobsApi, find_address
from tuner.submission import Code, Purpose, Submission

if TYPE_CHECKING:
    from tuner.plan import Plan

__all__ = ["Client", "JobState", "JobStatus", "SubmittedJob"]

POLL_S = 0.5


class JobState(StrEnum):
    """What Ray says of a job's driver."""

    PENDING = "pending"
    RUNNING = "running"
    STOPPED = "stopped"
    SUCCEEDED = "succeeded"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        """Whether the driver is gone."""
        return self not in {JobState.PENDING, JobState.RUNNING}


class SubmittedJob(BaseModel):
    """One submission of a job to a cluster.

    Attributes:
        id: what `status`, `logs` and `stop` take.
        name: of the job.
        state: of its driver.
        submitted: when; None where Ray does not know yet.
        ended: when its driver ended; None while it has not.
        exit_code: of the driver; None while it runs, and where it was killed.
        reason: why Ray ended it, where the driver did not end by itself; None else.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    name: str
    state: JobState
    submitted: datetime | None
    ended: datetime | None
    exit_code: int | None
    reason: str | None


class JobStatus(BaseModel):
    """A submission, and how far its job is.

    Attributes:
        progress: None before the job's first record, and where it cannot be read.
        fault: why the tracking store cannot be read from here, if it cannot.
    """

    model_config = ConfigDict(frozen=True)

    job: SubmittedJob
    progress: JobProgress | None = None
    fault: str | None = None


class Client:
    """The jobs of one cluster.

    The cluster's token is taken from `RAY_AUTH_TOKEN`, or from the file in `RAY_AUTH_TOKEN_PATH`;
    MLflow's password from `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`. A job is named
    by the id of its submission, or by its own name for the newest of its submissions.

    Args:
        address: URL of the Ray dashboard, such as http://HEAD:8265; `PWISER_ADDRESS` or
            `RAY_ADDRESS` where left out.
        tracking: URI of the MLflow tracking store as it is seen from here;
            `MLFLOW_TRACKING_URI`, or else the job file's, where left out.

    Raises:
        ClusterError: from every method too, if no address is known, nothing answers there, or the
            token is refused.
    """

    def __init__(self, address: str | None = None, *, tracking: str | None = None) -> None:
        self._api = JobsApi(find_address(address))
        self._tracking = tracking

    def submit(
        self,
        job_file: Path,
        *,
        fresh: bool = False,
        working_dir: Path | None = None,
        code: Code = "ship",
    ) -> str:
        """Check a job and hand it to the cluster.

        Args:
            job_file: YAML.
            fresh: archive a job of this name first.
            working_dir: with modules of the user's own, such as those of `module:Class` models.
            code: `ship` sends this installation's packages along, `image` takes the nodes' own.

        Returns:
            The id of the submission.

        Raises:
            PwiserError: if the job cannot be run as it is written, or one of its name runs already.
        """
        from tuner.job import read_job_text

        text = read_job_text(job_file)
        return self._send(text, str(job_file), working_dir, code=code, fresh=fresh)

    def resume(self, name: str, *, working_dir: Path | None = None, code: Code = "ship") -> str:
        """Go on with a job: its file is submitted again, as it was.

        Args:
            name: of the job. Its file is taken from its newest submission; on a cluster that knows
                none, from the tracking store.
            working_dir: as for `submit`.
            code: as for `submit`.

        Returns:
            The id of the new submission.

        Raises:
            JobNotFoundError: if neither the cluster nor the tracking store knows the job.
            PwiserError: as for `submit`.
        """
        text = self._job_file(name)
        return self._send(text, f"job {name}", working_dir, code=code)

    def plan(
        self, job_file: Path, *, working_dir: Path | None = None, code: Code = "ship"
    ) -> "Plan":
        """Plan a job on the cluster: a short submission of its own looks and measures there.

        Args:
            job_file: as for `submit`.
            working_dir: as for `submit`.
            code: as for `submit`.

        Raises:
            PwiserError: as for `submit`.
            ClusterError: if the submission ended without a plan; its last line says why.
        """
        from tuner.job import read_job_text
        from tuner.plan import Plan

        text = read_job_text(job_file)
        job_id = self._send(text, str(job_file), working_dir, code=code, purpose="plan")
        printed = "".join(self._api.follow_logs(job_id)).strip()
        last_line = printed.rpartition("\n")[2]
        try:
            return Plan.model_validate_json(last_line)
        except ValidationError as error:
            raise ClusterError(f"{job_file}: {last_line.removeprefix('pwiser: ')}") from error

    def jobs(self) -> list[SubmittedJob]:
        """List the submissions that the cluster remembers, the newest first."""
        return [_submitted(details) for details in self._api.list()]

    def status(self, job: str) -> JobStatus:
        """Tell how far a job is.

        Raises:
            JobNotFoundError: if the cluster knows no such job.
        """
        (found,) = self._statuses([self._find(job)])
        return found

    def statuses(self) -> list[JobStatus]:
        """Tell how far all submissions are that the cluster remembers, the newest first."""
        return self._statuses(self._api.list())

    def logs(self, job: str, *, follow: bool = False) -> Iterator[str]:
        """Give what a job's driver printed, in pieces; with `follow` until the driver has ended.

        Raises:
            JobNotFoundError: if the cluster knows no such job.
        """
        job_id = _submitted(self._find(job)).id
        if follow:
            yield from self._api.follow_logs(job_id)
        else:
            yield self._api.logs(job_id)

    def stop(self, job: str) -> SubmittedJob:
        """Stop a job in order and wait for its end; harmless for one that has ended.

        Its trials end, its runs in MLflow are closed as KILLED, its checkpoints stay.

        Raises:
            JobNotFoundError: if the cluster knows no such job.
        """
        found = _submitted(self._find(job))
        if not found.state.ended:
            self._api.stop(found.id)
        return self.wait(found.id)

    def wait(self, job: str) -> SubmittedJob:
        """Wait until a job's driver has ended.

        Raises:
            JobNotFoundError: if the cluster knows no such job.
        """
        job_id = _submitted(self._find(job)).id
        while not (found := _submitted(self._api.details(job_id))).state.ended:
            time.sleep(POLL_S)
        return found

    def _send(
        self,
        text: str,
        shown: str,
        working_dir: Path | None,
        *,
        code: Code,
        purpose: Purpose = "tune",
        fresh: bool = False,
    ) -> str:
        from tuner.submission_check import check_submission

        job = check_submission(text, shown, working_dir=working_dir, tracking=self._tracking)
        if purpose == "tune":
            self._refuse_second(job.name, shown)
        submission = Submission(
            job=job.name,
            job_file=text,
            storage=job.storage,
            tracking=job.tracking.uri,
            purpose=purpose,
            fresh=fresh,
            code=code,
        )
        prefix = job.name if purpose == "tune" else f"{job.name}-{purpose}"
        job_id = f"{prefix}-{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"
        self._api.submit(job_id, submission, submission.runtime_env(working_dir))
        return job_id

    def _refuse_second(self, name: str, shown: str) -> None:
        for other in self.jobs():
            if other.name == name and not other.state.ended:
                raise JobFileError(
                    f"{shown}: name: job {name!r} is running already, as {other.id}; wait for it, "
                    "stop it (pwiser stop), or choose another name"
                )

    def _find(self, job: str) -> JobDetails:
        known = self._api.list()
        for details in known:
            if job in (details.submission_id, details.metadata["pwiser.job"]):
                return details
        names = sorted({details.metadata["pwiser.job"] for details in known})
        raise JobNotFoundError(
            f"job {job!r}: not on the cluster {self._api.address}; "
            f"it has {', '.join(names) or 'no job'}"
        )

    def _statuses(self, known: list[JobDetails]) -> list[JobStatus]:
        from tuner.job_records import ProgressReader

        reader = ProgressReader()
        statuses = []
        for details in known:
            found = _submitted(details)
            try:
                progress = reader.read(self._tracking_uri(details), found.name)
            except TrackingError as error:
                statuses.append(JobStatus(job=found, fault=str(error)))
            else:
                statuses.append(JobStatus(job=found, progress=progress))
        return statuses

    def _job_file(self, name: str) -> str:
        for details in self._api.list():
            if details.metadata["pwiser.job"] == name:
                return str(details.metadata["pwiser.job_file"])
        uri = self._tracking or os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            raise JobNotFoundError(
                f"job {name!r}: the cluster {self._api.address} knows no submission of it; name "
                "the tracking store that holds it by --tracking or MLFLOW_TRACKING_URI"
            )
        from tuner.results import find_experiment, read_job_file
        from tuner.tracking_store import open_existing

        client = open_existing(uri)
        return read_job_file(client, find_experiment(client, name))

    def _tracking_uri(self, details: JobDetails) -> str:
        from tuner.tracking_store import default_uri

        submission = Submission.from_metadata(details.metadata)
        assert submission is not None  # `JobsApi` gives none of others
        named = self._tracking or os.environ.get("MLFLOW_TRACKING_URI") or submission.tracking
        return named or default_uri(submission.storage)


def _submitted(details: JobDetails) -> SubmittedJob:
    state = JobState(details.status.value.lower())
    ended_by_ray = state is JobState.FAILED and details.driver_exit_code is None
    return SubmittedJob(
        id=details.submission_id,
        name=details.metadata["pwiser.job"],
        state=state,
        submitted=_time(details.start_time),
        ended=_time(details.end_time),
        exit_code=details.driver_exit_code,
        reason=one_line(details.message, None) if ended_by_ray and details.message else None,
    )


def _time(milliseconds: int | None) -> datetime | None:
    return None if not milliseconds else datetime.fromtimestamp(milliseconds / 1000, UTC)
