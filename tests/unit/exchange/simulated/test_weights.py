"""The simulated venue's guard against too many requests and orders."""

import pytest

from service.exchange.simulated.faults import VenueFault
from service.exchange.simulated.weights import (
    IGNORED_WARNINGS_BEFORE_BAN,
    ORDERS_PER_10_S,
    WEIGHT_PER_MINUTE,
    RateLimits,
    request_weight,
)

MINUTE = 60_000
T0 = 1_000 * MINUTE


@pytest.mark.parametrize(
    ("limit", "weight"),
    [("1", 1), ("99", 1), ("100", 2), ("499", 2), ("500", 5), ("1000", 5), ("1001", 10), ("", 5)],
)
def test_candles_weigh_by_how_many_are_asked_for(limit: str, weight: int) -> None:
    assert request_weight("GET", "/fapi/v1/klines", {"symbol": "X", "limit": limit}) == weight


@pytest.mark.parametrize(
    ("method", "path", "one", "every"),
    [
        ("GET", "/fapi/v1/ticker/24hr", 1, 40),
        ("GET", "/fapi/v1/openOrders", 1, 40),
        ("GET", "/fapi/v1/openAlgoOrders", 1, 40),
        ("GET", "/fapi/v1/ticker/bookTicker", 2, 5),
        ("GET", "/fapi/v1/premiumIndex", 1, 10),
        ("POST", "/fapi/v1/order", 0, 0),
        ("GET", "/fapi/v3/account", 5, 5),
        ("GET", "/fapi/v1/exchangeInfo", 1, 1),
    ],
)
def test_some_requests_weigh_more_without_a_symbol(method: str, path: str, one: int, every: int) -> None:
    assert request_weight(method, path, {"symbol": "BTCUSDT"}) == one
    assert request_weight(method, path, {}) == every


def test_weight_is_counted_per_address_and_forgotten_with_the_minute() -> None:
    limits = RateLimits()
    limits.charge_weight("a", 40, T0 + 1)
    limits.charge_weight("a", 2, T0 + MINUTE - 1)
    limits.charge_weight("b", 1, T0 + MINUTE - 1)
    assert limits.used_weight("a", T0 + MINUTE - 1) == 42
    assert limits.used_weight("b", T0 + MINUTE - 1) == 1
    assert limits.used_weight("a", T0 + MINUTE) == 0


def test_too_much_weight_is_refused_until_the_minute_ends() -> None:
    limits = RateLimits()
    limits.charge_weight("a", WEIGHT_PER_MINUTE, T0)
    with pytest.raises(VenueFault) as refusal:
        limits.charge_weight("a", 1, T0 + 1)
    assert (refusal.value.code, refusal.value.http_status) == (-1003, 429)
    limits.charge_weight("a", 1, T0 + MINUTE)


def test_who_goes_on_after_the_warning_is_banned_until_the_stated_time() -> None:
    limits = RateLimits()
    limits.charge_weight("a", WEIGHT_PER_MINUTE, T0)
    statuses = []
    for _ in range(IGNORED_WARNINGS_BEFORE_BAN + 1):
        with pytest.raises(VenueFault) as refusal:
            limits.charge_weight("a", 1, T0 + 5)
        statuses.append(refusal.value.http_status)
    assert statuses == [429] * IGNORED_WARNINGS_BEFORE_BAN + [418]
    until_ms = T0 + 5 + 2 * MINUTE
    assert f"IP banned until {until_ms}." in refusal.value.message
    with pytest.raises(VenueFault) as refusal:  # a new minute does not lift the ban
        limits.charge_weight("a", 1, until_ms - 1)
    assert refusal.value.http_status == 418
    limits.charge_weight("a", 1, until_ms)
    limits.charge_weight("b", 1, T0 + 6)


def test_the_second_ban_lasts_longer() -> None:
    limits = RateLimits()
    untils = []
    for start_ms in (T0, T0 + 100 * MINUTE):
        limits.charge_weight("a", WEIGHT_PER_MINUTE, start_ms)
        for _ in range(IGNORED_WARNINGS_BEFORE_BAN + 1):
            with pytest.raises(VenueFault) as refusal:
                limits.charge_weight("a", 1, start_ms)
        untils.append(int(refusal.value.message.split("until ")[1].split(".")[0]) - start_ms)
    assert untils == [2 * MINUTE, 4 * MINUTE]


def test_orders_are_counted_in_two_windows_per_account() -> None:
    limits = RateLimits()
    limits.charge_orders("k", 1, 1, T0)
    limits.charge_orders("k", 5, 1, T0 + 10_000)
    assert limits.order_counts("k", T0 + 10_000) == (5, 2)
    assert limits.order_counts("other", T0 + 10_000) == (0, 0)


def test_too_many_orders_are_refused_with_their_own_code() -> None:
    limits = RateLimits()
    for _ in range(ORDERS_PER_10_S):
        limits.charge_orders("k", 1, 1, T0)
    with pytest.raises(VenueFault) as refusal:
        limits.charge_orders("k", 1, 1, T0 + 9_999)
    assert (refusal.value.code, refusal.value.http_status) == (-1015, 429)
    limits.charge_orders("k", 1, 1, T0 + 10_000)


def test_funding_history_has_a_window_of_its_own() -> None:
    limits = RateLimits()
    for _ in range(500):
        limits.charge_funding("a", T0)
    with pytest.raises(VenueFault) as refusal:
        limits.charge_funding("a", T0)
    assert refusal.value.code == -1003
    assert limits.used_weight("a", T0) == 0
