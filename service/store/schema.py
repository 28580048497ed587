"""The schema of each dialect: numbered, forward-only migrations. One that was released is never edited."""

SQLITE: tuple[tuple[str, ...], ...] = (
    (
        # payload is the record as JSON; the columns beside it are those that are searched or constrained
        """create table orders (
            client_order_id text primary key,
            venue_order_id text not null,
            conditional integer not null,
            symbol text not null,
            position_id text not null,
            final integer not null,
            payload blob not null
        ) without rowid""",
        "create index orders_open on orders (client_order_id) where final = 0",
        # a venue order belongs to one order of ours and so to one trade; ids of conditional orders are
        # numbered apart from those of the matching engine
        """create unique index orders_venue on orders (symbol, conditional, venue_order_id)
            where venue_order_id <> ''""",
        """create table fills (
            symbol text not null,
            trade_id text not null,
            client_order_id text not null,
            filled_ms integer not null,
            payload blob not null,
            primary key (symbol, trade_id)
        ) without rowid""",
        "create index fills_order on fills (client_order_id)",
        """create table positions (
            position_id text primary key,
            symbol text not null,
            traded integer not null,
            closed_ms integer not null,
            payload blob not null
        ) without rowid""",
        "create index positions_closed on positions (closed_ms)",
        """create table shadows (
            position_id text primary key,
            closed_ms integer not null,
            payload blob not null
        ) without rowid""",
        "create index shadows_open on shadows (position_id) where closed_ms = 0",
        "create index shadows_closed on shadows (closed_ms)",
        """create table decided (
            signal_id text primary key,
            candle_close_ms integer not null
        ) without rowid""",
        "create index decided_close on decided (candle_close_ms)",
        """create table adjustments (
            adjustment_id text primary key,
            at_ms integer not null,
            payload blob not null
        ) without rowid""",
        "create table settings (name text primary key, value text not null) without rowid",
        # exact decimals as text, moved in the transaction of the fill or adjustment that moves them
        "create table totals (name text primary key, amount text not null) without rowid",
        """create table holdings (
            symbol text primary key,
            quantity text not null,
            cost text not null
        ) without rowid""",
    ),
    (
        "create index orders_position on orders (position_id)",
        "create table bans (host text primary key, until_ms integer not null) without rowid",
        "create table cooldowns (symbol text primary key, until_ms integer not null) without rowid",
        """create table models (
            name text primary key,
            created_ms integer not null,
            role text not null,
            payload blob not null
        ) without rowid""",
        "create unique index models_champion on models (role) where role = 'champion'",
        # one row; each run adds one to the epoch
        "create table lease (name text primary key, epoch integer not null) without rowid",
    ),
    (
        # what is committed and not in the archive yet; the payload is the record as JSON
        """create table outbox (
            name text primary key,
            stream text not null,
            payload text not null
        ) without rowid""",
        "drop table cooldowns",
    ),
    (
        # The id under which an order is matched: a plain order's own, or of the order that a trigger made.
        # Both are numbers of the matching engine: each belongs to one order of ours, and so to one trade.
        "alter table orders add column matched_order_id text",
        "create unique index orders_matched on orders (symbol, matched_order_id)",
        """update orders set matched_order_id = venue_order_id
            where conditional = 0 and venue_order_id <> ''""",
        # a row that contradicts one before it keeps none: what is there must not keep perpd from starting
        """update or ignore orders
            set matched_order_id = nullif(json_extract(cast(payload as text), '$.became_order_id'), '')
            where conditional = 1""",
    ),
    ("create table cooldowns (symbol text primary key, until_ms integer not null) without rowid",),
)

POSTGRES: tuple[tuple[str, ...], ...] = (
    (
        """create table orders (
            client_order_id text primary key,
            venue_order_id text not null,
            conditional boolean not null,
            symbol text not null,
            position_id text not null,
            final boolean not null,
            payload json not null
        )""",
        "create index orders_open on orders (client_order_id) where not final",
        """create unique index orders_venue on orders (symbol, conditional, venue_order_id)
            where venue_order_id <> ''""",
        "create index orders_position on orders (position_id)",
        """create table fills (
            symbol text not null,
            trade_id text not null,
            client_order_id text not null,
            filled_ms bigint not null,
            payload json not null,
            primary key (symbol, trade_id)
        )""",
        "create index fills_order on fills (client_order_id)",
        """create table positions (
            position_id text primary key,
            symbol text not null,
            traded boolean not null,
            closed_ms bigint not null,
            payload json not null
        )""",
        "create index positions_closed on positions (closed_ms)",
        """create table shadows (
            position_id text primary key,
            closed_ms bigint not null,
            payload json not null
        )""",
        "create index shadows_open on shadows (position_id) where closed_ms = 0",
        "create index shadows_closed on shadows (closed_ms)",
        "create table decided (signal_id text primary key, candle_close_ms bigint not null)",
        "create index decided_close on decided (candle_close_ms)",
        """create table adjustments (
            adjustment_id text primary key,
            at_ms bigint not null,
            payload json not null
        )""",
        "create table settings (name text primary key, value text not null)",
        "create table totals (name text primary key, amount numeric not null)",
        "create table holdings (symbol text primary key, quantity numeric not null, cost numeric not null)",
        "create table bans (host text primary key, until_ms bigint not null)",
        "create table cooldowns (symbol text primary key, until_ms bigint not null)",
        """create table models (
            name text primary key,
            created_ms bigint not null,
            role text not null,
            payload json not null
        )""",
        "create unique index models_champion on models (role) where role = 'champion'",
    ),
    (
        "create table outbox (name text primary key, stream text not null, payload text not null)",
        "drop table cooldowns",
    ),
    (
        "alter table orders add column matched_order_id text",
        """update orders set matched_order_id = venue_order_id
            where not conditional and venue_order_id <> ''""",
        """update orders set matched_order_id = payload->>'became_order_id'
            from (
                select symbol as of_symbol, payload->>'became_order_id' as became,
                    min(client_order_id) as first
                from orders where conditional and payload->>'became_order_id' <> '' group by 1, 2
            ) triggered
            where client_order_id = first and not exists (
                select 1 from orders plain
                where plain.symbol = of_symbol and plain.matched_order_id = became
            )""",
        "create unique index orders_matched on orders (symbol, matched_order_id)",
    ),
    ("create table cooldowns (symbol text primary key, until_ms bigint not null)",),
)

# Made before anything else, since a schema may be changed by the holder of the lease only. That the epoch is
# part of a key makes taking the lease over wait for transactions that hold on to it, and they for that.
POSTGRES_LEASE = """
create table if not exists schema_version (one boolean primary key check (one), version integer not null);
insert into schema_version values (true, 0) on conflict do nothing;
create table if not exists lease (
    name text primary key,
    epoch bigint not null,
    holder text not null,
    expires timestamptz not null,
    unique (name, epoch)
)"""

# What is copied between stores: each table, its columns and their kinds, its key first.
TABLES: dict[str, tuple[tuple[str, str], ...]] = {
    "orders": (
        ("client_order_id", "text"),
        ("venue_order_id", "text"),
        ("conditional", "flag"),
        ("symbol", "text"),
        ("position_id", "text"),
        ("final", "flag"),
        ("payload", "json"),
        ("matched_order_id", "text"),  # null until there is one
    ),
    "fills": (
        ("symbol", "text"),
        ("trade_id", "text"),
        ("client_order_id", "text"),
        ("filled_ms", "integer"),
        ("payload", "json"),
    ),
    "positions": (
        ("position_id", "text"),
        ("symbol", "text"),
        ("traded", "flag"),
        ("closed_ms", "integer"),
        ("payload", "json"),
    ),
    "shadows": (("position_id", "text"), ("closed_ms", "integer"), ("payload", "json")),
    "decided": (("signal_id", "text"), ("candle_close_ms", "integer")),
    "adjustments": (("adjustment_id", "text"), ("at_ms", "integer"), ("payload", "json")),
    "settings": (("name", "text"), ("value", "text")),
    "totals": (("name", "text"), ("amount", "decimal")),
    "holdings": (("symbol", "text"), ("quantity", "decimal"), ("cost", "decimal")),
    "bans": (("host", "text"), ("until_ms", "integer")),
    "cooldowns": (("symbol", "text"), ("until_ms", "integer")),
    "outbox": (("name", "text"), ("stream", "text"), ("payload", "text")),
    "models": (("name", "text"), ("created_ms", "integer"), ("role", "text"), ("payload", "json")),
}
