"""A Recorder that tests can look at."""

from collections import Counter


class Recorder:
    """Counts, and the operations in the order they were recorded."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.operations: list[str] = []

    def record(self, operation: str, seconds: float) -> None:
        self.operations.append(operation)

    def count(self, name: str, amount: int = 1) -> None:
        self.counts[name] += amount
