"""`python -m tests.support.nodes FOLDER`: a Ray cluster whose nodes come and go as JSON lines ask.

    {"do": "add", "name": N, "cpus": C, "env": {...}}  ->  {"address": HOST:PORT, "id": ...}
    {"do": "kill", "name": N}                          ->  {}

All nodes are on this machine, each a raylet with an environment of its own. The first is the head.
Its end, or that of standard input, is the end of the cluster. `Cluster` talks to it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

# Seconds; Ray itself gives up after 30.
STARTS_WITHIN_S = 120
ROOT = Path(__file__).resolve().parents[2]


class Cluster:
    """A cluster in a process of its own, so that the test's process does not join it.

    Args:
        folder: for Ray's files; its path must be short.
        env: of all nodes.
    """

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.address = ""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.nodes", str(folder)],
            cwd=ROOT,
            env=env | {"RAY_raylet_start_wait_time_s": str(STARTS_WITHIN_S)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def add(self, name: str, *, cpus: int = 1, **env: str) -> str:
        """Start a node and return its id once it is alive."""
        answer = self._ask({"do": "add", "name": name, "cpus": cpus, "env": env})
        self.address = answer["address"]
        return answer["id"]

    def kill(self, name: str) -> None:
        """End all processes of a node, as a lost machine would."""
        self._ask({"do": "kill", "name": name})

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def _ask(self, command: dict) -> dict:
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the cluster ended: {self._process.wait(timeout=60)}"
        return json.loads(line)


def serve(folder: str) -> None:
    import ray
    from ray import cluster_utils
    from ray._common.utils import get_default_ray_temp_dir

    # What the cluster says of itself to those who join.
    ray.__version__ = os.environ.get("TEST_RAY_VERSION", ray.__version__)
    # Here Ray writes which cluster was started last, and does not make the folder.
    os.makedirs(get_default_ray_temp_dir(), exist_ok=True)
    cluster = cluster_utils.Cluster()
    nodes = {}
    environment = dict(os.environ)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        command = json.loads(line)
        name = command["name"]
        answer = {}
        if command["do"] == "add":
            os.environ.update(command["env"])
            first = {} if nodes else {"include_dashboard": False, "temp_dir": folder}
            node = cluster.add_node(wait=False, num_cpus=command["cpus"], node_name=name, **first)
            cluster._wait_for_node(node, timeout=STARTS_WITHIN_S)
            nodes[name] = node
            answer = {"address": cluster.address, "id": node.node_id}
            os.environ.clear()
            os.environ.update(environment)
        else:
            cluster.remove_node(nodes.pop(name), allow_graceful=False)
        print(json.dumps(answer), file=answers, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    serve(sys.argv[1])
