"""A driver to be killed: joins the Ray that somebody started before it, starts two ranks, prints their pids, and waits."""

import json
import sys

import ray

from lib.cluster.group import Deadlines
from lib.cluster.ray_backend import RayGroup
from lib.config.parallel import ClusterShape
from tests.lib.cluster.workers import Probe


def main() -> None:
    ray.init(address="local", ignore_reinit_error=True, num_cpus=1, include_dashboard=False)
    shape = ClusterShape(nodes=1, gpus_per_node=0, ranks_per_node=2, threads_per_rank=4)
    with RayGroup(Probe, shape, env={}, deadlines=Deadlines()) as group:
        found = group.call("identity", deadline_seconds=60.0)
        sums = group.call("all_reduce", deadline_seconds=60.0)
        print(json.dumps({"pids": [one["pid"] for one in found], "sums": sums}), flush=True)
        group.call("be_silent", 600.0, deadline_seconds=600.0)


if __name__ == "__main__":
    main()
    sys.exit(0)
