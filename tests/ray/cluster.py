"""A cluster of two nodes on this machine, and the service on it: `python cluster.py REGISTRY`; does what stdin says.

A line each: `kill DEPLOYMENT` (SIGKILL to its replica on the second node), `kill node` (the second, its raylet and
with that all it runs), `deploy SETTING=VALUE...`, `status`. Answers are lines of JSON.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import sys
from collections import Counter
from pathlib import Path
from time import monotonic, sleep
from typing import Any

APP = "lvm"
TOKEN = "ray-check-token-0123456789"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def offspring(raylet: int) -> list[int]:
    """Return the processes that a raylet started, and that live."""
    children = Path(f"/proc/{raylet}/task").glob("*/children")
    return [int(pid) for path in children for pid in path.read_text().split()]


def replicas(raylet: int) -> dict[int, str]:
    """Return the processes of the replicas on the node of a raylet, and of which deployment each is."""
    titles = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in offspring(raylet)}
    found = {pid: re.search(rf"ServeReplica:{APP}:(\w+)", title) for pid, title in titles.items()}
    return {pid: match[1] for pid, match in found.items() if match}


def killed(*pids: int) -> dict[str, Any]:
    """Kill; return when that began and when all were dead, on the machine's monotonic clock."""
    began = monotonic()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    while not all(map(is_dead, pids)):
        sleep(0.001)
    return {"began": began, "ended": monotonic()}


def is_dead(pid: int) -> bool:
    """Say whether a process has closed all it had: until then, its connections are open."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def main(registry: str) -> None:
    ports = free_port(), free_port()
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "LVM_TOKENS": f"check:{TOKEN}"}
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(ports[1])}
    os.environ["RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S"] = "1"
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    from service.ray.graph import build
    from service.settings import read_settings

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "include_dashboard": False})
    second = cluster.add_node(num_cpus=8)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")

    def deploy(least: str = "2", target_s: str = "0.02", per_node: str = "1", **values: str) -> None:
        known = {"registry": Path(registry), "reload_s": 0.2, "threads": 1, "watch_s": 0, "timeout_ms": 30_000} | values
        serve.run(build(read_settings(**known), int(least), float(target_s), int(per_node)), name=APP)

    def raylet_of(node: Any) -> int:
        return int(node.all_processes["raylet"][0].process.pid)

    serve.start(proxy_location="EveryNode", http_options={"host": "127.0.0.1", "port": ports[0]})
    deploy()
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    print(json.dumps({"urls": urls, "address": cluster.address}), flush=True)
    for line in sys.stdin:
        verb, *words = line.split()
        if (verb, *words) == ("kill", "node"):
            lost = Counter(replicas(raylet_of(second)).values())
            told = killed(*offspring(raylet_of(second)), raylet_of(second))  # all at once, as with the power
            told["replicas"] = lost
            cluster.remove_node(second, allow_graceful=False)
        elif verb == "kill":
            told = killed(next(pid for pid, name in replicas(raylet_of(second)).items() if name == words[0]))
        elif verb == "deploy":
            deploy(**dict(word.split("=") for word in words))
            told = {"deployed": words}
        else:
            state = serve.status().applications[APP]
            running = {name: part.replica_states.get("RUNNING", 0) for name, part in state.deployments.items()}
            told = {"app": state.status, "running": running}
        print(json.dumps(told, default=str), flush=True)
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
