"""The search of one study: an Optuna study that proposes trials and hears what became of them."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler

from trainables.configuration import ConfigurationError
from tuner.job import Job, SearchSettings
from tuner.messages import Report, Seconds
from tuner.space import PAPER_POINT
from tuner.study import PastTrial, Study, Trial, TrialState

__all__ = ["BASELINE_POINT", "StudySearch"]

BASELINE_POINT = {"loss.alpha": 0.0}
"""Plain BCE, whatever the rest."""

SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: TPESampler(seed=seed),
    "random": lambda seed: RandomSampler(seed=seed),
    "grid": lambda seed: RandomSampler(seed=seed),  # of a grid every point is enqueued, none drawn
    "gp": lambda seed: GPSampler(seed=seed),
}


class StudySearch:
    """Proposes the trials of one study and decides which are pruned.

    Trial 0 is the baseline: alpha 0, every other dimension at the job's own value. Trial 1 is the
    paper's point. Both run even where they lie outside the search space, and then Optuna does not
    hear of them; the baseline is never pruned. A grid's points follow in an order that the search's
    seed shuffles, so that as many as there are trials for come from all over it.

    Args:
        study: what is searched.
        job: its space, sampler, pruner, objectives and number of trials.

    Attributes:
        trials: all so far, by number.
        num_trials: that there will be.
        num_left_out: points of a grid that there are no trials for.
    """

    def __init__(self, study: Study, job: Job) -> None:
        self.study = study
        self.settings = job.search
        self.space = job.space(study.model)
        self.trials: list[Trial] = []
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna = optuna.create_study(
            study_name=study.name,
            directions=["maximize"] * len(self.settings.objectives),
            pruner=_pruner(self.settings),
        )
        self._asked: dict[int, optuna.Trial] = {}
        self._judged: dict[int, int] = {}
        self._unended: deque[Trial] = deque()
        self._points = [self.space.fixed_point(point) for point in (BASELINE_POINT, PAPER_POINT)]
        self.num_trials = self.settings.trials
        self.num_left_out = 0
        if self.settings.sampler == "grid":
            grid = [point for point in self.space.grid() if point not in self._points]
            order = np.random.default_rng(self.settings.seed).permutation(len(grid))
            self._points += [grid[index] for index in order]
            wanted = job.search.trials if "trials" in job.search.model_fields_set else None
            self.num_trials = min(wanted or len(self._points), len(self._points))
            self.num_left_out = len(self._points) - self.num_trials

    @property
    def exhausted(self) -> bool:
        """Whether every trial of the study has been proposed."""
        return len(self.trials) >= self.num_trials and not self._unended

    @property
    def ended(self) -> bool:
        """Whether every trial of the study has ended."""
        return self.exhausted and all(trial.state.ended for trial in self.trials)

    @property
    def num_ended(self) -> int:
        """Trials that have ended for good: stopped ones will run again."""
        return sum(trial.state.final for trial in self.trials)

    @property
    def seconds(self) -> Seconds:
        """Where the lanes' time for this study went, over all of its trials."""
        return sum(
            (trial.last.seconds for trial in self.trials if trial.last is not None), Seconds()
        )

    def ask(self) -> Trial | None:
        """Propose the next trial; None once the study has all of its trials.

        One whose values do not go together has a `failure`, and cannot be run.
        Trials without an end, after `restore` or `propose_again`, come first, each with its number.
        """
        if self._unended:
            return self._unended.popleft()
        if self.exhausted:
            return None
        number = len(self.trials)
        return self._propose(self._points[number] if number < len(self._points) else None)

    def propose_again(self, trial: Trial) -> None:
        """Let a trial without an end be asked for once more, before any new one."""
        self._unended.append(trial)

    def restore(self, past: Sequence[PastTrial]) -> None:
        """Take over the trials of an earlier process; those without an end will be proposed again.

        Optuna hears of every evaluation and every end anew, so that sampler and pruner decide from
        here on as they would have.

        Args:
            past: any order; each number at most once. A number that is missing is proposed anew.
        """
        by_number = {trial.number: trial for trial in past}
        for number in range(min(max(by_number, default=-1) + 1, self.num_trials)):
            found = by_number.get(number)
            point = self._points[number] if number < len(self._points) else None
            trial = self._propose(point if found is None else found.params)
            if found is None or not found.state.ended:
                if found is not None:
                    self._pass(trial, found.reports[:-1])
                self._unended.append(trial)
                continue
            for report in found.reports:
                trial.record(report)
                if found.state is not TrialState.COMPLETE or not report.last:
                    self.should_prune(trial)
            trial.state = found.state
            trial.failure = found.failure
            self.tell(trial)

    def _propose(self, params: dict[str, Any] | None) -> Trial:
        """Make the next trial, from Optuna where `params` are not given.

        Every proposal has a seed of its own, so that it does not matter in which process the ones
        before it were made.
        """
        number = len(self.trials)
        if params is None or (number > 0 and self.space.contains(params)):
            if params is not None:
                self._optuna.enqueue_trial(params)
            self._optuna.sampler = _sampler(self.settings, number)
            self._asked[number] = self._optuna.ask(self.space.distributions)
            params = self._asked[number].params
        failure = None
        try:
            configuration = self.space.configuration(params)
        except ConfigurationError as error:  # values that are well by themselves, not together
            configuration, failure = self.space.base, str(error)
        trial = Trial(
            study=self.study,
            number=number,
            configuration=configuration.replace(BASELINE_POINT) if number == 0 else configuration,
            params=params,
            objectives=self.settings.objectives,
            failure=failure,
        )
        self.trials.append(trial)
        return trial

    def should_prune(self, trial: Trial) -> bool:
        """Tell Optuna of the trial's last evaluation, and ask whether to stop the trial there.

        What it has passed once it has passed for good: a trial that begins again, and by now would
        be compared with more trials, is not judged there a second time.
        """
        asked = self._asked.get(trial.number)
        if asked is None or trial.last is None or len(self.settings.objectives) > 1:
            return False
        if trial.last.index <= self._judged.get(trial.number, 0):
            return False
        self._judged[trial.number] = trial.last.index
        asked.report(trial.score_of(trial.last), trial.last.index)
        return bool(asked.should_prune())

    def _pass(self, trial: Trial, reports: Sequence[Report]) -> None:
        """Note which evaluations a trial has passed that will report them once more.

        The last one before its process ended is not among them: nobody knows its verdict.
        """
        for report in reports:
            trial.record(report)
            self.should_prune(trial)
        trial.best = trial.last = None

    def tell(self, trial: Trial) -> None:
        """Tell Optuna how a trial ended; its value is that of its best evaluation."""
        asked = self._asked.pop(trial.number, None)
        if asked is None:
            return
        values = trial.best_values
        if trial.state is TrialState.COMPLETE and values is not None:
            self._optuna.tell(asked, list(values))
        elif trial.state is TrialState.PRUNED:
            self._optuna.tell(asked, state=optuna.trial.TrialState.PRUNED)
        else:
            self._optuna.tell(asked, state=optuna.trial.TrialState.FAIL)


def _sampler(settings: SearchSettings, number: int) -> BaseSampler:
    seed = np.random.SeedSequence((settings.seed, number)).generate_state(1)[0]
    return SAMPLERS[settings.sampler](int(seed))


def _pruner(settings: SearchSettings) -> BasePruner:
    if settings.pruner == "asha":
        return SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    return MedianPruner() if settings.pruner == "median" else NopPruner()
