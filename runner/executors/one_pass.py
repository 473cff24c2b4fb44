"""One pass over rows: what is left, who gets what, and how long it takes.

Both executors deal, learn and forecast by it. Does not know Ray, JAX or files.
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
    """What an executor works with during one pass.

    replicas: those of the run; more may be appended. tokens: from which workers read them.
    """

    backlog: Backlog
    rates: Rates
    dealer: Dealer
    recovery: Recovery
    replicas: Sequence[ReplicaState]
    tokens: Any = None

    def take_answer(
        self, replica: ReplicaState, batch: Batch, *, began: float, ended: float, learn: bool = True
    ) -> bool:
        """Learn from a computed batch; return whether this answer to it is the first.

        Args:
            learn: whether its time shows how fast the replica is.
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
    """Return an empty pass, for before the first."""
    backlog, rates = Backlog((), cost=lambda shape: 0.0), Rates(lambda shape: 0.0)
    recovery = Recovery(backlog, faults, (), note=lambda said: None)
    return Pass(backlog, rates, Dealer(backlog, rates, replicas), recovery, replicas)
