"""What the analysis asks of whoever runs its batches."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class AnalysisExecutor(Executor):
    """An Executor whose workers remember what they computed, so that a caller may prefer one of them."""

    def submit_to(self, number: int, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """As `submit`, for this worker if it has room, else for any: a preference never waits."""
        return self.submit(fn, *args, **kwargs)
