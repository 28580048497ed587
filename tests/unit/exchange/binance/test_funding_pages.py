import msgspec

from service.clock import ManualClock
from service.exchange.binance import adapter
from service.exchange.binance.adapter import BinanceExchange
from service.settings import ExchangeSettings


class Pages:
    """Answers as the venue does: the first `limit` rows from startTime on, at times with some jitter."""

    def __init__(self, rows: list[tuple[str, int]]) -> None:
        self.rows = sorted(rows, key=lambda row: row[1])
        self.asked = 0

    async def send(self, call: object, params: dict[str, str]) -> bytes:
        self.asked += 1
        start, end, limit = (int(params[name]) for name in ("startTime", "endTime", "limit"))
        page = [row for row in self.rows if start <= row[1] <= end][:limit]
        return msgspec.json.encode(
            [{"symbol": s, "fundingTime": at, "fundingRate": "0.0001", "markPrice": ""} for s, at in page]
        )


async def test_full_pages_are_read_on_and_an_instant_cut_by_a_page_is_read_whole(monkeypatch):
    monkeypatch.setattr(adapter, "MAX_FUNDING_ROWS", 4)
    hour = 3_600_000
    rows = [(f"S{n}", hour + n) for n in range(3)] + [(f"S{n}", 2 * hour + n) for n in range(3)]
    pages = Pages(rows)
    exchange = BinanceExchange(pages, ExchangeSettings(), ManualClock(3 * hour), "MARK_PRICE")
    rates = await exchange.funding_rates(0, 3 * hour)
    assert [(r.symbol, r.at_ms) for r in rates] == [(s, at // hour * hour) for s, at in rows]
    assert pages.asked == 2


async def test_an_instant_that_fills_pages_alone_does_not_hold_it_up(monkeypatch):
    monkeypatch.setattr(adapter, "MAX_FUNDING_ROWS", 2)
    hour = 3_600_000
    pages = Pages([("A", hour), ("B", hour), ("A", 2 * hour)])
    exchange = BinanceExchange(pages, ExchangeSettings(), ManualClock(3 * hour), "MARK_PRICE")
    rates = await exchange.funding_rates(hour, 3 * hour)
    assert [(r.symbol, r.at_ms) for r in rates] == [("A", hour), ("B", hour), ("A", 2 * hour)]
