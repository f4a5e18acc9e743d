"""The job's search as Ray Tune sees it: a searcher that proposes and a scheduler that prunes."""

from collections.abc import Callable
from typing import Any

from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from tuner.job_search import MAX_RESTARTS, JobSearch
from tuner.messages import Ended, TrialTask
from tuner.study import Trial
from tuner.trial import ENDED, REPORT, TASK

__all__ = ["TUNE_ACTOR_DIED", "JobScheduler", "JobSearcher", "keep_credentials"]


TUNE_ACTOR_DIED = f"its Tune actor died {MAX_RESTARTS + 1} times"


def keep_credentials() -> None:
    """Keep Tune from handing this process's AWS credentials to its actors, which need none.

    It does so in their runtime environment, which every node's agent logs in plain text.
    """
    ENV_VARS_TO_PROPAGATE.difference_update(
        [name for name in ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")]
    )


class _Unsaved:
    """Leaves nothing of itself in Tune's experiment state, from which no job is ever restored."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class JobSearcher(_Unsaved, Searcher):
    """Turns the job's proposals into Tune trials.

    Args:
        search: of the job.
        make_task: turns a trial into what a lane is given.
        cancel_task: takes a trial's task from its lane; says whether that could be told.
    """

    def __init__(
        self,
        search: JobSearch,
        make_task: Callable[[Trial], TrialTask],
        cancel_task: Callable[[Trial], bool],
    ) -> None:
        super().__init__()
        self._search = search
        self._make_task = make_task
        self.cancel_task = cancel_task
        self.trials: dict[str, Trial] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Propose a Tune trial's configuration; say that there is none now, or none any more."""
        trial = self._search.next_trial()
        if trial is None:  # for now: a trial that is lost on the way will be there again
            return str(Searcher.FINISHED) if self._search.over else None
        self.trials[trial_id] = trial
        return {TASK: self._make_task(trial)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Pass on a trial's last message; without one its Tune actor died, or the queue did.

        The trial is not to blame: it is proposed again, or left for the job's next run.
        """
        trial = self.trials[trial_id]
        if trial.state.ended:
            return
        message = (result or {}).get(REPORT) or (result or {}).get(ENDED)
        if error or message is None:
            # nobody else would take it back: its lane waits for a verdict
            if not self.cancel_task(trial):
                message = Ended(kind="stopped", reason="the queue died")
            elif self._search.restart(trial):
                return
            elif self._search.stop_reason is not None:
                message = Ended(kind="stopped", reason=self._search.stop_reason)
            else:
                message = Ended(kind="failed", reason=TUNE_ACTOR_DIED)
        self._search.ended(trial, message)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the job's own records are what a resumed job is built from."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing; see `save`."""


class JobScheduler(_Unsaved, FIFOScheduler):
    """Stops the trials that the job's pruner gives up.

    Args:
        searcher: knows which Tune trial is which.
        search: of the job.
    """

    def __init__(self, searcher: JobSearcher, search: JobSearch) -> None:
        super().__init__()
        self._searcher = searcher
        self._search = search

    def on_trial_result(
        self, tune_controller: TuneController, trial: TuneTrial, result: dict[str, Any]
    ) -> str:
        """Decide after an evaluation whether the trial goes on; if not, its lane is free at once.

        Its Tune actor may be kept for a later trial, and would tell the lane then, or never.
        """
        found = self._searcher.trials[trial.trial_id]
        if not self._search.evaluated(found, result[REPORT]):
            return str(TrialScheduler.CONTINUE)
        self._searcher.cancel_task(found)
        return str(TrialScheduler.STOP)
