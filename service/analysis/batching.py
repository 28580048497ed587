"""How many symbols one batch holds: more when the box is idle, fewer when it is busy."""

from collections.abc import Sequence
from itertools import islice
from typing import TypeVar

from service.records import Load

T = TypeVar("T")


def batch_size(
    workers: int,
    load: Load,
    factors: tuple[float, float, float] = (2.0, 1.5, 1.0),
    memory_thresholds: tuple[float, float] = (0.50, 0.65),
    cpu_thresholds: tuple[float, float] = (0.40, 0.60),
) -> int:
    """Symbols in one batch: twice the workers, times a factor that follows the load.

    The first factor holds while memory and CPU are both below their first threshold, the second while
    both are below their second, else the third. At least 1; no workers (in-process) count as one.
    """
    base = max(workers, 1) * 2
    bounds = zip(factors, memory_thresholds, cpu_thresholds, strict=False)
    for factor, memory, cpu in bounds:
        if load.memory_fraction < memory and load.cpu_fraction < cpu:
            return max(int(base * factor), 1)
    return max(int(base * factors[2]), 1)


def in_batches(items: Sequence[T], size: int) -> list[list[T]]:
    """Cut a sequence into runs of `size`; the last may be shorter."""
    rest = iter(items)
    return list(iter(lambda: list(islice(rest, size)), []))
