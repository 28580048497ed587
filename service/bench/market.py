"""The seeded market in a candle store, made in a process of its own so that nobody else pays for it."""

import json
import sys
from pathlib import Path
from typing import Any

import msgspec

STORE_FILE = "candles.mmap"
NEXT_FILE = "next.msgpack"
MOST_CANDLES = 500  # of history the generator has before its start, on 1h

CandleTuple = tuple[int, float, float, float, float, float]


class Rounds(msgspec.Struct):
    """Candles of 5m that close one after the other once the store is full, and the longer ones they end."""

    start_ms: int  # open time of the first
    symbols: list[str]
    candles: list[list[CandleTuple]]  # one list a round, in the order of the symbols
    longer: list[dict[str, list[CandleTuple]]]  # the same of each longer timeframe that closes with a round


def build(directory: Path, *, symbols: int, candles: int, rounds: int, seed: int) -> None:
    """Fill a store with the newest `candles` of each timeframe, and write the `rounds` that follow."""
    from service.exchange.simulated.generator import generate
    from service.market.candles import CandleStore
    from service.records import TIMEFRAME_MS

    tape = generate(seed, symbols)
    hour_ms = TIMEFRAME_MS["1h"]
    now_ms = tape.start_ms // hour_ms * hour_ms
    five_ms = TIMEFRAME_MS["5m"]
    until_ms = now_ms + rounds * five_ms
    store = CandleStore.open(directory / STORE_FILE, symbols_capacity=symbols, candles=candles)
    following: list[list[CandleTuple]] = [[] for _ in range(rounds)]
    longer: list[dict[str, list[CandleTuple]]] = [{} for _ in range(rounds)]
    for index, symbol in enumerate(tape.symbols):
        row = store.add_symbol(symbol)
        for timeframe in store.timeframes:
            step = TIMEFRAME_MS[timeframe]
            found = tape.candles(index, timeframe, now_ms - candles * step, now_ms - step, now_ms)
            store.append(row, timeframe, [_row(values) for values in found.tolist()])
            if (held := store.count(row, timeframe)) != candles:
                raise ValueError(f"{symbol} has {held} candles of {timeframe}, wanted are {candles}")
            later = tape.candles(index, timeframe, now_ms, until_ms - step, until_ms).tolist()
            for row_values in map(_row, later):
                number = (row_values[0] + step - now_ms) // five_ms - 1
                if timeframe == "5m":
                    following[number].append(row_values)
                else:
                    longer[number].setdefault(timeframe, []).append(row_values)
    store.close()
    document = Rounds(now_ms, list(tape.symbols), following, longer)
    (directory / NEXT_FILE).write_bytes(msgspec.msgpack.encode(document))


def read_rounds(directory: Path) -> Rounds:
    return msgspec.msgpack.decode((directory / NEXT_FILE).read_bytes(), type=Rounds)


def _row(values: list[float]) -> CandleTuple:
    open_ms, open_, high, low, close, volume = values[:6]
    return int(open_ms), open_, high, low, close, volume


def _main(spec: dict[str, Any]) -> None:
    build(Path(spec.pop("directory")), **spec)
    print("{}")  # noqa: T201


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
