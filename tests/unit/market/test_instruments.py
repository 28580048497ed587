"""The table of the venue's rules and rounding to its grids."""

import json
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.market.instruments import InstrumentTable, on_grid
from service.monitor.sizes import held_bytes
from service.records import Instrument

PAYLOADS = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "payloads"


def instrument(symbol: str = "BTCUSDT", **changes: object) -> Instrument:
    rules = Instrument(
        symbol=symbol,
        base_asset="BTC",
        quote_asset="USDT",
        contract_type="PERPETUAL",
        status="TRADING",
        onboard_ms=1_569_398_400_000,
        delivery_ms=4_133_404_800_000,
        tick_size=Decimal("0.10"),
        step_size=Decimal("0.001"),
        market_step_size=Decimal("0.01"),
        min_price=Decimal("556.80"),
        max_price=Decimal("4529764"),
        min_quantity=Decimal("0.001"),
        max_quantity=Decimal("1000"),
        market_min_quantity=Decimal("0.01"),
        market_max_quantity=Decimal("120"),
        min_notional=Decimal("100"),
        multiplier_up=Decimal("1.05"),
        multiplier_down=Decimal("0.95"),
    )
    return msgspec.structs.replace(rules, **changes)


@pytest.mark.parametrize(("rounding", "expected"), [(ROUND_FLOOR, "61234.50"), (ROUND_CEILING, "61234.60")])
def test_a_price_is_rounded_the_way_it_is_asked(rounding, expected):
    table = InstrumentTable([instrument()])
    assert str(table.quantise_price("BTCUSDT", Decimal("61234.56"), rounding)) == expected


def test_a_quantity_is_floored_on_the_grid_of_its_order_type():
    table = InstrumentTable([instrument()])
    assert table.quantise_quantity("BTCUSDT", Decimal("0.0199")) == Decimal("0.01")
    assert table.quantise_quantity("BTCUSDT", Decimal("0.0199"), market=False) == Decimal("0.019")
    assert table.quantise_quantity("BTCUSDT", Decimal("0.0099")) == 0


@given(
    st.decimals("0.00000001", "1000000", places=8),
    st.sampled_from(["0.1", "0.00001", "1", "10", "0.005", "100"]).map(Decimal),
)
def test_a_value_on_the_grid_is_a_multiple_and_less_than_a_step_away(value, step):
    floored = on_grid(value, step, ROUND_FLOOR)
    assert floored % step == 0
    assert 0 <= value - floored < step
    assert on_grid(floored, step, ROUND_FLOOR) == floored


@pytest.mark.parametrize(
    ("quantity", "price", "options", "words"),
    [
        ("0.01", "20000", {}, ""),
        ("0.005", "20000", {}, "below the minimum 0.01"),
        ("0.005", "20000", {"market": False}, ""),
        ("0", "20000", {}, "below the minimum"),
        ("121", "20000", {}, "above the maximum 120"),
        ("121", "20000", {"market": False}, ""),
        ("0.01", "9999", {}, "notional 99.99 below the minimum 100"),
        ("0.01", "9999", {"reduce_only": True}, ""),
    ],
)
def test_what_the_venue_would_refuse_is_said_in_words(quantity, price, options, words):
    table = InstrumentTable([instrument()])
    problem = table.order_problem("BTCUSDT", Decimal(quantity), Decimal(price), **options)
    assert words in problem
    assert bool(problem) is bool(words)


def test_numbers_that_no_rule_has_any_more_are_forgotten():
    table = InstrumentTable([instrument()])
    empty = held_bytes(table)
    for price in range(1_000_000, 1_002_000):
        table.refresh([instrument(max_price=Decimal(price))])
    assert held_bytes(table) < empty + 1_000


def test_a_refresh_keeps_what_did_not_change_and_forgets_what_is_gone():
    table = InstrumentTable([instrument("A"), instrument("B"), instrument("C")])
    kept = table.get("A")
    changed = table.refresh(
        [instrument("A"), instrument("B", tick_size=Decimal("0.01")), instrument("币USDT")]
    )
    assert changed == 2
    assert table.get("A") is kept
    assert table["B"].tick_size == Decimal("0.01")
    assert "C" not in table
    assert "币USDT" in table
    assert len(table) == 3


def test_equal_decimals_are_stored_once():
    table = InstrumentTable(
        [instrument("A", tick_size=Decimal("0.10")), instrument("B", tick_size=Decimal("0.1"))]
    )
    table.refresh([instrument("A"), instrument("B", min_notional=Decimal("1E+2"))])
    assert table["A"].step_size is table["B"].step_size
    assert str(table["A"].tick_size) == "0.10"


def test_a_symbol_without_rules_cannot_be_quantised():
    with pytest.raises(KeyError):
        InstrumentTable().quantise_quantity("BTCUSDT", Decimal(1))


def test_the_venues_smallest_quantities_lie_on_multiples_of_their_step():
    path = PAYLOADS / "cryptofeed" / "fapi_exchangeInfo_2021-07-21.json"
    if not path.exists():
        pytest.skip("recorded payloads are not beside the checkout")
    for symbol in json.loads(path.read_text())["symbols"]:
        for rule in symbol["filters"]:
            if rule["filterType"] in ("LOT_SIZE", "MARKET_LOT_SIZE"):
                assert Decimal(rule["minQty"]) % Decimal(rule["stepSize"]) == 0, symbol["symbol"]
            if rule["filterType"] == "PRICE_FILTER":
                assert Decimal(rule["minPrice"]) % Decimal(rule["tickSize"]) == 0, symbol["symbol"]
