"""Ray's Jobs API with its faults in our words: where the cluster is, and whether it lets us in."""

import asyncio
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import urlsplit

import aiohttp
import requests
from ray._private.authentication import authentication_token_setup
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from tuner.errors import ClusterError
from tuner.submission import Submission

__all__ = ["ADDRESS_VARIABLES", "JobsApi", "find_address"]

ADDRESS_VARIABLES = ("PWISER_ADDRESS", "RAY_ADDRESS")
RAY_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # for Ray they win over an argument
CHATTY_LOGGERS = (
    authentication_token_setup.__name__,
    "ray._private.runtime_env.packaging",
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
)

UNANSWERED = (ConnectionError, requests.RequestException, aiohttp.ClientError, RuntimeError)

_PASSWORD = re.compile(r":(?!//)[^@]*@")
Answer = TypeVar("Answer")


def find_address(address: str | None) -> str:
    """The URL of the cluster's dashboard: `address`, `PWISER_ADDRESS` or `RAY_ADDRESS`.

    Raises:
        ClusterError: if none is given, or it is no URL.
    """
    named = {"--address": address, **{name: os.environ.get(name) for name in ADDRESS_VARIABLES}}
    source, found = next(
        ((source, value) for source, value in named.items() if value), ("--address", None)
    )
    if found is None:
        raise ClusterError(
            "--address: no cluster is named; give the URL of its Ray dashboard, such as "
            "http://HEAD:8265, here or in PWISER_ADDRESS"
        )
    if _PASSWORD.search(found):  # before any message that shows the address
        raise ClusterError(f"{source}: holds a password; give the token in RAY_AUTH_TOKEN instead")
    if not _is_web_address(found):
        raise ClusterError(
            f"{source} {found}: is not the URL of a Ray dashboard; give one such as "
            "http://HEAD:8265"
        )
    return found.rstrip("/")


def _is_web_address(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of brackets or of a port that is no number
        return False


class JobsApi:
    """One cluster's submissions of tuning jobs; those of others are not seen.

    Args:
        address: URL of the Ray dashboard.

    Raises:
        ClusterError: from every method, if nothing answers, or the token is refused.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        for name in CHATTY_LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        # as `ray start` does: a token that is there is used, unless RAY_AUTH_MODE says otherwise
        authentication_token_setup.maybe_enable_token_auth_if_token_available()
        with _without(RAY_VARIABLES):
            self._ray = self._ask(lambda: JobSubmissionClient(address))

    def list(self) -> list[JobDetails]:
        """List the tuning jobs that the cluster remembers, the newest first."""
        jobs = [job for job in self._ask(self._ray.list_jobs) if _is_tuning_job(job)]
        return sorted(jobs, key=lambda job: (job.start_time or 0, job.submission_id), reverse=True)

    def details(self, job_id: str) -> JobDetails:
        """Read one submission."""
        return self._ask(lambda: self._ray.get_job_info(job_id))

    def submit(self, job_id: str, submission: Submission, runtime_env: dict[str, object]) -> None:
        """Upload the code and start the job's driver on the head node."""
        self._ask(
            lambda: self._ray.submit_job(
                submission_id=job_id,
                entrypoint=submission.entrypoint(),
                metadata=submission.metadata(),
                runtime_env=runtime_env,
            )
        )

    def stop(self, job_id: str) -> None:
        """Ask the driver to end; harmless where it has ended."""
        self._ask(lambda: self._ray.stop_job(job_id))

    def logs(self, job_id: str) -> str:
        """Read all that the driver has printed so far."""
        return str(self._ask(lambda: self._ray.get_job_logs(job_id)))

    def follow_logs(self, job_id: str) -> Iterator[str]:
        """Give what the driver prints, from the beginning, until it has ended."""
        pieces = self._ray.tail_job_logs(job_id)

        async def next_piece() -> str | None:
            return await anext(pieces, None)

        with asyncio.Runner() as runner:
            while (piece := self._ask(lambda: runner.run(next_piece()))) is not None:
                yield piece

    def _ask(self, call: Callable[[], Answer]) -> Answer:
        try:
            return call()
        except AuthenticationError as error:
            reason = error.message.partition("\n")[0]
            raise ClusterError(
                f"--address {self.address}: the cluster refuses the token ({reason}); set "
                "RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to the file that holds it"
            ) from error
        except UNANSWERED as error:
            reason = str(error).strip().partition("\n")[0]
            raise ClusterError(
                f"--address {self.address}: the cluster does not answer as it should ({reason}); "
                "is this the address of its Ray dashboard?"
            ) from error


def _is_tuning_job(job: JobDetails) -> bool:
    submission = Submission.from_metadata(job.metadata or {})
    return bool(job.submission_id) and submission is not None and submission.purpose == "tune"


@contextmanager
def _without(variables: tuple[str, ...]) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
