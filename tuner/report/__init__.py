"""`pwiser report`: what a job found, how sure it is, and how to repeat it, on one page."""

from tuner.report.figures import study_figures
from tuner.report.pages import html_page, json_page, markdown_page, study_markdown
from tuner.report.reading import JobReport, StudyReport, TrialRow, read_report

__all__ = [
    "JobReport",
    "StudyReport",
    "TrialRow",
    "html_page",
    "json_page",
    "markdown_page",
    "read_report",
    "study_figures",
    "study_markdown",
]
