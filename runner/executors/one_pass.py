"""One pass over rows as an executor computes it: what is left, how long it takes, who gets what.

Both executors deal, learn and forecast through it. Does not know Ray, JAX or files.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from runner.common.records import Faults, WorkerStats, seconds_to_compile
from runner.executors.recovery import Recovery
from sharding.backlog import Backlog
from sharding.batches import Batch, BatchShape
from sharding.dealing import Dealer, ReplicaState
from sharding.forecast import Pace
from sharding.rates import Rates


@dataclass(frozen=True, slots=True)
class Pass:
    """replicas: those of the run; more may be appended. tokens: what workers read them from."""

    backlog: Backlog
    rates: Rates
    dealer: Dealer
    recovery: Recovery
    replicas: Sequence[ReplicaState]
    tokens: Any = None

    def take_answer(
        self, replica: ReplicaState, batch: Batch, *, began: float, ended: float, learn: bool = True
    ) -> bool:
        """Learn from a batch that a replica has computed; return whether its answer is the first.

        Args:
            learn: whether its time says how fast the replica is.
        """
        if learn:
            self.rates.learn(
                replica.number,
                batch.shape,
                ended - began,
                is_first=batch.shape not in replica.used,
                compiling_s=replica.compile_times.within(began, ended),
            )
        replica.used.add(batch.shape)
        self.recovery.answered()
        return self.backlog.finish(batch)

    def paces(
        self, now: float, stats: list[WorkerStats], shapes: Iterable[BatchShape] | None
    ) -> list[Pace]:
        """See `Executor.paces`."""
        is_new = shapes is not None
        return self.dealer.paces(
            now,
            shapes=shapes,
            compile_s=lambda alike: seconds_to_compile(stats, is_new=is_new, replicas=alike),
        )

    def is_measured(self) -> bool:
        """See `Executor.is_measured`."""
        return any(self.rates.is_measured(replica.number) for replica in self.replicas)


def no_rows(replicas: Sequence[ReplicaState], faults: Faults) -> Pass:
    """Return the pass before the first."""
    backlog, rates = Backlog((), cost=lambda shape: 0.0), Rates(lambda shape: 0.0)
    recovery = Recovery(backlog, faults, (), note=lambda said: None)
    return Pass(backlog, rates, Dealer(backlog, rates, replicas), recovery, replicas)
