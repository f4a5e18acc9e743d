"""The queue between Tune's trials and the lanes, run as one Ray actor.

A plain asyncio class, so that its rules can be tested without Ray. Tune's side submits a task and
asks for one message after another; asking for the next one is the verdict "go on", cancelling is
the verdict "stop". A lane takes a task, reports its evaluations, and waits after each for the
verdict. A taken task is leased to its lane until the lane says that it is finished.

Workers of a lane that are given up may live on for a moment, beside their successors. So each
generation of a lane's workers joins under a number of its own, and once the lane is lost that is
worth nothing: it brings no task and no word in a trial (a fencing token, as in Kleppmann,
"Designing Data-Intensive Applications", chapter 8).
"""

import asyncio
from collections import Counter, deque
from dataclasses import dataclass, field

from tuner.messages import Ended, Generation, GivenUp, Report, Task, TrialTask

__all__ = ["CLOSED", "TrialQueue"]

CLOSED = "closed"
"""What `take` answers once no more tasks will come, or none to this lane."""

MAX_DEATHS_AT_ONE_PLACE = 2
"""Lanes that a task may take down between the same two evaluations before it has failed."""

MAX_DEATHS = 5
"""Lanes that a task may take down at all: one that gets on each time may be there by chance."""

MAX_FAULTS = 2
"""Tasks that a lane may give back, with none done in between, before it is given up."""


@dataclass
class _Entry:
    """A task.

    Attributes:
        task: it.
        submission: which of the queue's submissions it came with.
        messages: for Tune's side.
        changed: told when a lane's side may go on.
        num_reported: evaluations that a lane has reported, whichever.
        num_delivered: of them, those that Tune's side has taken.
        num_approved: of them, those after which it wants the next one.
        place: index of the last evaluation that the lane in hand has reported, again or not.
        deaths: places at which it took down its lane.
        cancelled: it is to be stopped.
        ended: nothing more will be said of it.
        interrupted: it was stopped with all others.
    """

    task: Task
    submission: int
    messages: asyncio.Queue[Report | Ended] = field(default_factory=asyncio.Queue)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    num_reported: int = 0
    num_delivered: int = 0
    num_approved: int = 0
    place: int = 0
    deaths: list[int] = field(default_factory=list)
    cancelled: bool = False
    ended: bool = False
    interrupted: bool = False


class TrialQueue:
    """Hands tasks to lanes and messages back."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._waiting: deque[_Entry] = deque()
        self._leases: dict[Generation, _Entry] = {}
        self._generations: dict[str, Generation] = {}
        self._num_generations = 0
        self._num_submissions = 0
        self._finished: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._given_up: asyncio.Queue[GivenUp | None] = asyncio.Queue()
        self._lanes: set[str] = set()
        self._changed = asyncio.Condition()
        self._stop_reason: str | None = None
        self._closed = False

    # Tune's side

    async def submit(self, task: Task) -> int:
        """Put a task at the end of the queue; after `cancel_all` a trial ends there and then.

        One of its id that is there still is stopped: nobody would go on with it.

        Returns:
            The number of the submission, by which its own submitter may cancel it.
        """
        await self.cancel(task.id)
        self._num_submissions += 1
        entry = self._entries[task.id] = _Entry(task, self._num_submissions)
        if self._stop_reason is not None and isinstance(task, TrialTask):
            self._end(entry, Ended(kind="stopped", reason=self._stop_reason))
        self._waiting.append(entry)
        await _notify(self._changed)
        return entry.submission

    async def next_message(self, task_id: str) -> Report | Ended:
        """Let the task go on after the last message, and wait for its next one."""
        entry = self._entries[task_id]
        entry.num_approved = entry.num_delivered
        await _notify(entry.changed)
        message = await entry.messages.get()
        entry.num_delivered += 1
        return message

    async def cancel(self, task_id: str, submission: int | None = None) -> None:
        """Stop a task wherever it is, and forget it; harmless for one that has ended.

        Args:
            task_id: of the task.
            submission: only if it is there by this one; whichever if left out.
        """
        entry = self._entries.get(task_id)
        if entry is not None and submission in {None, entry.submission}:
            del self._entries[task_id]
            await self._stop(entry)

    async def cancel_all(self, reason: str) -> None:
        """Stop every task, telling those who wait for a message, and take no more trials."""
        self._stop_reason = self._stop_reason or reason
        for entry in self._entries.values():
            entry.interrupted |= not entry.ended
            self._end(entry, Ended(kind="stopped", reason=reason))
            await self._stop(entry)

    async def num_lanes(self) -> int:
        """Count the lanes that have come up; one that is lost and starts anew stays counted."""
        return len(self._lanes)

    async def num_finished(self, lane: str) -> int:
        """Count the tasks that a lane's workers have done all for, those that failed too."""
        return self._finished[lane]

    async def close(self) -> None:
        """Let the lanes go home once they have no task."""
        self._closed = True
        self._given_up.put_nowait(None)
        await _notify(self._changed)

    async def next_given_up(self) -> GivenUp | None:
        """Wait for the next lane that is given up; None once the queue is closed."""
        return await self._given_up.get()

    async def lose_lane(self, lane: str) -> None:
        """Take the lane's task back, since its workers are gone; the next free lane gets it."""
        await self._take_back(lane, blamed=True)

    # a lane's side

    async def join(self, lane: str) -> Generation:
        """Take note of the lane's new workers; what their predecessors had is taken back."""
        await self.lose_lane(lane)
        self._lanes.add(lane)
        self._num_generations += 1
        generation = self._generations[lane] = Generation(lane, self._num_generations)
        return generation

    async def take(self, generation: Generation, *, timeout_s: float) -> Task | str | None:
        """Wait for a task; None when the time is up, `CLOSED` when no more will come.

        The workers of a lost lane wait for nothing: nobody would train a task handed to them.
        """
        if self._faults[generation.lane] >= MAX_FAULTS:
            return CLOSED
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(
                    lambda: self._closed or (self._waiting and self._is_current(generation))
                )
                while self._waiting and self._is_current(generation):
                    entry = self._waiting.popleft()
                    if self._start(entry):
                        self._leases[generation] = entry
                        return entry.task
        except TimeoutError:
            return None
        return CLOSED if self._closed else None

    async def report(self, generation: Generation, report: Report) -> bool:
        """Pass an evaluation of the leased task on and wait for the verdict: whether to go on.

        An evaluation that was reported before (its lane was lost and began anew) is not repeated.
        """
        entry = self._leases.get(generation)
        if entry is None or entry.ended or entry.cancelled:
            return False
        entry.place = report.index
        if report.index > entry.num_reported:
            entry.num_reported = report.index
            entry.ended = report.last
            entry.messages.put_nowait(report)
        if report.last:
            return False
        async with entry.changed:
            await entry.changed.wait_for(
                lambda: self._is_over(generation, entry) or entry.num_approved >= report.index
            )
        return not self._is_over(generation, entry)

    async def fail(self, generation: Generation, task_id: str, reason: str) -> None:
        """End a task with the reason of its failure, if it is the leased one still.

        Each of a lane's workers may say so, the last of them when rank 0 has taken another task.
        """
        entry = self._leases.get(generation)
        if entry is not None and entry.task.id == task_id:
            self._end(entry, Ended(kind="failed", reason=reason))

    async def give_back(self, generation: Generation, reason: str) -> None:
        """Take the task back from workers that cannot serve it, through no fault of the task.

        They have no more word in it. Their lane is given up once that has come too often.
        """
        if not self._is_current(generation):
            return
        lane = generation.lane
        self._faults[lane] += 1
        if self._faults[lane] == MAX_FAULTS:
            self._given_up.put_nowait(GivenUp(lane, reason))
        await self._take_back(lane, blamed=False)

    async def wait_cancelled(self, generation: Generation) -> None:
        """Return when the leased task is to be stopped, or is leased no more."""
        entry = self._leases.get(generation)
        if entry is not None:
            async with entry.changed:
                await entry.changed.wait_for(lambda: self._is_over(generation, entry))

    async def is_interrupted(self, generation: Generation) -> bool:
        """Whether the leased task was stopped with all others, and may go on another day."""
        entry = self._leases.get(generation)
        return entry is not None and entry.interrupted

    async def finish(self, generation: Generation) -> None:
        """Give back the lease: the lane has done all that it will do for its task."""
        entry = self._leases.pop(generation, None)
        if entry is not None:
            self._finished[generation.lane] += 1
            self._faults[generation.lane] = 0
            await self._stop(entry)

    async def _take_back(self, lane: str, *, blamed: bool) -> None:
        """Put the lane's task, if it has one, at the head of the queue."""
        generation = self._generations.pop(lane, None)
        entry = None if generation is None else self._leases.pop(generation, None)
        if entry is not None:
            if blamed:
                entry.deaths.append(entry.place)
            self._waiting.appendleft(entry)
            await _notify(entry.changed)
            await _notify(self._changed)

    def _is_current(self, generation: Generation) -> bool:
        return self._generations.get(generation.lane) == generation

    def _is_over(self, generation: Generation, entry: _Entry) -> bool:
        return entry.cancelled or self._leases.get(generation) is not entry

    def _start(self, entry: _Entry) -> bool:
        if entry.ended or entry.cancelled:
            return False
        entry.place = 0
        at_one_place = max(map(entry.deaths.count, entry.deaths), default=0)
        if at_one_place >= MAX_DEATHS_AT_ONE_PLACE or len(entry.deaths) >= MAX_DEATHS:
            reason = f"it took down its lane {len(entry.deaths)} times"
            self._end(entry, Ended(kind="failed", reason=reason))
            return False
        return True

    def _end(self, entry: _Entry, message: Ended) -> None:
        if not entry.ended:
            entry.ended = True
            entry.messages.put_nowait(message)

    async def _stop(self, entry: _Entry) -> None:
        entry.cancelled = True
        await _notify(entry.changed)


async def _notify(condition: asyncio.Condition) -> None:
    async with condition:
        condition.notify_all()
