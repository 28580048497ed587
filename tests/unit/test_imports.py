"""Imports are the memory: what neither the daemon nor a worker may ever load."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("pandas", "polars", "pyarrow", "duckdb", "lightgbm", "sklearn", "ccxt", "scipy", "aiohttp.web")


def loaded_by(statement: str) -> set[str]:
    """Names of the modules in a fresh interpreter after the statement."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import service.daemon, service.exchange.paper",
        "from service.analysis.nursery import preload; preload()",
        "from service.cli import build_parser; build_parser()",
    ],
)
def test_nothing_heavy_is_imported(statement):
    assert not loaded_by(statement) & set(HEAVY)


def test_a_worker_says_its_modules_without_loading_more():
    before = loaded_by("from service.analysis.nursery import preload; preload()")
    after = loaded_by(
        "from service.analysis.nursery import preload; preload(); import service.learning.loaded_modules"
    )
    assert after - before == {"service.learning", "service.learning.loaded_modules"}


def test_redis_is_loaded_only_where_its_address_is_known():
    assert "redis" not in loaded_by("import service.daemon, service.exchange.paper")
    assert "redis" in loaded_by("import service.learning.redis_tier")


def test_the_daemon_process_needs_no_numpy():
    assert not loaded_by("import service.daemon, service.exchange.paper") & {"numpy", "talib"}


def test_the_command_line_loads_neither_loop_nor_network():
    assert not loaded_by("import service.__main__, service.cli") & {"asyncio", "aiohttp", "numpy", "uvloop"}
