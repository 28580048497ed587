"""What a strategy is: a pure function from the candles of one symbol to a wish, or to nothing."""

import math
from collections.abc import Callable, Collection
from operator import countOf
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import msgspec

from service.errors import SettingsInvalid
from service.records import PositionSide, Signal

T = TypeVar("T")

if TYPE_CHECKING:
    from service.analysis.indicators import Array

MAX_NAMED_VALUES = 256
"""Most entries `scores` and `features` may have."""

MAX_NAMES_BYTES = 8192
"""Most bytes their keys may have together, as UTF-8."""

MAX_REMEMBERED_BYTES = 4_096
"""Most bytes, as msgpack, of a result that `MarketView.remember` keeps."""

_encode = msgspec.msgpack.Encoder().encode


class Candles(NamedTuple):
    """Closed candles of one timeframe, oldest first: equally long, contiguous, read-only."""

    open_ms: "object"  # int64[n]
    open: "Array"
    high: "Array"
    low: "Array"
    close: "Array"
    volume: "Array"  # base currency


class MarketView:
    """The closed candles of one symbol, read in place from the candle store.

    The arrays are valid during the call only: a strategy keeps no reference to them.
    """

    __slots__ = ("_read", "candle_close_ms", "symbol")

    def __init__(self, symbol: str, candle_close_ms: int, read: Callable[[str], Candles]) -> None:
        self.symbol = symbol
        self.candle_close_ms = candle_close_ms  # first millisecond after the newest 5m candle
        self._read = read

    def candles(self, timeframe: str) -> Candles:
        """All closed candles of a timeframe. Raises KeyError for one that is not kept."""
        return self._read(timeframe)

    def remember(self, timeframe: str, compute: Callable[..., T], *arguments: Any) -> T:
        """`compute(candles, *arguments)` of a timeframe; its last result while neither of them has changed.

        For what depends on one timeframe alone, the arguments included. `compute` is a method of the
        strategy or a function of its module, a few in all: one made anew in each call is another one, and
        computed each time. Arguments and result are immutable data (None, numbers, texts, tuples, frozen
        msgspec records); what is larger than MAX_REMEMBERED_BYTES is computed each time.
        Raises: what `compute` raises; nothing is remembered then. StrategyBroke: its result is not such data.
        """
        result = compute(self.candles(timeframe), *arguments)
        size_to_remember((arguments, result))
        return result


def size_to_remember(data: object) -> int:
    """Its bytes as msgpack. Raises StrategyBroke: it may change later, or is no plain data."""
    try:
        hash(data)  # arrays, lists, dicts and records that are not frozen have none
        return len(_encode(data))
    except (TypeError, ValueError, OverflowError) as error:
        raise StrategyBroke(f"what it wants remembered is not immutable data: {error}") from None


class SignalDraft(msgspec.Struct, frozen=True, kw_only=True):
    """What a strategy returns: a Signal without what perpd fills in (id, strategy, symbol, time)."""

    position_side: PositionSide
    entry: float
    stop: float
    target: float
    atr: float  # of 5m, quote currency
    confidence: float  # 0 to 1
    scores: dict[str, float]  # the parts of the confidence
    features: dict[str, float]  # what a model scores


class Strategy(Protocol):
    """One way to trade. Built once per worker with the settings' options: `YourStrategy(options)`.

    `analyse` depends on its argument and the options only: no state, no clock, no randomness, so that
    the same candles give the same signal in any worker. What it computes from one timeframe alone it may
    hand to `MarketView.remember`. It may raise: the symbol is skipped and counted.
    """

    @property
    def name(self) -> str: ...
    @property
    def timeframes(self) -> tuple[str, ...]:
        """Those it reads; a symbol lacking one of them is skipped."""
        ...

    @property
    def candles(self) -> int:
        """The fewest closed candles it needs in each of them."""
        ...

    def analyse(self, view: MarketView) -> SignalDraft | None: ...


class StrategyBroke(Exception):
    """A strategy returned something that is not a usable signal; the message says what."""


def checked_signal(strategy: str, view: MarketView, draft: object) -> Signal | None:
    """Turn what a strategy returned into a Signal. Raises StrategyBroke with the reason."""
    if draft is None:
        return None
    if not isinstance(draft, SignalDraft):
        raise StrategyBroke(f"returned {type(draft).__name__} instead of SignalDraft or None")
    side, scores, features = draft.position_side, draft.scores, draft.features
    if not isinstance(side, PositionSide):
        raise StrategyBroke(f"position_side is {_shown(side)}")
    entry, stop, target, atr, confidence = draft.entry, draft.stop, draft.target, draft.atr, draft.confidence
    _check_names("scores", scores)
    _check_names("features", features)
    if (
        type(scores) is type(features) is dict
        and _plain((entry, stop, target, atr, confidence))
        and _plain(scores.values())
        and _plain(features.values())
    ):
        scores, features = scores.copy(), features.copy()
    else:
        entry = _number("entry", entry)
        stop = _number("stop", stop)
        target = _number("target", target)
        atr = _number("atr", atr)
        confidence = _number("confidence", confidence)
        scores, features = _numbers("scores", scores), _numbers("features", features)
    if entry <= 0.0 or stop <= 0.0 or target <= 0.0 or atr < 0.0:
        raise StrategyBroke(f"entry {entry}, stop {stop}, target {target}, atr {atr} must be positive")
    sign = 1 if side is PositionSide.LONG else -1
    if (entry - stop) * sign <= 0.0:
        raise StrategyBroke(f"the stop {stop} of a {side} is on the wrong side of {entry}")
    if (target - entry) * sign <= 0.0:
        raise StrategyBroke(f"the target {target} of a {side} is on the wrong side of {entry}")
    if not 0.0 <= confidence <= 1.0:
        raise StrategyBroke(f"confidence {confidence} is outside 0 to 1")
    return Signal(
        signal_id=f"{strategy}:{view.symbol}:{view.candle_close_ms}:{side}",
        strategy=strategy,
        symbol=view.symbol,
        position_side=side,
        candle_close_ms=view.candle_close_ms,
        entry=entry,
        stop=stop,
        target=target,
        atr=atr,
        confidence=confidence,
        scores=scores,
        features=features,
    )


def _number(name: str, value: object) -> float:
    """A finite Python float; numpy's scalars are welcome, booleans and texts are not."""
    if type(value) is not float:
        if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
            raise StrategyBroke(f"{name} is {_shown(value)}, not a number")
        try:
            value = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise StrategyBroke(f"{name} is {_shown(value)}: {error}") from error
    if not math.isfinite(value):
        raise StrategyBroke(f"{name} is {value}")
    return value


def _numbers(name: str, values: dict[str, Any]) -> dict[str, float]:
    return {key: _number(f"{name}[{key!r}]", value) for key, value in values.items()}


def _check_names(name: str, values: object) -> None:
    """Whether its kind, its size and its keys are allowed; not what its values are."""
    if not isinstance(values, dict):
        raise StrategyBroke(f"{name} is a {type(values).__name__}, not a dict")
    if len(values) > MAX_NAMED_VALUES:
        raise StrategyBroke(f"{name} has {len(values)} entries, at most {MAX_NAMED_VALUES} are kept")
    try:
        size = len("".join(values).encode())
    except TypeError:
        key = next(key for key in values if not isinstance(key, str))
        raise StrategyBroke(f"{name} has the key {_shown(key)}, keys are texts") from None
    except UnicodeEncodeError as error:
        raise StrategyBroke(f"{name} has a key that is no text: {error.reason}") from None
    if size > MAX_NAMES_BYTES:
        raise StrategyBroke(f"the keys of {name} have {size} bytes, at most {MAX_NAMES_BYTES} are kept")


def _plain(values: Collection[object]) -> bool:
    """Whether all are finite Python floats, as nearly always: asked of all at once.

    A sum is finite only when each of its terms is; one that overflows is left to the closer look.
    """
    return countOf(map(type, values), float) == len(values) and math.isfinite(sum(values))  # type: ignore[arg-type]


def _shown(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}" if isinstance(value, str) else type(value).__name__


Options = TypeVar("Options", bound=msgspec.Struct)


def read_options(kind: type[Options], options: dict[str, float]) -> Options:
    """Strategy options as a frozen record whose fields are the options.

    Raises: SettingsInvalid: an option is unknown or out of range; names it, what was found and what is
    allowed.
    """
    known = [field.name for field in msgspec.structs.fields(kind)]
    for key in options:
        if key not in known:
            raise SettingsInvalid(f"strategy.options: unknown option {key!r}; allowed are {', '.join(known)}")
    try:
        return msgspec.convert(options, kind, strict=False)
    except msgspec.ValidationError as error:
        found = next((f", found {v!r}" for k, v in options.items() if f"$.{k}`" in str(error)), "")
        raise SettingsInvalid(f"strategy.options: {error}{found}") from None
