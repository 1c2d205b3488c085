"""Starts Ray nodes with the identities it is given, and says whom the cluster lets in. Run by test_node_identity.py.

``python ray_admission.py JSON``, JSON being ``{"base_port": int, "nodes": {name: {"address": str, "index": int,
"environment": {...}}}, "steps": [{"start": [name, ...], "until": "serves" | "ended"}, ...]}``. The first node of all is
the head. The nodes of a step start at one time; it is over when each of them has come to what the step waits for.
After each step a driver on the head runs a task on every live node and prints, as one line of JSON, the address that
each node's task saw.

A node with ``"packages"`` finds what is in those directories too. With ``"agents": true`` in the plan the head's agents
are asked at last, by plain HTTP, as a stranger would: one line of JSON says what each answered, if anything.

Run it in a PID namespace of its own, with a /dev/shm of its own: whatever Ray starts ends with the namespace.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from typing import Any

from ray_gpu.ports import NodePorts

#: A node that is let in serves in some 5 s, and one that is not gives up by itself in some 20 s.
ANSWER_S = 90.0
#: What every node gets beside its identity. Ray's own patience is half a minute for each try.
PLAIN = {
    "HOME": "/dev/shm",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_gcs_rpc_server_connect_timeout_s": "2",
    "RAY_py_gcs_connect_timeout_s": "3",
    "RAY_NUM_REDIS_GET_RETRIES": "2",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
}
DRIVER = """
import json, sys, ray
address, own_address = sys.argv[1:]
ray.init(address=address, _node_ip_address=own_address, log_to_driver=False)
@ray.remote(num_cpus=1)
def answer():
    return ray.util.get_node_ip_address()
names = [node["NodeName"] for node in ray.nodes() if node["Alive"]]
asked = {name: answer.options(label_selector={"ray-gpu-node": name}).remote() for name in names}
print(json.dumps({name: ray.get(reference, timeout=60) for name, reference in asked.items()}))
"""

Node = dict[str, Any]


class Bed:
    """The nodes of one plan."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.nodes: dict[str, Node] = plan["nodes"]
        self.base_port: int = plan["base_port"]
        self.head: Node = self.nodes[plan["steps"][0]["start"][0]]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        """Start one node."""
        self.processes[name] = subprocess.Popen(
            self._command(name), env=self._environment(self.nodes[name]), stdout=sys.stderr, cwd="/"
        )

    def _command(self, name: str) -> list[str]:
        node, ports = self.nodes[name], NodePorts.of(self.base_port, self.nodes[name]["index"])
        words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        words += [f"--node-ip-address={node['address']}", f"--node-name={name}", *ports.flags()]
        words += [f"--temp-dir=/dev/shm/{node['index']}", "--num-cpus=1", "--object-store-memory=80000000"]
        words += ["--include-log-monitor=false", f"--labels=ray-gpu-node={name}"]
        if node is self.head:
            return [*words, "--head", f"--port={ports.gcs}", "--include-dashboard=false", "--no-monitor"]
        return [*words, f"--address={self.head['address']}:{self.base_port}"]

    def _environment(self, node: Node) -> dict[str, str]:
        # Behind this environment's own, so that nothing of it is replaced.
        path = ":".join([os.environ["PYTHONPATH"], *node.get("packages", [])])
        return {"PATH": os.environ["PATH"], "PYTHONPATH": path, **PLAIN, **node["environment"]}

    def await_each(self, names: list[str], until: str) -> None:
        """Wait until each node serves or has ended, whichever *until* says."""
        deadline = time.monotonic() + ANSWER_S
        while left := [name for name in names if not self._is(until, name)]:
            if time.monotonic() > deadline or (until == "serves" and any(self._is("ended", name) for name in left)):
                sys.exit(f"waited in vain for {left}: {until}")
            time.sleep(0.02)

    def _is(self, what: str, name: str) -> bool:
        if what == "ended":
            return self.processes[name].poll() is not None
        # The runtime-env agent opens its port last: a raylet joins the cluster once its agents are up.
        address = (self.nodes[name]["address"], NodePorts.of(self.base_port, self.nodes[name]["index"]).last_to_open)
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex(address) == 0

    def ask(self) -> str:
        """Return what a task on each live node answers, as the driver prints it."""
        address = [f"{self.head['address']}:{self.base_port}", self.head["address"]]
        driver = [sys.executable, "-c", DRIVER, *address]
        environment = self._environment(self.head)
        return subprocess.run(
            driver, env=environment, stdout=subprocess.PIPE, check=True, timeout=ANSWER_S, text=True
        ).stdout

    def ask_agents(self) -> dict[str, str]:
        """Return what each agent of the head answers to whoever has neither certificate nor token."""
        ports = NodePorts.of(self.base_port, self.head["index"])
        wait = self.head.get("packages")
        return {
            what: _answer(f"http://{self.head['address']}:{port}{path}", ANSWER_S if wait else 0)
            for what, port, path in (
                ("metrics", ports.first + 3, "/metrics"),
                ("agent", ports.first + 4, "/api/local_raylet_healthz"),
            )
        }


def _answer(url: str, patience_s: float) -> str:
    """Return the beginning of an answer, or ``""`` when nothing answers within a time."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                return str(response.read(200).decode("utf-8", "replace"))
        except OSError:
            if time.monotonic() >= deadline:
                return ""
            time.sleep(0.05)


def main() -> None:
    """Run the plan."""
    plan = json.loads(sys.argv[1])
    bed = Bed(plan)
    for step in plan["steps"]:
        for name in step["start"]:
            bed.start(name)
            if bed.nodes[name] is bed.head:
                bed.await_each([name], "serves")
        bed.await_each(step["start"], step["until"])
        sys.stdout.write(bed.ask())
        sys.stdout.flush()
    if plan.get("agents"):
        sys.stdout.write(json.dumps(bed.ask_agents()) + "\n")


main()
