import asyncio
import gc
from collections.abc import Coroutine
from typing import Any

from tuner import trial_queue
from tuner.messages import Ended, Report, TestTask, TrialTask
from tuner.trial_queue import CLOSED, MAX_ATTEMPTS, TrialQueue

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


async def take(queue: TrialQueue, lane: str = "lane") -> object:
    return await queue.take(lane, timeout_s=SOON_S)


async def ended(queue: TrialQueue, task_id: str = "a") -> Ended:
    message = await queue.next_message(task_id)
    assert isinstance(message, Ended)
    return message


def test_a_trial_goes_through_in_lock_step() -> None:
    async def test() -> None:
        queue = TrialQueue()
        await queue.submit(task())
        assert await take(queue) == task()
        first_message = asyncio.create_task(queue.next_message("a"))
        first_verdict = asyncio.create_task(queue.report("a", report(1)))
        assert await first_message == report(1)
        await settle()
        assert not first_verdict.done()  # the lane waits until Tune asks for the next message
        second_message = asyncio.create_task(queue.next_message("a"))
        assert await first_verdict
        await settle()
        assert not second_message.done()
        assert not await queue.report("a", report(2, last=True))
        assert await second_message == report(2, last=True)
        await queue.finish("lane")

    run(test())


def test_tasks_are_taken_in_their_order_by_whoever_is_free() -> None:
    async def test() -> None:
        queue = TrialQueue()
        waiting = [asyncio.create_task(take(queue, lane)) for lane in "xy"]
        await settle()
        for name in "abc":
            await queue.submit(task(name))
        assert [await answer for answer in waiting] == [task("a"), task("b")]
        assert await take(queue, "z") == task("c")

    run(test())


def test_a_take_gives_up_when_its_time_is_up() -> None:
    async def test() -> None:
        queue = TrialQueue()
        assert await queue.take("lane", timeout_s=0.01) is None
        await queue.submit(task())
        assert await take(queue) == task()

    run(test())


def test_a_closed_queue_gives_what_it_holds_and_then_sends_the_lanes_home() -> None:
    async def test() -> None:
        queue = TrialQueue()
        idle = asyncio.create_task(take(queue, "idle"))
        await settle()
        await queue.close()
        assert await idle == CLOSED
        await queue.submit(task())
        assert await take(queue) == task()
        assert await take(queue) == CLOSED

    run(test())


def test_a_task_cancelled_while_it_waits_is_never_taken() -> None:
    async def test() -> None:
        queue = TrialQueue()
        await queue.submit(task("a"))
        await queue.submit(task("b"))
        await queue.cancel("a")
        assert await take(queue) == task("b")

    run(test())


def test_a_task_cancelled_while_it_trains_is_heard_of_at_once_and_refused_at_its_report() -> None:
    async def test() -> None:
        queue = TrialQueue()
        await queue.submit(task())
        await take(queue)
        heard = asyncio.create_task(queue.wait_cancelled("a"))
        await settle()
        assert not heard.done()
        await queue.cancel("a")
        await heard
        assert not await queue.report("a", report(1))

    run(test())


def test_a_task_cancelled_between_report_and_verdict_is_stopped() -> None:
    async def test() -> None:
        queue = TrialQueue()
        await queue.submit(task())
        await take(queue)
        verdict = asyncio.create_task(queue.report("a", report(1)))
        assert await queue.next_message("a") == report(1)
        await queue.cancel("a")
        assert not await verdict

    run(test())


def test_cancelling_what_has_ended_or_never_was_is_harmless() -> None:
    async def test() -> None:
        queue = TrialQueue()
        await queue.cancel("never")
        await queue.submit(task())
        await take(queue)
        await queue.report("a", report(1, last=True))
        await queue.cancel("a")
        await queue.cancel("a")
        await queue.finish("lane")

    run(test())


def test_an_unknown_task_has_no_verdict_to_wait_for() -> None:
    async def test() -> None:
        queue = TrialQueue()
        assert not await queue.report("never", report(1))
        await queue.wait_cancelled("never")
        await queue.fail("never", "no reason")
        await queue.finish("no lane")
        await queue.lose_lane("no lane")

    run(test())


def test_a_lane_that_has_finished_does_not_wait_for_a_cancellation() -> None:
    async def test() -> None:
        queue = TrialQueue()
        await queue.submit(task())
        await take(queue)
        poll = asyncio.create_task(queue.wait_cancelled("a"))
        await queue.report("a", report(1, last=True))
        await queue.finish("lane")
        await poll
        await queue.lose_lane("lane")  # the lease is given back: nothing to take again
        assert await queue.take("lane", timeout_s=0.01) is None

    run(test())


def test_a_lost_lanes_task_is_the_next_to_be_taken_and_repeats_no_evaluation() -> None:
    async def test() -> None:
        queue = TrialQueue()
        for name in "ab":
            await queue.submit(task(name))
        await take(queue, "lost")
        first_message = asyncio.create_task(queue.next_message("a"))
        asyncio.create_task(queue.report("a", report(1)))  # noqa: RUF006 - its lane is lost
        assert await first_message == report(1)
        second_message = asyncio.create_task(queue.next_message("a"))
        await settle()
        await queue.lose_lane("lost")
        assert await take(queue, "other") == task("a")
        assert await queue.report("a", report(1))  # approved already, and not passed on again
        await settle()
        assert not second_message.done()
        assert not await queue.report("a", report(2, last=True))
        assert await second_message == report(2, last=True)

    run(test())


def test_an_evaluation_repeated_before_its_verdict_waits_for_it() -> None:
    async def test() -> None:
        queue = TrialQueue()
        await queue.submit(task())
        await take(queue)
        asyncio.create_task(queue.report("a", report(1)))  # noqa: RUF006 - its lane is lost
        assert await queue.next_message("a") == report(1)
        await queue.lose_lane("lane")
        assert await take(queue) == task()
        verdict = asyncio.create_task(queue.report("a", report(1)))
        await settle()
        assert not verdict.done()
        waiting = asyncio.create_task(queue.next_message("a"))
        assert await verdict
        waiting.cancel()

    run(test())


def test_a_task_that_takes_its_lanes_down_fails() -> None:
    async def test() -> None:
        queue = TrialQueue()
        await queue.submit(task())
        for _ in range(MAX_ATTEMPTS):
            assert await take(queue) == task()
            await queue.lose_lane("lane")
        assert await queue.take("lane", timeout_s=SOON_S) is None
        message = await ended(queue)
        assert message == Ended(kind="failed", reason=f"it took down its lane {MAX_ATTEMPTS} times")

    run(test())


def test_a_lost_lanes_cancelled_task_is_not_taken_again() -> None:
    async def test() -> None:
        queue = TrialQueue()
        await queue.submit(task())
        await take(queue)
        await queue.cancel("a")
        await queue.lose_lane("lane")
        assert await queue.take("lane", timeout_s=0.01) is None

    run(test())


def test_workers_that_are_gone_are_handed_nothing() -> None:
    async def test() -> None:
        queue = TrialQueue()
        of_the_dead = asyncio.create_task(take(queue))
        await settle()
        await queue.lose_lane("lane")
        assert await of_the_dead is None
        of_the_living = asyncio.create_task(take(queue))
        await settle()
        await queue.submit(task())
        assert await of_the_living == task()

    run(test())


def test_a_lanes_second_take_replaces_its_first() -> None:
    async def test() -> None:
        queue = TrialQueue()
        first = asyncio.create_task(take(queue))
        await settle()
        second = asyncio.create_task(take(queue))
        await settle()
        await queue.submit(task())
        assert (await first, await second) == (None, task())

    run(test())


def test_a_failure_is_told_with_its_reason_and_ends_the_task() -> None:
    async def test() -> None:
        queue = TrialQueue()
        await queue.submit(task())
        await take(queue)
        message = asyncio.create_task(queue.next_message("a"))
        await queue.fail("a", "out of memory")
        assert await message == Ended(kind="failed", reason="out of memory")
        await queue.fail("a", "a second reason")
        assert not await queue.report("a", report(1))
        await queue.lose_lane("lane")
        assert await queue.take("lane", timeout_s=0.01) is None

    run(test())


def test_cancelling_all_tells_who_waits_and_stops_who_trains() -> None:
    async def test() -> None:
        queue = TrialQueue()
        for name in "ab":
            await queue.submit(task(name))
        await take(queue)
        verdict = asyncio.create_task(queue.report("a", report(1)))
        assert await queue.next_message("a") == report(1)
        messages = [asyncio.create_task(queue.next_message(name)) for name in "ab"]
        poll = asyncio.create_task(queue.wait_cancelled("a"))
        assert await verdict
        await queue.cancel_all("interrupted")
        stopped = Ended(kind="stopped", reason="interrupted")
        assert [await message for message in messages] == [stopped, stopped]
        await poll
        assert await queue.take("other", timeout_s=0.01) is None  # b is not begun

    run(test())


def test_after_cancelling_all_no_trial_begins_but_a_test_does() -> None:
    async def test() -> None:
        queue = TrialQueue()
        await queue.cancel_all("the budget is spent")
        await queue.submit(task())
        assert await ended(queue) == Ended(kind="stopped", reason="the budget is spent")
        winner = TestTask(id="test/a", dataset="/data/us", checkpoint="/c")
        await queue.submit(winner)
        assert await take(queue) == winner
        assert not await queue.report("test/a", report(1, last=True))
        assert await queue.next_message("test/a") == report(1, last=True)

    run(test())


def test_trials_that_have_ended_leave_nothing_behind() -> None:
    async def test() -> None:
        queue = TrialQueue()
        for number in range(50):
            name = str(number)
            await queue.submit(task(name))
            if number % 5 != 0:  # the others are cancelled before a lane takes them
                await take(queue)
                poll = asyncio.create_task(queue.wait_cancelled(name))
                await queue.report(name, report(1, last=True))
                await queue.next_message(name)
                await queue.finish("lane")
                await poll
            await queue.cancel(name)
        assert await queue.take("lane", timeout_s=0.01) is None
        gc.collect()
        assert not any(type(found) is trial_queue._Entry for found in gc.get_objects())
        await queue.cancel_all("interrupted")

    run(test())


def test_hundreds_of_lanes_wait_at_once_and_each_gets_its_task() -> None:
    async def test() -> None:
        queue = TrialQueue()
        names = [str(number) for number in range(500)]
        takes = [asyncio.create_task(take(queue, name)) for name in names]
        await settle()
        for name in names:
            await queue.submit(task(name))
        assert [await one for one in takes] == [task(name) for name in names]
        verdicts = [asyncio.create_task(queue.report(name, report(1))) for name in names]
        for name in names:
            assert await queue.next_message(name) == report(1)
        await queue.cancel_all("interrupted")
        assert [await verdict for verdict in verdicts] == [False] * len(names)

    run(test())
