"""A history of signals and outcomes as the archive's views show it."""

from collections.abc import Iterator

import duckdb
import pytest

HOUR_MS = 3_600_000


class History:
    """Tables under the names of the archive's views."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self.connection = connection
        connection.execute(
            "create table signals (signal_id text, strategy text, symbol text, candle_close_ms bigint,"
            " features map(text, double), seq bigint, archived_ms bigint)"
        )
        connection.execute(
            "create table shadow_outcomes (signal_id text, opened_ms bigint, closed_ms bigint,"
            " outcome_r double, close_reason text, seq bigint, archived_ms bigint)"
        )
        connection.execute(
            "create table decisions (signal_id text, outcome text, risk_amount text, seq bigint)"
        )
        connection.execute(
            "create table positions (signal_id text, closed_ms bigint, entry_price text, realised_pnl text,"
            " fees text, funding text, seq bigint)"
        )

    def signal(self, name: str, at_ms: int, strategy: str = "s", **features: float | None) -> str:
        signal_id = f"{strategy}:{name}:{at_ms}"
        self.connection.execute(
            "insert into signals values (?, ?, ?, ?, ?, (select count(*) + 1 from signals), ?)",
            [signal_id, strategy, name, at_ms, features or {"x": 1.0, "y": 2.0}, at_ms],
        )
        return signal_id

    def outcome(
        self, signal_id: str, opened_ms: int, result: float, *, held_h: float = 1.0, reason: str = "stop"
    ) -> None:
        closed_ms = opened_ms + round(held_h * HOUR_MS)
        self.connection.execute(
            "insert into shadow_outcomes values"
            " (?, ?, ?, ?, ?, (select count(*) + 1 from shadow_outcomes), ?)",
            [signal_id, opened_ms, closed_ms, result, reason, closed_ms],
        )

    def decision(self, signal_id: str, outcome: str = "accepted", risk_amount: str = "10") -> None:
        self.connection.execute(
            "insert into decisions values (?, ?, ?, (select count(*) + 1 from decisions))",
            [signal_id, outcome, risk_amount],
        )

    def position(self, signal_id: str, closed_ms: int) -> None:
        """A record of a real position; open while `closed_ms` is 0."""
        self.connection.execute(
            "insert into positions values (?, ?, '10', '20', '1', '0', (select count(*) + 1 from positions))",
            [signal_id, closed_ms],
        )

    def hours(self, count: int, symbols: int = 2) -> None:
        """That many hours with a signal of each symbol and its outcome an hour later."""
        for hour in range(count):
            for symbol in range(symbols):
                at_ms = (hour + 1) * HOUR_MS
                name = self.signal(f"S{symbol}", at_ms, x=float(hour), y=float(symbol))
                self.outcome(name, at_ms, 2.0 if (hour + symbol) % 3 == 0 else -1.0)


@pytest.fixture
def history() -> Iterator[History]:
    with duckdb.connect() as connection:
        yield History(connection)
