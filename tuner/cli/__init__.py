"""The command line `pwiser`: a thin layer that parses, calls and prints."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from datasets.errors import PwiserError, one_line
from tuner import __version__
from tuner.cli.complaint import complain
from tuner.cli.data import data_app
from tuner.cli.options import JobFile, JobName, Tracking, local_path
from tuner.cli.service import service_app
from tuner.errors import JobFailedError, JobFileError, StorageError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from trainables.program import ProgramFormat
    from tuner.results import JobResult

__all__ = ["app", "run"]

app = typer.Typer(
    name="pwiser",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Tune click and conversion models with the PWiseR loss on Ray, Optuna and MLflow.",
    epilog="Example: pwiser tune examples/demo.yaml",
)
app.add_typer(data_app, name="data")
app.add_typer(service_app)


class ReportFormat(StrEnum):
    """The pages that a report can be."""

    HTML = "html"
    MD = "md"
    JSON = "json"


class ExportFormat(StrEnum):
    """What an export's model is written as; the weights are always there."""

    SAFETENSORS = "safetensors"
    PT2 = "pt2"
    ONNX = "onnx"

    @property
    def program(self) -> "ProgramFormat | None":
        """The program to write beside the weights."""
        programs: dict[ExportFormat, ProgramFormat] = {
            ExportFormat.PT2: "pt2",
            ExportFormat.ONNX: "onnx",
        }
        return programs.get(self)


EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def run() -> int:
    """Run the command line; return the exit code.

    Faults that the user can mend print one line and give 2, a job that failed gives 1, an
    interrupted one 130.
    """
    try:
        code = app(standalone_mode=False)  # what typer.Exit was raised with, or None
    except PwiserError as error:
        return _complain(error, EXIT_BAD_INPUT)
    except JobFailedError as error:
        return _complain(error, EXIT_INTERRUPTED if error.interrupted else EXIT_FAILED)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        fault = _fault(error)
        if fault is not None:
            return _complain(fault, EXIT_BAD_INPUT)
        if not hasattr(error, "show"):  # click's usage errors know how to show themselves
            raise
        error.show()
        return EXIT_BAD_INPUT
    return int(code or 0)


def _fault(error: Exception) -> object:
    """Say what files, the network or MLflow refused; None for what only a program can mend."""
    from tuner.tracking_store import tracking_fault

    if isinstance(error, OSError):
        return f"{one_line(error, None)}; check that it can be reached, its permissions and space"
    return tracking_fault(error)


def _complain(message: object, code: int) -> int:
    complain(message)
    return code


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pwiser {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: pwiser tune examples/demo.yaml --fresh")
def tune(
    job_file: JobFile,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Archive a job of this name, and start anew.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show what Ray and the workers print.")
    ] = False,
) -> None:
    """Search, here on an embedded Ray or on the cluster in RAY_ADDRESS; choose the winners."""
    from rich.console import Console

    from tuner.cli.hints import next_commands
    from tuner.job import read_job

    job = read_job(job_file)
    from tuner.tuning import run_job

    console = Console()
    text = job_file.read_text(encoding="utf-8")
    try:
        results = run_job(job, text, console, fresh=fresh, verbose=verbose)
    except JobFileError as error:
        raise JobFileError(f"{job_file}: {error}") from error
    console.print(next_commands(job, results), soft_wrap=True, highlight=False, markup=False)


@app.command(epilog="Example: pwiser best demo --json")
def best(
    job: JobName,
    tracking: Tracking = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show each dataset's winner: configuration, metrics beside its baseline's, checkpoint, run."""
    from rich.console import Console

    from tuner.tables import evidence_tables, results_tables
    from tuner.tracking_store import open_existing

    results = _results(open_existing(tracking), job)
    if as_json:
        typer.echo(results.model_dump_json(indent=2))
        return
    console = Console()
    console.print(*results_tables(results), *evidence_tables(results))
    for name, found in results.datasets.items():
        console.print(f"{name}: checkpoint {found.checkpoint}", soft_wrap=True, highlight=False)
        console.print(f"{name}: MLflow run {found.run_id}", soft_wrap=True, highlight=False)


@app.command(epilog="Example: pwiser export demo --dataset demo --out exported/demo")
def export(
    job: JobName,
    dataset: Annotated[str, typer.Option(help="Name of the dataset.")],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Directory to make; must not exist.", parser=local_path),
    ],
    form: Annotated[
        ExportFormat,
        typer.Option("--format", help="pt2 and onnx also write the model as a program of its own."),
    ] = ExportFormat.SAFETENSORS,
    tracking: Tracking = None,
) -> None:
    """Export a winner: weights, configuration, schema and vocabularies, for trainables.load."""
    from tuner.export import export_winner
    from tuner.tracking_store import open_existing

    results = _results(open_existing(tracking), job)
    export_winner(results, dataset, out, form.program)
    typer.echo(f"{out}: the winner of {job} on {dataset}; load it by trainables.load({str(out)!r})")


@app.command(epilog="Example: pwiser predict exported/demo --input rows.csv --out scores.parquet")
def predict(
    export_directory: Annotated[
        Path,
        typer.Argument(metavar="EXPORT_DIR", help="What pwiser export wrote.", parser=local_path),
    ],
    input: Annotated[  # noqa: A002  (the option's name)
        str,
        typer.Option(
            "--input",
            metavar="PATH",
            help="CSV or Parquet rows of raw features: a file, a directory of files, 'dir/*.csv'.",
        ),
    ],
    out: Annotated[
        str, typer.Option(metavar="FILE", help="Parquet file or URI to make; must not exist.")
    ],
) -> None:
    """Score a table's rows in their order: pctr, and with a conversion head pctcvr and pcvr."""
    from tuner.prediction import predict_table

    typer.echo(f"{out}: scores of {predict_table(export_directory, input, out):,} rows")


@app.command(epilog="Example: pwiser register demo --dataset demo")
def register(
    job: JobName,
    dataset: Annotated[str, typer.Option(help="Name of the dataset.")],
    force: Annotated[
        bool, typer.Option("--force", help="Without evidence that it is better than BCE, too.")
    ] = False,
    tracking: Tracking = None,
) -> None:
    """Make a winner the champion among its dataset's registered models, ready to be served."""
    from tuner.registry import CHAMPION, model_name, register_winner
    from tuner.tracking_store import hide_password, open_existing

    client = open_existing(tracking)
    results = _results(client, job)
    version = register_winner(client, results, dataset, force=force)
    name = model_name(dataset)
    typer.echo(f"{name} version {version} is the {CHAMPION}; serve it by")
    typer.echo(
        f"MLFLOW_TRACKING_URI={hide_password(str(client.tracking_uri))} "
        f"mlflow models serve -m models:/{name}@{CHAMPION} --env-manager local --port 5001"
    )


@app.command(epilog="Example: pwiser report demo --out demo.html")
def report(
    job: JobName,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File to write; Markdown and JSON are printed without.",
            parser=local_path,
        ),
    ] = None,
    form: Annotated[
        ReportFormat, typer.Option("--format", help="HTML is one file that needs nothing else.")
    ] = ReportFormat.HTML,
    tracking: Tracking = None,
) -> None:
    """Write what a job found: verdicts, tables, figures, cost, and how to repeat it."""
    from tuner.tracking_store import open_existing

    if out is None and form is ReportFormat.HTML:
        raise typer.BadParameter("a page of HTML needs a file", param_hint="--out")
    client = open_existing(tracking)
    from tuner.report import html_page, json_page, markdown_page, read_report
    from tuner.results import find_experiment

    pages = {
        ReportFormat.HTML: html_page,
        ReportFormat.MD: markdown_page,
        ReportFormat.JSON: json_page,
    }
    text = pages[form](read_report(client, find_experiment(client, job)))
    if out is None:
        typer.echo(text)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"--out {out}: cannot be written ({error.strerror}); name another file"
        ) from error
    typer.echo(f"{out}: the report of {job}")


@app.command(epilog="Example: pwiser ui --port 5000")
def ui(
    tracking: Tracking = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 5000,
) -> None:
    """Open the MLflow UI on the tracking store; Ctrl-C ends it."""
    from tuner.tracking_store import existing_uri, hide_password

    uri = existing_uri(tracking)
    if uri.startswith(("http://", "https://")):
        typer.echo(f"the store is a server with a UI of its own: {hide_password(uri)}")
        return
    typer.echo(f"MLflow UI on http://{host}:{port}, Ctrl-C ends it")
    sys.stdout.flush()
    os.environ["MLFLOW_BACKEND_STORE_URI"] = uri  # no argument: it may hold a password
    command = [sys.executable, "-m", "mlflow", "ui", "--workers", "1"]
    os.execv(command[0], [*command, "--host", host, "--port", str(port)])


@app.command(epilog="Example: pwiser schema > job.schema.json")
def schema() -> None:
    """Print the JSON Schema of job files, for editors that check and complete YAML."""
    import json

    from tuner.job import Job

    typer.echo(json.dumps(Job.model_json_schema(), indent=2))


def _results(client: "MlflowClient", job: str) -> "JobResult":
    from tuner.results import find_experiment, read_results

    return read_results(client, find_experiment(client, job))
