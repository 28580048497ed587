"""Request weights and order counts per fixed window, as the venue keeps them.

Windows are cut from market time, the only time the venue's answers speak of: a market that runs 60 times
as fast grants 60 times the weight per wall second. Sources: the venue's endpoint pages for the
weights, `exchangeInfo.rateLimits` for the limits.
"""

from collections.abc import Callable, Mapping

from service.exchange.simulated.faults import VenueFault

WEIGHT_PER_MINUTE = 2_400
ORDERS_PER_10_S = 300
ORDERS_PER_MINUTE = 1_200
FUNDING_REQUESTS_PER_5_MINUTES = 500

# The venue bans an address that goes on after 429; how long it watches first is not published.
IGNORED_WARNINGS_BEFORE_BAN = 20
FIRST_BAN_MS = 120_000
LONGEST_BAN_MS = 3 * 86_400_000

MINUTE_MS = 60_000
TEN_SECONDS_MS = 10_000
FIVE_MINUTES_MS = 300_000

Params = Mapping[str, str]
Weight = int | Callable[[Params], int]


def _limit(params: Params, default: int) -> int:
    text = params.get("limit", "")
    return int(text) if text.isdecimal() else default


def kline_weight(params: Params) -> int:
    """1, 2, 5 or 10 for fewer than 100, fewer than 500, up to 1,000 and more candles."""
    limit = _limit(params, 500)
    if limit < 100:
        return 1
    if limit < 500:
        return 2
    return 5 if limit <= 1_000 else 10


def depth_weight(params: Params) -> int:
    limit = _limit(params, 500)
    for most, weight in ((50, 2), (100, 5), (500, 10)):
        if limit <= most:
            return weight
    return 20


def by_symbol(one: int, every: int) -> Callable[[Params], int]:
    """A weight that depends on whether the request names a symbol."""
    return lambda params: one if params.get("symbol") else every


WEIGHTS: dict[tuple[str, str], Weight] = {
    ("GET", "/fapi/v1/klines"): kline_weight,
    ("GET", "/fapi/v1/continuousKlines"): kline_weight,
    ("GET", "/fapi/v1/depth"): depth_weight,
    ("GET", "/fapi/v1/ticker/24hr"): by_symbol(1, 40),
    ("GET", "/fapi/v1/ticker/price"): by_symbol(1, 2),
    ("GET", "/fapi/v2/ticker/price"): by_symbol(1, 2),
    ("GET", "/fapi/v1/ticker/bookTicker"): by_symbol(2, 5),
    ("GET", "/fapi/v1/premiumIndex"): by_symbol(1, 10),
    ("GET", "/fapi/v1/fundingRate"): 0,  # these two have a window of their own
    ("GET", "/fapi/v1/fundingInfo"): 0,
    ("POST", "/fapi/v1/order"): 0,
    ("POST", "/fapi/v1/algoOrder"): 0,
    ("POST", "/fapi/v1/batchOrders"): 5,
    ("GET", "/fapi/v1/openOrders"): by_symbol(1, 40),
    ("GET", "/fapi/v1/openAlgoOrders"): by_symbol(1, 40),
    ("GET", "/fapi/v1/allOrders"): 5,
    ("GET", "/fapi/v1/allAlgoOrders"): 5,
    ("GET", "/fapi/v1/userTrades"): 5,
    ("POST", "/fapi/v1/countdownCancelAll"): 10,
    ("GET", "/fapi/v2/account"): 5,
    ("GET", "/fapi/v3/account"): 5,
    ("GET", "/fapi/v2/balance"): 5,
    ("GET", "/fapi/v3/balance"): 5,
    ("GET", "/fapi/v2/positionRisk"): 5,
    ("GET", "/fapi/v3/positionRisk"): 5,
    ("GET", "/fapi/v1/symbolConfig"): 5,
    ("GET", "/fapi/v1/accountConfig"): 5,
    ("GET", "/fapi/v1/positionSide/dual"): 30,
    ("GET", "/fapi/v1/multiAssetsMargin"): 30,
    ("GET", "/fapi/v1/commissionRate"): 20,
    ("GET", "/fapi/v1/income"): 30,
}

# (counted in 10 seconds, counted in a minute)
ORDER_COUNTS: dict[tuple[str, str], tuple[int, int]] = {
    ("POST", "/fapi/v1/order"): (1, 1),
    ("POST", "/fapi/v1/algoOrder"): (1, 1),
    ("POST", "/fapi/v1/batchOrders"): (5, 1),
}

FUNDING_PATHS = frozenset(("/fapi/v1/fundingRate", "/fapi/v1/fundingInfo"))


def request_weight(method: str, path: str, params: Params) -> int:
    """What one request costs its address; 1 for what the table does not name."""
    weight = WEIGHTS.get((method, path), 1)
    return weight if isinstance(weight, int) else weight(params)


class FixedWindow:
    """Counts per name in windows of `length_ms` that begin on its multiples; old windows are dropped."""

    def __init__(self, length_ms: int) -> None:
        self.length_ms = length_ms
        self._window = -1
        self._counts: dict[str, int] = {}

    def add(self, name: str, amount: int, now_ms: int) -> int:
        """Count and return what the window holds for `name`."""
        window = now_ms // self.length_ms
        if window != self._window:
            self._window = window
            self._counts.clear()
        used = self._counts.get(name, 0) + amount
        self._counts[name] = used
        return used

    def end_ms(self, now_ms: int) -> int:
        """First millisecond after the window that holds `now_ms`."""
        return (now_ms // self.length_ms + 1) * self.length_ms


class RateLimits:
    """The venue's guard: weight per address, orders per account, bans for those who go on.

    Raises VenueFault -1003 (429, or 418 while banned) and -1015.
    """

    def __init__(self) -> None:
        self._weight = FixedWindow(MINUTE_MS)
        self._warnings = FixedWindow(MINUTE_MS)
        self._funding = FixedWindow(FIVE_MINUTES_MS)
        self._orders_10_s = FixedWindow(TEN_SECONDS_MS)
        self._orders_minute = FixedWindow(MINUTE_MS)
        self._banned_until_ms: dict[str, int] = {}
        self._bans: dict[str, int] = {}

    def used_weight(self, address: str, now_ms: int) -> int:
        return self._weight.add(address, 0, now_ms)

    def order_counts(self, account: str, now_ms: int) -> tuple[int, int]:
        """(in 10 seconds, in a minute)."""
        return self._orders_10_s.add(account, 0, now_ms), self._orders_minute.add(account, 0, now_ms)

    def charge_weight(self, address: str, weight: int, now_ms: int) -> None:
        self._refuse_banned(address, now_ms)
        if self._weight.add(address, weight, now_ms) > WEIGHT_PER_MINUTE:
            self._warn(
                address,
                f"current limit of IP({address}) is {WEIGHT_PER_MINUTE} requests per minute",
                self._weight.end_ms(now_ms),
                now_ms,
            )

    def charge_funding(self, address: str, now_ms: int) -> None:
        self._refuse_banned(address, now_ms)
        if self._funding.add(address, 1, now_ms) > FUNDING_REQUESTS_PER_5_MINUTES:
            limit = f"current limit is {FUNDING_REQUESTS_PER_5_MINUTES} requests per 5 minutes"
            self._warn(address, limit, self._funding.end_ms(now_ms), now_ms)

    def charge_orders(self, account: str, in_10_s: int, in_minute: int, now_ms: int) -> None:
        counted = (
            (self._orders_10_s.add(account, in_10_s, now_ms), ORDERS_PER_10_S, "10 SECOND"),
            (self._orders_minute.add(account, in_minute, now_ms), ORDERS_PER_MINUTE, "1 MINUTE"),
        )
        for used, limit, window in counted:
            if used > limit:
                text = f"Too many new orders; current limit is {limit} orders per {window}."
                raise VenueFault(-1015, text, 429)

    def _refuse_banned(self, address: str, now_ms: int) -> None:
        until_ms = self._banned_until_ms.get(address, 0)
        if now_ms < until_ms:
            raise _banned(until_ms)

    def _warn(self, address: str, limit: str, retry_ms: int, now_ms: int) -> None:
        if self._warnings.add(address, 1, now_ms) > IGNORED_WARNINGS_BEFORE_BAN:
            bans = self._bans.get(address, 0)
            until_ms = now_ms + min(FIRST_BAN_MS << min(bans, 32), LONGEST_BAN_MS)
            self._bans[address] = bans + 1
            self._banned_until_ms[address] = until_ms
            raise _banned(until_ms)
        text = (
            f"Too many requests; {limit}. Please use the websocket for live updates to avoid polling the API."
        )
        raise Throttled(-1003, text, 429, retry_ms)


class Throttled(VenueFault):
    """-1003 with the market time at which requests are welcome again."""

    def __init__(self, code: int, message: str, http_status: int, retry_ms: int) -> None:
        super().__init__(code, message, http_status)
        self.retry_ms = retry_ms


def _banned(until_ms: int) -> Throttled:
    text = (
        f"Way too many requests; IP banned until {until_ms}. "
        "Please use the websocket for live updates to avoid bans."
    )
    return Throttled(-1003, text, 418, until_ms)
