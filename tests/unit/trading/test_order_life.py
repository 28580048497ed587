import re
from decimal import Decimal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.records import CloseReason, Order, OrderPurpose, OrderRequest, OrderStatus, OrderType, Side
from service.trading.orders import (
    LEG_LETTERS,
    Denied,
    OrderEvent,
    Refused,
    Reported,
    Sent,
    Unanswered,
    client_order_id,
    exit_leg,
    exit_reason,
    is_ours,
    new_order,
    order_leg,
    step,
)

REQUEST = OrderRequest(
    client_order_id="pp-1",
    symbol="AUSDT",
    side=Side.BUY,
    type=OrderType.MARKET,
    purpose=OrderPurpose.ENTRY,
    position_id="p1",
    quantity=Decimal(2),
)
ORDER = new_order(REQUEST, 5)


STOP = new_order(
    msgspec.structs.replace(
        REQUEST, type=OrderType.STOP_MARKET, purpose=OrderPurpose.STOP, quantity=None, close_position=True
    ),
    5,
)


def told(
    status: OrderStatus, filled: str = "0", at_ms: int = 9, of: Order = ORDER, **changes: object
) -> Order:
    return msgspec.structs.replace(
        of, status=status, filled_quantity=Decimal(filled), updated_ms=at_ms, **changes
    )


def run(*updates: Order, of: Order = ORDER) -> Order:
    for update in updates:
        of = step(of, Reported(update), 9).order
    return of


# Each state against each event: the state after it, and "!" where the event cannot be. What the venue
# reports comes with its order id, and so has the order, from the moment the venue spoke of it.
WORDS = {
    "int": "intended",
    "snt": "sent",
    "unk": "unknown",
    "opn": "open",
    "par": "partly_filled",
    "trg": "triggered",
    "fil": "filled",
    "can": "cancelled",
    "exp": "expired",
    "rej": "rejected",
    "lost": "lost",
    "una": "unanswered",
    "ref": "refused",
    "den": "denied",
}

PLAIN = """
     snt  una  ref  den  opn  par  trg  fil  can  exp  rej
int  snt  unk  rej  rej  opn  par  int! fil  can  exp  rej
snt  snt! unk  rej  rej  opn  par  snt! fil  can  exp  rej
unk  unk! unk  rej  rej  opn  par  unk! fil  can  exp  rej
opn  opn! opn  opn! exp  opn  par  opn! fil  can  exp  rej
par  par! par  par! exp  par  par  par! fil  can  exp  rej
fil  fil! fil  fil! fil  fil  fil  fil! fil  fil! fil! fil!
can  can! can  can! can  can  can  can! fil! can  can! can!
exp  exp! exp  exp! exp  exp  exp  exp! fil! exp! exp  exp!
rej  rej! rej  rej  rej  rej  rej  rej! fil! rej! rej! rej
lost rej! rej  rej  rej  opn! par! rej! fil! can! exp! rej
"""
CONDITIONAL = """
     snt  una  ref  den  opn  par  trg  fil  can  exp  rej
int  snt  unk  rej  rej  opn  par  trg  fil  can  exp  rej
snt  snt! unk  rej  rej  opn  par  trg  fil  can  exp  rej
unk  unk! unk  rej  rej  opn  par  trg  fil  can  exp  rej
opn  opn! opn  opn! exp  opn  par  trg  fil  can  exp  rej
par  par! par  par! exp  par  par  trg  fil  can  exp  rej
trg  trg! trg  trg! exp  trg  trg  trg  fil  can  exp  rej
fil  fil! fil  fil! fil  fil  fil  fil  fil  fil! fil! fil!
can  can! can  can! can  can  can  can  fil! can  can! can!
exp  exp! exp  exp! exp  exp  exp  exp  fil! exp! exp  exp!
rej  rej! rej  rej  rej  rej  rej  rej  fil! rej! rej! rej
lost rej! rej  rej  rej  opn! par! trg! fil! can! exp! rej
"""


def cells(table: str) -> list[tuple[str, str, str]]:
    head, *rows = [line.split() for line in table.strip().splitlines()]
    return [
        (WORDS[row[0]], WORDS[event], WORDS[cell.rstrip("!")] + "!" * cell.endswith("!"))
        for row in rows
        for event, cell in zip(head, row[1:], strict=True)
    ]


def in_state(order: Order, state: str) -> Order:
    """`lost` is rejected by our own conclusion: the venue never gave it an id."""
    if state == "lost":
        return msgspec.structs.replace(order, status=OrderStatus.REJECTED)
    status = OrderStatus(state)
    ours = status in (OrderStatus.INTENDED, OrderStatus.SENT, OrderStatus.UNKNOWN)
    filled = {"partly_filled": "1", "filled": "2"}.get(state, "0")
    return told(status, filled, of=order, venue_order_id="" if ours else "7")


def happens(order: Order, event: str) -> OrderEvent:
    ours: dict[str, OrderEvent] = {
        "sent": Sent(),
        "unanswered": Unanswered("no answer"),
        "refused": Refused("-2019: no"),
        "denied": Denied("nothing of it"),
    }
    if event in ours:
        return ours[event]
    filled = {"partly_filled": "1", "filled": "2"}.get(event, "0")
    return Reported(told(OrderStatus(event), filled, of=order, venue_order_id="7"))


@pytest.mark.parametrize(("state", "event", "cell"), cells(PLAIN))
def test_a_plain_order_in_each_state_meets_each_event(state, event, cell):
    assert_cell(ORDER, state, event, cell)


@pytest.mark.parametrize(("state", "event", "cell"), cells(CONDITIONAL))
def test_a_conditional_order_in_each_state_meets_each_event(state, event, cell):
    assert_cell(STOP, state, event, cell)


def assert_cell(order: Order, state: str, event: str, cell: str) -> None:
    before = in_state(order, state)
    taken = step(before, happens(before, event), 9)
    assert taken.order.status == cell.rstrip("!")
    assert bool(taken.fault) == cell.endswith("!"), taken.fault
    assert taken.changed == (taken.order != before)


def test_every_state_is_in_the_tables():
    states = {row for row, _, _ in cells(CONDITIONAL)} - {"lost"}
    assert states == {status.value for status in OrderStatus}
    assert {row for row, _, _ in cells(PLAIN)} - {"lost"} == states - {"triggered"}


@pytest.mark.parametrize(
    ("state", "event", "instructions"),
    [
        ("intended", "sent", {"save"}),
        ("sent", "unanswered", {"save", "ask"}),
        ("unknown", "unanswered", {"ask"}),
        ("open", "unanswered", set()),
        ("sent", "refused", {"save", "ended", "unguarded"}),
        ("open", "refused", {"ask"}),
        ("sent", "open", {"save", "guards"}),
        ("open", "open", {"guards"}),
        ("open", "triggered", {"save", "guards"}),
        ("triggered", "filled", {"save", "ended"}),
        ("open", "cancelled", {"save", "ended", "unguarded"}),
        ("triggered", "rejected", {"save", "ended", "unguarded"}),
        ("lost", "open", {"save", "guards"}),
    ],
)
def test_a_stop_says_what_is_to_be_done(state, event, instructions):
    before = in_state(STOP, state)
    assert set(step(before, happens(before, event), 9).instructions) == instructions


def test_a_plain_order_guards_nothing():
    assert set(step(ORDER, happens(ORDER, "open"), 9).instructions) == {"save"}
    assert set(step(ORDER, happens(ORDER, "cancelled"), 9).instructions) == {"save", "ended"}


def test_an_order_begins_as_intended():
    assert (ORDER.status, ORDER.filled_quantity, ORDER.created_ms) == (OrderStatus.INTENDED, 0, 5)


def test_a_stop_remembers_the_order_that_its_trigger_made():
    order = run(
        told(OrderStatus.OPEN, of=STOP, venue_order_id="7"),
        told(OrderStatus.TRIGGERED, of=STOP, venue_order_id="7", became_order_id="91"),
        of=STOP,
    )
    assert (order.venue_order_id, order.became_order_id) == ("7", "91")
    other = step(order, Reported(told(OrderStatus.TRIGGERED, of=STOP, became_order_id="92")), 9)
    assert "91 became 92" in other.fault
    assert other.order.became_order_id == "91"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"client_order_id": "pp-2"}, "another order"),
        ({"symbol": "BUSDT"}, "another order"),
        ({"filled_quantity": Decimal(3)}, "filled 3 of 2"),
    ],
)
def test_what_cannot_be_is_reported(changes, words):
    update = msgspec.structs.replace(told(OrderStatus.OPEN), **changes)
    assert words in step(ORDER, Reported(update), 9).fault


def test_a_venue_id_is_given_once():
    order = run(told(OrderStatus.OPEN, venue_order_id="7"))
    taken = step(order, Reported(told(OrderStatus.OPEN, venue_order_id="8")), 9)
    assert taken.order.venue_order_id == "7"
    assert "became 8" in taken.fault


def test_ownership_is_never_taken_from_an_update():
    foreign = told(OrderStatus.OPEN, position_id="", purpose=OrderPurpose.EXIT)
    order = run(foreign)
    assert (order.position_id, order.purpose) == ("p1", OrderPurpose.ENTRY)


def test_a_late_fill_of_a_cancelled_order_still_counts_its_quantity():
    order = run(told(OrderStatus.CANCELLED), told(OrderStatus.PARTLY_FILLED, "1"))
    assert (order.status, order.filled_quantity) == (OrderStatus.CANCELLED, 1)


events = st.one_of(
    st.sampled_from([Sent(), Unanswered("x"), Refused("x"), Denied("x")]),
    st.builds(
        lambda status, filled, at_ms: Reported(told(status, str(filled), at_ms)),
        st.sampled_from(list(OrderStatus)),
        st.integers(0, 3),
        st.integers(0, 50),
    ),
)


@given(st.sampled_from([ORDER, STOP]), st.lists(events, max_size=12))
def test_quantity_and_time_never_fall_and_an_end_that_the_venue_stated_is_the_end(order, happened):
    for event in happened:
        taken = step(order, event, 20)
        after = taken.order
        assert after.filled_quantity >= order.filled_quantity
        assert after.updated_ms >= order.updated_ms
        if order.status.final and not after.status.final:
            assert order.status is OrderStatus.REJECTED
            assert taken.fault
        assert not isinstance(event, Reported) or step(after, event, 20).order == after
        order = after


@given(st.permutations([OrderStatus.OPEN, OrderStatus.PARTLY_FILLED, OrderStatus.FILLED]))
def test_the_order_in_which_reports_arrive_does_not_matter(statuses):
    filled = {OrderStatus.OPEN: "0", OrderStatus.PARTLY_FILLED: "1", OrderStatus.FILLED: "2"}
    order = run(*(told(status, filled[status], venue_order_id="7") for status in statuses))
    assert (order.status, order.filled_quantity) == (OrderStatus.FILLED, 2)


@given(st.text(min_size=1), st.sampled_from([*LEG_LETTERS]), st.integers(0, 500))
def test_client_ids_fit_the_venue_whatever_the_symbol_is_written_in(position_id, leg, attempt):
    name = client_order_id(position_id, leg, attempt)
    assert re.fullmatch(r"[.A-Z:/a-z0-9_-]{1,36}", name)
    assert is_ours(name)
    assert order_leg(name) == leg
    assert name == client_order_id(position_id, leg, attempt)


def test_an_id_that_is_not_ours_names_no_leg():
    assert [order_leg(name) for name in ("", "x-1-s00", "pp-", "autoclose-17", "pp-ff-q00")] == [""] * 5


def test_client_ids_differ_by_position_leg_and_attempt():
    names = {client_order_id(p, leg, n) for p in ("币", "B") for leg in LEG_LETTERS for n in (0, 1)}
    assert len(names) == 4 * len(LEG_LETTERS)


@pytest.mark.parametrize(
    "reason", [CloseReason.STOP, CloseReason.TARGET, CloseReason.EXPIRED, CloseReason.EXIT]
)
def test_the_name_of_an_exit_tells_why_it_was_sent(reason):
    assert exit_reason(client_order_id("s1", exit_leg(reason), 12)) is reason
