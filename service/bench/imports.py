"""`perpd bench imports`: what the daemon's and a worker's imports cost, module by module."""

import argparse
import json
import sys
import time
from typing import Any, NamedTuple

from service.bench.machine import machine
from service.bench.processes import measured_apart, memory_of
from service.bench.result import Figure, Result

NAME = "imports"
SUMMARY = "resident size and time of the daemon's and a worker's imports, module by module"
MEASURES = (
    "Fresh interpreters that import what the daemon imports before its first cycle, and what a worker shares with "
    "its nursery. Resident size is the kernel's, exact (smaps_rollup), shared library pages included; each "
    "module's own part leaves out what it imported in turn. The work of measuring is not in the times."
)
FORBIDDEN = ("pandas", "polars", "pyarrow", "duckdb", "lightgbm", "sklearn", "scipy", "ccxt")
STATEMENTS = {
    "daemon": ("service.cli", "service.analysis.nursery", "service.settings", "service.daemon"),
    "worker": ("service.analysis.nursery", "service.analysis.worker", "service.strategies.ict_smc"),
}
MB = 1024 * 1024


class Imported(NamedTuple):
    """One module: what it added by itself, and with all it imported for the first time."""

    name: str
    own_bytes: int
    own_s: float
    total_bytes: int
    total_s: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--top", type=int, default=12, metavar="N", help="packages shown (default 12)")


def measure(args: argparse.Namespace) -> Result:
    facts = machine()
    found = {role: measured_apart("service.bench.imports", {"role": role}) for role in STATEMENTS}
    figures: list[Figure] = []
    for role, one in found.items():
        figures += [
            Figure(f"{role}: interpreter alone", one["bare_bytes"] / MB, "MB", "less"),
            Figure(f"{role}: resident after imports", one["resident_bytes"] / MB, "MB", "less"),
            Figure(f"{role}: unique after imports", one["unique_bytes"] / MB, "MB", "less"),
            Figure(f"{role}: time of imports", one["seconds"] * 1000, "ms", "less"),
            Figure(f"{role}: modules", one["modules_loaded"], "modules", "less"),
            Figure(f"{role}: forbidden modules", len(one["forbidden"]), "modules", "less", 0),
        ]
        for package, (size_bytes, seconds) in packages(one["modules"])[: args.top]:
            figures.append(
                Figure(f"{role}: {package}", size_bytes / MB, f"MB, {seconds * 1000:.1f} ms", "less")
            )
    return Result(NAME, MEASURES, {"top": args.top}, facts, tuple(figures), found)


def packages(modules: list[dict[str, Any]]) -> list[tuple[str, tuple[int, float]]]:
    """Own bytes and seconds summed by top-level package, the largest first; ours by its parts."""
    sums: dict[str, tuple[int, float]] = {}
    for module in modules:
        parts = module["name"].split(".")
        package = ".".join(parts[:2]) if parts[0] == "service" else parts[0]
        size_bytes, seconds = sums.get(package, (0, 0.0))
        sums[package] = (size_bytes + module["own_bytes"], seconds + module["own_s"])
    return sorted(sums.items(), key=lambda item: -item[1][0])


# -- in the fresh process


class _Meter:
    """Finds modules as the interpreter would, and weighs each while it is loaded."""

    def __init__(self) -> None:
        self.imported: list[Imported] = []
        self._within: list[list[float]] = []  # per module being loaded: bytes and seconds of those inside it
        self._measuring_s = 0.0

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                self._weigh(spec)
                return spec
        return None

    def _weigh(self, spec: Any) -> None:
        """Wrap the one loader object of this module; classes stay as they are."""
        loader = spec.loader
        if loader is None or isinstance(loader, type):
            return  # a namespace package, or built into the interpreter: nothing is read
        for step in ("create_module", "exec_module"):  # an extension is mapped by the first
            original = getattr(loader, step, None)
            if original is not None:
                setattr(loader, step, self._weighed(spec.name, original))

    def _weighed(self, name: str, load: Any) -> Any:
        def weighed(argument: Any) -> Any:
            size_before, began_s, measuring_before_s = self._now()
            self._within.append([0, 0.0])
            try:
                return load(argument)
            finally:
                size_after, ended_s, measuring_after_s = self._now()
                inner_bytes, inner_s = self._within.pop()
                total_bytes = size_after - size_before
                total_s = (ended_s - began_s) - (measuring_after_s - measuring_before_s)
                self.imported.append(
                    Imported(name, total_bytes - int(inner_bytes), total_s - inner_s, total_bytes, total_s)
                )
                if self._within:
                    self._within[-1][0] += total_bytes
                    self._within[-1][1] += total_s

        return weighed

    def _now(self) -> tuple[int, float, float]:
        """(resident bytes, seconds, seconds spent measuring so far); the two clocks are read together."""
        began_s = time.perf_counter()
        size = memory_of(_own_pid()).resident
        ended_s = time.perf_counter()
        self._measuring_s += ended_s - began_s
        return size, ended_s, self._measuring_s


def _own_pid() -> int:
    import os

    return os.getpid()


def _merged(imported: list[Imported]) -> list[dict[str, Any]]:
    """Both steps of a module as one, largest own size first."""
    merged: dict[str, Imported] = {}
    for one in imported:
        before = merged.get(one.name, Imported(one.name, 0, 0.0, 0, 0.0))
        merged[one.name] = Imported(
            one.name,
            before.own_bytes + one.own_bytes,
            before.own_s + one.own_s,
            before.total_bytes + one.total_bytes,
            before.total_s + one.total_s,
        )
    return [one._asdict() for one in sorted(merged.values(), key=lambda one: -one.own_bytes)]


def _main(spec: dict[str, Any]) -> None:
    import importlib
    import os

    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # as in the nursery
    already = len(sys.modules)
    bare = memory_of(os.getpid())
    meter = _Meter()
    sys.meta_path.insert(0, meter)
    measuring_s, began_s = meter._measuring_s, time.perf_counter()
    for module in STATEMENTS[spec["role"]]:
        importlib.import_module(module)
    seconds = time.perf_counter() - began_s - (meter._measuring_s - measuring_s)
    sys.meta_path.remove(meter)
    after = memory_of(os.getpid())
    found = {
        "bare_bytes": bare.resident,
        "resident_bytes": after.resident,
        "unique_bytes": after.unique,
        "seconds": seconds,
        "modules_before": already,
        "modules_loaded": len(sys.modules),
        "forbidden": sorted(set(FORBIDDEN) & {name.partition(".")[0] for name in sys.modules}),
        "modules": _merged(meter.imported),
    }
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
