"""The current figures of a run -> Prometheus' text format, on a port of this machine.

The official client serves them from a separate registry. Once the port is open, nothing here can
fail the run: if the figures cannot be read, the response is empty. Does not know how rows are
predicted. docs/observability.md lists the names.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from runner.common.errors import ConfigError
from runner.common.records import Faults, WorkerStats
from runner.telemetry.progress import Status

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

PREFIX = "arena_runner"
HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Figures:
    """The state of a run at one moment.

    build: versions and mode. rows: counts by name, the keys of `ROWS`.
    """

    build: dict[str, str]
    status: Status
    rows: dict[str, int]
    real_tokens: int
    padded_tokens: int
    workers: Sequence[WorkerStats]
    faults: Faults


class Metrics:
    """Serves figures during a run. A context manager, which does nothing without a port.

    Args:
        port: 0 for any free port, None for no metrics.

    Attributes:
        url: where the metrics are served, None if they are not.
    """

    def __init__(self, port: int | None) -> None:
        self._port = port
        self._find: Callable[[], Figures] | None = None
        self._server: Any = None
        self._thread: threading.Thread | None = None
        self.url: str | None = None

    def __enter__(self) -> "Metrics":
        """Open the port.

        Raises:
            ConfigError: another program uses it.
        """
        if self._port is None:
            return self
        from prometheus_client import CollectorRegistry, start_http_server

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(self._port, HOST, registry)
        except OSError as error:
            raise ConfigError(
                "--metrics-port must be a free port; 0 takes any. Received: --metrics-port "
                f"{self._port} ({error.strerror or error})"
            ) from None
        self.url = f"http://{HOST}:{self._server.server_port}/metrics"
        return self

    def __exit__(self, *exception: object) -> None:
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join(timeout=5)

    def watch(self, find: Callable[[], Figures]) -> None:
        """Serve what `find` returns; another thread calls it."""
        self._find = find

    def collect(self) -> Iterable["Metric"]:
        """Return the current metrics; the client's registry calls this for each request."""
        if self._find is None:
            return []
        try:
            return list(families(self._find()))
        except Exception:
            return []  # a figure changed while it was read; the next request will succeed


def families(figures: Figures) -> Iterator["Metric"]:
    """Yield the figures as the client's metric families."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

    yield InfoMetricFamily(f"{PREFIX}_build", "Versions and mode of this run.", value=figures.build)
    now = figures.status
    # Names that end in _total are reserved for counters.
    rows = {"rows" if name == "total" else f"rows_{name}": name for name in ROWS}
    for name, help_text, value in (
        *((named, ROWS[name], figures.rows[name]) for named, name in rows.items()),
        ("rows_per_second", "Rows done, since the first batch.", now.rows_per_s),
        ("tokens_per_second", "Real tokens done, since the first batch.", now.tokens_per_s),
        ("elapsed_seconds", "Since the process started.", now.elapsed_s),
        ("left_seconds", "Forecast of the remaining work.", now.left_s),
        ("slack_seconds", "Time to the limit minus that; negative if too late.", now.slack_s),
    ):
        if value is not None:
            yield GaugeMetricFamily(f"{PREFIX}_{name}", help_text, value=value)
    for name, help_text, count in (
        ("tokens_real", "Tokens of rows in finished batches.", figures.real_tokens),
        ("tokens_padded", "The same with padding.", figures.padded_tokens),
    ):
        yield CounterMetricFamily(f"{PREFIX}_{name}", help_text, value=count)
    for field, (kind, name, help_text) in WORKERS.items():
        make = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
        family = make(f"{PREFIX}_worker_{name}", help_text, labels=["replica", "member"])
        for worker in figures.workers:
            family.add_metric([str(worker.replica), str(worker.member)], getattr(worker, field))
        yield family
    faults = CounterMetricFamily(
        f"{PREFIX}_faults", "Faults that the run recovered from.", labels=["kind"]
    )
    for kind, number in asdict(figures.faults).items():
        faults.add_metric([kind], number)
    yield faults
    state = GaugeMetricFamily(
        f"{PREFIX}_replica_state", "1 for a replica's current state.", labels=["replica", "state"]
    )
    for replica, doing in now.workers.items():
        # Leave out its count of shapes: each value would become a separate time series.
        state.add_metric([str(replica), doing.split()[0]], 1)
    yield state


ROWS = {
    "total": "Rows of the test set.",
    "done": "Rows that have an answer.",
    "resumed": "Rows that were already in the journal.",
    "shortened": "Rows predicted from fewer tokens than configured.",
    "filled": "Rows that got the fallback.",
}
# Field of WorkerStats -> kind, name and help of its metric.
WORKERS = {
    "busy_s": ("counter", "busy_seconds", "Seconds spent on batches."),
    "rows": ("counter", "rows", "Rows of finished batches."),
    "batches": ("counter", "batches", "Finished batches."),
    "restarts": ("counter", "restarts", "How often its process was restarted."),
    "peak_rss_bytes": ("gauge", "peak_rss_bytes", "Peak resident memory of its process."),
    "weight_bytes": ("gauge", "weight_bytes", "Bytes of weights that it holds."),
}
