"""`perpd bench orders`: how long an order is on its way inside perpd, from decision to the wire."""

import argparse
import statistics

from service.bench.disk import asking_disk
from service.bench.machine import machine
from service.bench.observed import observe
from service.bench.processes import BenchFailed
from service.bench.result import Figure, Result, quantile

NAME = "orders"
SUMMARY = "from the decision to the order's request on the wire, while the whole market moves"
MEASURES = (
    "The real daemon over a simulated exchange in a process apart, all streams updating and cycles running; "
    "more positions than by default, so that there is something to measure. Entry: from the approved signal "
    "handed to the executor until its request is handed to the socket, one durable write included; the wait "
    "for the venue to set a leverage is left out and told apart. Stop: from the entry's booked fill until "
    "the stop's request is handed to the socket, one durable write included. What the state store took of "
    "it, its thread's queue and the disk's sync included, is told apart: a busy disk shows there. Disk "
    "alone: as many bytes as an entry's, over a file that is long enough, written and synced five times a "
    "second beside all that."
)
GOAL_MS = 5.0
LEAST_ORDERS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--symbols", type=int, default=650, metavar="N", help="1 to 700 (default 650)")
    parser.add_argument("--candles", type=int, default=200, metavar="M", help="120 to 500 (default 200)")
    parser.add_argument("--workers", type=int, default=2, metavar="W", help="0 to 64 (default 2)")
    parser.add_argument("--cycles", type=int, default=120, metavar="N", help="default 120")
    parser.add_argument("--speed", type=float, default=60.0, metavar="X", help="default 60: a cycle a second")
    parser.add_argument("--positions", type=int, default=150, metavar="P", help="at most (default 150)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the market (default 1)")


def measure(args: argparse.Namespace) -> Result:
    facts = machine()
    settings = {
        "run.cycles": args.cycles,
        "sim.symbols": args.symbols,
        "market.symbols": args.symbols,
        "market.candles": args.candles,
        "analysis.workers": args.workers,
        "sim.speed": args.speed,
        "sim.seed": args.seed,
        "sim.deposit": 10_000_000.0,
        "trading.max_positions": args.positions,
        "trading.max_signals": 200,
        "trading.top_signals": 20,
        "risk.margin_fraction": 0.001,
        "risk.min_margin_fraction": 0.0005,
        "risk.max_margin_fraction": 0.002,
        "kill.loss_streak": 0,
    }
    with asking_disk() as disk_ms:
        seen = observe(settings, every=max(args.cycles // 10, 1), orders=True)
    found = seen.end["orders"]
    entries, stops = found["entry_ms"], found["stop_ms"]
    if min(len(entries), len(stops)) < LEAST_ORDERS:
        raise BenchFailed(
            f"only {len(entries)} entries and {len(stops)} stops were sent; ask for more cycles"
        )
    with_leverage = found["entry_with_leverage_ms"]
    without = [whole - part for whole, part in zip(entries, found["entry_store_ms"], strict=True)]
    stop_without = [whole - part for whole, part in zip(stops, found["stop_store_ms"], strict=True)]
    figures = (
        *_figures("entry, decision to wire", entries, GOAL_MS),
        *_figures("entry, in the state store", found["entry_store_ms"]),
        *_figures("entry, without the state store", without),
        *_figures("entry, with the venue's leverage", with_leverage),
        *_figures("stop, fill to wire", stops, GOAL_MS),
        *_figures("stop, in the state store", found["stop_store_ms"]),
        *_figures("stop, without the state store", stop_without),
        *_figures("disk alone, write and sync", disk_ms),
        Figure("entries measured", len(entries), "orders", "more"),
        Figure("stops measured", len(stops), "orders", "more"),
        Figure("symbols followed", seen.samples[-1]["symbols"], "symbols", "more"),
        Figure("warnings and errors logged", sum(seen.said.values()), "lines", "less"),
    )
    names = ("symbols", "candles", "workers", "cycles", "speed", "positions", "seed")
    parameters = {name: getattr(args, name) for name in names}
    details = {"orders": found, "disk_ms": disk_ms, "summary": seen.summary, "said": seen.said}
    return Result(NAME, MEASURES, parameters, facts, figures, details)


def _figures(name: str, values: list[float], goal: float | None = None) -> tuple[Figure, ...]:
    return (
        Figure(f"{name}, p50", statistics.median(values), "ms", "less"),
        Figure(f"{name}, p99", quantile(values, 0.99), "ms", "less", goal),
    )
