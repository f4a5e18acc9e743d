"""How far a job is, read from MLflow alone."""

from collections import Counter

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from tuner.errors import JobNotFoundError, TrackingError
from tuner.job_progress import JobProgress, StudyProgress
from tuner.look import look
from tuner.results import WINNER_TRIAL_TAG, find_experiment, search_all
from tuner.study import TrialState
from tuner.tracking import LANES_TAG, REPLICATES_TAG, SECONDS_METRICS, TRIALS_TAG
from tuner.tracking_store import hide_password, open_existing, tracking_fault

__all__ = ["ProgressReader", "read_progress"]


class ProgressReader:
    """Reads how far jobs are; it opens each tracking store once, and looks at a fault once."""

    def __init__(self) -> None:
        self._clients: dict[str, MlflowClient] = {}
        self._faults: dict[str, TrackingError] = {}

    def read(self, uri: str, job: str) -> JobProgress | None:
        """Read how far a job is; None before its first record.

        Args:
            uri: of its tracking store, as it is seen from here.
            job: its name.

        Raises:
            TrackingError: if the store cannot be read from here; so for the next job of it, too.
        """
        if uri in self._faults:
            raise self._faults[uri]
        try:
            return read_progress(self._open(uri), job)
        except JobNotFoundError:
            return None
        except TrackingError as error:
            self._faults[uri] = error
            raise
        except Exception as error:
            fault = tracking_fault(error)
            if fault is None:
                raise
            self._faults[uri] = fault
            raise fault from error

    def _open(self, uri: str) -> MlflowClient:
        if uri not in self._clients:
            client = look(lambda: open_existing(uri))
            if client is None:
                raise TrackingError(
                    f"tracking.uri {hide_password(uri)}: does not answer; name the store as it is "
                    "seen from here by --tracking or MLFLOW_TRACKING_URI"
                )
            self._clients[uri] = client
        return self._clients[uri]


def read_progress(client: MlflowClient, job: str) -> JobProgress:
    """Read how far a job is.

    Raises:
        JobNotFoundError: if the tracking store holds no such job.
    """
    experiment_id = find_experiment(client, job).experiment_id
    trials: dict[str, list[Run]] = {}
    for run in search_all(client, experiment_id, "trial"):
        trials.setdefault(run.data.tags["pwiser.study"], []).append(run)
    replicates = Counter(
        (run.data.tags["pwiser.study"], run.data.tags["pwiser.trial"])
        for run in search_all(client, experiment_id, "replicate")
        if _state(run).final
    )
    parents = sorted(
        search_all(client, experiment_id, "study"), key=lambda run: run.info.start_time
    )
    return JobProgress(
        job=job,
        studies=tuple(
            _study_progress(parent, trials.get(study, []), replicates[study, winner])
            for parent in parents
            for study in (parent.data.tags["pwiser.study"],)
            for winner in (parent.data.tags.get(WINNER_TRIAL_TAG, "0"),)
        ),
    )


def _study_progress(parent: Run, trials: list[Run], num_replicates: int) -> StudyProgress:
    tags = parent.data.tags
    states = [_state(run) for run in trials]
    num_done = sum(state.final for state in states)
    num_trials = int(tags.get(TRIALS_TAG, len(trials)))
    num_planned = int(tags.get(REPLICATES_TAG, num_replicates))
    replicating = num_done >= num_trials and num_replicates < num_planned
    lanes = int(tags.get(LANES_TAG, 1))
    best, best_trial = max(
        ((score, -int(run.data.tags["pwiser.trial"])) for run, score in _scores(trials)),
        default=(None, None),
    )
    return StudyProgress(
        dataset=tags["pwiser.dataset"],
        model=tags["pwiser.model"],
        trials=num_trials,
        done=num_done,
        replicates=num_replicates,
        planned_replicates=num_planned,
        running=states.count(TrialState.RUNNING),
        pruned=states.count(TrialState.PRUNED),
        failed=states.count(TrialState.FAILED),
        best=best,
        best_trial=None if best_trial is None else -best_trial,
        time_left_s=None if replicating else _time_left_s(trials, num_done, num_trials, lanes),
    )


def _state(run: Run) -> TrialState:
    """Of a trial that runs again after it was stopped the tag still says that it was."""
    if run.info.status == "RUNNING":
        return TrialState.RUNNING
    return TrialState(run.data.tags.get("pwiser.state", TrialState.STOPPED))


def _scores(trials: list[Run]) -> list[tuple[Run, float]]:
    """Each usable trial with its best score; of a running one that of its last evaluation."""
    scores = [
        (run, run.data.metrics.get("best/objective", run.data.metrics.get("valid/objective")))
        for run in trials
        if _state(run) is not TrialState.FAILED
    ]
    return [(run, score) for run, score in scores if score is not None]


def _time_left_s(trials: list[Run], num_done: int, num_trials: int, num_lanes: int) -> float | None:
    num_left = num_trials - num_done
    if num_left <= 0:
        return 0.0
    if num_done == 0:
        return None
    lane_s = sum(run.data.metrics.get(name, 0.0) for run in trials for name in SECONDS_METRICS)
    if lane_s == 0.0:  # those that have ended failed before their first evaluation
        return None
    return lane_s / num_done * num_left / min(num_lanes, num_left)
