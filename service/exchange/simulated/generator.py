"""A seeded market that needs no files: regimes, jumps, correlated moves, realistic turnover.

Log prices move by beta x market + loading x sector + own moves. Each of the three has regimes (rising,
falling, ranging, wild) that last hours to days; rising and falling are equally likely and equally steep, so a
long and a short strategy meet the same market. A weak pull toward the starting price keeps months of it
plausible. A day is drawn from (seed, day) and the state in which the day before ended, in order of days.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from itertools import product

import numpy as np

from service.exchange.simulated import contracts
from service.exchange.simulated.path import Floats, Ints
from service.exchange.simulated.tape import DAY_CANDLES, DAY_MS, HOUR_MS, Block, Funding, Tape

START_MS = 1_767_607_650_000  # 2026-01-05T10:07:30Z, on no candle's edge
HISTORY_DAYS = 22  # 500 1h candles and a day before the start
KEPT_DAYS = 90
FOREVER_MS = 4_102_444_800_000  # 2100-01-01

SECTORS = 8
TRENDING = 0.35  # probability of each of rising and falling; the rest is ranging or wild
WILD = 0.10
# Drift of a trend in units of one candle's volatility. The market's is slight, or a few hours of it would
# make all symbols long or all short.
MARKET_STEEPNESS, SECTOR_STEEPNESS, OWN_STEEPNESS = 0.04, 0.10, 0.15
MARKET_SCALE, SECTOR_SCALE = 0.0008, 0.0006  # volatility of one 5m candle
WILD_FACTOR = 2.2
JUMP_CHANCE = 0.0004  # per symbol and candle
MARKET_JUMP_CHANCE = 0.0008
PULL = 0.02  # of the distance to the starting price, per day

_KNOWN: tuple[tuple[str, float], ...] = (
    ("BTC", 92_000.0), ("ETH", 3_150.0), ("SOL", 138.0), ("XRP", 2.05), ("BNB", 890.0),
    ("DOGE", 0.142), ("ADA", 0.41), ("SUI", 1.62), ("LINK", 13.4), ("AVAX", 13.6),
    ("1000PEPE", 0.0047), ("LTC", 82.0), ("BCH", 560.0), ("HYPE", 29.0), ("NEAR", 1.74),
    ("DOT", 2.1), ("UNI", 5.6), ("AAVE", 176.0), ("TRX", 0.279), ("ENA", 0.24), ("WLD", 0.58),
    ("ARB", 0.205), ("OP", 0.31), ("APT", 1.78), ("FIL", 1.5), ("ETC", 13.1), ("INJ", 5.4),
    ("TIA", 0.57), ("SEI", 0.13), ("1000SHIB", 0.0083), ("1000BONK", 0.0095), ("WIF", 0.38),
    ("TON", 1.55), ("ATOM", 2.3), ("XLM", 0.24), ("HBAR", 0.134), ("ICP", 3.3), ("CRV", 0.38),
    ("LDO", 0.61), ("ONDO", 0.46), ("TAO", 278.0), ("RENDER", 1.6), ("JUP", 0.22), ("ZEC", 410.0),
    ("ALGO", 0.134), ("GALA", 0.0073), ("SAND", 0.132), ("AXS", 0.93), ("1000FLOKI", 0.048),
    ("币安人生", 0.131), ("MANA", 0.15), ("DYDX", 0.2), ("PENDLE", 2.2), ("STX", 0.29), ("ORDI", 4.3),
    ("FET", 0.24), ("GRT", 0.043), ("RUNE", 0.64), ("EGLD", 7.2), ("THETA", 0.31), ("FLOW", 0.19),
    ("CHZ", 0.034), ("IMX", 0.27), ("KAS", 0.046), ("BLUR", 0.031), ("MINA", 0.088), ("COMP", 28.0),
    ("SNX", 0.49), ("ZRX", 0.13), ("ENS", 10.1), ("GMX", 8.9), ("1INCH", 0.17), ("YFI", 3_600.0),
    ("KSM", 8.1), ("DASH", 46.0), ("XMR", 395.0), ("NEO", 3.9), ("QTUM", 1.4),
)  # fmt: skip
_HEADS = (
    "AR",
    "BEL",
    "COR",
    "DEX",
    "EVO",
    "FLA",
    "GRI",
    "HEX",
    "IVO",
    "JOL",
    "KRO",
    "LUM",
    "MEG",
    "NOV",
    "ORB",
)
_TAILS = (
    "A",
    "AI",
    "BIT",
    "DA",
    "EX",
    "FI",
    "GO",
    "IX",
    "LY",
    "MO",
    "NET",
    "ON",
    "PAD",
    "RA",
    "SWAP",
    "TA",
    "UM",
)
_EXTRA = ("", "X", "Y", "Z")


@dataclass(slots=True)
class _State:
    """Where a day ended: float64[f] per factor, then float64[n] per symbol. Factors: market, sectors, own."""

    log_price: Floats
    regime: Ints  # [f]
    heat: Floats  # [f] log of volatility against its normal
    open_ticks: Ints  # [n] last close


class Generated:
    """Days of the generated market, extended as they are asked for; the newest `KEPT_DAYS` are kept."""

    def __init__(self, seed: int, symbols: int, first_day: int) -> None:
        self.first_day = first_day
        self._seed = seed
        self._days: OrderedDict[int, Block] = OrderedDict()
        self._next_day = first_day
        named = _names(symbols)
        self.symbols = tuple(f"{base}USDT" for base, _ in named)
        draws = self._draws(0)
        rank = np.arange(1, symbols + 1)
        odd_prices = 10 ** draws.uniform(-2.5, 1.3, symbols)
        prices = np.array([known or odd for (_, known), odd in zip(named, odd_prices, strict=True)])
        self.daily_turnover = 1.6e10 * rank**-1.05 * np.exp(0.25 * draws.standard_normal(symbols))
        self.grids = tuple(
            contracts.grid_for_price(s, p) for s, p in zip(self.symbols, prices.tolist(), strict=True)
        )
        self.prices = prices
        self._tick_scale = np.array([10.0**g.price_decimals for g in self.grids])
        self._lot_scale = np.array([10.0**g.quantity_decimals for g in self.grids])
        self._sector = draws.integers(0, SECTORS, symbols)
        # A day has 288 candles, so 0.0013 is 2.2 % a day before trends.
        own = 0.0007 + 0.0007 * np.minimum(rank / 100, 1.0) * draws.uniform(0.6, 1.4, symbols)
        own[0] *= 0.6
        self._scale = np.concatenate([[MARKET_SCALE], np.full(SECTORS, SECTOR_SCALE), own])
        self._steepness = np.concatenate(
            [[MARKET_STEEPNESS], np.full(SECTORS, SECTOR_STEEPNESS), np.full(symbols, OWN_STEEPNESS)]
        )
        self._beta = np.clip(draws.normal(1.15, 0.25, symbols), 0.5, 2.0)
        self._loading = np.clip(draws.normal(0.9, 0.3, symbols), 0.0, 1.8)
        self._beta[0], self._loading[0] = 0.9, 0.2
        self._home = np.log(prices)
        self._state = _State(
            log_price=self._home.copy(),
            regime=_regimes(draws, len(self._scale)),
            heat=0.35 * draws.standard_normal(len(self._scale)),
            open_ticks=np.rint(prices * self._tick_scale).astype(np.int64),
        )

    def block(self, day: int) -> Block | None:
        if day < self.first_day:
            return None
        while self._next_day <= day:
            self._days[self._next_day] = self._day(self._next_day)
            self._next_day += 1
            if len(self._days) > KEPT_DAYS:
                self._days.popitem(last=False)
        return self._days.get(day)

    def _draws(self, day: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=np.array([self._seed, day], dtype=np.uint64)))

    def _day(self, day: int) -> Block:
        draws, state, factors = self._draws(day), self._state, len(self._scale)
        regime = _regime_path(draws, state.regime)
        heat, state.heat = _heat_path(draws, state.heat)
        state.regime = regime[:, -1]
        level = np.exp(heat) * np.where(regime == 2, WILD_FACTOR, 1.0) * _season() ** 0.5
        shock = draws.standard_t(4, (factors, DAY_CANDLES)) / math.sqrt(2.0)
        chance = np.where(np.arange(factors) == 0, MARKET_JUMP_CHANCE, JUMP_CHANCE)[:, None]
        jumps = draws.random((factors, DAY_CANDLES)) < chance
        shock += jumps * draws.choice([-1.0, 1.0], shock.shape) * draws.uniform(6.0, 16.0, shock.shape)
        drift = self._steepness[:, None] * np.where(regime == 2, 0, regime)
        moves = self._scale[:, None] * level * (shock + drift)
        own = moves[1 + SECTORS :]
        total = self._beta[:, None] * moves[0] + self._loading[:, None] * moves[1 + self._sector] + own
        total += (PULL / DAY_CANDLES) * (self._home - state.log_price)[:, None]
        logs = state.log_price[:, None] + np.cumsum(total, axis=1)
        state.log_price = logs[:, -1]
        parts = (self._beta * MARKET_SCALE, self._loading * SECTOR_SCALE, self._scale[1 + SECTORS :])
        usual: Floats = np.sqrt(sum(part**2 for part in parts))
        return self._rounded(draws, logs, np.abs(total) / usual[:, None], level[1 + SECTORS :], usual)

    def _rounded(
        self, draws: np.random.Generator, logs: Floats, effort: Floats, level: Floats, usual: Floats
    ) -> Block:
        """Candles on the grid around the closes; `effort` is each move in units of its usual size."""
        scale, shape = self._tick_scale[:, None], logs.shape
        close = np.maximum(np.rint(np.exp(logs) * scale), 1.0)
        gap = np.where(draws.random(shape) < 0.2, draws.choice([-1.0, 1.0], shape), 0.0)
        before = np.concatenate([self._state.open_ticks[:, None], close[:, :-1]], axis=1)
        open_ = np.maximum(before + gap, 1.0)
        self._state.open_ticks = close[:, -1].astype(np.int64)
        reach = 0.45 * usual[:, None] * level
        above, below = (np.abs(draws.standard_normal(shape)) * reach for _ in range(2))
        high = np.rint(np.maximum(open_, close) * np.exp(above))
        low = np.maximum(np.rint(np.minimum(open_, close) * np.exp(-below)), 1.0)
        wave = np.exp(0.45 * draws.standard_normal(shape))
        notional = self.daily_turnover[:, None] / DAY_CANDLES * _season() * wave * (0.45 + 0.55 * effort)
        lots = np.maximum(np.rint(notional / (close / scale) * self._lot_scale[:, None]), 1.0)
        return Block(np.stack([open_, high, low, close]).astype(np.int32), lots.astype(np.int64))


def generate(seed: int, symbols: int, *, start_ms: int | None = None) -> Tape:
    """The market of one seed, for ever. It is one market for one (seed, symbols, UTC day of the start)."""
    start_ms = START_MS if start_ms is None else start_ms
    first_day = start_ms // DAY_MS - HISTORY_DAYS
    source = Generated(seed, symbols, first_day)
    prices, turnover = source.prices.tolist(), source.daily_turnover.tolist()
    four_hours = np.random.Generator(np.random.Philox(key=np.array([seed, 1], dtype=np.uint64))).random(
        symbols
    )
    return Tape(
        source,
        seed=seed,
        symbols=source.symbols,
        grids=source.grids,
        instruments=tuple(
            contracts.instrument(
                symbol, source.grids[i], prices[i], turnover[i], (first_day - 30 - 7 * (symbols - i)) * DAY_MS
            )
            for i, symbol in enumerate(source.symbols)
        ),
        brackets={s: contracts.brackets(turnover[i]) for i, s in enumerate(source.symbols)},
        funding=Funding(
            tuple((4 if i >= 10 and four_hours[i] < 0.3 else 8) * HOUR_MS for i in range(symbols)), {}
        ),
        history_ms=first_day * DAY_MS,
        start_ms=start_ms,
        end_ms=FOREVER_MS,
    )


def _names(count: int) -> list[tuple[str, float]]:
    """Base assets and prices, most liquid first; made-up names (price 0: to be drawn) once the known end."""
    made_up = ((head + tail + extra, 0.0) for extra, tail, head in product(_EXTRA, _TAILS, _HEADS))
    names = list(_KNOWN[:count])
    while len(names) < count:
        names.append(next(made_up))
    return names


def _regimes(draws: np.random.Generator, count: int | tuple[int, int]) -> Ints:
    """Regimes by chance: 1 rising, -1 falling, 0 ranging, 2 wild."""
    pick = draws.random(count)
    return np.select([pick < TRENDING, pick < 2 * TRENDING, pick < 2 * TRENDING + WILD], [1, -1, 2], 0)


def _regime_path(draws: np.random.Generator, before: Ints) -> Ints:
    """Regimes of a day, int64[f, 288]: each factor changes after 10 hours on average, the market after 16."""
    shape = (len(before), DAY_CANDLES)
    lasting = np.where(np.arange(len(before)) == 0, 192.0, 120.0)[:, None]
    drawn = np.concatenate([before[:, None], _regimes(draws, shape)], axis=1)
    changes = np.where(draws.random(shape) < 1 / lasting, np.arange(1, DAY_CANDLES + 1), 0)
    return np.take_along_axis(drawn, np.maximum.accumulate(changes, axis=1), axis=1)


def _heat_path(draws: np.random.Generator, before: Floats) -> tuple[Floats, Floats]:
    """Log volatility of a day, float64[f, 288], between hourly values that are forgotten in about a day."""
    hours = np.empty((len(before), 25))
    hours[:, 0] = before
    noise = draws.standard_normal((len(before), 24))
    for hour in range(24):
        hours[:, hour + 1] = 0.96 * hours[:, hour] + 0.10 * noise[:, hour]
    part = np.arange(1, DAY_CANDLES + 1) / 12
    left = np.minimum(part.astype(np.int64), 23)
    return hours[:, left] + (hours[:, left + 1] - hours[:, left]) * (part - left), hours[:, -1]


def _season() -> Floats:
    """Activity over the UTC day, float64[288], mean 1: high at both ends, low in the middle."""
    angle = 2 * np.pi * np.arange(DAY_CANDLES) / DAY_CANDLES
    return 1.0 + 0.4 * np.cos(angle)
