import io

import pytest
from rich.console import Console

from tuner.job import Job
from tuner.job_search import JobSearch
from tuner.messages import Ended, Report, Seconds
from tuner.progress import Progress
from tuner.search import StudySearch
from tuner.study import Study, Trial


class Shown:
    """A job of two studies of two trials, and what its progress printed."""

    def __init__(self, *, terminal: bool, width: int = 120) -> None:
        content = {
            "name": "job",
            "datasets": ["us"],
            "models": ["mmoe", "dnn"],
            "search": {
                "sampler": "random",
                "pruner": "none",
                "trials": 2,
                "space": {
                    "loss.alpha": {"low": 0.1, "high": 1.0},
                    "training.learning_rate": {"low": 0.0001, "high": 0.1},
                    "model.expert_units": {"values": [[512, 256, 128]]},
                },
            },
        }
        job = Job.model_validate(content)
        searches = [
            StudySearch(Study(dataset="us", dataset_uri="/us", model=model), job)
            for model in job.models
        ]
        self.file = io.StringIO()
        console = Console(file=self.file, force_terminal=terminal, width=width)
        self.progress = Progress(console, searches, num_lanes=2)
        self.search = JobSearch(searches, [self.progress])

    def next_trial(self) -> Trial:
        trial = self.search.next_trial()
        assert trial is not None
        return trial

    @property
    def lines(self) -> list[str]:
        return self.file.getvalue().splitlines()


def report(value: float, *, last: bool, lane_s: float = 10.0) -> Report:
    metrics = {"ctr_auc": value, "ctcvr_auc": value}
    seconds = Seconds(lane=lane_s)
    return Report(index=1, last=last, step=1, epoch=0.5, metrics=metrics, seconds=seconds)


@pytest.fixture
def plain() -> Shown:
    return Shown(terminal=False)


def test_without_a_terminal_every_ended_trial_is_a_line(plain: Shown) -> None:
    with plain.progress:
        plain.search.ended(plain.next_trial(), report(0.61234, last=True))
        trial = plain.next_trial()
        assert not plain.search.evaluated(trial, report(0.7, last=False))
        plain.search.ended(trial, report(0.65, last=True))
    others = "learning_rate 0.001 expert_units [512, 256, 128]"
    assert plain.lines == [
        "us/mmoe baseline complete 0.6123 alpha 0 | 1/2 done, best 0.6123, 00:15 left",
        f"us/mmoe trial 1 complete 0.7000 alpha 0.3 {others} | 2/2 done, best 0.7000, 00:10 left",
    ]


def test_a_failure_is_told_on_its_line(plain: Shown) -> None:
    reason = "TrainingError: the loss became nan [/bold] before step 3"
    with plain.progress:
        plain.search.ended(plain.next_trial(), Ended(kind="failed", reason=reason))
    (line,) = plain.lines
    assert line.startswith("us/mmoe baseline failed - alpha 0 | ")
    assert line.endswith(f"| 1/2 done, best -, 00:00 left | {reason}")


def test_long_lines_are_not_broken_and_without_escapes() -> None:
    shown = Shown(terminal=False, width=40)
    with shown.progress:
        shown.search.ended(shown.next_trial(), report(0.5, last=True, lane_s=5000))
    (line,) = shown.lines
    assert line.endswith("2:05:00 left")
    assert "\x1b" not in line


def test_on_a_terminal_a_table_shows_every_study() -> None:
    shown = Shown(terminal=True)
    with shown.progress:
        shown.search.ended(shown.next_trial(), report(0.6, last=True))
        running = shown.next_trial()
        shown.search.evaluated(running, report(0.7, last=False))
        shown.search.ended(shown.next_trial(), Ended(kind="failed", reason="out of memory"))
    printed = shown.file.getvalue()
    for text in ("done", "running", "pruned", "failed", "epoch", "best trial", "us/mmoe", "us/dnn"):
        assert text in printed
    rows = [line.replace("│", " ").split() for line in printed.splitlines() if "us/" in line]
    assert rows[-2][:7] == ["us/mmoe", "1/2", "1", "0", "0", "0.5", "0.7000"]
    assert rows[-1][:6] == ["us/dnn", "1/2", "0", "0", "1", "-"]
    assert "out of memory" not in printed
