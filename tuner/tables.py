"""Results as tables: for the terminal, and as Markdown for the MLflow UI."""

from rich.table import Table

from tuner.results import JobResult, Metrics
from tuner.search import StudySearch

__all__ = ["results_markdown", "results_table", "time_table"]

COLUMNS = ("ctr_auc", "ctcvr_auc", "cvr_auc", "ctr_logloss", "ctcvr_logloss")
HEADINGS = ("CTR AUC", "CTCVR AUC", "CVR AUC", "CTR logloss", "CTCVR logloss")


def _rows(results: JobResult) -> list[tuple[str, str, str, str, Metrics]]:
    rows = []
    for name, result in results.datasets.items():
        loss = result.config["loss"]
        point = f"alpha {loss['alpha']:.4g}, m1 {loss['m1']:.3g}, m2 {loss['m2']:.3g}"
        for split in ("valid", "test"):
            rows.append(
                (name, result.model, split, "baseline, BCE", result.baseline.metrics[split])
            )
            rows.append((name, result.model, split, f"winner, {point}", result.metrics[split]))
    return rows


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def results_table(results: JobResult) -> Table:
    """Lay out baseline against winner, per dataset and split."""
    table = Table(title=f"{results.job}: baseline against winner", title_justify="left")
    for heading in ("dataset", "model", "split", "trial"):
        table.add_column(heading)
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for dataset, model, split, trial, metrics in _rows(results):
        style = "bold" if trial.startswith("winner") else ""
        cells = [_cell(metrics[column]) for column in COLUMNS]
        table.add_row(dataset, model, split, trial, *cells, style=style)
    return table


def results_markdown(results: JobResult) -> str:
    """Write the same table as Markdown."""
    lines = [
        "| dataset | model | split | trial | " + " | ".join(HEADINGS) + " |",
        "|---" * 4 + "|---:" * len(HEADINGS) + "|",
    ]
    for dataset, model, split, trial, metrics in _rows(results):
        cells = " | ".join(_cell(metrics[column]) for column in COLUMNS)
        lines.append(f"| {dataset} | {model} | {split} | {trial} | {cells} |")
    return "\n".join(lines)


def time_table(searches: list[StudySearch]) -> Table:
    """Lay out where each study's lane time went."""
    table = Table(title="lane time", title_justify="left")
    table.add_column("study")
    headings = ("trials", "set-up s", "training s", "evaluation s", "overhead s", "overhead")
    for heading in (*headings, "overhead s/trial"):
        table.add_column(heading, justify="right")
    for search in searches:
        seconds = search.seconds
        parts = (seconds.setup, seconds.training, seconds.evaluation, seconds.overhead)
        num_trials = max(len(search.trials), 1)
        table.add_row(
            search.study.name,
            str(len(search.trials)),
            *(f"{part:.1f}" for part in parts),
            f"{seconds.overhead / seconds.lane:.0%}" if seconds.lane else "-",
            f"{seconds.overhead / num_trials:.2f}",
        )
    return table
