"""`perpd stop-entries`, `reduce-only`, `flatten` and `resume`: the kill switch by hand.

A running daemon is asked over its control socket and obeys at once. Where none runs, the switch is written
into the store, and the next daemon starts with it. Where one trades on another host of the same database, it
is left a request there.
"""

import argparse
import asyncio
import getpass
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from service.clock import WallClock, utc_time
from service.directory import data_directory, data_path, locked, marked_name, market_name
from service.errors import EXIT_USAGE, DaemonUnreachable, DataDirectoryUnusable, LeaseHeld, NobodyListens
from service.monitor.asking import ask
from service.ports import StateStore
from service.settings import Loaded
from service.store.opening import STATE_FILE, open_state
from service.trading.halting import (
    KEY,
    NOTHING_TRIPPED,
    READ_EVERY_S,
    answered,
    decoded,
    described,
    lift,
    read_switch,
    write_switch,
)
from service.trading.kill_request import REQUEST, encoded_request, with_request
from service.trading.killswitch import Level, Switch, standing, tripped

RESUME, SHOW = "resume", "show"
NO_REASON = "nothing was lifted: say why with --reason TEXT"
_ANSWER_LIMIT_S = 15.0
TAKEN_LIMIT_S = READ_EVERY_S + 10.0
TAKEN_LOOK_S = 0.25


def run(loaded: Loaded, args: argparse.Namespace, action: str) -> int:
    """Perform and print. Raises DaemonUnreachable, DataDirectoryUnusable, LeaseHeld."""
    if action == RESUME and not args.reason.strip():
        _print({**_perform(loaded, SHOW, ""), "answer": NO_REASON}, args)
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
    if action == SHOW:
        return asyncio.run(_as_kept(loaded))
    try:
        return asyncio.run(_without_daemon(loaded, action, reason, by))
    except DataDirectoryUnusable as error:
        raise DataDirectoryUnusable(f"no daemon answers, and its state cannot be written: {error}") from None


async def _as_kept(loaded: Loaded) -> dict[str, Any]:
    """The switch as the store has it. Opened for reading: neither lease nor schema is touched."""
    now_ms = WallClock().now_ms()
    if loaded.secrets.database_url:
        from service.store.beside import open_beside

        async with open_beside(loaded) as beside:
            switch, where = await read_switch(beside, now_ms), beside.where
            if await beside.trades():
                return {**described(switch), "daemon": f"trading: {await beside.holder()}, by {where}"}
    else:
        from service.store.backup import Kept, reading

        with _held(loaded) as directory, reading(directory / STATE_FILE) as db:
            switch, where = await read_switch(Kept(db), now_ms), str(directory / STATE_FILE)
    waits = "; perpd closes all positions at its next start" if switch.level is Level.FLATTEN else ""
    return {**described(switch), "daemon": f"no daemon runs: read from {where}, nothing was changed{waits}"}


async def _without_daemon(loaded: Loaded, action: str, reason: str, by: str) -> dict[str, Any]:
    now_ms = WallClock().now_ms()
    with ExitStack() as stack:
        try:
            directory = stack.enter_context(_held(loaded))
        except DataDirectoryUnusable:
            if not _state_is_elsewhere(loaded):
                raise
            return await _beside_a_holder(loaded, action, reason, by, now_ms)
        try:
            async with open_state(loaded, directory) as state:
                before = await read_switch(state.store, now_ms)
                switch = await _written(state.store, before, action, reason, by, now_ms)
        except LeaseHeld:
            return await _beside_a_holder(loaded, action, reason, by, now_ms)
    where = "the database" if loaded.secrets.database_url else str(directory / STATE_FILE)
    answer = _stays(before, action)
    if switch == before:
        waits = "; perpd closes all positions at its next start" if switch.level is Level.FLATTEN else ""
        daemon = f"no daemon runs: read from {where}, nothing was changed{waits}"
    else:
        daemon = _offline(RESUME if action == RESUME else str(switch.level), where, now_ms, left=switch.words)
    return {**answered(described(switch), answer), "daemon": daemon}


def _stays(before: Switch, action: str) -> str:
    """Why a command changes less than it says, or ''."""
    if action == RESUME:
        return "" if before.trips else NOTHING_TRIPPED
    return standing(before, Level(action))


def _offline(done: str, where: str, now_ms: int, *, left: str) -> str:
    """What was done without a daemon, when it takes effect, and by which clock.

    Args: done: RESUME, or the level that is in force now; left: what is tripped still, in words.
    """
    written = f"written to {where} at {utc_time(now_ms)} by this machine's clock"
    if done == RESUME and left:
        return f"no daemon runs: {written}; what is left is booked by a resume while perpd runs"
    if done == RESUME:
        return f"no daemon runs: {written}; perpd trades again from its next start"
    if done == Level.FLATTEN:
        return (
            f"no daemon runs: nothing was closed and nothing was sent to the venue; {written}; perpd closes "
            "all positions at its next start and opens none: to close them now, start it, or go to the venue"
        )
    return (
        f"no daemon runs: nothing was sent to the venue, orders that rest there stay; {written}; "
        "in force from the next start of perpd"
    )


def _held(loaded: Loaded) -> AbstractContextManager[Path]:
    """The data directory, held. One with its own state says itself whose books it holds: stopping must not
    fail for a flag of the run that was not repeated. In a database the flags say which books are meant."""
    directory = data_path(loaded.settings)
    return data_directory(loaded.settings) if loaded.secrets.database_url else _locked(directory)


@contextmanager
def _locked(directory: Path) -> Iterator[Path]:
    with locked(directory):
        yield directory


def _state_is_elsewhere(loaded: Loaded) -> bool:
    """The directory need not be ours for a state in a database, unless it says that other books are meant."""
    books = marked_name(data_path(loaded.settings))
    return bool(loaded.secrets.database_url) and books in ("", market_name(loaded.settings))


async def _written(
    store: StateStore, before: Switch, action: str, reason: str, by: str, now_ms: int
) -> Switch:
    if action == RESUME:
        return await lift(store, reason, by, now_ms)
    switch = tripped(before, Level(action), reason, by, now_ms)
    if switch != before:
        await write_switch(store, switch)
    return switch


async def _beside_a_holder(loaded: Loaded, action: str, reason: str, by: str, now_ms: int) -> dict[str, Any]:
    """Another perpd holds the lease: leave it a request, and see that it is taken up.

    Raises: LeaseHeld: to resume; DaemonUnreachable: the request is kept and was not taken up in time.
    """
    from service.store.beside import open_beside

    async with open_beside(loaded) as beside:
        holder = f"{await beside.holder()}, by {beside.where}"
        if action == RESUME:
            raise LeaseHeld(f"{holder}: it trades; resume there, so that nothing is lifted behind its back")
        before = decoded(await beside.get_value(KEY) or "", now_ms)
        pending = await beside.get_value(REQUEST) or ""
        asked_for = with_request(before, pending, now_ms)
        answer = standing(asked_for, Level(action))
        request = encoded_request(Level(action), reason, by, now_ms)
        if tripped(asked_for, Level(action), reason, by, now_ms) == asked_for:
            request = pending  # no severer: it must not take the place of one that nobody took up yet
        else:
            await beside.put_unfenced(REQUEST, request)
        for _ in range(int(TAKEN_LIMIT_S / TAKEN_LOOK_S)):
            switch = decoded(await beside.get_value(KEY) or "", now_ms)
            if switch.asked == request:
                return {**answered(described(switch), answer), "daemon": f"taken up by {holder}"}
            await asyncio.sleep(TAKEN_LOOK_S)
    raise DaemonUnreachable(
        f"{action} is written down and not taken up within {TAKEN_LIMIT_S:g} s by {holder}; it is in "
        "force as soon as a perpd trades on this database; look there, and at the venue"
    )


def _print(state: dict[str, Any], args: argparse.Namespace) -> None:
    print(json.dumps(state) if args.json else "\n".join(lines(state)))  # noqa: T201


def lines(state: dict[str, Any]) -> Iterator[str]:
    """The state for a reader."""
    if "answer" in state:
        yield state["answer"]
    yield f"kill switch: {state['level']}"
    for trip in state["trips"]:
        yield f"  {trip['level']} since {utc_time(trip['tripped_ms'])}: {trip['words']}"
    if "open" in state:
        yield "open now, of ours: {positions} positions, {orders} orders".format(**state["open"])
    resumed = state["resumed"]
    if resumed["at_ms"]:
        yield f"last resumed {utc_time(resumed['at_ms'])} ({resumed['by']}): {resumed['reason']}"
    if "daemon" in state:
        yield state["daemon"]
