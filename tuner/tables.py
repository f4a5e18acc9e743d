"""Results as tables: for the terminal, and as Markdown for the MLflow UI."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tuner.results import DatasetResult, JobResult, Metrics
from tuner.search import StudySearch

__all__ = ["evidence_tables", "results_markdown", "results_tables", "time_table"]

COLUMNS = ("ctr_auc", "ctcvr_auc", "cvr_auc", "ctr_logloss", "ctcvr_logloss")
HEADINGS = ("CTR AUC", "CTCVR AUC", "CVR AUC", "CTR logloss", "CTCVR logloss")


def _rows(result: DatasetResult) -> list[tuple[str, str, Metrics]]:
    return [
        (split, trial, metrics[split])
        for split in ("valid", "test")
        for trial, metrics in (("baseline", result.baseline.metrics), ("winner", result.metrics))
    ]


def _title(name: str, result: DatasetResult) -> str:
    loss = result.config["loss"]
    point = f"alpha {loss['alpha']:.4g}, m1 {loss['m1']:.3g}, m2 {loss['m2']:.3g}"
    return f"{name}: {result.model}, baseline (BCE) against winner ({point})"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def results_tables(results: JobResult) -> list[Table]:
    """Lay out baseline against winner, a table per dataset."""
    tables = []
    for name, result in results.datasets.items():
        table = Table(
            title=_title(name, result), title_justify="left", box=SIMPLE_HEAD, pad_edge=False
        )
        for heading in ("split", "trial"):
            table.add_column(heading)
        for heading in HEADINGS:
            table.add_column(heading, justify="right", no_wrap=True)
        for split, trial, metrics in _rows(result):
            style = "bold" if trial == "winner" else ""
            table.add_row(
                split, trial, *(_cell(metrics[column]) for column in COLUMNS), style=style
            )
        tables.append(table)
    return tables


EVIDENCE_HEADINGS = ("CTR AUC", "CTCVR AUC", "objective")


def _evidence_rows(result: DatasetResult) -> list[tuple[str, ...]]:
    """Per study its winner with plain BCE and with PWiseR, and the difference with its verdict."""
    rows = []
    for model, evidence in result.evidence.items():
        found = [*map(evidence.metrics.get, ("ctr_auc", "ctcvr_auc")), evidence.objective]
        name = "PWiseR" if evidence.loss["alpha"] else "BCE (won)"
        rows += [
            (model, "BCE", *(_spread(c.baseline, c.baseline_sd) if c else "-" for c in found)),
            (model, name, *(_spread(c.winner, c.winner_sd) if c else "-" for c in found)),
            (
                evidence.verdict,
                "difference",
                *(
                    _spread(c.difference, c.high - c.difference, sign="+") if c else "-"
                    for c in found
                ),
            ),
        ]
    return rows


def _spread(middle: float, reach: float, *, sign: str = "") -> str:
    return f"{middle:{sign}.4f}±{reach:.4f}"


def _evidence_title(name: str, result: DatasetResult) -> str:
    seeds = sorted({len(evidence.seeds) for evidence in result.evidence.values()})
    shown = " to ".join(str(number) for number in dict.fromkeys((seeds[0], seeds[-1])))
    return (
        f"{name}: test over {shown} fresh seeds, mean±standard deviation; "
        "difference with its 95% interval"
    )


def _failure_lines(result: DatasetResult) -> list[str]:
    return [
        f"{model}: {evidence.failures}"
        for model, evidence in result.evidence.items()
        if evidence.failures
    ]


def evidence_tables(results: JobResult) -> list[Table]:
    """Lay out what the replicates show, a table per dataset that has any.

    Those that failed are named below it.
    """
    tables = []
    for name, result in results.datasets.items():
        if not result.evidence:
            continue
        table = Table(
            title=_evidence_title(name, result),
            title_justify="left",
            caption="\n".join(_failure_lines(result)) or None,
            caption_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        table.add_column("model", overflow="fold")
        table.add_column("loss")
        for heading in EVIDENCE_HEADINGS:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in _evidence_rows(result):
            is_verdict = row[1] == "difference"
            table.add_row(*row, style="bold" if is_verdict else "", end_section=is_verdict)
        tables.append(table)
    return tables


def results_markdown(results: JobResult) -> str:
    """Write the same tables as Markdown."""
    lines = []
    for name, result in results.datasets.items():
        lines += [
            f"**{_title(name, result)}**",
            "",
            "| split | trial | " + " | ".join(HEADINGS) + " |",
            "|---" * 2 + "|---:" * len(HEADINGS) + "|",
        ]
        for split, trial, metrics in _rows(result):
            cells = " | ".join(_cell(metrics[column]) for column in COLUMNS)
            lines.append(f"| {split} | {trial} | {cells} |")
        lines.append("")
        if result.evidence:
            lines += [
                f"**{_evidence_title(name, result)}**",
                "",
                "| " + " | ".join(("model", "loss", *EVIDENCE_HEADINGS)) + " |",
                "|---" * 2 + "|---:" * len(EVIDENCE_HEADINGS) + "|",
            ]
            lines += [f"| {' | '.join(row)} |" for row in _evidence_rows(result)]
            lines.append("")
            lines += [f"{line}\n" for line in _failure_lines(result)]
    return "\n".join(lines)


def time_table(searches: list[StudySearch]) -> Table:
    """Lay out where the lanes' time went, study by study; overhead is what was nothing else."""
    table = Table(
        title="lane time in seconds",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("study", overflow="fold")
    for heading in ("trials", "set-up", "training", "eval.", "overhead", "each"):
        table.add_column(heading, justify="right", no_wrap=True)
    for search in searches:
        seconds = search.seconds
        parts = (seconds.setup, seconds.training, seconds.evaluation)
        share = seconds.overhead / seconds.lane if seconds.lane else 0.0
        table.add_row(
            search.study.name,
            str(len(search.trials)),
            *(f"{part:.1f}" for part in parts),
            f"{seconds.overhead:.1f} ({share:.0%})",
            f"{seconds.overhead / max(len(search.trials), 1):.2f}",
        )
    return table
