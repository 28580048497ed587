"""`perpd stop-entries`, `reduce-only`, `flatten` and `resume`: the kill switch by hand.

A running daemon is asked over its control socket and obeys at once. Where none runs, the switch is written
into the store, and the next daemon starts with it.
"""

import argparse
import asyncio
import getpass
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from service.clock import WallClock
from service.directory import data_directory, data_path
from service.errors import EXIT_USAGE, DaemonUnreachable, DataDirectoryUnusable, NobodyListens
from service.monitor.asking import ask
from service.settings import Loaded
from service.store.opening import STATE_FILE, open_state
from service.trading.halting import described, lift, read_switch, write_switch
from service.trading.killswitch import Level, tripped

RESUME = "resume"
_ANSWER_LIMIT_S = 15.0


def run(loaded: Loaded, args: argparse.Namespace, action: str) -> int:
    """Perform and print. Raises DaemonUnreachable, DataDirectoryUnusable, LeaseHeld."""
    if action == RESUME and not args.reason.strip():
        state = _perform(loaded, "show", "")
        _print(state, args)
        print("nothing was lifted: say why with --reason TEXT")  # noqa: T201
        return EXIT_USAGE
    _print(_perform(loaded, action, args.reason.strip()), args)
    return 0


def _perform(loaded: Loaded, action: str, reason: str) -> dict[str, Any]:
    directory = data_path(loaded.settings)
    by = f"perpd, {getpass.getuser()}"
    question = {"ask": "kill", "do": action, "reason": reason, "by": by}
    try:
        return ask(directory, question, _ANSWER_LIMIT_S)
    except NobodyListens:  # one that accepts and does not answer is there: behind its back it would be lost
        pass
    kept = bool(loaded.secrets.database_url) or (directory / STATE_FILE).exists()
    if not kept:  # a wrong directory must not look like success
        raise DaemonUnreachable(
            f"no daemon answers and no state is kept at {directory}; name its data directory with --data-dir"
        )
    try:
        return asyncio.run(_without_daemon(loaded, action, reason, by))
    except DataDirectoryUnusable as error:
        raise DataDirectoryUnusable(f"no daemon answers, and its state cannot be written: {error}") from None


async def _without_daemon(loaded: Loaded, action: str, reason: str, by: str) -> dict[str, Any]:
    now_ms = WallClock().now_ms()
    with data_directory(loaded.settings) as directory:
        async with open_state(loaded, directory) as state:
            store = state.store
            if action == RESUME:
                switch = await lift(store, reason, by, now_ms)
            else:
                switch = await read_switch(store, now_ms)
                if action != "show":
                    switch = tripped(switch, Level(action), reason, by, now_ms)
                    await write_switch(store, switch)
    closed = "nothing was closed, " if switch.level is Level.FLATTEN else ""
    return {**described(switch), "daemon": f"no daemon runs: {closed}it is in force from the next start"}


def _print(state: dict[str, Any], args: argparse.Namespace) -> None:
    print(json.dumps(state) if args.json else "\n".join(lines(state)))  # noqa: T201


def lines(state: dict[str, Any]) -> Iterator[str]:
    """The state for a reader."""
    yield f"kill switch: {state['level']}"
    for trip in state["trips"]:
        yield f"  {trip['level']} since {_time(trip['tripped_ms'])}: {trip['words']}"
    resumed = state["resumed"]
    if resumed["at_ms"]:
        yield f"last resumed {_time(resumed['at_ms'])} ({resumed['by']}): {resumed['reason']}"
    if "daemon" in state:
        yield state["daemon"]


def _time(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
