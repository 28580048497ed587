"""Which symbols are traded."""

from decimal import Decimal

import pytest

from service.market.universe import DAY_MS, mistaken, select, unlisted, unlisted_words
from service.records import Instrument, Ticker
from service.settings import MarketSettings

NOW = 1_760_000_000_000


def listed(symbol: str, **changes: object) -> Instrument:
    one = Decimal(1)
    grids = (
        "tick_size step_size market_step_size min_price max_price min_quantity max_quantity "
        "market_min_quantity market_max_quantity min_notional multiplier_up multiplier_down"
    )
    words = {
        "symbol": symbol,
        "base_asset": symbol[:3],
        "quote_asset": "USDT",
        "contract_type": "PERPETUAL",
        "status": "TRADING",
        "onboard_ms": NOW - 400 * DAY_MS,
        "delivery_ms": 4_133_404_800_000,
    }
    return Instrument(**{**dict.fromkeys(grids.split(), one), **words, **changes})


def traded(**volumes: float) -> list[Ticker]:
    return [Ticker(symbol=s, last_price=1.0, quote_volume=v) for s, v in volumes.items()]


def choose(instruments, tickers, held=frozenset(), **settings):
    return select(instruments, tickers, settings=MarketSettings(**settings), held=held, now_ms=NOW)


def test_the_most_liquid_symbols_come_first_and_the_rest_is_counted():
    universe = choose([listed(s) for s in "ABCD"], traded(A=1, B=4, C=3, D=2), symbols=3)
    assert universe.symbols == ("B", "C", "D")
    assert universe.dropped == {"below_top": 1}


def test_equal_volumes_are_ordered_by_name_whatever_the_venues_order():
    names = ["C", "A", "B"]
    universe = choose([listed(s) for s in names], traded(B=1, C=1, A=1), symbols=2)
    assert universe.symbols == ("A", "B")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quote_asset": "USDC"}, "quote_asset"),
        ({"contract_type": "TRADIFI_PERPETUAL"}, "contract_type"),
        ({"contract_type": "CURRENT_QUARTER"}, "contract_type"),
        ({"status": "SETTLING"}, "status"),
        ({"onboard_ms": NOW - 6 * DAY_MS}, "too_young"),
        ({"onboard_ms": NOW + DAY_MS}, "too_young"),
        ({"delivery_ms": NOW + 3 * DAY_MS}, "near_delivery"),
        ({"delivery_ms": NOW - DAY_MS}, "near_delivery"),
    ],
)
def test_a_symbol_the_settings_do_not_allow_is_dropped_with_its_reason(changes, reason):
    instruments = [listed("GOOD"), listed("BAD", **changes)]
    universe = choose(instruments, traded(GOOD=1, BAD=2))
    assert universe.symbols == ("GOOD",)
    assert universe.dropped == {reason: 1}
    assert choose(instruments, traded(GOOD=1, BAD=2), held={"BAD"}).symbols == ("BAD", "GOOD")


@pytest.mark.parametrize(
    ("tickers", "settings", "reason"),
    [
        (traded(GOOD=5), {}, "no_volume"),
        (traded(GOOD=5, BAD=float("nan")), {}, "no_volume"),
        (traded(GOOD=5, BAD=4), {"min_quote_volume": 4.5}, "low_volume"),
        (traded(GOOD=5, BAD=9), {"exclude": ("BAD",)}, "excluded"),
    ],
)
def test_volume_and_the_exclude_list_are_obeyed(tickers, settings, reason):
    universe = choose([listed("GOOD"), listed("BAD")], tickers, **settings)
    assert universe.symbols == ("GOOD",)
    assert universe.dropped == {reason: 1}


def test_a_perpetual_without_a_delivery_date_is_traded():
    assert choose([listed("A", delivery_ms=0)], traded(A=1)).symbols == ("A",)


def test_held_symbols_take_the_place_of_the_least_liquid():
    universe = choose([listed(s) for s in "ABCD"], traded(A=9, B=4, C=3, D=1), held={"D"}, symbols=2)
    assert universe.symbols == ("A", "D")


def test_more_held_symbols_than_asked_are_all_kept_even_when_the_venue_forgot_them():
    universe = choose([listed("A")], traded(A=9), held={"GONE", "币安人生USDT"}, symbols=1)
    assert universe.symbols == ("GONE", "币安人生USDT")


def test_an_excluded_name_that_is_not_listed_is_told_with_the_nearest():
    venue = [listed(s) for s in ("BTCUSDT", "ETHUSDT", "DOGEUSDT")]
    found = unlisted(["BTCUSD", "ethusdt", "DOGEUSDT", "@@", "BTC", "BTC/USDT"], venue)
    assert found["BTC"] == found["BTC/USDT"] == ["BTCUSDT"]
    assert found["BTCUSD"][0] == "BTCUSDT"
    assert found["ethusdt"][0] == "ETHUSDT"
    assert found["@@"] == []
    assert "DOGEUSDT" not in found
    words = unlisted_words(found)
    for word in ("market.exclude", "'BTCUSD' (is BTCUSDT", "nothing is excluded"):
        assert word in words


def test_excluded_names_that_are_listed_are_no_finding():
    assert unlisted(["A", "B"], [listed(s) for s in "ABC"]) == {}


@pytest.mark.parametrize(
    ("name", "near", "once", "mode", "wrong"),
    [
        ("BTCUSD", ["BTCUSDT"], (), "sim", True),
        ("BTCUSD", ["BTCUSDT"], (), "live", True),
        ("LUNAUSDT", [], (), "live", True),
        ("LUNAUSDT", [], (), "sim", False),  # a simulated exchange lists a part of the market
        ("LUNAUSDT", ["LUNA2USDT"], ("LUNAUSDT",), "live", False),  # delisted since an earlier run
    ],
)
def test_a_name_that_was_never_listed_is_a_mistake(name, near, once, mode, wrong):
    assert (mistaken({name: near}, set(once), mode) == {name: near}) is wrong
