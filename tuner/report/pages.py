"""A report as a page: HTML in one file, Markdown, or JSON."""

import base64
from dataclasses import dataclass
from datetime import UTC, datetime

import jinja2

from tuner.clock import clock
from tuner.report.figures import study_figures
from tuner.report.reading import JobReport, StudyReport

__all__ = ["html_page", "json_page", "markdown_page", "study_markdown"]

SINGLE_TASK = ("dnn", "masknet")
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
    return _environment("study.md").get_template("study.md").render(study=study)


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
    return (
        _environment(template)
        .get_template(template)
        .render(
            report=report,
            tables=_tables(report),
            made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            **more,
        )
    )


def _environment(template: str) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tuner.report"),
        autoescape=template.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"clock": clock, "number": _number, "params": _params}
    return environment


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _params(params: dict[str, object]) -> str:
    """Name parameters by the last parts of their paths."""
    return ", ".join(
        f"{name.rpartition('.')[2]} {value:.4g}"
        if isinstance(value, float)
        else f"{name.rpartition('.')[2]} {value}"
        for name, value in params.items()
    )


def _tables(report: JobReport) -> dict[str, list[PaperTable]]:
    """Lay out each dataset's replicates in the paper's form: AUC x 100 on test, mean and spread."""
    tables: dict[str, list[PaperTable]] = {}
    for dataset in dict.fromkeys(study.dataset for study in report.studies):
        studies = [s for s in report.studies if s.dataset == dataset and s.evidence is not None]
        groups = {
            "MTL: two heads": [s for s in studies if s.model not in SINGLE_TASK],
            "STL: one head": [s for s in studies if s.model in SINGLE_TASK],
        }
        tables[dataset] = [_table(title, group) for title, group in groups.items() if group]
    return tables


def _table(title: str, studies: list[StudyReport]) -> PaperTable:
    columns = [
        (head, metric, loss) for head, metric in HEADS.items() for loss in ("baseline", "winner")
    ]
    best = {
        metric: max(
            (
                getattr(study.evidence.metrics[metric], loss)
                for study in studies
                if study.evidence is not None and metric in study.evidence.metrics
                for loss in ("baseline", "winner")
            ),
            default=None,
        )
        for metric in HEADS.values()
    }
    rows = []
    for study in studies:
        cells = []
        for _, metric, loss in columns:
            found = study.evidence.metrics.get(metric) if study.evidence else None
            if found is None:
                cells.append(Cell("-"))
                continue
            mean, deviation = getattr(found, loss), getattr(found, f"{loss}_sd")
            note = (
                f"{found.difference * 100:+.2f} [{found.low * 100:+.2f}, {found.high * 100:+.2f}]"
            )
            cells.append(
                Cell(
                    f"{mean * 100:.2f} ± {deviation * 100:.2f}",
                    note if loss == "winner" else "",
                    best=mean == best[metric],
                )
            )
        rows.append((study.model, tuple(cells)))
    headings = tuple(
        f"{head} {'BCE' if loss == 'baseline' else 'PWiseR'}" for head, _, loss in columns
    )
    return PaperTable(title, headings, tuple(rows))
