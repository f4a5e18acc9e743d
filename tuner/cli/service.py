"""The commands that hand jobs to a cluster and look after them there, over Ray's Jobs API."""

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli.options import JobFile, JobName, local_path
from tuner.clock import clock

if TYPE_CHECKING:
    from rich.table import Table

    from tuner.client import JobStatus, SubmittedJob

__all__ = ["service_app"]

service_app = typer.Typer(pretty_exceptions_enable=False)


class CodeChoice(StrEnum):
    """Whose code a job runs on the cluster; see `tuner.submission.Code`."""

    SHIP = "ship"
    IMAGE = "image"


Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="Ray dashboard of the cluster, http://HEAD:8265; PWISER_ADDRESS or RAY_ADDRESS "
        "if left out. Its token comes from RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.",
    ),
]
JobId = Annotated[
    str, typer.Argument(metavar="ID", help="Of a submission; or a job's name, for its newest one.")
]
WorkingDir = Annotated[
    Path | None,
    typer.Option(
        "--working-dir",
        metavar="DIR",
        help="Directory of your own modules, sent along.",
        parser=local_path,
    ),
]
CodeOption = Annotated[
    CodeChoice,
    typer.Option("--code", help="Send this installation's code along, or run the image's."),
]
StoreFromHere = Annotated[
    str | None,
    typer.Option(
        "--tracking",
        metavar="URI",
        help="MLflow tracking store as seen from here; MLFLOW_TRACKING_URI, or that of the job, "
        "if left out.",
    ),
]
Wait = Annotated[bool, typer.Option("--wait", help="Wait until the job has ended.")]


@service_app.command(epilog="Example: pwiser submit job.yaml --address http://head:8265 --wait")
def submit(
    job_file: JobFile,
    address: Address = None,
    tracking: StoreFromHere = None,
    wait: Wait = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Archive a job of this name, and start anew.")
    ] = False,
    working_dir: WorkingDir = None,
    code: CodeOption = CodeChoice.SHIP,
) -> None:
    """Check a job and hand it to a cluster; print the id of the submission."""
    from tuner.client import Client

    client = Client(address, tracking=tracking)
    job_id = client.submit(job_file, fresh=fresh, working_dir=working_dir, code=code.value)
    typer.echo(job_id)
    if wait:
        _wait(client.wait(job_id))


@service_app.command(epilog="Example: pwiser resume paper-us --wait")
def resume(
    job: JobName,
    address: Address = None,
    tracking: StoreFromHere = None,
    wait: Wait = False,
    working_dir: WorkingDir = None,
    code: CodeOption = CodeChoice.SHIP,
) -> None:
    """Go on with a stopped or killed job: submit its file again; print the new id."""
    from tuner.client import Client

    client = Client(address, tracking=tracking)
    job_id = client.resume(job, working_dir=working_dir, code=code.value)
    typer.echo(job_id)
    if wait:
        _wait(client.wait(job_id))


@service_app.command(epilog="Example: pwiser jobs --address http://head:8265")
def jobs(
    address: Address = None,
    tracking: StoreFromHere = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List a cluster's jobs: state, age, trials done of all, the best score so far."""
    from rich.console import Console

    from tuner.client import Client

    found = Client(address, tracking=tracking).statuses()
    if as_json:
        typer.echo(f"[{', '.join(status.model_dump_json() for status in found)}]")
        return
    Console().print(_jobs_table(found))


@service_app.command(epilog="Example: pwiser status paper-us --json")
def status(
    job: JobId,
    address: Address = None,
    tracking: StoreFromHere = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell how far a job is: per study trials done, running, pruned, failed, best, time left."""
    from rich.console import Console

    from tuner.client import Client

    found = Client(address, tracking=tracking).status(job)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
        return
    console = Console()
    console.print(_headline(found), highlight=False, markup=False, soft_wrap=True)
    if found.progress is not None:
        console.print(_studies_table(found))


@service_app.command(epilog="Example: pwiser logs paper-us -f")
def logs(
    job: JobId,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")
    ] = False,
) -> None:
    """Print what a job's driver printed."""
    from tuner.client import Client

    for piece in Client(address).logs(job, follow=follow):
        typer.echo(piece, nl=False)


@service_app.command(epilog="Example: pwiser stop paper-us")
def stop(job: JobId, address: Address = None) -> None:
    """Stop a job in order: trials end, runs are closed, checkpoints stay; it can be resumed."""
    from tuner.client import Client

    found = Client(address).stop(job)
    hint = "" if found.state == "succeeded" else f"; pwiser resume {found.name} goes on with it"
    typer.echo(f"{found.id}: {found.state}{hint}")


@service_app.command(epilog="Example: pwiser plan job.yaml --address http://head:8265")
def plan(
    job_file: JobFile,
    address: Address = None,
    tracking: StoreFromHere = None,
    working_dir: WorkingDir = None,
    code: CodeOption = CodeChoice.SHIP,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what a job would run, take and cost, here or on a cluster; exit code 2 if it won't run.

    A few steps of each model are trained to measure it: on the cluster whose URL --address,
    PWISER_ADDRESS or RAY_ADDRESS names, on the one in a RAY_ADDRESS that is no URL, else on this
    machine.
    """
    from rich.console import Console

    from tuner.cli.plan_tables import plan_lines, plan_table
    from tuner.job import read_job

    on_cluster = address or os.environ.get("PWISER_ADDRESS")
    if on_cluster or os.environ.get("RAY_ADDRESS", "").startswith(("http://", "https://")):
        from tuner.client import Client

        client = Client(address, tracking=tracking)
        found = client.plan(job_file, working_dir=working_dir, code=code.value)
    else:
        from tuner.planning import plan_job
        from tuner.submission_check import import_path

        with import_path(working_dir):
            found = plan_job(read_job(job_file))
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        console = Console()
        console.print(plan_table(found))
        for line in plan_lines(found):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    if found.obstacles:
        raise typer.Exit(2)


@service_app.command(hidden=True)
def drive() -> None:
    """Do what this submission is for; Ray starts it on the head node."""
    from rich.console import Console

    from tuner import __version__
    from tuner.cli.hints import next_commands
    from tuner.errors import ClusterError
    from tuner.job import parse_job
    from tuner.planning import plan_job
    from tuner.submission import Submission
    from tuner.tuning import run_job

    submission = Submission.of_this_process()
    if submission is None:
        raise ClusterError("drive: this process is no submission's; use pwiser submit")
    if submission.version != __version__:
        raise ClusterError(
            f"cluster: its image has pwiser-tuner {__version__}, {submission.job!r} was submitted "
            f"by {submission.version}; install the same version, or submit with --code ship"
        )
    job = parse_job(submission.job_file, f"job {submission.job}")
    if submission.purpose == "plan":
        typer.echo(plan_job(job).model_dump_json())
        return
    console = Console(width=120)
    results = run_job(job, submission.job_file, console, fresh=submission.fresh)
    console.print(next_commands(job, results), soft_wrap=True, highlight=False, markup=False)


def _wait(job: "SubmittedJob") -> None:
    typer.echo(f"{job.id}: {job.state}")
    if job.state == "stopped":
        raise typer.Exit(130)
    if job.state == "failed":
        typer.echo(job.reason or f"pwiser logs {job.id} shows why", err=True)
        raise typer.Exit(job.exit_code or 1)


def _headline(found: "JobStatus") -> str:
    line = f"{found.job.name}: {found.job.state}, {_age(found.job)} ({found.job.id})"
    if found.job.reason is not None:
        line += f"; {found.job.reason}"
    if found.fault is not None:
        return f"{line}; {found.fault}"
    if found.progress is None:
        return f"{line}; no record in the tracking store yet"
    return f"{line}; {found.progress.left}"


def _jobs_table(found: "list[JobStatus]") -> "Table":
    from rich.table import Table

    table = Table()
    for heading in ("id", "job", "state"):
        table.add_column(heading, overflow="fold")
    for heading in ("age", "done", "best", "left"):
        table.add_column(heading, justify="right", no_wrap=True)
    for status_ in found:
        progress = status_.progress
        done = "-" if progress is None else f"{progress.done}/{progress.trials}"
        best = None if progress is None else progress.best
        left = None if progress is None else progress.time_left_s
        table.add_row(
            *(status_.job.id, status_.job.name, str(status_.job.state), _age(status_.job)),
            *(done, _score(best), clock(left)),
        )
    return table


def _studies_table(found: "JobStatus") -> "Table":
    from rich.table import Table

    table = Table()
    table.add_column("study", overflow="fold")
    for heading in ("done", "running", "pruned", "failed", "best", "of trial", "left", "again"):
        table.add_column(heading, justify="right", no_wrap=True)
    for study in found.progress.studies if found.progress is not None else ():
        table.add_row(
            f"{study.dataset}/{study.model}",
            f"{study.done}/{study.trials}",
            *(str(study.running), str(study.pruned), str(study.failed), _score(study.best)),
            "-" if study.best_trial is None else str(study.best_trial),
            clock(study.time_left_s),
            f"{study.replicates}/{study.planned_replicates}",
        )
    return table


def _score(score: float | None) -> str:
    return "-" if score is None else f"{score:.4f}"


def _age(job: "SubmittedJob") -> str:
    from datetime import UTC, datetime

    if job.submitted is None:
        return "-"
    return clock(((job.ended or datetime.now(UTC)) - job.submitted).total_seconds())
