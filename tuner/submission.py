"""What travels with a submitted job, written by the client and read by the job's driver.

The job file goes in the submission's metadata, so that a client of any machine can read it back;
the code goes in its runtime environment. Neither holds a secret: what opens MLflow and storage is
in the environment of the cluster's nodes.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tuner import __version__

__all__ = ["STOP_PATIENCE_S", "Code", "Purpose", "Submission"]

Code = Literal["ship", "image"]
Purpose = Literal["tune", "plan"]

PACKAGES = ("tuner", "trainables", "datasets")
METADATA_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # where Ray tells a driver of its submission
STOP_PATIENCE_S = 120
"""Seconds that Ray gives a driver to end its trials before it kills it (its own default is 3)."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job on its way to a cluster.

    Attributes:
        job: its name.
        job_file: the text of its file.
        storage: as the job file names it.
        tracking: URI of the tracking store in the job file; None where it names none.
        purpose: `tune` runs the job, `plan` only says what it would take.
        fresh: whether a job of this name is archived first.
        code: `ship` sends this installation's packages along, `image` takes the nodes' own.
        version: of the client's pwiser-tuner.
    """

    job: str
    job_file: str
    storage: str
    tracking: str | None = None
    purpose: Purpose = "tune"
    fresh: bool = False
    code: Code = "ship"
    version: str = __version__

    def entrypoint(self) -> str:
        """The command that Ray runs on the head node."""
        return "python -m tuner drive"

    def metadata(self) -> dict[str, str]:
        """Strings that Ray keeps with the submission."""
        return {
            "pwiser.job": self.job,
            "pwiser.job_file": self.job_file,
            "pwiser.storage": self.storage,
            "pwiser.tracking": self.tracking or "",
            "pwiser.purpose": self.purpose,
            "pwiser.fresh": json.dumps(self.fresh),
            "pwiser.code": self.code,
            "pwiser.version": self.version,
        }

    def runtime_env(self, working_dir: Path | None) -> dict[str, Any]:
        """What the driver and every worker of the job start with.

        Args:
            working_dir: with modules of the user's own, put on the import path; None for none.
        """
        environment: dict[str, Any] = {
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_PATIENCE_S)}
        }
        if self.code == "ship":
            root = Path(__file__).parents[1]
            environment["py_modules"] = [str(root / package) for package in PACKAGES]
            environment["excludes"] = ["__pycache__", "*.pyc"]
        if working_dir is not None:
            environment["working_dir"] = str(working_dir)
        return environment

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "Submission | None":
        """Read a submission back, of another version's client too; None for a job not ours."""
        if "pwiser.job_file" not in metadata:
            return None
        return cls(
            job=metadata["pwiser.job"],
            job_file=metadata["pwiser.job_file"],
            storage=metadata.get("pwiser.storage", ""),
            tracking=metadata.get("pwiser.tracking") or None,
            purpose="plan" if metadata.get("pwiser.purpose") == "plan" else "tune",
            fresh=bool(json.loads(metadata.get("pwiser.fresh", "false"))),
            code="image" if metadata.get("pwiser.code") == "image" else "ship",
            version=metadata.get("pwiser.version", ""),
        )

    @classmethod
    def of_this_process(cls) -> "Submission | None":
        """The submission that this process is the driver of; None outside of one."""
        config = json.loads(os.environ.get(METADATA_VARIABLE, "{}"))
        return cls.from_metadata(config.get("metadata", {}))
