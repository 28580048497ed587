"""`perpd bench dataset`: how fast, and in how much memory, a training set is built from a long history."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from service.bench.machine import machine
from service.bench.place import add_argument, place, temporary_in
from service.bench.processes import BenchFailed, environment
from service.bench.result import Figure, Result

NAME = "dataset"
SUMMARY = "records a second and peak memory of building and describing a training set"
MEASURES = (
    "A made-up history in the archive's compacted form (`perpd dataset generate`), then `perpd dataset "
    "build` and `describe` on it, each in a process of its own. A record is a signal with its outcome and 29 "
    "features. Peak memory: the kernel's highest resident size of the process."
)
BYTES_A_RECORD = 300  # 89 of history and 130 of chunks at 1,000,000 records, and what the build spills
RATE_GOAL, PEAK_GOAL_MB = 200_000.0, 512.0


class _Done(NamedTuple):
    seconds: float
    cpu_s: float
    peak_mb: float
    output: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--records", type=int, default=10_000_000, metavar="N", help="default 10000000")
    parser.add_argument("--memory-mb", type=int, default=512, metavar="MB", help="of the build (512)")
    add_argument(parser)


def measure(args: argparse.Namespace) -> Result:
    facts = machine()
    with place(args.directory, args.records * BYTES_A_RECORD) as directory:
        data, out = directory / "data", directory / "set"
        made = _perpd(directory, "generate", "--records", str(args.records), "--out", str(data))
        size = sum(file.stat().st_size for file in data.rglob("*.parquet"))
        memory = ("--memory-mb", str(args.memory_mb))
        built = _perpd(directory, "build", "--data-dir", str(data), "--out", str(out), *memory)
        manifest = json.loads((out / "manifest.json").read_text())
        described = _perpd(directory, "describe", str(out), "--json")
    figures = (
        Figure("build", args.records / built.seconds, "records/s", "more", RATE_GOAL),
        Figure("build, peak memory", built.peak_mb, "MB", "less", PEAK_GOAL_MB),
        Figure("build, CPU a record", built.cpu_s / args.records * 1e6, "us", "less"),
        Figure("describe", manifest["kept"] / described.seconds, "records/s", "more"),
        Figure("describe, peak memory", described.peak_mb, "MB", "less", PEAK_GOAL_MB),
        Figure("generate", args.records / made.seconds, "records/s", "more"),
        Figure("history on disk", size / 1e6, "MB"),
        Figure("records read", manifest["read"], "records"),
        Figure("records kept", manifest["kept"], "records"),
        Figure("joined one to one", float(manifest["one_to_one"]), "yes is 1", "more", 1.0),
    )
    parameters = {"records": args.records, "memory_mb": args.memory_mb}
    return Result(NAME, MEASURES, parameters, facts, figures)


def _perpd(directory: Path, *arguments: str) -> _Done:
    """Run `perpd dataset ...` to its end, with its temporary files in the directory. Raises BenchFailed."""
    command = [sys.executable, "-m", "service", "dataset", *arguments]
    began_s = time.monotonic()
    process: subprocess.Popen[Any] = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment() | temporary_in(directory),
    )
    assert process.stdout is not None
    try:
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)  # what the kernel counted of this process alone
    except BaseException:
        process.kill()  # or it would write on into a directory that is being removed
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise BenchFailed(f"perpd dataset {arguments[0]} ended with {process.returncode}: {output[-400:]}")
    return _Done(time.monotonic() - began_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, output)
