"""The lease as a row in PostgreSQL, valid by the database's clock and so across hosts."""

from service.store.postgres_link import Connection, Link

MAKE = "insert into lease values ('perpd', 0, '', '-infinity') on conflict do nothing"
TAKE = """
update lease set epoch = epoch + 1, holder = $1, expires = clock_timestamp() + make_interval(secs => $2)
where name = 'perpd' and expires <= clock_timestamp() returning epoch"""
RENEW = """
update lease set expires = clock_timestamp() + make_interval(secs => $2)
where name = 'perpd' and epoch = $1 returning 1"""
RELEASE = "update lease set expires = clock_timestamp() where name = 'perpd' and epoch = $1"
HOLDER = "select holder from lease where name = 'perpd'"


class PostgresLeaseRow:
    """A `LeaseRow` on a connection of its own, which no long transaction may hold up."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.where = link.where

    async def take(self, holder: str, lease_s: float) -> tuple[int | None, str]:
        async def take(db: Connection) -> tuple[int | None, str]:
            await db.execute(MAKE)  # apart: of two that insert and update in one statement, one may fail
            epoch = await db.fetchval(TAKE, holder, lease_s)
            return (int(epoch), "") if epoch is not None else (None, str(await db.fetchval(HOLDER)))

        return await self._link.run(take)

    async def renew(self, epoch: int, lease_s: float) -> bool:
        return await self._link.run(lambda db: db.fetchval(RENEW, epoch, lease_s)) is not None

    async def release(self, epoch: int) -> None:
        await self._link.run(lambda db: db.execute(RELEASE, epoch))

    async def holder(self) -> str:
        return str(await self._link.run(lambda db: db.fetchval(HOLDER)))
