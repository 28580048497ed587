"""Every way in which a venue disturbs its clients, in one table, and the seeded draw from it.

`perpd sim --faults FILE` and the simulation in one process use the same table. A file names kinds and how
often each strikes:

    seed = 7
    hours = 24           # of market time, then no more; 0, the default, is never
    usual = 1.0          # every kind as often as in the table, times this; 0 leaves only those named
    [faults]
    lost_answer = 0.05   # of the requests it concerns
    exchange_restart = 2 # an hour of market time
"""

import random
import tomllib
from collections import Counter
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import msgspec

from service.errors import SettingsInvalid


class Where(Enum):
    """What a kind of fault strikes; the value says what its number counts."""

    REQUEST = "of all requests"
    ORDER = "of requests that place an order"
    STOP = "of requests that place a conditional order"
    EVENT = "of private stream events"
    FILL = "of market orders"
    TRIGGER = "of triggers"
    VENUE = "an hour of market time"


class Kind(NamedTuple):
    """One kind of fault. `usual` is how often it strikes when nothing else is said."""

    where: Where
    usual: float
    what: str


KINDS: dict[str, Kind] = {
    "latency": Kind(Where.REQUEST, 0.05, "the answer takes up to 8 s"),
    "lost_request": Kind(Where.REQUEST, 0.008, "nothing arrives, nothing comes back"),
    "broken_connection": Kind(Where.REQUEST, 0.008, "the connection breaks before the request is read"),
    "lost_answer": Kind(Where.REQUEST, 0.012, "it is executed, its answer never comes"),
    "throttled_429": Kind(Where.REQUEST, 0.002, "too many requests, with Retry-After"),
    "banned_418": Kind(Where.REQUEST, 0.0003, "the address is banned for up to two minutes"),
    "unavailable_503": Kind(Where.REQUEST, 0.005, "503 Service Unavailable: not executed"),
    "clock_1021": Kind(Where.REQUEST, 0.003, "the timestamp is refused: not executed"),
    "unknown_503": Kind(Where.ORDER, 0.05, "503 Unknown error: executed or not"),
    "protection_1008": Kind(Where.ORDER, 0.03, "-1008 system protection: not executed"),
    "timeout_1007": Kind(Where.ORDER, 0.05, "-1007 timeout at the backend: executed or not"),
    "unreadable": Kind(Where.ORDER, 0.02, "it is executed and the answer is no JSON"),
    "stop_2021": Kind(Where.STOP, 0.03, "-2021 would immediately trigger"),
    "stop_4164": Kind(Where.STOP, 0.02, "-4164 below the minimum notional"),
    "stop_percent_price": Kind(Where.STOP, 0.02, "-4131 PERCENT_PRICE"),
    "event_duplicated": Kind(Where.EVENT, 0.04, "it is told twice"),
    "event_late": Kind(Where.EVENT, 0.04, "later ones overtake it"),
    "event_lost": Kind(Where.EVENT, 0.03, "it is never told"),
    "partial_fill": Kind(Where.FILL, 0.15, "it fills in parts; now and then the rest expires"),
    "trigger_rejected": Kind(Where.TRIGGER, 0.04, "the order of a trigger is refused by the book"),
    "silent_stream": Kind(Where.VENUE, 1.0, "one connection stays open and tells nothing for minutes"),
    "disconnect": Kind(Where.VENUE, 3.0, "one connection is dropped"),
    "liquidation": Kind(Where.VENUE, 0.3, "a position is liquidated"),
    "deleveraging": Kind(Where.VENUE, 0.3, "a position is closed by auto-deleveraging"),
    "manual_close": Kind(Where.VENUE, 0.5, "a person closes a position, or half of it"),
    "manual_cancel": Kind(Where.VENUE, 0.7, "a person cancels a stop or a target"),
    "foreign_position": Kind(Where.VENUE, 0.2, "a person opens a position and closes it minutes later"),
    "delisting": Kind(Where.VENUE, 0.05, "a symbol is settled and trades no more"),
    "exchange_restart": Kind(Where.VENUE, 0.4, "everything is down for up to a minute"),
    "clock_skew": Kind(Where.VENUE, 0.4, "the venue's clock jumps by up to three seconds"),
}


class FaultFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a file of faults may say."""

    seed: int = 1
    usual: float = 0.0
    hours: float = 0.0
    faults: dict[str, float] = {}


def read_fault_file(path: Path) -> "FaultPlan":
    """Raises SettingsInvalid, naming the file, the kind, what was found and what is allowed."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        file = msgspec.convert(document, FaultFile)
    except OSError as error:
        raise SettingsInvalid(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise SettingsInvalid(
            f"{path}: {error}; allowed is seed = N, usual = X, hours = H and a table [faults]"
        ) from None
    try:
        often = frequencies(file.usual, file.faults)
        return FaultPlan(often, random.Random(file.seed), hours=file.hours)
    except ValueError as error:
        raise SettingsInvalid(f"{path}: {error}") from None


def frequencies(usual: float, named: Mapping[str, float] | None = None) -> dict[str, float]:
    """How often each kind strikes: its usual number times `usual`, unless it is named.

    Raises: ValueError: a kind is unknown or its number impossible.
    """
    found = {name: kind.usual * usual for name, kind in KINDS.items()}
    for name, often in (named or {}).items():
        if name not in KINDS:
            raise ValueError(f"there is no fault {name!r}; there are {', '.join(KINDS)}")
        found[name] = often
    for name, often in found.items():
        most = 60.0 if KINDS[name].where is Where.VENUE else 1.0
        if not 0.0 <= often <= most:
            raise ValueError(f"{name} is {often}, allowed is 0 to {most:g} {KINDS[name].where.value}")
    return found


class FaultPlan:
    """Draws faults. The same seed and the same questions give the same faults.

    `active` switches them all; `counts` says how often each struck. After `hours` of market time they
    end; 0 is never.
    """

    def __init__(self, often: Mapping[str, float], draws: random.Random, *, hours: float = 0.0) -> None:
        self.hours = hours
        self.often = dict(often)
        self.random = draws
        self.active = True
        self.counts: Counter[str] = Counter()
        self._kinds = {
            where: [name for name, kind in KINDS.items() if kind.where is where and self.often[name] > 0]
            for where in Where
        }

    def draw(self, *places: Where) -> str:
        """The kind that strikes now at one of these places, or ""."""
        if not self.active:
            return ""
        for where in places:
            for name in self._kinds[where]:
                if self.random.random() < self.often[name]:
                    self.counts[name] += 1
                    return name
        return ""

    def due(self, seconds: float) -> list[str]:
        """The venue's own troubles that begin within a span of market time."""
        if not self.active:
            return []
        names = self._kinds[Where.VENUE]
        return [name for name in names if self.random.random() < self.often[name] * seconds / 3_600]
