"""What a worker does with a batch: read rows in place, run the strategy, answer in a few bytes.

Runs in a worker process, or in the daemon when it has no workers. Errors travel back as data.
"""

import functools
import gc
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from service.analysis.limit import LimitReached
from service.analysis.row_view import CLOCK_TIMEFRAME, RowView
from service.analysis.series import SeriesMemo
from service.errors import SettingsInvalid, StrategyInvalid
from service.market.candles import CandleStore
from service.records import Signal
from service.settings import StrategySettings
from service.strategies.base import Strategy, StrategyBroke, checked_signal
from service.strategies.loader import describe, file_mark, load_strategy

_READ_ATTEMPTS = 3

Place = tuple[int, str]
"""A row of the candle store and the symbol expected there."""


class Task:
    """What all batches of one analyser share. It goes with each of them, so it is pickled only once."""

    __slots__ = ("collect", "mark", "sent", "store_path", "strategy")

    def __init__(
        self, store_path: str, strategy: StrategySettings, collect: bool, mark: str | None = None
    ) -> None:
        """Reads the strategy's own file.

        Args: collect: garbage is collected after each batch; mark: what that file is known by, None to look.
        """
        self.store_path = store_path
        self.strategy = strategy
        self.collect = collect
        self.mark = file_mark(strategy.name) if mark is None else mark
        self.sent = pickle.dumps((store_path, strategy, collect, self.mark))

    def __reduce__(self) -> tuple[Any, ...]:
        return _received_task, (self.sent,)


@functools.lru_cache(maxsize=1)
def _received_task(sent: bytes) -> Task:
    return Task(*pickle.loads(sent))


class Outcome(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What became of one symbol: a signal, nothing, or a reason in `skipped` or `failed`."""

    sequence: int  # of the candle store's row at which this holds; -1 when it may not be reused
    signal: Signal | None = None
    skipped: str = ""  # its data does not allow an analysis
    failed: str = ""  # the strategy broke on it


class BatchAnswer(msgspec.Struct, frozen=True, array_like=True):
    """One Outcome per place of a batch, and how often a part that depends on one series was at hand."""

    outcomes: list[Outcome]
    series_reused: int
    series_computed: int


class StrategyFacts(msgspec.Struct, frozen=True):
    """A loaded strategy as it describes itself."""

    name: str
    timeframes: tuple[str, ...]
    candles: int


class _Prepared:
    """The store and the strategy a worker keeps between batches."""

    def __init__(self, task: Task) -> None:
        self.task = task
        _require_unchanged(task)
        self.strategy, self.facts = _load(task.strategy)
        _require_unchanged(task)  # nor while it was loaded
        self.store = CandleStore.attach(Path(task.store_path))
        if absent := set(self.facts.timeframes) - set(self.store.timeframes):
            raise SettingsInvalid(f"the candle store does not keep {', '.join(sorted(absent))}")
        self.memo = SeriesMemo()
        needed = dict.fromkeys((*self.facts.timeframes, CLOCK_TIMEFRAME))
        self.needed = tuple((timeframe, self.store.count_at[timeframe]) for timeframe in needed)


def _require_unchanged(task: Task) -> None:
    """Results are stored under the code the daemon identified; no worker runs any other."""
    if file_mark(task.strategy.name) != task.mark:
        raise StrategyInvalid(
            f"strategy {task.strategy.name}: its file changed since the start; restart perpd to use it"
        )


_encode = msgspec.msgpack.Encoder().encode
_prepared: _Prepared | None = None


def describe_strategy(strategy: StrategySettings) -> StrategyFacts:
    """Load the strategy and say what it needs. Raises StrategyInvalid, SettingsInvalid."""
    return _load(strategy)[1]


def _load(strategy: StrategySettings) -> tuple[Strategy, StrategyFacts]:
    """A strategy, and its facts as they are now: it is asked for them once."""
    loaded = load_strategy(strategy.name, strategy.options)
    return loaded, StrategyFacts(loaded.name, loaded.timeframes, loaded.candles)


def analyse_batch(task: Task, places: Sequence[Place]) -> bytes:
    """A BatchAnswer, outcomes in the order of the places, as msgpack.

    Raises: StrategyInvalid, SettingsInvalid, CandleFileInvalid: before any symbol is analysed.
    """
    prepared = _prepare(task)
    outcomes = [_analyse(prepared, row, symbol) for row, symbol in places]
    answer = _encode(BatchAnswer(outcomes, *prepared.memo.take_counts()))
    del outcomes
    if task.collect:
        gc.collect(1)  # a batch's garbage is young; in the daemon a full one would look at all it has too
    return answer


def forget() -> None:
    """Let go of the store, the strategy and what it remembers, that the last batch left."""
    global _prepared
    if _prepared is not None:
        _prepared.store.close()
        _prepared = None


def _prepare(task: Task) -> _Prepared:
    global _prepared
    if _prepared is None or _prepared.task.sent != task.sent:
        forget()
        _prepared = _Prepared(task)
        keep_loaded()
    return _prepared


def keep_loaded() -> None:
    """What is loaded now stays: later collections look at a batch's objects only."""
    gc.collect()
    gc.freeze()


def _analyse(prepared: _Prepared, row: int, symbol: str) -> Outcome:
    store = prepared.store
    for _ in range(_READ_ATTEMPTS):
        state = store.state(row)
        if state[0] & 1:
            continue
        outcome = _analyse_once(prepared, row, symbol, state)
        if store.sequence(row) == state[0]:
            return outcome
        prepared.memo.discard(row)
    return Outcome(-1, skipped="its candles are being written")


def _analyse_once(prepared: _Prepared, row: int, symbol: str, state: Sequence[int]) -> Outcome:
    store, facts, sequence = prepared.store, prepared.facts, state[0]
    if store.row_of(symbol) != row:
        return Outcome(-1, skipped="its row belongs to another symbol")
    for timeframe, count_at in prepared.needed:
        if state[count_at] < facts.candles:
            reason = f"{state[count_at]} candles of {timeframe}, {facts.candles} needed"
            return Outcome(sequence, skipped=reason)
    view = RowView(store, row, symbol, prepared.memo, state)
    try:
        return Outcome(sequence, checked_signal(facts.name, view, prepared.strategy.analyse(view)))
    except LimitReached:
        raise
    except StrategyBroke as error:
        return Outcome(-1, failed=_sendable(str(error)))
    except BaseException as error:  # noqa: BLE001  somebody else's code; Ctrl-C is a signal the loop handles
        return Outcome(-1, failed=_sendable(describe(error)))


def _sendable(reason: str) -> str:
    """A strategy's words as text that can be encoded: half a surrogate pair in them must not end a batch."""
    return reason[:300].encode("utf-8", "replace").decode()
