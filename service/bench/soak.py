"""`perpd bench soak`: does the daemon grow? Cycles as fast as they go, and the slope of what it holds."""

import argparse
import statistics
from pathlib import Path
from typing import Any

from service.bench.machine import machine
from service.bench.observed import Observed, observe
from service.bench.plot import Line, Panel, fit, svg
from service.bench.result import Figure, Result, quantile

NAME = "soak"
SUMMARY = "growth of the daemon per 1,000 cycles over the simulated exchange, with a plot"
MEASURES = (
    "The real daemon with its nursery and workers over a simulated exchange in a process apart, a cycle each "
    "market minute as fast as `speed` lets them come. Samples between cycles: PSS and USS of the tree, the "
    "PSS that no file backs (pages of libraries count less while another program on the machine maps them "
    "too, so only this part is free of its coming and going), file descriptors of all its processes, and the "
    "daemon's live containers (without what start-up froze), allocated blocks and tasks. Slopes by least "
    "squares over the samples after the warm-up, per 1,000 cycles, and once more over the second half alone: "
    "what is still filling shows less there, what grows does not."
)
SAMPLES = 200
SLOPE_GOAL_MB = 0.5
FLAT_GOAL = 1.0  # tasks and descriptors per 1,000 cycles that still count as flat
GC_GOAL_MS = 1.0
PSS_GOALS_MB = {200: 100.0, 650: 140.0}  # by symbols
CANDLES = {200: 200, 650: 500}
SERIES = {
    "pss_mb": ("PSS", "MB"),
    "uss_mb": ("USS", "MB"),
    "anonymous_mb": ("PSS without files", "MB"),
    "objects": ("objects", "objects"),
    "blocks": ("blocks", "blocks"),
    "tasks": ("tasks", "tasks"),
    "fds": ("fds", "descriptors"),
    "shadows": ("open shadows", "shadows"),
}
IN_HALVES = ("pss_mb", "uss_mb", "anonymous_mb", "objects", "blocks")
FEW_CYCLES = 1_000
"""In the second half. Over fewer, memory that comes and goes with the work makes the slope."""
GOALS = {"pss_mb": SLOPE_GOAL_MB, "tasks": FLAT_GOAL, "fds": FLAT_GOAL}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cycles", type=int, default=5_000, metavar="N", help="default 5000")
    parser.add_argument("--symbols", type=int, default=200, metavar="N", help="1 to 700 (default 200)")
    parser.add_argument("--candles", type=int, metavar="M", help="120 to 500 (default 200; 500 at 650)")
    parser.add_argument("--workers", type=int, default=2, metavar="W", help="0 to 64 (default 2)")
    parser.add_argument(
        "--speed", type=float, default=1_200.0, metavar="X", help="market s per wall s (default 1200)"
    )
    parser.add_argument(
        "--warm-up", type=float, default=0.2, metavar="F", help="share left out of slopes (default 0.2)"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the market (default 1)")
    parser.add_argument(
        "--plot", type=Path, default=Path("perpd-soak.svg"), metavar="FILE", help="default perpd-soak.svg"
    )


def measure(args: argparse.Namespace) -> Result:
    facts = machine()
    candles = args.candles or CANDLES.get(args.symbols, 200)
    settings = {
        "run.cycles": args.cycles,
        "sim.symbols": args.symbols,
        "market.symbols": args.symbols,
        "market.candles": candles,
        "analysis.workers": args.workers,
        "sim.speed": args.speed,
        "sim.seed": args.seed,
    }
    seen = observe(settings, every=max(args.cycles // SAMPLES, 1))
    parameters = {name: getattr(args, name) for name in ("cycles", "symbols", "workers", "speed", "seed")}
    parameters |= {"candles": candles, "warm_up": args.warm_up, "plot": str(args.plot)}
    from_cycle = args.warm_up * args.cycles
    lines = {name: fitted(seen.samples, name, from_cycle) for name in SERIES}
    args.plot.write_text(_image(seen, lines, parameters, from_cycle), encoding="utf-8")
    details = {"samples": seen.samples, "summary": seen.summary, "said": seen.said}
    figures, notes = _figures(seen, lines, args), _notes(args.cycles)
    return Result(NAME, MEASURES, parameters, facts, figures, details, notes)


def _notes(cycles: int) -> tuple[str, ...]:
    if cycles / 2 >= FEW_CYCLES:
        return ()
    return (
        f"The second half are {cycles / 2:,.0f} cycles: a megabyte that comes and goes with the work is "
        f"{2_000 / cycles:,.1f} MB / 1,000 there. Growth is judged over {2 * FEW_CYCLES:,} cycles and more.",
    )


def fitted(samples: list[dict[str, float]], name: str, from_cycle: float) -> Line:
    """The line through one series from a cycle on."""
    kept = [sample for sample in samples if sample["cycle"] >= from_cycle]
    if len(kept) < 2:
        kept = samples
    return fit([sample["cycle"] for sample in kept], [sample[name] for sample in kept])


def _figures(seen: Observed, lines: dict[str, Line], args: argparse.Namespace) -> tuple[Figure, ...]:
    samples, cycle_s, garbage_s = seen.samples, seen.end["cycle_s"], seen.end["garbage_s"]
    garbage_cpu_s = seen.end["garbage_cpu_s"]
    pss = [sample["pss_mb"] for sample in samples]
    figures = []
    for name, (title, unit) in SERIES.items():
        per_1000 = lines[name].slope * 1000
        figures.append(Figure(f"slope of {title}", per_1000, f"{unit} / 1,000", "less", GOALS.get(name)))
    whole = fitted(samples, "pss_mb", 0.0).slope * 1000
    figures.append(Figure("slope of PSS with the warm-up", whole, "MB / 1,000", "less"))
    for name in IN_HALVES:
        title, unit = SERIES[name]
        per_1000 = fitted(samples, name, args.cycles / 2).slope * 1000
        title = f"slope of {title}, second half"
        figures.append(Figure(title, per_1000, f"{unit} / 1,000", "less", GOALS.get(name)))
    goal = PSS_GOALS_MB.get(args.symbols)
    figures += [
        Figure("PSS at the first sample", pss[0], "MB", "less"),
        Figure("PSS at the last sample", pss[-1], "MB", "less", goal),
        Figure("PSS highest sample", max(pss), "MB", "less", goal),
        Figure("USS at the last sample", samples[-1]["uss_mb"], "MB", "less"),
        Figure("PSS of the daemon process, last", samples[-1]["daemon_pss_mb"], "MB", "less"),
        Figure("objects at the last sample", samples[-1]["objects"], "objects", "less"),
        Figure("tasks at the last sample", samples[-1]["tasks"], "tasks", "less"),
        Figure("fds at the last sample", samples[-1]["fds"], "descriptors", "less"),
        Figure("open shadows at the last sample", samples[-1]["shadows"], "shadows"),
        Figure("cycles", len(cycle_s), "cycles"),
        Figure("whole cycle p50", statistics.median(cycle_s) * 1000, "ms", "less"),
        Figure("whole cycle p99", quantile(cycle_s, 0.99) * 1000, "ms", "less"),
        Figure("collection CPU p50", statistics.median(garbage_cpu_s) * 1000, "ms", "less", GC_GOAL_MS),
        Figure("collection CPU p99", quantile(garbage_cpu_s, 0.99) * 1000, "ms", "less", GC_GOAL_MS),
        Figure("collection p50", statistics.median(garbage_s) * 1000, "ms", "less", GC_GOAL_MS),
        Figure("collection p99", quantile(garbage_s, 0.99) * 1000, "ms", "less"),
        Figure("collection max", max(garbage_s) * 1000, "ms", "less"),
        Figure("time a cycle, all in all", _wall_per_cycle_ms(samples), "ms", "less"),
        Figure("warnings and errors logged", sum(seen.said.values()), "lines", "less"),
    ]
    return tuple(figures)


def _wall_per_cycle_ms(samples: list[dict[str, float]]) -> float:
    first, last = samples[0], samples[-1]
    return (last["wall_s"] - first["wall_s"]) / (last["cycle"] - first["cycle"]) * 1000


def _image(seen: Observed, lines: dict[str, Line], parameters: dict[str, Any], from_cycle: float) -> str:
    panels = [
        Panel(
            f"{title}, {unit}: {lines[name].slope * 1000:+,.3f} per 1,000 cycles",
            [sample[name] for sample in seen.samples],
            lines[name],
            from_cycle,
        )
        for name, (title, unit) in SERIES.items()
    ]
    title = f"perpd soak: {parameters['cycles']:,} cycles of {parameters['symbols']} symbols"
    subtitle = (
        f"each panel from its smallest to its largest value; dashed: fitted from cycle {from_cycle:,.0f}"
    )
    return svg(title, subtitle, [sample["cycle"] for sample in seen.samples], panels)
