"""A made-up history of any size, in the archive's own compacted form: for benchmarks and for trying out.

Every symbol has a signal at every candle. Its features follow distributions like those of the founding
strategy; its outcome depends a little on three of them, so that there is something to learn. The same seed
gives the same history.
"""

from pathlib import Path
from typing import NamedTuple

from service.analysis.features import FEATURE_NAMES
from service.archive.duck import Connection, connected, text
from service.archive.manifest import Manifest, sha256_of, write_manifest
from service.archive.schema import columns, version
from service.archive.segments import parquet_path, segment_path, utc_day
from service.errors import HistoryUnusable

CANDLE_MS = 300_000
CANDLES_A_DAY = 288
FIRST_DAY_MS = 1_735_689_600_000  # 2025-01-01
MEMORY_MB = 256
STREAMS = ("signals", "shadow_outcomes")

_SCORES = ("trend", "structure", "position", "momentum", "volatility")
_SPECIAL = {  # SQL of features that are no plain noise
    "confidence": "least(greatest(0.55 + 0.12 * {noise}, 0.0), 1.0)",
    "side": "side",
    "rsi": "50.0 + 8.0 * {noise}",
    "atr_fraction": "0.004 * exp(0.4 * {noise})",
    "volume_ratio": "exp(0.6 * {noise})",
    "risk_reward": "2.0",
    "hour_of_day": "(at_ms // 3600000) % 24",
    "day_of_week": "(at_ms // 86400000 + 3) % 7",
}


class Size(NamedTuple):
    """How much to make."""

    records: int
    symbols: int = 100
    seed: int = 1


def generate(directory: Path, size: Size) -> int:
    """Write the archive; returns how many signals it has, each with an outcome.

    Raises HistoryUnusable: the directory is not empty.
    """
    if directory.exists() and any(directory.iterdir()):
        raise HistoryUnusable(f"{directory} is not empty; name a new directory with --out")
    a_day = size.symbols * CANDLES_A_DAY
    with connected(MEMORY_MB, threads=2) as connection:
        for begin in range(0, size.records, a_day):
            count = min(a_day, size.records - begin)
            _make_day(connection, size, begin, count)
            for stream in STREAMS:
                _write(connection, directory, stream, begin, count)
    return size.records


def _make_day(connection: Connection, size: Size, begin: int, count: int) -> None:
    """One day's signals and outcomes as a table: at each candle, one of each symbol."""
    noises = ", ".join(f"{_noise(place, size.seed)} as n{place}" for place in range(len(FEATURE_NAMES) + 1))
    connection.execute(
        f"""create or replace temp table day as
            select *, 'synthetic:' || symbol || ':' || at_ms || ':' || position_side as signal_id
            from (select n, 'S' || (n % {size.symbols}) || 'USDT' as symbol,
                         {FIRST_DAY_MS} + n // {size.symbols} * {CANDLE_MS} as at_ms,
                         case when hash(n, {size.seed}) % 2 = 0 then 'LONG' else 'SHORT' end as position_side,
                         case when hash(n, {size.seed}) % 2 = 0 then 1.0 else -1.0 end as side,
                         {noises}
                  from (select {begin} + range as n from range({count})))"""
    )


def _noise(place: int, seed: int) -> str:
    """SQL of a number between -2 and 2 around 0, different for each row and place, to three digits."""
    uniform = f"(hash(n, {place}, {seed}) % 1000003) / 1000003.0"
    other = f"(hash({place}, n, {seed + 1}) % 1000003) / 1000003.0"
    return f"round(2.0 * ({uniform} + {other} - 1.0), 3)"


def _features() -> str:
    values = ", ".join(
        f"({_SPECIAL.get(name, '{noise}').format(noise=f'n{place}')})::double"
        for place, name in enumerate(FEATURE_NAMES)
    )
    names = ", ".join(text(name) for name in FEATURE_NAMES)
    return f"map([{names}], [{values}])"


def _scores() -> str:
    names = ", ".join(text(name) for name in _SCORES)
    values = ", ".join(f"(n{place} + 2.0) / 4.0" for place in range(len(_SCORES)))
    return f"map([{names}], [{values}])"


def _result() -> str:
    """The outcome in R: a win of about 1.9 or a loss of about 1.1, likelier where three features agree."""
    luck = f"n{len(FEATURE_NAMES)}"
    return f"case when {luck} + 0.15 * (n0 + n11 - n22) > 0.45 then 1.9 else -1.1 end"


def _columns(stream: str) -> dict[str, str]:
    """SQL of each column of a stream over the table `day`."""
    shared = {"symbol": "symbol", "position_side": "position_side", "signal_id": "signal_id"}
    prices = {"entry": "100.0", "stop": "100.0 - side", "target": "100.0 + 2.0 * side"}
    if stream == "signals":
        return (
            shared
            | prices
            | {
                "strategy": "'synthetic'",
                "candle_close_ms": "at_ms",
                "atr": "0.5",
                "confidence": "least(greatest(0.55 + 0.12 * n5, 0.0), 1.0)",
                "scores": _scores(),
                "features": _features(),
            }
        )
    held_ms = f"({CANDLE_MS} * (1 + hash(n, 'held') % 36))"
    return (
        shared
        | prices
        | {
            "position_id": "'shadow:' || signal_id",
            "opened_ms": "at_ms",
            "checked_ms": f"at_ms + {held_ms}",
            "closed_ms": f"at_ms + {held_ms}",
            "favourable_excursion": f"greatest({_result()}, 0.3)",
            "adverse_excursion": f"greatest(-({_result()}), 0.3)",
            "exit_price": f"100.0 + side * ({_result()})",
            "close_reason": f"case when {_result()} > 0 then 'target' else 'stop' end",
            "outcome_r": _result(),
            "pnl_fraction": f"({_result()}) / 100.0",
            "funding_fraction": "0.0",
            "resolution": "'5m'",
            "traded": "false",
        }
    )


def _write(connection: Connection, directory: Path, stream: str, begin: int, count: int) -> None:
    """One day of one stream as a compacted segment with its manifest."""
    first, last = begin + 1, begin + count
    made = _columns(stream) | {"v": str(version(stream)), "seq": "n + 1", "archived_ms": "at_ms"}
    wanted = ", ".join(f'CAST({made[c.name]} AS {c.type}) AS "{c.name}"' for c in columns(stream))
    times = connection.execute("select min(at_ms), max(at_ms) from day").fetchone()
    assert times is not None
    path = parquet_path(segment_path(directory, stream, utc_day(times[0]), first), last)
    path.parent.mkdir(parents=True, exist_ok=True)
    connection.execute(
        f"COPY (SELECT {wanted} FROM day ORDER BY n) TO {text(path)} "
        "(FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 30000)"
    )
    write_manifest(
        path,
        Manifest(
            stream=stream,
            version=version(stream),
            first=first,
            last=last,
            records=count,
            first_ms=times[0],
            last_ms=times[1],
            size_bytes=path.stat().st_size,
            sha256=sha256_of(path),
            source_bytes=0,
        ),
    )
