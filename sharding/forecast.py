"""A backlog and the speeds of replicas -> the seconds that are left.

Pure arithmetic; does not know a clock.
"""

from sharding.backlog import Backlog
from sharding.rates import Rates

# Of a batch that is under way, on average so much is still to be done.
HALF_WAY = 0.5


def seconds_left(backlog: Backlog, rates: Rates, speed: float, replicas: int) -> float | None:
    """Return the seconds until all rows have an answer, None where nothing is known yet.

    Work over speed, and at the end, when the first replica finds nothing to do, half of a batch
    for each of the others.

    Args:
        speed: of all replicas together, in cost a second.
        replicas: how many they are.
    """
    if not speed:
        return None
    waiting = [rates.work(batch.shape) for batch in backlog.waiting()]
    under_way = [rates.work(batch.shape) * HALF_WAY for batch in backlog.under_way()]
    work = sum(waiting) + sum(under_way)
    last = waiting[-1] if waiting else max(under_way, default=0.0)
    return (work + HALF_WAY * last * (replicas - 1)) / speed
