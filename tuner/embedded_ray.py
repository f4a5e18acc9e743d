"""A Ray of this process's own: of no more processes than a job has a use for."""

import os
import subprocess
from functools import partial
from typing import Any

import ray
from ray._private import node, ray_constants, services
from ray._private.parameter import RayParams
from ray._private.utils import detect_fate_sharing_support_linux

__all__ = ["start_embedded_ray"]

NO_API_SERVER = b"127.0.0.1:9"
OBJECT_STORE_BYTES = 256 * 1024**2  # nothing large passes through it


class _EmbeddedNode(node.Node):  # type: ignore[misc]
    """Ray's processes without API server, autoscaler and, unless output is shown, log monitor.

    They would take seconds of a job's start, and hundreds of MB; `ray.init` has no word for it.
    """

    def __init__(self, ray_params: RayParams, *, shows_output: bool, **settings: Any) -> None:  # noqa: ANN401 - Ray's
        ray_params.no_monitor = True
        ray_params.include_log_monitor = shows_output
        super().__init__(ray_params, **settings)

    def start_api_server(self, **settings: Any) -> None:  # noqa: ANN401 - Ray's
        """Start none: an embedded Ray has no dashboard, and no jobs are submitted to it.

        But leave an address, where nothing listens, as Ray's own would without a dashboard: the
        node's agent looks for one every second, and logs a traceback where there is none.
        """
        self.get_gcs_client().internal_kv_put(
            ray_constants.DASHBOARD_ADDRESS.encode(),
            NO_API_SERVER,
            True,
            ray_constants.KV_NAMESPACE_DASHBOARD,
        )


def start_embedded_ray(
    *, logging_level: int, shows_output: bool, num_cpus: int | None = None
) -> None:
    """Start Ray on this machine and connect to it; `ray.shutdown` ends it, and this process's end.

    Args:
        logging_level: of what Ray says in this process.
        shows_output: whether what workers print is printed here.
        num_cpus: that Ray may give out; None for the machine's.

    Raises:
        Exception: of any kind, Ray's own included, if it cannot be started.
    """
    # what every task did and when, which Ray would keep for a dashboard that is not there
    os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    # processes started ahead, of which none fits: each of ours has an environment of its own
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    _keep_group_signals_from_ray()
    ray_node = node.Node
    node.Node = partial(_EmbeddedNode, shows_output=shows_output)
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            logging_level=logging_level,
            log_to_driver=shows_output,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
        )
    finally:
        node.Node = ray_node


def _keep_group_signals_from_ray() -> None:
    """Have Ray start its processes in process groups of their own, as it does on Windows.

    `timeout`, shells and batch systems signal the whole group of a command: its Ray would be gone
    before the job has saved what it must. Where the system does not end Ray's processes with this
    one, Ray's reaper does, by their group: they stay in it.
    """
    if detect_fate_sharing_support_linux():
        services.ConsolePopen = partial(subprocess.Popen, process_group=0)
