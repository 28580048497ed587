"""`perpd bench imports`: what the daemon's and a worker's imports cost, module by module."""

import argparse
from typing import Any

from service.bench.machine import machine
from service.bench.processes import BenchFailed, answer_of
from service.bench.result import Figure, Result

NAME = "imports"
SUMMARY = "resident size and time of the daemon's and a worker's imports, module by module"
MEASURES = (
    "Fresh interpreters that import what the daemon imports before its first cycle, and what a worker shares "
    "with its nursery. Resident size is the kernel's, exact (smaps_rollup), shared library pages included; "
    "what a module imported in turn is not its own. The work of measuring is not in the times. Of a module "
    "that several want, the first to ask pays."
)
FORBIDDEN = ("pandas", "polars", "pyarrow", "duckdb", "lightgbm", "sklearn", "scipy", "ccxt")
ROLES = {
    "daemon": ["service.cli", "service.analysis.nursery", "service.settings", "service.daemon"],
    "worker": ["service.analysis.nursery", "service.analysis.worker", "service.strategies.ict_smc"],
}
MB = 1024 * 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--top", type=int, default=12, metavar="N", help="packages shown (default 12)")


def measure(args: argparse.Namespace) -> Result:
    facts = machine()
    found = {role: weighed(modules) for role, modules in ROLES.items()}
    figures = [figure for role, one in found.items() for figure in _figures(role, one, args.top)]
    return Result(NAME, MEASURES, {"top": args.top}, facts, tuple(figures), found)


def weighed(modules: list[str]) -> dict[str, Any]:
    """What importing these modules costs in a fresh interpreter; `forbidden` names what must not be there."""
    found = answer_of("service.bench.weigh", ",".join(modules))
    if not found["modules"]:
        raise BenchFailed("no module was weighed")
    found["forbidden"] = sorted(set(FORBIDDEN) & set(found["packages_loaded"]))
    return found


def packages(modules: list[dict[str, Any]]) -> list[tuple[str, int, float]]:
    """(name, own bytes, own seconds) summed by top-level package, ours by its parts; the largest first."""
    sums: dict[str, tuple[int, float]] = {}
    for module in modules:
        parts = module["name"].split(".")
        package = ".".join(parts[:2]) if parts[0] == "service" else parts[0]
        size_bytes, seconds = sums.get(package, (0, 0.0))
        sums[package] = (size_bytes + module["own_bytes"], seconds + module["own_s"])
    ordered = sorted(sums.items(), key=lambda item: -item[1][0])
    return [(name, size_bytes, seconds) for name, (size_bytes, seconds) in ordered]


def _figures(role: str, found: dict[str, Any], top: int) -> list[Figure]:
    figures = [
        Figure(f"{role}: interpreter alone", found["bare_bytes"] / MB, "MB", "less"),
        Figure(f"{role}: resident after imports", found["resident_bytes"] / MB, "MB", "less"),
        Figure(f"{role}: unique after imports", found["unique_bytes"] / MB, "MB", "less"),
        Figure(f"{role}: time of imports", found["seconds"] * 1000, "ms", "less"),
        Figure(f"{role}: modules", found["modules_after"], "modules", "less"),
        Figure(f"{role}: forbidden packages", len(found["forbidden"]), "packages", "less", 0),
    ]
    for package, size_bytes, seconds in packages(found["modules"])[:top]:
        figures.append(Figure(f"{role}: {package}", size_bytes / MB, "MB", "less"))
        figures.append(Figure(f"{role}: {package}, time", seconds * 1000, "ms", "less"))
    return figures
