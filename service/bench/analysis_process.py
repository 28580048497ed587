"""The fresh process an analysis is measured in, with nursery, loop, store and pool as in the daemon."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from service.analysis.inline import InlineExecutor
    from service.analysis.nursery import Nursery
    from service.analysis.pool import NurseryPool
    from service.bench.market import Rounds
    from service.market.candles import CandleStore
    from service.settings import AnalysisSettings


class Analysing(NamedTuple):
    """What a measurement works with."""

    store: "CandleStore"
    rounds: "Rounds"
    pool: "NurseryPool | InlineExecutor"
    settings: "AnalysisSettings"


def measure_in_loop(
    spec: dict[str, Any], measure: "Callable[[dict[str, Any], Nursery | None], Awaitable[dict[str, Any]]]"
) -> None:
    """Run `measure(spec, nursery)` and print what it found as JSON. Imports grow in the daemon's order."""
    nursery = None
    if spec["workers"]:
        from service.analysis.nursery import start_nursery

        nursery = start_nursery()  # first of all, as the daemon does
    import asyncio

    import uvloop

    from service.logs import configure
    from service.settings import LogSettings

    async def found() -> dict[str, Any]:
        return await measure(spec, nursery)

    configure(LogSettings(level="error"))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(found())))  # noqa: T201


@asynccontextmanager
async def analysing(spec: dict[str, Any], nursery: "Nursery | None") -> AsyncIterator[Analysing]:
    """Open the store and the workers that the spec names."""
    from service.analysis.pool import open_pool
    from service.bench.market import STORE_FILE, read_rounds
    from service.market.candles import CandleStore
    from service.settings import AnalysisSettings

    directory = Path(spec["directory"])
    settings = AnalysisSettings(workers=spec["workers"])
    store = CandleStore.open(
        directory / STORE_FILE, symbols_capacity=spec["symbols"], candles=spec["candles"]
    )
    try:
        async with open_pool(settings, nursery) as pool:
            yield Analysing(store, read_rounds(directory), pool, settings)
    finally:
        store.close()
