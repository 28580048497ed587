"""`perpd bench pool`: what the nursery's workers cost beside the standard forkserver's, and beside none."""

import argparse
import json
import statistics
import sys
import tempfile
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from service.bench.machine import machine
from service.bench.processes import answer_of, cpu_s, memory_of, tree
from service.bench.result import Figure, Result

NAME = "pool"
SUMMARY = "memory, start and speed of the nursery's workers beside the standard forkserver's and none"
MEASURES = (
    "The daemon's imports with three executors, each in a process tree of its own: workers forked from the "
    "nursery, workers of the standard process pool with its forkserver (which preloads the same modules) and "
    "resource tracker, and the strategy in the daemon itself. Start: from asking for the executor to the "
    "first batch answered by it; the nursery imports while the daemon does. Round: the founding strategy "
    "over all symbols in batches of 8. Memory after the rounds; the part that no file backs does not depend "
    "on what else runs on the machine."
)
KINDS = ("nursery", "forkserver", "inline")
BATCH = 8
MB = 1024 * 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--symbols", type=int, default=200, metavar="N", help="1 to 700 (default 200)")
    parser.add_argument("--candles", type=int, default=200, metavar="M", help="120 to 500 (default 200)")
    parser.add_argument("--workers", type=int, default=2, metavar="W", help="1 to 64 (default 2)")
    parser.add_argument("--rounds", type=int, default=10, metavar="R", help="over all symbols (default 10)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the market (default 1)")


def measure(args: argparse.Namespace) -> Result:
    facts = machine()
    parameters = {name: getattr(args, name) for name in ("symbols", "candles", "workers", "rounds", "seed")}
    parameters["workers"] = max(args.workers, 1)
    with tempfile.TemporaryDirectory(prefix="perpd-bench-") as directory:
        market = {name: parameters[name] for name in ("symbols", "candles", "seed")}
        answer_of("service.bench.market", {"directory": directory, "rounds": 1, **market})
        found = {
            kind: answer_of("service.bench.pool", {"directory": directory, "kind": kind, **parameters})
            for kind in KINDS
        }
    return Result(NAME, MEASURES, parameters, facts, figures(found), found)


def figures(found: dict[str, Any]) -> tuple[Figure, ...]:
    """Bytes and seconds in, MB and milliseconds out."""
    rows: list[Figure] = []
    for kind, one in found.items():
        rows += [
            Figure(f"{kind}: processes", one["processes"], "processes", "less"),
            Figure(f"{kind}: PSS of the tree", one["pss_bytes"] / MB, "MB", "less"),
            Figure(f"{kind}: PSS without files", one["anonymous_bytes"] / MB, "MB", "less"),
            Figure(f"{kind}: start", one["start_s"] * 1000, "ms", "less"),
            Figure(f"{kind}: CPU of the start", one["start_cpu_s"] * 1000, "ms", "less"),
            Figure(f"{kind}: round wall p50", statistics.median(one["round_s"]) * 1000, "ms", "less"),
            Figure(f"{kind}: round CPU mean", one["rounds_cpu_s"] / len(one["round_s"]) * 1000, "ms", "less"),
        ]
    return tuple(rows)


# -- in the fresh process


def _main(spec: dict[str, Any]) -> None:
    import os
    import time

    began_s, began_cpu_s = time.perf_counter(), cpu_s(os.getpid())
    nursery = None
    if spec["kind"] == "nursery":
        from service.analysis.nursery import start_nursery

        nursery = start_nursery()  # first of all, as the daemon does
    forked_s, forked_cpu_s = time.perf_counter() - began_s, cpu_s(os.getpid()) - began_cpu_s
    import asyncio

    import uvloop

    import service.daemon  # noqa: F401  what the workers live beside

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(_measure(spec, nursery))
    found["start_s"] += forked_s
    found["start_cpu_s"] += forked_cpu_s
    print(json.dumps(found))  # noqa: T201


async def _measure(spec: dict[str, Any], nursery: Any) -> dict[str, Any]:
    import asyncio
    import os
    import time

    from service.analysis.worker import Task, analyse_batch
    from service.bench.market import STORE_FILE
    from service.market.candles import CandleStore
    from service.settings import StrategySettings

    store = CandleStore.attach(Path(spec["directory"]) / STORE_FILE)
    places = store.symbols()
    store.close()
    batches = [places[at : at + BATCH] for at in range(0, len(places), BATCH)]
    task = Task(str(Path(spec["directory"]) / STORE_FILE), StrategySettings(), True)

    def tree_cpu_s() -> float:
        return sum(map(cpu_s, tree(os.getpid())))

    async def batch(executor: Executor, one: Any) -> None:
        await asyncio.wrap_future(executor.submit(analyse_batch, task, one))

    started_s, started_cpu_s = time.perf_counter(), tree_cpu_s()
    executor = _executor(spec, nursery)
    try:
        await batch(executor, batches[0])
        start_s, start_cpu_s = time.perf_counter() - started_s, tree_cpu_s() - started_cpu_s
        rounds_cpu_s = tree_cpu_s()
        round_s: list[float] = []
        for _ in range(spec["rounds"]):
            round_began_s = time.perf_counter()
            await asyncio.gather(*(batch(executor, one) for one in batches))
            round_s.append(time.perf_counter() - round_began_s)
        rounds_cpu_s = tree_cpu_s() - rounds_cpu_s
        memories = [memory_of(pid) for pid in tree(os.getpid())]
    finally:
        executor.shutdown()
    return {
        "processes": len(memories),
        "pss_bytes": sum(memory.proportional for memory in memories),
        "anonymous_bytes": sum(memory.anonymous for memory in memories),
        "start_s": start_s,
        "start_cpu_s": start_cpu_s,
        "round_s": round_s,
        "rounds_cpu_s": rounds_cpu_s,
    }


def _executor(spec: dict[str, Any], nursery: Any) -> Executor:
    from service.analysis.inline import InlineExecutor
    from service.analysis.pool import NurseryPool

    if spec["kind"] == "inline":
        return InlineExecutor(limit_s=60.0)
    if nursery is not None:
        return NurseryPool(nursery, spec["workers"], limit_s=60.0, memory_limit_bytes=10**9)
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["service.analysis.worker", "service.strategies.ict_smc"])
    return ProcessPoolExecutor(spec["workers"], mp_context=context)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
