"""One actor on each node of a cluster: it reports what the node has and receives model files.

Does not know which nodes there are, nor what workers do there: `nodes.py` places them.
"""

import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from runner.common import machine
from runner.common.errors import ArenaRunnerError, ConfigError, first_line
from runner.common.files import cache_folder, compilation_cache
from runner.common.records import ModelSpec
from runner.common.units import gb, seconds_text
from runner.common.versions import installed
from runner.executors.ray.shipping import SHIP, Parcel, Receiver, at, pieces
from runner.preset.resolve import ANSWERS_DEPEND_ON

# Seconds in which a node must start a process with the run's code, and in which it must look for
# files or write a piece of one.
ANSWERS_WITHIN_S, WRITES_WITHIN_S = 120.0, 300.0
# Seconds between checks whether the run has ended.
WAIT_S = 0.5
# Pieces of a file in Ray's object store at a time.
PIECES_IN_FLIGHT = 3
# The user is told when a preset is sent, or another parcel larger than this.
WORTH_SAYING_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Facts:
    """What a node reports about itself.

    gpu_dtype: the 16-bit dtype of its GPUs, gpu_memory_bytes: of the smallest; None if it has none.
    cache: its own folder for compiled programs.
    """

    versions: dict[str, str]
    cores: tuple[int, ...]
    gpu_dtype: str | None
    gpu_memory_bytes: int | None
    cache: str


class Keeper(Receiver):
    """The actor that receives a run's files on one node."""

    def __init__(self) -> None:
        super().__init__(cache_folder() / "files")

    def facts(self) -> Facts:
        return Facts(
            versions_here(),
            machine.cores_here(),
            machine.gpu_dtype(),
            machine.device_memory_bytes(),
            compilation_cache(),
        )


class Keepers:
    """The keepers of the nodes that a run may use.

    Args:
        name: returns what a user calls a node, by its id.
        note: shows a sentence to the user.
        stop: set when the run ends; nothing waits after that.

    Attributes:
        facts: of each node that answered. refused: nodes that cannot take part.
    """

    def __init__(
        self, name: Callable[[str], str], note: Callable[[str], None], stop: threading.Event
    ) -> None:
        self._name, self._note, self._stop = name, note, stop
        # Whether to send files that nodes can read at their own paths, as on a shared file system.
        self._even_here = os.environ.get(SHIP) == "always"
        self._running: dict[str, Any] = {}
        self.facts: dict[str, Facts] = {}
        self.refused: set[str] = set()

    def hire(self, nodes: Iterable[str]) -> None:
        """Start a keeper on each node, and ask it for the node's facts."""
        nodes = list(nodes)
        for node in nodes:
            self._running[node] = (
                ray.remote(Keeper)
                .options(
                    num_cpus=0,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
                )
                .remote()
            )
        self.facts |= self._answers(self._call(nodes, "facts"), ANSWERS_WITHIN_S)

    def check_versions(self, nodes: Iterable[str], *, is_first: bool) -> None:
        """Refuse nodes whose versions differ from those of this process.

        Raises:
            ConfigError: they differ, and these are the first nodes of the run.
        """
        ours = versions_here()
        for node in nodes:
            facts = self.facts.get(node)
            if facts is None or facts.versions == ours:
                continue
            message = (
                f"Node {self._name(node)} must have the versions that this process has, for the "
                f"same answers. Expected: {_listed(ours)}. Received: {_listed(facts.versions)}"
            )
            if is_first:
                raise ConfigError(message)
            self._refuse(node, message)

    def ship(
        self, nodes: list[str], spec: ModelSpec, parcels: Iterable[Parcel]
    ) -> dict[str, ModelSpec]:
        """Bring the files to nodes that lack them; for each node that has all,
        return the spec with the paths there."""
        self.hire(node for node in nodes if node not in self._running)
        paths: dict[str, dict[str, str]] = {node: {} for node in nodes}
        for parcel in parcels:
            found = self._ask(nodes, "find", parcel, even_here=self._even_here)
            missing = [node for node, path in found.items() if path is None]
            found |= self._send(missing, parcel) if missing else {}
            nodes = [node for node in found if node in self._running]
            for node in nodes:
                paths[node][parcel.field] = found[node]
        return {node: at(spec, paths[node], self.facts[node].cache) for node in nodes}

    def dismiss(self) -> None:
        """End all keepers; the files stay where they are."""
        for keeper in self._running.values():
            ray.kill(keeper)
        self._running.clear()

    def _send(self, nodes: list[str], parcel: Parcel) -> dict[str, Any]:
        """Send a parcel to nodes; each piece is stored once in Ray's object store for all."""
        if parcel.field == "preset" or parcel.bytes > WORTH_SAYING_BYTES:
            names = ", ".join(map(self._name, nodes))
            self._note(f"sending {parcel.field} ({gb(parcel.bytes)}) to {names}")
        begun = list(self._ask(nodes, "begin", parcel))
        under_way: deque[dict[str, Any]] = deque()
        for piece in pieces(parcel):
            under_way.append(self._call(begun, "write", parcel.digest, ray.put(piece)))
            if len(under_way) >= PIECES_IN_FLIGHT:
                self._answers(under_way.popleft(), WRITES_WITHIN_S)
            if self._stop.is_set():
                return {}
        while under_way:
            self._answers(under_way.popleft(), WRITES_WITHIN_S)
        return self._ask(begun, "finish", parcel)

    def _ask(
        self, nodes: Sequence[str], method: str, *arguments: Any, **named: Any
    ) -> dict[str, Any]:
        return self._answers(self._call(nodes, method, *arguments, **named), WRITES_WITHIN_S)

    def _call(
        self, nodes: Sequence[str], method: str, *arguments: Any, **named: Any
    ) -> dict[str, Any]:
        """Call each node's keeper: node -> reference."""
        return {
            node: getattr(self._running[node], method).remote(*arguments, **named)
            for node in nodes
            if node in self._running
        }

    def _answers(self, calls: dict[str, Any], within_s: float) -> dict[str, Any]:
        """Wait for keepers; nodes that fail or do not answer are left out from now on."""
        end, waiting = time.monotonic() + within_s, list(calls.values())
        while waiting and not self._stop.is_set() and time.monotonic() < end:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=WAIT_S)
        answers = {}
        for node, reference in calls.items():
            try:
                answers[node] = ray.get(reference, timeout=0)
            except ray.exceptions.GetTimeoutError:
                self._refuse(node, f"no answer within {seconds_text(within_s)}")
            except (ray.exceptions.RayError, ArenaRunnerError) as error:
                cause = getattr(error, "cause", None)
                self._refuse(node, first_line(cause if isinstance(cause, Exception) else error))
        return answers

    def _refuse(self, node: str, why: str) -> None:
        if node not in self.refused and not self._stop.is_set():
            self._note(f"warning: node {self._name(node)} is left out: {why}")
        self.refused.add(node)
        keeper = self._running.pop(node, None)
        if keeper is not None:
            ray.kill(keeper)


def versions_here() -> dict[str, str]:
    """Return the versions that must be equal on all machines of a run."""
    python = ".".join(platform.python_version_tuple()[:2])
    missing = dict.fromkeys(ANSWERS_DEPEND_ON, "missing")
    return {"python": python} | missing | installed(ANSWERS_DEPEND_ON)


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
