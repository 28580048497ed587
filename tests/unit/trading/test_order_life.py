import re
from decimal import Decimal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.records import Order, OrderPurpose, OrderRequest, OrderStatus, OrderType, Side
from service.trading.orders import apply, client_order_id, is_ours, new_order, with_status

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


def told(status: OrderStatus, filled: str = "0", at_ms: int = 9, **changes: object) -> Order:
    return msgspec.structs.replace(
        ORDER, status=status, filled_quantity=Decimal(filled), updated_ms=at_ms, **changes
    )


def run(*updates: Order) -> Order:
    order = ORDER
    for update in updates:
        order = apply(order, update).order
    return order


def test_an_order_begins_as_intended():
    assert (ORDER.status, ORDER.filled_quantity, ORDER.created_ms) == (OrderStatus.INTENDED, 0, 5)


def test_an_order_lives_through_its_states():
    order = run(told(OrderStatus.SENT), told(OrderStatus.OPEN), told(OrderStatus.PARTLY_FILLED, "1"))
    assert (order.status, order.filled_quantity) == (OrderStatus.PARTLY_FILLED, 1)
    assert run(told(OrderStatus.OPEN), told(OrderStatus.FILLED, "2")).status is OrderStatus.FILLED


def test_a_late_event_changes_nothing():
    order = run(told(OrderStatus.FILLED, "2"))
    late = apply(order, told(OrderStatus.OPEN))
    assert (late.order, late.changed, late.fault) == (order, False, "")


def test_a_duplicate_changes_nothing():
    order = run(told(OrderStatus.OPEN))
    assert not apply(order, told(OrderStatus.OPEN)).changed


def test_a_final_order_cannot_end_another_way_and_says_so():
    order = run(told(OrderStatus.CANCELLED))
    answer = apply(order, told(OrderStatus.EXPIRED))
    assert answer.order.status is OrderStatus.CANCELLED
    assert "cannot become" in answer.fault


def test_a_fill_outweighs_what_was_concluded_from_silence():
    order = run(told(OrderStatus.REJECTED))
    answer = apply(order, told(OrderStatus.FILLED, "2"))
    assert answer.order.status is OrderStatus.FILLED
    assert answer.fault


def test_only_a_conditional_order_is_triggered():
    assert "triggered" in apply(ORDER, told(OrderStatus.TRIGGERED)).fault
    stop = msgspec.structs.replace(ORDER, type=OrderType.STOP_MARKET)
    update = msgspec.structs.replace(stop, status=OrderStatus.TRIGGERED)
    assert apply(stop, update).order.status is OrderStatus.TRIGGERED


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"client_order_id": "pp-2"}, "another order"),
        ({"symbol": "BUSDT"}, "another order"),
        ({"filled_quantity": Decimal(3)}, "filled 3 of 2"),
    ],
)
def test_what_cannot_be_is_reported(changes, words):
    assert words in apply(ORDER, msgspec.structs.replace(told(OrderStatus.OPEN), **changes)).fault


def test_a_venue_id_is_given_once():
    order = run(told(OrderStatus.OPEN, venue_order_id="7"))
    answer = apply(order, told(OrderStatus.OPEN, venue_order_id="8"))
    assert answer.order.venue_order_id == "7"
    assert "became 8" in answer.fault


def test_ownership_is_never_taken_from_an_update():
    foreign = told(OrderStatus.OPEN, position_id="", purpose=OrderPurpose.EXIT)
    order = apply(ORDER, foreign).order
    assert (order.position_id, order.purpose) == ("p1", OrderPurpose.ENTRY)


def test_our_own_knowledge_is_an_update_like_any_other():
    unknown = with_status(ORDER, OrderStatus.UNKNOWN, 9, "no answer").order
    assert (unknown.status, unknown.reason) == (OrderStatus.UNKNOWN, "no answer")
    assert apply(unknown, told(OrderStatus.OPEN)).order.status is OrderStatus.OPEN


updates = st.builds(
    lambda status, filled, at_ms: told(status, str(filled), at_ms),
    st.sampled_from(list(OrderStatus)),
    st.integers(0, 3),
    st.integers(0, 50),
)


@given(st.lists(updates, max_size=12))
def test_quantity_and_time_never_fall_and_a_final_order_never_reopens(events):
    order = ORDER
    for event in events:
        after = apply(order, event).order
        assert after.filled_quantity >= order.filled_quantity
        assert after.updated_ms >= order.updated_ms
        assert after.status.final or not order.status.final
        assert apply(after, event).order == after
        order = after


@given(st.text(min_size=1), st.sampled_from(["entry", "stop", "target", "exit"]), st.integers(0, 500))
def test_client_ids_fit_the_venue_whatever_the_symbol_is_written_in(position_id, leg, attempt):
    name = client_order_id(position_id, leg, attempt)
    assert re.fullmatch(r"[.A-Z:/a-z0-9_-]{1,36}", name)
    assert is_ours(name)
    assert name == client_order_id(position_id, leg, attempt)


def test_client_ids_differ_by_position_leg_and_attempt():
    names = {client_order_id(p, leg, n) for p in ("币", "B") for leg in ("entry", "stop") for n in (0, 1)}
    assert len(names) == 8
