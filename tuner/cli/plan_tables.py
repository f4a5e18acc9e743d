"""A plan as a person reads it."""

from rich.table import Table

from tuner.clock import clock
from tuner.plan import LanePlan, Plan

__all__ = ["plan_lines", "plan_table"]

MIB = 1024**2


def plan_table(plan: Plan) -> Table:
    """Lay out the studies: trials, size of the model, steps and seconds of a trial."""
    table = Table()
    table.add_column("study", overflow="fold")
    for heading in ("trials+replicates", "weights", "steps each", "impressions/s", "each", "all"):
        table.add_column(heading, justify="right", no_wrap=True)
    for study in plan.studies:
        table.add_row(
            f"{study.dataset}/{study.model}",
            *(f"{study.trials}+{study.replicates}", f"{study.parameters:,}", f"{study.steps:,}"),
            f"{study.impressions_per_s:,.0f}",
            *(clock(study.trial_s), clock(study.trial_s * (study.trials + study.replicates))),
        )
    return table


def plan_lines(plan: Plan) -> list[str]:
    """Say the rest in lines: what the lanes need, the hours, what stands in the way."""
    lines = [] if plan.lanes is None else [_lanes_line(plan.lanes)]
    lines.append(
        f"{len(plan.studies)} studies, {plan.trials} trials, about {plan.hours:.2f} hours "
        f"(measured on {plan.measured_on or 'nothing'})"
    )
    lines += [f"note: {note}" for note in plan.notes]
    lines += [f"obstacle: {obstacle}" for obstacle in plan.obstacles]
    if not plan.obstacles:
        lines.append("nothing stands in the way")
    return lines


def _lanes_line(lanes: LanePlan) -> str:
    line = (
        f"{lanes.lanes} lanes of {lanes.workers_per_lane} workers; each worker "
        f"{lanes.cpus_per_worker} CPUs, {lanes.gpus_per_worker:g} GPUs, "
        f"{lanes.memory_bytes // MIB} MiB; {lanes.data_bytes // MIB} MiB of data per node, once"
    )
    if lanes.device_bytes:
        line += f"; {lanes.device_bytes // MIB} MiB on the GPU"
    return line
