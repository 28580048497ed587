"""`perpd bench loop`: how long the daemon's event loop keeps others waiting while the whole market moves."""

import argparse
import statistics

from service.bench.heartbeat import beating
from service.bench.machine import machine
from service.bench.observed import observe
from service.bench.result import Figure, Result, quantile

NAME = "loop"
SUMMARY = "event-loop lag of the daemon while every symbol's streams update and cycles run"
MEASURES = (
    "The real daemon over a simulated exchange in a process apart. The daemon subscribes to one candle "
    "stream a symbol (5m); each sends its forming candle every quarter of a wall second at most, as the "
    "venue does, and every close. Candles close and cycles run `speed` times as often as in life. Lag: the "
    "age of beats that a third process sends every 2 ms, so a hold-up is seen by every beat that fell into "
    "it. From the first cycle on; start-up is left out."
)
BEAT_INTERVAL_S = 0.002
LAG_GOAL_MS = 5.0
EVENTS_PER_S = 4  # of one candle stream on the venue, at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--symbols", type=int, default=650, metavar="N", help="1 to 700 (default 650)")
    parser.add_argument("--candles", type=int, default=500, metavar="M", help="120 to 500 (default 500)")
    parser.add_argument("--workers", type=int, default=2, metavar="W", help="0 to 64 (default 2)")
    parser.add_argument("--cycles", type=int, default=60, metavar="N", help="default 60")
    parser.add_argument("--speed", type=float, default=60.0, metavar="X", help="default 60: a cycle a second")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the market (default 1)")


def measure(args: argparse.Namespace) -> Result:
    facts = machine()
    venue_rate = args.symbols * EVENTS_PER_S
    settings = {
        "run.cycles": args.cycles,
        "sim.symbols": args.symbols,
        "market.symbols": args.symbols,
        "market.candles": args.candles,
        "analysis.workers": args.workers,
        "sim.speed": args.speed,
        "sim.seed": args.seed,
        "sim.stream_messages_per_s": 2 * venue_rate + 1_000,  # nothing is thinned
    }
    with beating(BEAT_INTERVAL_S) as pipe:
        seen = observe(settings, every=args.cycles, pipe=pipe)  # a sample holds up the loop
    lag, samples, cycle_s = seen.end["lag"], seen.samples, seen.end["cycle_s"]
    wall_s = samples[-1]["wall_s"] - samples[0]["wall_s"]

    def rate(name: str) -> float:
        return (samples[-1][name] - samples[0][name]) / wall_s

    figures = (
        Figure("loop lag p50", lag["p50_ms"], "ms", "less"),
        Figure("loop lag p99", lag["p99_ms"], "ms", "less", LAG_GOAL_MS),
        Figure("loop lag max", lag["max_ms"], "ms", "less"),
        Figure("beats", lag["samples"], "beats"),
        Figure("beats that should have come", lag["seconds"] / BEAT_INTERVAL_S, "beats"),
        Figure("candle updates received", rate("received"), "1/s", "more"),
        Figure("candle updates of the venue at most", venue_rate, "1/s"),
        Figure("candles closed", rate("closed"), "1/s", "more"),
        Figure("symbols followed", samples[-1]["symbols"], "symbols", "more"),
        Figure("CPU of the daemon process", rate("daemon_cpu_s"), "cores", "less"),
        Figure("CPU of the tree", rate("cpu_s"), "cores", "less"),
        Figure("cycles", len(cycle_s), "cycles"),
        Figure("whole cycle p50", statistics.median(cycle_s) * 1000, "ms", "less"),
        Figure("whole cycle p99", quantile(cycle_s, 0.99) * 1000, "ms", "less"),
        Figure("PSS at the last sample", samples[-1]["pss_mb"], "MB", "less"),
        Figure("warnings and errors logged", sum(seen.said.values()), "lines", "less"),
    )
    names = ("symbols", "candles", "workers", "cycles", "speed", "seed")
    parameters = {name: getattr(args, name) for name in names}
    details = {"samples": samples, "summary": seen.summary, "said": seen.said, "end": seen.end}
    return Result(NAME, MEASURES, parameters, facts, figures, details)
