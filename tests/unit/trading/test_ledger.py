from decimal import Decimal
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from service.records import Account, Adjustment, Fill, Side, VenuePosition
from service.store.sqlite import open_sqlite
from service.trading.ledger import Holding, Ledger, book, booked, open_ledger
from tests.recorder import Recorder


def fill(number: int, side: Side, quantity: str, price: str, fee: str = "0", **changes: str) -> Fill:
    return Fill(
        trade_id=str(number),
        client_order_id="pp-x",
        venue_order_id="1",
        symbol="AUSDT",
        side=side,
        price=Decimal(price),
        quantity=Decimal(quantity),
        fee=Decimal(fee),
        fee_asset=changes.get("fee_asset", "USDT"),
        realised_pnl=Decimal(changes.get("stated", "0")),
        maker=False,
        filled_ms=2_000 + number,
    )


def account(wallet: str = "1000", *positions: VenuePosition) -> Account:
    unrealised = sum((p.unrealised_pnl for p in positions), Decimal(0))
    return Account(
        wallet_balance=Decimal(wallet),
        unrealised_pnl=unrealised,
        equity=Decimal(wallet) + unrealised,
        available_balance=Decimal(wallet),
        positions=positions,
        at_ms=1_000,
    )


def held(quantity: str, entry: str, mark: str) -> VenuePosition:
    amount = Decimal(quantity)
    return VenuePosition(
        symbol="AUSDT",
        quantity=amount,
        entry_price=Decimal(entry),
        mark_price=Decimal(mark),
        unrealised_pnl=amount * (Decimal(mark) - Decimal(entry)),
        liquidation_price=Decimal(0),
        leverage=3,
        updated_ms=1_000,
    )


def funding(amount: str, at_ms: int, name: str = "f1") -> Adjustment:
    return Adjustment(
        adjustment_id=name, kind="funding", symbol="AUSDT", amount=Decimal(amount), reason="", at_ms=at_ms
    )


async def take(ledger: Ledger, *fills: Fill) -> list[bool]:
    return [await ledger.book_fill(one, ledger.preview(one)) for one in fills]


executions = st.tuples(
    st.sampled_from(list(Side)),
    st.decimals("0.001", "5", places=3),
    st.decimals("0.01", "5000", places=2),
    st.decimals("0", "3", places=8),
)


@given(st.lists(executions, max_size=25), st.decimals("0.01", "5000", places=2))
def test_wallet_and_unrealised_are_what_was_paid_and_what_it_is_worth(trades, mark):
    """Cash flow knows no cost basis: equity must equal it whatever the order of buys and sells."""
    holding, realised, fees, cash = Holding(), Decimal(0), Decimal(0), Decimal(0)
    for number, (side, quantity, price, fee) in enumerate(trades):
        booking = book(holding, fill(number, side, str(quantity), str(price), str(fee)), "USDT")
        holding = booking.holding
        realised += booking.realised_pnl
        fees += booking.fee
        cash -= (quantity if side is Side.BUY else -quantity) * price + fee
    equity = realised - fees + mark * holding.quantity - holding.cost
    assert abs(equity - (cash + mark * holding.quantity)) <= Decimal("0.000000005") * len(trades)


@given(st.lists(executions, max_size=25))
def test_nothing_held_costs_nothing_and_the_cost_has_the_sign_of_the_quantity(trades):
    holding = Holding()
    for number, (side, quantity, price, _) in enumerate(trades):
        holding = book(holding, fill(number, side, str(quantity), str(price)), "USDT").holding
        assert (holding.cost > 0) == (holding.quantity > 0)
        assert (holding.cost == 0) == (holding.quantity == 0)


def test_a_partial_close_realises_its_share_and_a_flip_opens_at_its_price():
    long = book(Holding(), fill(1, Side.BUY, "3", "100"), "USDT").holding
    part = book(long, fill(2, Side.SELL, "1", "110"), "USDT")
    assert (part.realised_pnl, part.holding) == (10, Holding(quantity=Decimal(2), cost=Decimal(200)))
    flip = book(part.holding, fill(3, Side.SELL, "5", "90"), "USDT")
    assert (flip.realised_pnl, flip.holding) == (-20, Holding(quantity=Decimal(-3), cost=Decimal(-270)))
    assert book(flip.holding, fill(4, Side.BUY, "3", "80"), "USDT").realised_pnl == 30


def test_a_fee_in_another_asset_leaves_this_wallet_alone():
    assert book(Holding(), fill(1, Side.BUY, "1", "1", "0.5", fee_asset="BNB"), "USDT").fee == 0


def test_amounts_are_booked_to_eight_decimals_half_to_even():
    assert booked(Decimal("0.000000005")) == Decimal("0.00000000")
    assert booked(Decimal("0.000000015")) == Decimal("0.00000002")


async def test_the_first_start_takes_the_wallet_over_and_the_next_reads_the_books(tmp_path: Path):
    async with open_sqlite(tmp_path / "s") as store:
        ledger, opening = await open_ledger(store, account("1000"), Recorder())
        assert opening is not None
        assert (opening.kind, ledger.wallet) == ("deposit", 1000)
        await take(ledger, fill(1, Side.BUY, "2", "100", "0.1"))
        await ledger.book_adjustment(funding("-0.3", 3_600_000))
    async with open_sqlite(tmp_path / "s") as store:
        again, opening = await open_ledger(store, account("5"), Recorder())
    assert opening is None
    assert again.wallet == Decimal("999.6")
    assert again.holding("AUSDT") == Holding(quantity=Decimal(2), cost=Decimal(200))


async def test_a_fill_and_a_funding_payment_are_booked_once(tmp_path: Path):
    async with open_sqlite(tmp_path / "s") as store:
        counts = Recorder()
        ledger, _ = await open_ledger(store, account(), counts)
        one = fill(1, Side.BUY, "2", "100", "0.1")
        assert await take(ledger, one, one) == [True, False]
        assert await ledger.book_adjustment(funding("-1", 3_600_020, "from the stream"))
        assert not await ledger.book_adjustment(funding("-1", 3_600_000, "from the history"))
        assert await ledger.book_adjustment(funding("-1", 7_200_000))
    assert ledger.wallet == Decimal("997.9")
    assert ledger.holding("AUSDT").quantity == 2
    assert counts.counts["ledger.duplicate_fills"] == 1


async def test_what_happened_before_the_opening_balance_is_in_it(tmp_path: Path):
    async with open_sqlite(tmp_path / "s") as store:
        ledger, _ = await open_ledger(store, account(), Recorder())
        assert not await ledger.book_adjustment(funding("-1", 999))
        assert ledger.wallet == 1000


async def test_equity_equals_the_venues_with_the_marks_of_the_same_answer(tmp_path: Path):
    async with open_sqlite(tmp_path / "s") as store:
        ledger, _ = await open_ledger(store, account(), Recorder())
        await take(ledger, fill(1, Side.SELL, "2", "100", "0.1"))
        check = ledger.compare(account("999.9", held("-2", "100", "103")))
        assert (check.difference, check.mismatched) == (0, ())
        assert check.ledger_equity == Decimal("993.9")
        other = ledger.compare(account("999.9"))
        assert other.mismatched == ("AUSDT",)


async def test_what_was_held_before_the_first_start_counts_in_equity(tmp_path: Path):
    async with open_sqlite(tmp_path / "s") as store:
        found = account("1000", held("2", "100", "110"))
        ledger, _ = await open_ledger(store, found, Recorder())
        assert ledger.compare(found).difference == 0


async def test_a_stated_pnl_that_differs_is_counted(tmp_path: Path):
    async with open_sqlite(tmp_path / "s") as store:
        counts = Recorder()
        ledger, _ = await open_ledger(store, account(), counts)
        await take(
            ledger,
            fill(1, Side.BUY, "1", "100"),
            fill(2, Side.SELL, "0.5", "110", stated="5"),
            fill(3, Side.SELL, "0.5", "110", stated="4"),
        )
    assert counts.counts == {"ledger.stated_pnl_differs": 1}
