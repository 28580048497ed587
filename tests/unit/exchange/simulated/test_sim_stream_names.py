"""Stream names, frames and the message budget of the simulated venue."""

import pytest
import structlog.testing

from service.exchange.simulated.streams import THINNING_WINDOW_S, Budget, parse_stream, text_frame

INDEX = {"btcusdt": 0, "币安人生usdt": 1}


@pytest.mark.parametrize(
    ("name", "kind", "place", "timeframe", "route"),
    [
        ("btcusdt@kline_5m", "kline", 0, "5m", "market"),
        ("币安人生usdt@kline_1h", "kline", 1, "1h", "market"),
        ("btcusdt@markPrice@1s", "markPrice@1s", 0, "", "market"),
        ("btcusdt@markPrice@3s", "markPrice", 0, "", "market"),
        ("btcusdt@bookTicker", "bookTicker", 0, "", "public"),
        ("!bookTicker", "!bookTicker", -1, "", "public"),
        ("!miniTicker@arr", "!miniTicker@arr", -1, "", "market"),
        ("!markPrice@arr@1s", "!markPrice@arr@1s", -1, "", "market"),
    ],
)
def test_a_stream_name_tells_kind_symbol_and_route(
    name: str, kind: str, place: int, timeframe: str, route: str
) -> None:
    topic = parse_stream(name, INDEX)
    assert topic is not None
    assert (topic.kind, topic.place, topic.timeframe, topic.route) == (kind, place, timeframe, route)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "BTCUSDT@kline_5m",
        "btcusdt@kline_7m",
        "btcusdt",
        "btcusdt@nothing",
        "!nothing",
        "btcusdt@!bookTicker",
    ],
)
def test_what_is_not_served_has_no_topic(name: str) -> None:
    assert parse_stream(name, INDEX) is None


@pytest.mark.parametrize(("length", "head"), [(0, 2), (125, 2), (126, 4), (65_535, 4), (65_536, 10)])
def test_a_frame_states_its_payloads_length(length: int, head: int) -> None:
    frame = text_frame(b"x" * length)
    assert frame[0] == 0x81
    assert len(frame) == head + length
    stated = frame[1] if head == 2 else int.from_bytes(frame[2:head], "big")
    assert stated == length


def test_a_budget_lets_pass_what_fits_and_thins_what_does_not() -> None:
    budget = Budget(100, 0.0)
    assert budget.share(50, 0.0) == 1.0
    budget.spend(50)
    assert budget.share(200, 0.0) == 0.25
    budget.spend(50)
    assert budget.share(10, 0.0) == 0.0
    budget.refill(0.1)
    assert budget.share(20, 0.1) == 0.5


def test_closes_borrow_no_more_than_a_second() -> None:
    budget = Budget(100, 0.0)
    budget.spend(10_000)
    budget.refill(1.0)
    assert budget.share(1, 1.0) == 0.0
    budget.refill(1.5)
    assert budget.share(100, 1.5) == 0.5


def test_an_idle_budget_holds_no_more_than_a_second() -> None:
    budget = Budget(100, 0.0)
    budget.refill(1_000.0)
    assert budget.share(200, 1_000.0) == 0.5


def test_lasting_thinning_is_said_once() -> None:

    budget = Budget(100, 0.0)
    with structlog.testing.capture_logs() as lines:
        for second in range(1, 20):
            now_s = second * THINNING_WINDOW_S / 2
            budget.refill(now_s)
            budget.spend(round(budget.share(400, now_s) * 400))
    assert [line["one_in"] for line in lines] == [4.0]
