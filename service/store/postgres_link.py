"""One connection to PostgreSQL that comes back by itself. asyncpg is loaded here, and only when it is used.

Work is done one at a time, in the order asked for. A lost connection is made anew and the work begun
again; where that takes longer than the grace, the work fails and so does what follows, at once, until the
database answers.
"""

import asyncio
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import asyncpg
import structlog

from service.errors import SettingsInvalid, StateConflict, StoreUnavailable

log = structlog.get_logger("store.postgres")

Result = TypeVar("Result")
Connection = Any  # asyncpg.Connection, which has no types

CONNECT_LIMIT_S = 5.0
WORK_LIMIT_S = 5.0
GRACE_S = 2.0  # a restart of the database takes about as long
ATTEMPTS = 3
PAUSE_S = 0.1
OPEN_PAUSE_S = 0.5
TELL_EVERY_S = 5.0

# Waiting does not help against these.
REFUSALS = (
    asyncpg.InvalidPasswordError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
)
# The connection is gone, or of no more use. InterfaceError: it closed under us.
LOST = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.PostgresSystemError,
    asyncpg.ReadOnlySQLTransactionError,
)


def where(url: str) -> str:
    """Host, port and database of a URL: what may be shown of it."""
    parts = urllib.parse.urlsplit(url)
    host = urllib.parse.parse_qs(parts.query).get("host", [parts.hostname or "localhost"])[0]
    return f"{host}:{parts.port or 5432}{parts.path}"


class Link:
    """A connection and its order of work.

    Args: schema: where our tables stand; name: how the server lists the connection; source: where the URL
    was given, for messages.
    """

    def __init__(
        self,
        url: str,
        schema: str,
        *,
        name: str = "perpd",
        grace_s: float = GRACE_S,
        source: str = "DATABASE_URL",
    ) -> None:
        self._url = url
        self._source = source
        self._schema = schema
        self._name = name
        self._grace_s = grace_s
        self._connection: Connection | None = None
        self._turn = asyncio.Lock()
        self._running: set[asyncio.Task[Any]] = set()
        self._away_s: float | None = None  # loop time since when there is no connection
        self._connecting: asyncio.Task[None] | None = None
        self._why = ""  # the last attempt failed
        self._told = False  # that it was lost
        self.where = where(url)

    async def run(self, work: Callable[[Connection], Awaitable[Result]]) -> Result:
        """Do the work in its turn; a caller that is cancelled leaves it to finish.

        The work may be begun again from its start when the connection is lost, also when all of it was
        done and only the answer was lost. Raises StoreUnavailable, StateConflict, or what the work raises.
        """
        task = asyncio.ensure_future(self._in_turn(work))
        self._running.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    async def alone(self, work: Callable[[Connection], Awaitable[Result]]) -> Result:
        """Do work of any length once, for commands. Raises StoreUnavailable when the connection breaks."""
        async with self.borrowed() as connection:
            return await work(connection)

    @asynccontextmanager
    async def borrowed(self) -> AsyncIterator[Connection]:
        """The connection itself, in turn and without a time limit."""
        async with self._turn:
            connection = await self._connected()
            try:
                yield connection
            except (*LOST, asyncpg.PostgresError) as error:
                self._lose(error)
                raise self._unavailable(error) from error

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # looked at: nobody may be waiting for it any more

    async def _in_turn(self, work: Callable[[Connection], Awaitable[Result]]) -> Result:
        async with self._turn:
            for attempt in range(1, ATTEMPTS + 1):
                connection = await self._connected()
                try:
                    async with asyncio.timeout(WORK_LIMIT_S):
                        return await work(connection)
                except asyncpg.IntegrityConstraintViolationError as error:
                    raise StateConflict(f"{self.where}: {error}") from error
                except LOST as error:
                    self._lose(error)
                    if attempt == ATTEMPTS:
                        raise self._unavailable(error) from error
                except asyncpg.PostgresError as error:
                    raise self._unavailable(error) from error
            raise AssertionError("unreachable")

    async def _connected(self) -> Connection:
        """The connection, or one made anew within the grace; beyond it no call waits for a connection."""
        if self._connection is not None:
            if not self._connection.is_closed():
                return self._connection
            self._lose(ConnectionResetError("closed while it was idle"))
        now_s = asyncio.get_running_loop().time()
        if self._away_s is None:
            self._away_s = now_s
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.ensure_future(self._reconnect())
        left_s = self._away_s + self._grace_s - now_s
        if left_s > 0:
            await asyncio.wait({self._connecting}, timeout=left_s)
        if self._connection is None:
            raise self._unanswered(f"the database {self.where} does not answer{self._why}")
        return self._connection

    async def _reconnect(self) -> None:
        """Try until it is there."""
        while True:
            try:
                self._connection = await self._connect()
            except (*LOST, asyncpg.PostgresError) as error:
                self._why = f": {words(error)}"
                await asyncio.sleep(PAUSE_S)
                continue
            if self._told:
                log.info("database reached again", database=self.where)
            self._away_s, self._why, self._told = None, "", False
            return

    def _lose(self, error: BaseException) -> None:
        if self._away_s is None:
            self._away_s = asyncio.get_running_loop().time()
            self._told = True
            log.warning("database lost", database=self.where, error=words(error))
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    def _unavailable(self, error: BaseException) -> StoreUnavailable:
        return self._unanswered(f"the database {self.where}: {words(error)}")

    def _unanswered(self, message: str) -> StoreUnavailable:
        error = StoreUnavailable(message)
        error.advice = f"check {self._source}, the database and the network between"
        return error

    async def _connect(self) -> Connection:
        async with asyncio.timeout(CONNECT_LIMIT_S):
            return await asyncpg.connect(
                self._url,
                server_settings={
                    "search_path": self._schema,
                    "application_name": self._name,
                    # a server does not wait for ever for a client whose machine vanished in mid transaction
                    "idle_in_transaction_session_timeout": "15000",
                },
            )

    async def open(self, limit_s: float) -> None:
        """Connect, waiting for a database that is not up yet.

        Raises StoreUnavailable after `limit_s` wall seconds; SettingsInvalid: it refuses us for good.
        """
        loop = asyncio.get_running_loop()
        began_s = tell_s = loop.time()
        while True:
            try:
                self._connection = await self._connect()
                return
            except REFUSALS as error:
                raise SettingsInvalid(f"{self._source}: {self.where} refuses: {words(error)}") from None
            except (*LOST, asyncpg.PostgresError) as error:
                now_s = loop.time()
                if now_s - began_s >= limit_s:
                    raise self._unanswered(
                        f"the database {self.where} did not answer within {limit_s:g} s "
                        f"(run.database_wait_s): {words(error)}"
                    ) from None
                if now_s >= tell_s:
                    tell_s = now_s + TELL_EVERY_S
                    log.warning(
                        "waiting for the database",
                        database=self.where,
                        waited_s=round(now_s - began_s, 1),
                        limit_s=limit_s,
                        error=words(error),
                    )
                await asyncio.sleep(min(OPEN_PAUSE_S, limit_s))
            except ValueError as error:
                raise SettingsInvalid(f"{self._source}: cannot be used: {type(error).__name__}") from None

    async def close(self) -> None:
        """Finish what was begun, within the limits of the work, then close."""
        if self._running:
            await asyncio.wait(self._running)
        if self._connecting is not None and not self._connecting.done():
            self._connecting.cancel()
            await asyncio.wait({self._connecting})
        connection, self._connection = self._connection, None
        if connection is not None and not connection.is_closed():
            try:
                await connection.close(timeout=1.0)
            except LOST:
                connection.terminate()


def words(error: BaseException) -> str:
    """What went wrong, without what a driver may quote of the URL."""
    if isinstance(error, asyncpg.PostgresError):
        return str(error)
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    return type(error).__name__
