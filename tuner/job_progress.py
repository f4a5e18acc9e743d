"""How far a job is: per study its trials, the best so far, the time left."""

from pydantic import BaseModel, ConfigDict

from tuner.clock import clock

__all__ = ["JobProgress", "StudyProgress"]


class StudyProgress(BaseModel):
    """How far one study is.

    Attributes:
        trials: that there will be.
        done: that have ended for good; stopped ones will run again.
        replicates: of its winner that have ended; they follow the search.
        planned_replicates: that there will be; those that have ended, before the search has.
        running: that a lane has, or that wait for one.
        best: the highest score of an evaluation so far, in the order of the job's objective.
        best_trial: its trial's number.
        time_left_s: of the search, at the pace of the trials so far; None before the first has
            ended, and while replicates are left.
    """

    model_config = ConfigDict(frozen=True)

    dataset: str
    model: str
    trials: int
    done: int
    replicates: int
    planned_replicates: int
    running: int
    pruned: int
    failed: int
    best: float | None
    best_trial: int | None
    time_left_s: float | None


class JobProgress(BaseModel):
    """How far a job is."""

    model_config = ConfigDict(frozen=True)

    job: str
    studies: tuple[StudyProgress, ...]

    @property
    def trials(self) -> int:
        """Trials of all studies."""
        return sum(study.trials for study in self.studies)

    @property
    def done(self) -> int:
        """Trials of all studies that have ended."""
        return sum(study.done for study in self.studies)

    @property
    def best(self) -> float | None:
        """The best score of all studies; scores of one job are comparable within a dataset."""
        return max((study.best for study in self.studies if study.best is not None), default=None)

    @property
    def replicates(self) -> int:
        """Replicates of all studies that have ended."""
        return sum(study.replicates for study in self.studies)

    @property
    def planned_replicates(self) -> int:
        """Replicates of all studies whose search has ended."""
        return sum(study.planned_replicates for study in self.studies)

    @property
    def time_left_s(self) -> float | None:
        """Time left for the search of all studies; None while it is unknown for one of them.

        It is unknown, too, once nothing but replicates is left.
        """
        unsearched = [study for study in self.studies if study.done < study.trials]
        parts = [study.time_left_s for study in unsearched or self.studies]
        return None if None in parts else sum(part for part in parts if part is not None)

    @property
    def left(self) -> str:
        """What is left, in words: the time of the search, or what is done of the replicates."""
        if self.done == self.trials and self.replicates < self.planned_replicates:
            return f"{self.replicates} of {self.planned_replicates} replicates done"
        return f"{clock(self.time_left_s)} left"
