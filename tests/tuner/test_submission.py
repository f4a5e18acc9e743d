import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import datasets
import trainables
import tuner
from tuner.submission import STOP_PATIENCE_S, Code, Purpose, Submission

JOB_FILE = "name: us\ndatasets: [/data/us]\n"
SUBMISSION = Submission(job="us", job_file=JOB_FILE, storage="s3://bucket/jobs")


@settings(deadline=None)
@given(
    job_file=st.text(),
    storage=st.text(min_size=1),
    tracking=st.none() | st.text(min_size=1),
    purpose=st.sampled_from(["tune", "plan"]),
    fresh=st.booleans(),
    code=st.sampled_from(["ship", "image"]),
    version=st.text(),
)
def test_metadata_says_all_of_a_submission(
    job_file: str,
    storage: str,
    tracking: str | None,
    purpose: Purpose,
    fresh: bool,
    code: Code,
    version: str,
) -> None:
    submission = Submission(
        job="us",
        job_file=job_file,
        storage=storage,
        tracking=tracking,
        purpose=purpose,
        fresh=fresh,
        code=code,
        version=version,
    )
    metadata = submission.metadata()
    assert all(isinstance(value, str) for value in metadata.values())
    sent = json.loads(json.dumps(metadata))
    assert Submission.from_metadata(sent) == submission


@pytest.mark.parametrize(
    "job_file",
    [
        "name: \"us\"\ndatasets: ['a']\n",
        "# ☃ é\r\nname: us\n",
        "a: |\n  $(reboot) `x` \\\n",
        "\x00",
    ],
)
def test_the_driver_reads_the_job_file_as_it_was(
    monkeypatch: pytest.MonkeyPatch, job_file: str
) -> None:
    submission = replace(SUBMISSION, job_file=job_file, tracking="http://mlflow:5000", fresh=True)
    config = {"runtime_env": {}, "metadata": submission.metadata()}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(config))
    assert Submission.of_this_process() == submission


def test_what_others_submit_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Submission.from_metadata({"job_submission_id": "raysubmit_1"}) is None
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {}}))
    assert Submission.of_this_process() is None
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert Submission.of_this_process() is None


def test_the_three_packages_are_sent_and_nothing_but_the_patience_is_set() -> None:
    environment = SUBMISSION.runtime_env(None)
    packages = [Path(str(package.__file__)).parent for package in (tuner, trainables, datasets)]
    assert environment == {
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_PATIENCE_S)},
        "py_modules": [str(package) for package in packages],
        "excludes": ["__pycache__", "*.pyc"],
    }


def test_of_an_image_nothing_is_sent_but_the_users_modules() -> None:
    submission = replace(SUBMISSION, code="image")
    assert submission.runtime_env(Path("/home/me/modules")) == {
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_PATIENCE_S)},
        "working_dir": "/home/me/modules",
    }


@pytest.mark.parametrize("code", ["ship", "image"])
def test_no_secret_of_the_environment_goes_along(
    monkeypatch: pytest.MonkeyPatch, code: Code
) -> None:
    names = (
        "RAY_AUTH_TOKEN",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
    )
    for name in names:
        monkeypatch.setenv(name, f"sentinel-{name}")
    submission = replace(SUBMISSION, code=code)
    sent: dict[str, Any] = {
        "entrypoint": submission.entrypoint(),
        "metadata": submission.metadata(),
        "runtime_env": submission.runtime_env(Path("/home/me/modules")),
    }
    assert "sentinel" not in json.dumps(sent)


def test_a_submission_of_another_version_is_still_read() -> None:
    metadata = {"pwiser.job": "old", "pwiser.job_file": "name: old\n"}
    found = Submission.from_metadata(metadata)
    assert found is not None
    assert (found.job, found.purpose, found.code, found.version) == ("old", "tune", "ship", "")
