"""Which symbols are traded: the most liquid of those the settings allow. Pure."""

from collections.abc import Iterable, Sequence, Set

from service.records import Instrument, Record, Ticker
from service.settings import MarketSettings

DAY_MS = 86_400_000
NEAR_NAMES = 3
NEAR_RATIO = 0.8
DELIVERY_MARGIN_MS = 4 * DAY_MS  # a shadow position lives as long (96 h) and must be able to end before


class Universe(Record, frozen=True, kw_only=True):
    """Symbols by falling 24 h quote volume, and how many were left out for each reason."""

    symbols: tuple[str, ...]
    dropped: dict[str, int]


def select(
    instruments: Sequence[Instrument],
    tickers: Sequence[Ticker],
    *,
    settings: MarketSettings,
    held: Set[str],
    now_ms: int,
) -> Universe:
    """The top `settings.symbols` by quote volume; ties go by name, so equal input gives equal output.

    Symbols with an open position (`held`) are always in, whatever the venue says about them; they take
    the place of the least liquid others, so the result is larger than asked only when more are held.
    """
    volumes = {ticker.symbol: ticker.quote_volume for ticker in tickers}
    dropped: dict[str, int] = {}
    allowed: list[str] = []
    for instrument in instruments:
        if instrument.symbol in held:
            continue
        reason = _reason_to_drop(instrument, volumes.get(instrument.symbol), settings, now_ms)
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
        else:
            allowed.append(instrument.symbol)

    def by_volume(symbol: str) -> tuple[float, str]:
        return -volumes.get(symbol, 0.0), symbol

    allowed.sort(key=by_volume)
    room = max(settings.symbols - len(held), 0)
    if len(allowed) > room:
        dropped["below_top"] = len(allowed) - room
    return Universe(symbols=tuple(sorted({*allowed[:room], *held}, key=by_volume)), dropped=dropped)


def unlisted(exclude: Iterable[str], instruments: Iterable[Instrument]) -> dict[str, list[str]]:
    """The names of `market.exclude` that the venue does not list, each with the nearest that it does."""
    listed = {instrument.symbol for instrument in instruments}
    return {name: _near(name, listed) for name in dict.fromkeys(exclude) if name not in listed}


def _near(name: str, listed: Set[str]) -> list[str]:
    from difflib import get_close_matches  # for a mistake only: a daemon that starts does without it

    plain = "".join(filter(str.isalnum, name)).upper()
    begun = sorted((symbol for symbol in listed if plain and symbol.startswith(plain)), key=len)
    like = get_close_matches(plain, sorted(listed), NEAR_NAMES, NEAR_RATIO)
    return list(dict.fromkeys([*begun, *like]))[:NEAR_NAMES]


def mistaken(gone: dict[str, list[str]], once_listed: Set[str], mode: str) -> dict[str, list[str]]:
    """Those of `unlisted` that must be mistakes: the venue never listed them, and what was meant would trade.

    A simulated exchange lists a part of the market: there only a name near a listed one is.
    """
    return {name: near for name, near in gone.items() if name not in once_listed and (near or mode != "sim")}


def unlisted_words(found: dict[str, list[str]]) -> str:
    """For a person: what is meant is not excluded."""
    names = (
        f"{name!r}" + (f" (is {' or '.join(near)} meant?)" if near else "") for name, near in found.items()
    )
    return f"market.exclude: the venue lists no {', no '.join(names)}, so nothing is excluded by that name"


def _reason_to_drop(
    instrument: Instrument, volume: float | None, settings: MarketSettings, now_ms: int
) -> str:
    age_days = (now_ms - instrument.onboard_ms) / DAY_MS
    checks = (
        ("excluded", instrument.symbol in settings.exclude),
        ("quote_asset", instrument.quote_asset != settings.quote_asset),
        ("contract_type", instrument.contract_type not in settings.contract_types),
        ("status", instrument.status != "TRADING"),
        ("too_young", age_days < settings.min_age_days),
        ("near_delivery", 0 < instrument.delivery_ms < now_ms + DELIVERY_MARGIN_MS),
        ("no_volume", volume is None or not volume >= 0.0),
        ("low_volume", volume is not None and volume < settings.min_quote_volume),
    )
    return next((reason for reason, applies in checks if applies), "")
