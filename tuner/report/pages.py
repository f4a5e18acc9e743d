"""A report as a page: HTML in one file, Markdown, or JSON."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import jinja2

from tuner.clock import clock
from tuner.evidence import Comparison, Evidence
from tuner.report.figures import study_figures
from tuner.report.reading import JobReport, StudyReport
from tuner.study import short_params

__all__ = ["html_page", "json_page", "markdown_page", "study_markdown"]

HEADS = {"CTR": "ctr_auc", "CTCVR": "ctcvr_auc"}


@dataclass(frozen=True)
class Cell:
    """One figure of a table, with what stands below it."""

    text: str
    note: str = ""
    best: bool = False


@dataclass(frozen=True)
class PaperTable:
    """Models by loss, as the paper lays them out: multi-task models in one, the others apart."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def json_page(report: JobReport) -> str:
    """Write a report as JSON, all of its figures as numbers."""
    return report.model_dump_json(indent=2)


def markdown_page(report: JobReport) -> str:
    """Write a report as Markdown, without figures."""
    return _render("report.md", report)


def study_markdown(study: StudyReport) -> str:
    """Write one study's verdict and best trials as Markdown, for the MLflow UI."""
    return _template("study.md").render(study=study)


def html_page(report: JobReport) -> str:
    """Write a report as one HTML file that needs nothing else: no script, no link to elsewhere."""
    figures = {
        study.name: [
            (caption, base64.b64encode(png).decode()) for _, caption, png in study_figures(study)
        ]
        for study in report.studies
    }
    return _render("report.html", report, figures=figures)


def _render(template: str, report: JobReport, **more: object) -> str:
    made = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return _template(template).render(report=report, tables=_tables(report), made=made, **more)


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tuner.report"),
        autoescape=jinja2.select_autoescape(),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"clock": clock, "number": _number, "params": _params}
    return environment.get_template(name)


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _params(params: Mapping[str, object]) -> str:
    return ", ".join(short_params(params))


def _tables(report: JobReport) -> dict[str, list[PaperTable]]:
    """Lay out each dataset's replicates in the paper's form: AUC x 100 on test, mean and spread."""
    tables: dict[str, list[PaperTable]] = {}
    for dataset in dict.fromkeys(study.dataset for study in report.studies):
        found = [
            study.evidence
            for study in report.studies
            if study.dataset == dataset and study.evidence is not None
        ]
        groups = {
            "MTL: two heads": [one for one in found if not one.single_task],
            "STL: one head": [one for one in found if one.single_task],
        }
        tables[dataset] = [_table(title, group) for title, group in groups.items() if group]
    return tables


def _table(title: str, evidence: list[Evidence]) -> PaperTable:
    best = {
        metric: max(
            (
                max(found.baseline, found.winner)
                for one in evidence
                if (found := one.metrics.get(metric)) is not None
            ),
            default=None,
        )
        for metric in HEADS.values()
    }
    rows = [
        (
            one.model,
            tuple(
                cell
                for metric in HEADS.values()
                for cell in _cells(one.metrics.get(metric), best[metric])
            ),
        )
        for one in evidence
    ]
    headings = tuple(f"{head} {loss}" for head in HEADS for loss in ("BCE", "PWiseR"))
    return PaperTable(title, headings, tuple(rows))


def _cells(found: Comparison | None, best: float | None) -> tuple[Cell, Cell]:
    """The baseline's and the winner's; below the latter its difference with its interval."""
    if found is None:
        return Cell("-"), Cell("-")
    interval = f"[{found.low * 100:+.2f}, {found.high * 100:+.2f}]"
    return (
        Cell(_spread(found.baseline, found.baseline_sd), best=found.baseline == best),
        Cell(
            _spread(found.winner, found.winner_sd),
            f"{found.difference * 100:+.2f} {interval}",
            best=found.winner == best,
        ),
    )


def _spread(mean: float, deviation: float) -> str:
    return f"{mean * 100:.2f} ± {deviation * 100:.2f}"
