"""The same promises over real sockets: `perpd run` against `perpd sim --faults`, killed again and again.

Both are processes as a user starts them. What they did is judged by the venue's own books, which the
simulated exchange shows without faults, and by the files of the data directory after the end.
"""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec

from service.errors import VenueUnavailable
from service.exchange.embedded import SIM_KEY, SIM_SECRET
from service.simulation import strategy
from service.trading.orders import is_ours

READY = "simulated exchange ready"
POLL_S = 0.5
RESTART_S = 0.5
UNPROTECTED_LIMIT_S = 60.0  # wall; as in one process, and the daemon counts wall seconds too
CALM_S = 30.0  # wall: after the last fault and kill, until everything must be right again
DRAIN_LIMIT_S = 60.0
START_LIMIT_S = 30.0
CENT = Decimal("0.01")
MAX_POSITIONS = 3
SYMBOLS = 8
FAULTS = """seed = {seed}
usual = 1.0
hours = {hours}
[faults]
# These count in market time and last wall time, of which an accelerated market has little.
exchange_restart = {rare}
silent_stream = {rare}
disconnect = {often}
banned_418 = 0.0
delisting = 0.0
foreign_position = 0.0
clock_skew = 0.0
"""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What a run over sockets did and what it violated."""

    hours: float
    kills: int
    restarts: int
    violations: tuple[str, ...]
    faults: dict[str, int]
    totals: dict[str, int]


def run(
    directory: Path, *, seed: int, hours: float, kills: int, speed: float, calm_s: float = CALM_S
) -> Verdict:
    """Trade `hours` of market time with faults, killing the daemon `kills` times at random moments.

    Args: calm_s: wall seconds without faults and kills before it is judged.
    """
    return _Run(directory, seed, hours, kills, speed, calm_s).run()


class _Run:
    def __init__(
        self, directory: Path, seed: int, hours: float, kills: int, speed: float, calm_s: float
    ) -> None:
        self._directory = directory
        self._calm_s = calm_s
        self._hours = hours
        self._speed = speed
        self._seed = seed
        self._draws = random.Random(seed)
        wall_s = hours * 3_600 / speed
        self._kill_at_s = sorted(self._draws.uniform(0.0, wall_s) for _ in range(kills))
        self._kills = self._restarts = 0
        self._violations: dict[str, str] = {}
        self._bare_s: dict[str, float] = {}
        self._started_s = 0.0
        self._url = ""

    def run(self) -> Verdict:
        faults = self._directory / "faults.toml"
        often = 3.0 * 60 / self._speed  # as often in wall time as a market at 60 times has it
        faults.write_text(
            FAULTS.format(seed=self._seed, hours=self._hours, often=min(often, 3.0), rare=min(often / 8, 0.4))
        )
        exchange = self._start_exchange(faults)
        self._environment = {
            **os.environ,
            "PERPD_SIM__URL": self._url,
            "PERPD_MARKET__CANDLES": "120",
            "PERPD_ANALYSIS__WORKERS": "0",
            "PERPD_STRATEGY__NAME": f"{strategy.__file__}:Restless",
            "PERPD_RISK__HISTORY_TRADES": "1000000",
            "PERPD_RISK__CAUTION_LOSSES": "1000000",
            "PERPD_RISK__CAUTION_DAY_LOSS_FRACTION": "0.15",
        }
        self._words = ["--symbols", str(SYMBOLS), "--data-dir", str(self._directory / "data")]
        try:
            books = self._trade(exchange)
            self._judge_files(books)
        finally:
            exchange.terminate()
            exchange.wait(timeout=20)
        return Verdict(
            hours=self._hours,
            kills=self._kills,
            restarts=self._restarts,
            violations=tuple(f"{kind}: {detail}" for kind, detail in self._violations.items()),
            faults=books["faults"],
            totals=self._totals,
        )

    def _violate(self, kind: str, detail: object) -> None:
        self._violations.setdefault(kind, str(detail))

    # Processes

    def _start_exchange(self, faults: Path) -> "subprocess.Popen[bytes]":
        words = ["sim", "--symbols", SYMBOLS, "--seed", self._seed, "--speed", self._speed]
        words += ["--faults", faults, "--key", f"{SIM_KEY}:{SIM_SECRET}"]
        path = self._directory / "exchange.log"
        with path.open("wb") as log:
            process = subprocess.Popen([sys.executable, "-m", "service", *map(str, words)], stdout=log)
        limit_s = time.monotonic() + START_LIMIT_S
        while not self._url:
            if process.poll() is not None or time.monotonic() > limit_s:
                process.kill()
                raise VenueUnavailable(f"the simulated exchange did not start, see {path}")
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n") and (entry := json.loads(line)).get("message") == READY:
                    self._url = entry["rest_url"]
            time.sleep(0.05)
        return process

    def _start_daemon(self) -> "subprocess.Popen[bytes]":
        self._started_s = time.monotonic()
        command = [sys.executable, "-m", "service", "run", *self._words]
        with (self._directory / "daemon.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, env=self._environment)

    # The run

    def _trade(self, exchange: "subprocess.Popen[bytes]") -> dict[str, Any]:
        """Run, kill and watch until the calm is over; returns the venue's books after the drain."""
        daemon = self._start_daemon()
        began_s = time.monotonic()
        end_s = began_s + self._hours * 3_600 / self._speed + self._calm_s
        try:
            while (now_s := time.monotonic()) < end_s:
                if exchange.poll() is not None:
                    self._violate("the simulated exchange ended", exchange.returncode)
                    break
                if self._kill_at_s and now_s - began_s >= self._kill_at_s[0]:
                    self._kill_at_s.pop(0)
                    daemon.send_signal(signal.SIGKILL)
                    daemon.wait()
                    self._kills += 1
                if daemon.poll() is not None:
                    self._note_end(daemon.returncode)
                    time.sleep(RESTART_S)
                    daemon = self._start_daemon()
                    self._restarts += 1
                self._watch(self._books())
                time.sleep(POLL_S)
            self._judge_protection(self._books())
            daemon.send_signal(signal.SIGTERM)
            code = daemon.wait(DRAIN_LIMIT_S)
            if code != 0:
                self._violate("the drain ended with another exit code than 0", code)
        finally:
            if daemon.poll() is None:
                daemon.kill()
                daemon.wait()
        return self._books()

    def _note_end(self, code: int) -> None:
        """Killed, or ended because the venue was away; anything else is a fault of the daemon."""
        if code not in (-signal.SIGKILL, 69):
            self._violate("the daemon ended by itself", f"exit code {code}, see daemon.log")

    def _books(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self._url}/sim/v1/books?key={SIM_KEY}", timeout=20) as answer:
            found: dict[str, Any] = json.loads(answer.read())
        return found

    def _watch(self, books: dict[str, Any]) -> None:
        held = _held(books)
        if len(held) > MAX_POSITIONS:
            self._violate("more positions than allowed", sorted(held))
        now_s = time.monotonic()
        bare = set(_bare(books))
        for symbol in self._bare_s.keys() - bare:
            del self._bare_s[symbol]
        for symbol in bare:
            since_s = max(self._bare_s.setdefault(symbol, now_s), self._started_s)
            if now_s - since_s > UNPROTECTED_LIMIT_S:
                self._violate("a position is unprotected", f"{symbol} for {now_s - since_s:.0f} s")

    def _judge_protection(self, books: dict[str, Any]) -> None:
        """In calm every position has its stop, and no stop is without a position."""
        time.sleep(2.0)
        still = set(_bare(books)) & set(_bare(self._books()))
        if still:
            self._violate("a position has no stop in calm", sorted(still))

    # The end

    def _judge_files(self, books: dict[str, Any]) -> None:
        data = self._directory / "data"
        [database] = list(data.glob("**/state.sqlite3"))
        with sqlite3.connect(database) as db:
            known = {row[0] for row in db.execute("select client_order_id from orders")}
            decided = {row[0] for row in db.execute("select signal_id from decided")}
            holdings = {s: Decimal(q) for s, q in db.execute("select symbol, quantity from holdings")}
            totals = {name: Decimal(amount) for name, amount in db.execute("select name, amount from totals")}
        db.close()
        orders = _orders(books)
        twice = [name for name, times in Counter(name for name, _ in orders).items() if times > 1]
        if twice:
            self._violate("one client id became two orders", twice[:3])
        entered = Counter[str]()
        asked: dict[str, Decimal] = {}
        for name, order in orders:
            digest, _, leg = name.rpartition("-")
            if leg.startswith("e"):
                asked.setdefault(digest, Decimal(order["quantity"]))
                entered[digest] += Decimal(order["executed"])  # type: ignore[assignment]
        beyond = [digest for digest, quantity in entered.items() if quantity > asked[digest]]
        if beyond:
            self._violate("an intent was executed twice", beyond[:3])
        everything = {name for name, _ in orders} | {name for name in _algos(books) if is_ours(name)}
        if unowned := sorted(everything - known):
            self._violate("an order on the venue has no owner", unowned[:3])
        held = {symbol: Decimal(p["quantity"]) for symbol, p in _held(books).items()}
        if held != holdings:
            self._violate("the ledger holds something else than the venue", f"ours {holdings}, venue {held}")
        wallet = sum(totals.values()) - 2 * totals.get("fees", Decimal(0))
        difference = wallet - Decimal(books["account"]["wallet"])
        if abs(difference) > CENT:
            self._violate("the ledger's wallet differs from the venue's", difference)
        self._judge_archive(decided, len(orders))

    def _query(self, sql: str) -> list[dict[str, Any]]:
        """Ask the archive as a user does: what is hot and what is compacted."""
        words = ["archive", "query", *self._words, "--format", "json", sql]
        done = subprocess.run(
            [sys.executable, "-m", "service", *words], env=self._environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            self._violate("the archive cannot be read", done.stdout[-500:] + done.stderr[-500:])
            return []
        return [json.loads(line) for line in done.stdout.splitlines()]

    def _judge_archive(self, decided: set[str], orders: int) -> None:
        rows = self._query("SELECT signal_id FROM decisions")
        decisions = Counter(str(row["signal_id"]) for row in rows)
        twice = [name for name, times in decisions.items() if times > 1]
        if twice:
            self._violate("the archive has a decision twice", twice[:3])
        if missing := sorted(decided - decisions.keys()):
            self._violate("the archive lacks a decision", missing[:3])
        self._totals = {
            "orders": orders,
            "fills": len(self._query("SELECT trade_id FROM fills")),
            "decisions": decisions.total(),
        }


def _held(books: dict[str, Any]) -> dict[str, Any]:
    positions = books["account"]["positions"].values()
    return {p["symbol"]: p for p in positions if Decimal(p["quantity"])}


def _bare(books: dict[str, Any]) -> Iterator[str]:
    """Symbols held without a stop that closes them."""
    for symbol, position in _held(books).items():
        side = "SELL" if Decimal(position["quantity"]) > 0 else "BUY"
        stops = (
            a
            for a in books["account"]["algos"].values()
            if a["symbol"] == symbol and a["side"] == side and a["type"] == "STOP_MARKET"
        )
        if not any(True for _ in stops):
            yield symbol


def _orders(books: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Our plain orders, open and finished, by client id; those a trigger made are not among them."""
    account = books["account"]
    everything = [*account["orders"].values()]
    for history in account["finished_orders"].values():
        everything += history
    return [
        (o["client_order_id"], o) for o in everything if is_ours(o["client_order_id"]) and not o["algo_id"]
    ]


def _algos(books: dict[str, Any]) -> Iterator[str]:
    account = books["account"]
    for algo in account["algos"].values():
        yield algo["client_algo_id"]
    for history in account["finished_algos"].values():
        for algo in history:
            yield algo["client_algo_id"]
