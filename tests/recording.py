"""What stands in for the archive and the monitor where a test wants to see what they were given."""

from service.records import Record


class Kept:
    writable = True

    def __init__(self) -> None:
        self.records: list[tuple[str, Record]] = []

    async def put(self, stream: str, record: Record) -> None:
        self.records.append((stream, record))

    def of(self, stream: str) -> list[Record]:
        return [record for name, record in self.records if name == stream]


class Counts:
    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def record(self, operation: str, seconds: float) -> None: ...

    def count(self, name: str, amount: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + amount
