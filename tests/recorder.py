"""A Recorder and an archive that tests can look at."""

from collections import Counter

from service.records import Record


class Recorder:
    """Counts, and the operations in the order they were recorded."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.operations: list[str] = []

    def record(self, operation: str, seconds: float) -> None:
        self.operations.append(operation)

    def count(self, name: str, amount: int = 1) -> None:
        self.counts[name] += amount


class Kept:
    """What was put, with its stream, in the order it came."""

    writable = True

    def __init__(self) -> None:
        self.records: list[tuple[str, Record]] = []

    async def put(self, stream: str, record: Record) -> None:
        self.records.append((stream, record))

    def of(self, stream: str) -> list[Record]:
        return [record for name, record in self.records if name == stream]
