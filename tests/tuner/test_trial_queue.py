import asyncio
import gc
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import pytest

from tuner import trial_queue
from tuner.messages import Ended, Generation, GivenUp, Report, Task, TestTask, TrialTask
from tuner.trial_queue import (
    CLOSED,
    MAX_DEATHS,
    MAX_DEATHS_AT_ONE_PLACE,
    MAX_FAULTS,
    TrialQueue,
)

SOON_S = 5.0
"""Nothing here takes as long; a test that waits for ever fails by it."""


def task(name: str = "a") -> TrialTask:
    return TrialTask(
        id=name,
        dataset="/data/us",
        configuration={},
        objectives=("mean_auc",),
        checkpoint="/c",
        state="/nowhere-state",
    )


def report(index: int, *, last: bool = False) -> Report:
    return Report(index=index, last=last, step=index, epoch=index, metrics={"ctr_auc": index / 10})


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, SOON_S))


async def settle() -> None:
    """Let every other coroutine go on until it waits."""
    for _ in range(20):
        await asyncio.sleep(0)


@dataclass
class Lane:
    """A lane's workers, in their dealings with the queue."""

    queue: TrialQueue
    generation: Generation

    async def take(self, timeout_s: float = SOON_S) -> Task | str | None:
        return await self.queue.take(self.generation, timeout_s=timeout_s)

    async def report(self, index: int, *, last: bool = False) -> bool:
        return await self.queue.report(self.generation, report(index, last=last))

    async def fail(self, reason: str, task_id: str = "a") -> None:
        await self.queue.fail(self.generation, task_id, reason)

    async def give_back(self, reason: str) -> None:
        await self.queue.give_back(self.generation, reason)

    async def wait_cancelled(self) -> None:
        await self.queue.wait_cancelled(self.generation)

    async def finish(self) -> None:
        await self.queue.finish(self.generation)


async def join(queue: TrialQueue, name: str = "lane") -> Lane:
    return Lane(queue, await queue.join(name))


async def ended(queue: TrialQueue, task_id: str = "a") -> Ended:
    message = await queue.next_message(task_id)
    assert isinstance(message, Ended)
    return message


def test_a_trial_goes_through_in_lock_step() -> None:
    async def test() -> None:
        queue = TrialQueue()
        lane = await join(queue)
        await queue.submit(task())
        assert await lane.take() == task()
        first_message = asyncio.create_task(queue.next_message("a"))
        first_verdict = asyncio.create_task(lane.report(1))
        assert await first_message == report(1)
        await settle()
        assert not first_verdict.done()  # the lane waits until Tune asks for the next message
        second_message = asyncio.create_task(queue.next_message("a"))
        assert await first_verdict
        await settle()
        assert not second_message.done()
        assert not await lane.report(2, last=True)
        assert await second_message == report(2, last=True)
        await lane.finish()

    run(test())


def test_tasks_are_taken_in_their_order_by_whoever_is_free() -> None:
    async def test() -> None:
        queue = TrialQueue()
        waiting = [asyncio.create_task((await join(queue, name)).take()) for name in "xy"]
        await settle()
        for name in "abc":
            await queue.submit(task(name))
        assert [await answer for answer in waiting] == [task("a"), task("b")]
        assert await (await join(queue, "z")).take() == task("c")

    run(test())


def test_what_is_stopped_with_the_job_is_interrupted_and_what_is_cancelled_is_not() -> None:
    async def test() -> None:
        queue = TrialQueue()
        names = ("cancelled", "failed", "ended", "hand")
        lanes = {name: await join(queue, name) for name in names}
        for name, lane in lanes.items():
            await queue.submit(task(name))
            assert await lane.take() == task(name)
            assert not await queue.is_interrupted(lane.generation)
        await queue.cancel("cancelled")
        await queue.fail(lanes["failed"].generation, "failed", "why")
        assert not await lanes["ended"].report(1, last=True)
        await queue.cancel_all("interrupted")
        await queue.cancel_all("the job has ended")
        found = {name: await queue.is_interrupted(lane.generation) for name, lane in lanes.items()}
        assert found == {"cancelled": False, "failed": False, "ended": False, "hand": True}
        await lanes["hand"].finish()
        assert not await queue.is_interrupted(lanes["hand"].generation)

    run(test())


def test_a_task_submitted_again_takes_the_place_of_the_earlier_one() -> None:
    async def test() -> None:
        queue = TrialQueue()
        first, second = await join(queue, "x"), await join(queue, "y")
        submission = await queue.submit(task())
        assert await first.take() == task()
        verdict = asyncio.create_task(first.report(1))
        await settle()
        again = await queue.submit(task())
        assert not await verdict
        assert await second.take() == task()
        message = asyncio.create_task(queue.next_message("a"))
        await queue.cancel("a", submission)  # by whoever submitted it first
        assert not await second.report(1, last=True)
        assert await message == report(1, last=True)
        await queue.cancel("a", again)
        with pytest.raises(KeyError):
            await queue.next_message("a")

    run(test())


def test_a_take_gives_up_when_its_time_is_up() -> None:
    async def test() -> None:
        queue = TrialQueue()
        lane = await join(queue)
        assert await lane.take(0.01) is None
        await queue.submit(task())
        assert await lane.take() == task()

    run(test())


def test_a_closed_queue_gives_what_it_holds_and_then_sends_the_lanes_home() -> None:
    async def test() -> None:
        queue = TrialQueue()
        lane = await join(queue)
        idle = asyncio.create_task((await join(queue, "idle")).take())
        await settle()
        await queue.close()
        assert await idle == CLOSED
        await queue.submit(task())
        assert await lane.take() == task()
        assert await lane.take() == CLOSED

    run(test())


def test_a_task_cancelled_while_it_waits_is_never_taken() -> None:
    async def test() -> None:
        queue = TrialQueue()
        lane = await join(queue)
        await queue.submit(task("a"))
        await queue.submit(task("b"))
        await queue.cancel("a")
        assert await lane.take() == task("b")

    run(test())


def test_a_task_cancelled_while_it_trains_is_heard_of_at_once_and_refused_at_its_report() -> None:
    async def test() -> None:
        queue = TrialQueue()
        lane = await join(queue)
        await queue.submit(task())
        await lane.take()
        heard = asyncio.create_task(lane.wait_cancelled())
        await settle()
        assert not heard.done()
        await queue.cancel("a")
        await heard
        assert not await lane.report(1)

    run(test())


def test_a_task_cancelled_between_report_and_verdict_is_stopped() -> None:
    async def test() -> None:
        queue = TrialQueue()
        lane = await join(queue)
        await queue.submit(task())
        await lane.take()
        verdict = asyncio.create_task(lane.report(1))
        assert await queue.next_message("a") == report(1)
        await queue.cancel("a")
        assert not await verdict

    run(test())


def test_cancelling_what_has_ended_or_never_was_is_harmless() -> None:
    async def test() -> None:
        queue = TrialQueue()
        lane = await join(queue)
        await queue.cancel("never")
        await queue.submit(task())
        await lane.take()
        await lane.report(1, last=True)
        await queue.cancel("a")
        await queue.cancel("a")
        await lane.finish()

    run(test())


def test_a_lane_without_a_task_has_nothing_to_wait_for() -> None:
    async def test() -> None:
        queue = TrialQueue()
        lane = await join(queue)
        assert not await lane.report(1)
        await lane.wait_cancelled()
        await lane.fail("no reason")
        await lane.finish()
        await queue.lose_lane("lane")
        await queue.lose_lane("no lane")

    run(test())


def test_a_lane_that_has_finished_does_not_wait_for_a_cancellation() -> None:
    async def test() -> None:
        queue = TrialQueue()
        lane = await join(queue)
        await queue.submit(task())
        await lane.take()
        poll = asyncio.create_task(lane.wait_cancelled())
        await lane.report(1, last=True)
        await lane.finish()
        await poll
        lane = await join(queue)  # the lease is given back: nothing to take again
        assert await lane.take(0.01) is None

    run(test())


def test_a_lost_lanes_task_is_the_next_to_be_taken_and_repeats_no_evaluation() -> None:
    async def test() -> None:
        queue = TrialQueue()
        lost, other = await join(queue, "lost"), await join(queue, "other")
        for name in "ab":
            await queue.submit(task(name))
        await lost.take()
        first_message = asyncio.create_task(queue.next_message("a"))
        given_up = asyncio.create_task(lost.report(1))
        assert await first_message == report(1)
        await queue.lose_lane("lost")
        assert not await given_up
        second_message = asyncio.create_task(queue.next_message("a"))
        assert await other.take() == task("a")
        assert await other.report(1)  # approved already, and not passed on again
        await settle()
        assert not second_message.done()
        assert not await other.report(2, last=True)
        assert await second_message == report(2, last=True)

    run(test())


def test_an_evaluation_repeated_before_its_verdict_waits_for_it() -> None:
    async def test() -> None:
        queue = TrialQueue()
        lost = await join(queue)
        await queue.submit(task())
        await lost.take()
        given_up = asyncio.create_task(lost.report(1))
        assert await queue.next_message("a") == report(1)
        lane = await join(queue)
        assert not await given_up
        assert await lane.take() == task()
        verdict = asyncio.create_task(lane.report(1))
        await settle()
        assert not verdict.done()
        waiting = asyncio.create_task(queue.next_message("a"))
        assert await verdict
        waiting.cancel()

    run(test())


def test_workers_of_a_lost_lane_that_live_on_have_no_more_word_in_their_trial() -> None:
    async def test() -> None:
        queue = TrialQueue()
        lost = await join(queue)
        await queue.submit(task())
        await lost.take()
        poll = asyncio.create_task(lost.wait_cancelled())
        await settle()
        assert not poll.done()
        lane = await join(queue)
        await poll
        assert await lane.take() == task()
        assert not await lost.report(1, last=True)
        await lost.fail("its process was killed")
        await lost.finish()
        verdict = asyncio.create_task(lane.report(1))
        assert await queue.next_message("a") == report(1)
        await settle()
        assert not verdict.done()  # not cancelled by the others' end
        waiting = asyncio.create_task(queue.next_message("a"))
        assert await verdict
        waiting.cancel()

    run(test())


def test_workers_of_a_lost_lane_are_handed_nothing() -> None:
    async def test() -> None:
        queue = TrialQueue()
        lost = await join(queue)
        waiting = asyncio.create_task(lost.take())
        await settle()
        await queue.lose_lane("lane")
        await queue.submit(task())
        assert await lost.take(0.01) is None
        lane = await join(queue)
        assert await lane.take() == task()
        assert not waiting.done()
        await queue.close()
        assert await waiting == CLOSED

    run(test())


async def die_after(queue: TrialQueue, index: int) -> None:
    """Have a lane take the task and die once it has reported, or repeated, so many evaluations."""
    lane = await join(queue)
    assert await lane.take() == task()
    for one in range(1, index + 1):
        assert await lane.report(one)
    await queue.lose_lane("lane")


async def end_of(queue: TrialQueue) -> Ended:
    """Have Tune's side let the task go on after every evaluation."""
    while isinstance(message := await queue.next_message("a"), Report):
        pass
    return message


def test_a_task_that_takes_its_lanes_down_at_one_place_fails() -> None:
    async def test() -> None:
        queue = TrialQueue()
        await queue.submit(task())
        for _ in range(MAX_DEATHS_AT_ONE_PLACE):
            await die_after(queue, 0)
        assert await (await join(queue)).take() is None
        reason = f"it took down its lane {MAX_DEATHS_AT_ONE_PLACE} times"
        assert await ended(queue) == Ended(kind="failed", reason=reason)

    run(test())


def test_a_task_that_gets_on_between_its_lanes_deaths_has_more_of_them() -> None:
    async def test() -> None:
        queue = TrialQueue()
        await queue.submit(task())
        end = asyncio.create_task(end_of(queue))
        for index in range(MAX_DEATHS):
            await die_after(queue, index)
        assert await (await join(queue)).take() is None
        assert await end == Ended(kind="failed", reason=f"it took down its lane {MAX_DEATHS} times")

    run(test())


def test_what_a_lane_gives_back_is_the_next_to_be_taken_and_never_fails_by_it() -> None:
    async def test() -> None:
        queue = TrialQueue()
        for name in "ab":
            await queue.submit(task(name))
        for number in range(MAX_DEATHS + 1):
            lane = await join(queue, str(number))
            assert await lane.take() == task("a")
            await lane.give_back("its disk is full")
        lane = await join(queue)
        assert await lane.take() == task("a")
        assert not await lane.report(1, last=True)
        assert await queue.next_message("a") == report(1, last=True)

    run(test())


async def give_back_after_another(queue: TrialQueue, reason: str) -> Lane:
    """Have the lane's next workers take a task and give it back."""
    lane = await join(queue)
    assert isinstance(await lane.take(), TrialTask)
    await lane.give_back(reason)
    return lane


def test_a_lane_that_gives_back_one_task_after_another_is_given_up() -> None:
    async def test() -> None:
        queue = TrialQueue()
        await queue.submit(task())
        given_up = asyncio.create_task(queue.next_given_up())
        for number in range(MAX_FAULTS):
            assert not given_up.done()
            await give_back_after_another(queue, f"reason {number}")
            await settle()
        assert await given_up == GivenUp("lane", f"reason {MAX_FAULTS - 1}")
        assert await (await join(queue)).take() == CLOSED
        assert await (await join(queue, "other")).take() == task()
        await queue.close()
        assert await queue.next_given_up() is None

    run(test())


def test_a_lane_that_gets_a_task_done_in_between_may_give_back_more() -> None:
    async def test() -> None:
        queue = TrialQueue()
        for number in range(MAX_FAULTS):
            await queue.submit(task(str(number)))
            await give_back_after_another(queue, "a reason")
            lane = await join(queue)
            assert await lane.take() == task(str(number))
            assert not await lane.report(1, last=True)
            await lane.finish()
        await queue.submit(task())
        assert await lane.take() == task()
        await queue.close()
        assert await queue.next_given_up() is None

    run(test())


def test_each_worker_of_a_lane_may_give_its_task_back_but_that_counts_once() -> None:
    async def test() -> None:
        queue = TrialQueue()
        await queue.submit(task())
        lane = await give_back_after_another(queue, "rank 0")
        await lane.give_back("rank 1")
        assert await (await join(queue)).take() == task()
        await lane.give_back("rank 1, late")
        assert await (await join(queue, "other")).take(0.01) is None

    run(test())


def test_a_lost_lanes_cancelled_task_is_not_taken_again() -> None:
    async def test() -> None:
        queue = TrialQueue()
        lane = await join(queue)
        await queue.submit(task())
        await lane.take()
        await queue.cancel("a")
        lane = await join(queue)
        assert await lane.take(0.01) is None

    run(test())


def test_a_failure_is_told_with_its_reason_and_ends_the_task() -> None:
    async def test() -> None:
        queue = TrialQueue()
        lane = await join(queue)
        await queue.submit(task())
        await lane.take()
        message = asyncio.create_task(queue.next_message("a"))
        await lane.fail("out of memory")
        assert await message == Ended(kind="failed", reason="out of memory")
        await lane.fail("a second reason")
        assert not await lane.report(1)
        lane = await join(queue)
        assert await lane.take(0.01) is None

    run(test())


def test_a_worker_that_tells_of_a_failure_late_does_not_fail_the_next_task() -> None:
    async def test() -> None:
        queue = TrialQueue()
        lane = await join(queue)
        for name in "ab":
            await queue.submit(task(name))
        await lane.take()
        await lane.fail("a broke")  # rank 0
        await lane.finish()
        assert await lane.take() == task("b")
        await lane.fail("a broke")  # rank 1
        assert not await lane.report(1, last=True)
        assert await queue.next_message("b") == report(1, last=True)

    run(test())


def test_cancelling_all_tells_who_waits_and_stops_who_trains() -> None:
    async def test() -> None:
        queue = TrialQueue()
        lane = await join(queue)
        for name in "ab":
            await queue.submit(task(name))
        await lane.take()
        verdict = asyncio.create_task(lane.report(1))
        assert await queue.next_message("a") == report(1)
        messages = [asyncio.create_task(queue.next_message(name)) for name in "ab"]
        poll = asyncio.create_task(lane.wait_cancelled())
        assert await verdict
        await queue.cancel_all("interrupted")
        stopped = Ended(kind="stopped", reason="interrupted")
        assert [await message for message in messages] == [stopped, stopped]
        await poll
        assert await (await join(queue, "other")).take(0.01) is None  # b is not begun

    run(test())


def test_after_cancelling_all_no_trial_begins_but_a_test_does() -> None:
    async def test() -> None:
        queue = TrialQueue()
        lane = await join(queue)
        await queue.cancel_all("the budget is spent")
        await queue.submit(task())
        assert await ended(queue) == Ended(kind="stopped", reason="the budget is spent")
        winner = TestTask(id="test/a", dataset="/data/us", checkpoint="/c")
        await queue.submit(winner)
        assert await lane.take() == winner
        assert not await lane.report(1, last=True)
        assert await queue.next_message("test/a") == report(1, last=True)

    run(test())


def test_trials_that_have_ended_leave_nothing_behind() -> None:
    async def test() -> None:
        queue = TrialQueue()
        lane = await join(queue)
        for number in range(50):
            name = str(number)
            await queue.submit(task(name))
            if number % 5 != 0:  # the others are cancelled before a lane takes them
                await lane.take()
                poll = asyncio.create_task(lane.wait_cancelled())
                await lane.report(1, last=True)
                await queue.next_message(name)
                await lane.finish()
                await poll
            await queue.cancel(name)
        assert await lane.take(0.01) is None
        gc.collect()
        assert not any(type(found) is trial_queue._Entry for found in gc.get_objects())
        await queue.cancel_all("interrupted")

    run(test())


def test_hundreds_of_lanes_wait_at_once_and_each_gets_its_task() -> None:
    async def test() -> None:
        queue = TrialQueue()
        names = [str(number) for number in range(500)]
        lanes = [await join(queue, name) for name in names]
        takes = [asyncio.create_task(lane.take()) for lane in lanes]
        await settle()
        for name in names:
            await queue.submit(task(name))
        assert [await one for one in takes] == [task(name) for name in names]
        verdicts = [asyncio.create_task(lane.report(1)) for lane in lanes]
        for name in names:
            assert await queue.next_message(name) == report(1)
        await queue.cancel_all("interrupted")
        assert [await verdict for verdict in verdicts] == [False] * len(names)

    run(test())
