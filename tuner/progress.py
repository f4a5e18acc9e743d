"""What a running job shows: a live table on a terminal, a line per event elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as BarProgress
from rich.table import Table

from tuner.clock import clock
from tuner.messages import Report
from tuner.replicates import Replicate
from tuner.search import StudySearch
from tuner.study import Trial, TrialState, choose_winner, short_params

__all__ = ["Progress", "ReplicateProgress"]


class Progress:
    """Shows each study's trials: done, running, pruned, failed, the best so far, the time left.

    Args:
        console: where to show it.
        searches: of the job's studies.
        num_lanes: trials at a time, for the time left.
    """

    def __init__(self, console: Console, searches: list[StudySearch], num_lanes: int) -> None:
        self._console = console
        self._searches = searches
        self._num_lanes = num_lanes
        self._started = time.monotonic()
        self._live = Live(console=console, get_renderable=self._table, refresh_per_second=2)

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def trial_started(self, trial: Trial) -> None:
        """The table shows it by itself."""

    def trial_evaluated(self, trial: Trial, report: Report) -> None:
        """The table shows it by itself."""

    def trial_ended(self, trial: Trial) -> None:
        """Print a line where there is no terminal."""
        if self._console.is_terminal:
            return
        search = next(search for search in self._searches if search.study == trial.study)
        value = "-" if trial.best_score is None else f"{trial.best_score:.4f}"
        name = "baseline" if trial.baseline else f"trial {trial.number}"
        line = (
            f"{trial.study.name} {name} {trial.state} {value} {_point(trial)} | "
            f"{search.num_ended}/{search.num_trials} done, best {_best(search)}, "
            f"{clock(self._seconds_left())} left"
        )
        if trial.failure is not None:
            line += f" | {trial.failure}"
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)

    def study_ended(self, search: StudySearch) -> None:
        """The table and the lines of the trials say it."""

    def _table(self) -> Table:
        elapsed = time.monotonic() - self._started
        table = Table(
            title=f"{clock(elapsed)} passed, {clock(self._seconds_left())} left",
            title_justify="left",
        )
        table.add_column("study")
        for heading in ("done", "running", "pruned", "failed", "epoch", "best"):
            table.add_column(heading, justify="right")
        table.add_column("best trial")
        for search in self._searches:
            states = [trial.state for trial in search.trials]
            running = [trial for trial in search.trials if not trial.state.ended]
            winner = choose_winner(search.trials)
            table.add_row(
                search.study.name,
                f"{search.num_ended}/{search.num_trials}",
                str(len(running)),
                str(states.count(TrialState.PRUNED)),
                str(states.count(TrialState.FAILED)),
                ", ".join(f"{trial.last.epoch:.2g}" for trial in running if trial.last is not None),
                _best(search),
                "" if winner is None else _point(winner),
            )
        return table

    def _seconds_left(self) -> float | None:
        """Estimate from the trials that ended so far, at the pace of the whole job."""
        num_ended = sum(search.num_ended for search in self._searches)
        num_left = sum(search.num_trials for search in self._searches) - num_ended
        if num_ended == 0:
            return None
        lane_s = sum(search.seconds.lane for search in self._searches)
        return num_left * lane_s / num_ended / min(self._num_lanes, max(num_left, 1))


class ReplicateProgress:
    """Shows how many replicates have ended: a bar on a terminal, a line each elsewhere.

    Args:
        console: where to show it.
        num_replicates: that there will be.
    """

    def __init__(self, console: Console, num_replicates: int) -> None:
        self._console = console
        self._num_replicates = num_replicates
        self._num_ended = 0
        self._bar = BarProgress(
            TextColumn("winners again, with fresh seeds"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("replicates", total=num_replicates)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def replicate_started(self, replicate: Replicate) -> None:
        """The bar counts the ended ones."""

    def replicate_evaluated(self, replicate: Replicate, report: Report) -> None:
        """The bar counts the ended ones."""

    def replicate_ended(self, replicate: Replicate) -> None:
        """Move the bar, or print a line where there is no terminal."""
        self._num_ended += 1
        self._bar.advance(self._task)
        if self._console.is_terminal:
            return
        name = f"trial {replicate.number}{' with plain BCE' if replicate.plain else ''}"
        shown = " ".join(
            f"{metric} {value:.4f}"
            for metric, value in replicate.test_metrics.items()
            if value is not None and metric in {"ctr_auc", "ctcvr_auc"}
        )
        line = (
            f"{replicate.study.name} {name} again, seed {replicate.seed}: {replicate.state} "
            f"{'test ' + shown if shown else replicate.failure or ''} | "
            f"{self._num_ended}/{self._num_replicates} replicates"
        )
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)


def _best(search: StudySearch) -> str:
    winner = choose_winner(search.trials)
    return "-" if winner is None or winner.best_score is None else f"{winner.best_score:.4f}"


def _point(trial: Trial) -> str:
    """Name what the search chose."""
    return "alpha 0" if trial.baseline else " ".join(short_params(trial.params))
