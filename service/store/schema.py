"""The SQLite schema: numbered, forward-only migrations. An entry that was released is never edited."""

MIGRATIONS: tuple[tuple[str, ...], ...] = (
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
)
