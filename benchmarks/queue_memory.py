"""Does the queue's actor grow with the trials that have gone through it?

    python benchmarks/queue_memory.py [--trials 1500]

One lane's calls and one Tune trial's, as fast as they go, four evaluations a trial, on a queue
actor of its own; nothing is trained. Printed is the actor's own memory (USS) after every hundredth
trial. The last line is one line of JSON.
"""

import argparse
import json

import psutil
import ray
from process_memory import parts
from run_header import run_header

from tuner.cluster import connected
from tuner.lanes import queue_actor
from tuner.messages import Generation, Report, TrialTask

MIB = 1024**2
EVALUATIONS = 4
EVERY = 100


def run_trial(queue: ray.actor.ActorHandle, generation: Generation, number: int) -> None:
    """Let one trial go through the queue, from both sides."""
    task = TrialTask(
        id=f"trial-{number}",
        dataset="/data/us",
        configuration={"units": list(range(50))},
        objectives=("mean_auc",),
        checkpoint="/checkpoint",
        state="/state",
    )
    ray.get(queue.submit.remote(task))
    ray.get(queue.take.remote(generation, timeout_s=60.0))
    cancelled = queue.wait_cancelled.remote(generation)
    for index in range(1, EVALUATIONS + 1):
        message = queue.next_message.remote(task.id)
        report = Report(
            index=index,
            last=index == EVALUATIONS,
            step=index,
            epoch=1.0,
            metrics={"ctr_auc": 0.5, "ctcvr_auc": 0.5},
        )
        verdict = queue.report.remote(generation, report)
        ray.get(message)
    ray.get(verdict)
    ray.get(queue.finish.remote(generation))
    ray.get(queue.cancel.remote(task.id))
    ray.get(cancelled)


def main() -> None:
    """Run the trials and print the memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1_500)
    arguments = parser.parse_args()
    header = run_header(0, "ray", trials=arguments.trials)
    memory_mib = []
    with connected():
        queue = queue_actor().remote()
        generation = ray.get(queue.join.remote("lane"))
        (actor,) = parts(psutil.Process(), "ray::TrialQueue")
        for number in range(arguments.trials):
            run_trial(queue, generation, number)
            if (number + 1) % EVERY == 0:
                memory_mib.append(round(actor.memory_full_info().uss / MIB, 1))
                print(f"{number + 1:>6} trials: {memory_mib[-1]:.1f} MiB", flush=True)
    print(json.dumps({**header, "memory_mib": memory_mib}))


if __name__ == "__main__":
    main()
