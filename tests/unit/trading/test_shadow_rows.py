"""Open shadows as rows of numbers: they come out as they went in."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.monitor.sizes import held_bytes
from service.records import PositionSide, ShadowPosition
from service.trading.shadow_rows import NUMBERS, OF_THE_END, ShadowRows

SYMBOLS = ("AUSDT", "币安人生USDT")
times = st.integers(0, 2**45)
floats = st.floats(allow_nan=False)


def shadow(
    symbol: str = "AUSDT",
    opened_ms: int = 300_000,
    strategy: str = "s",
    side: PositionSide = PositionSide.LONG,
) -> ShadowPosition:
    signal_id = f"{strategy}:{symbol}:{opened_ms}:{side}"
    return ShadowPosition(
        position_id=f"shadow:{signal_id}",
        signal_id=signal_id,
        symbol=symbol,
        position_side=side,
        entry=1.5,
        stop=1.25,
        target=2.0,
        opened_ms=opened_ms,
        checked_ms=opened_ms,
    )


@st.composite
def shadows(draw: st.DrawFn) -> ShadowPosition:
    made = shadow(
        draw(st.sampled_from(SYMBOLS)),
        draw(times),
        draw(st.sampled_from(("ict_smc", "mine", "a:b"))),
        draw(st.sampled_from(PositionSide)),
    )
    numbers = {name: draw(floats) for name in NUMBERS if name not in ("opened_ms", "checked_ms", "traded")}
    changed = msgspec.structs.replace(made, checked_ms=draw(times), traded=draw(st.booleans()), **numbers)
    if draw(st.booleans()):
        return changed
    name = draw(st.text(min_size=1))  # an id of another form
    return msgspec.structs.replace(changed, signal_id=name, position_id=f"shadow:{name}")


def changes(one: ShadowPosition) -> st.SearchStrategy[ShadowPosition]:
    """It stays, moves on, or ends."""
    moved = st.builds(
        lambda best, worst: msgspec.structs.replace(
            one, checked_ms=one.checked_ms + 1, favourable_excursion=best, adverse_excursion=worst
        ),
        floats,
        floats,
    )
    return st.one_of(st.just(one), moved, st.just(msgspec.structs.replace(one, closed_ms=1)))


@given(st.lists(shadows(), max_size=12, unique_by=lambda one: one.position_id), st.data())
def test_what_goes_in_comes_out_equal_and_in_order(made: list[ShadowPosition], data: st.DataObject) -> None:
    rows = ShadowRows()
    for one in made:
        assert not rows.holds(one)
        rows.add(one)
        assert rows.holds(one)
    kept = made
    for symbol in SYMBOLS:
        held = [one for one in made if one.symbol == symbol]
        assert rows.of(symbol) == held
        assert rows.checked_ms(symbol) == min((one.checked_ms for one in held), default=0)
        assert rows.opened_ms(symbol) == min((one.opened_ms for one in held), default=0)
        changed = {one.position_id: data.draw(changes(one)) for one in held}
        rows.change(symbol, lambda one, changed=changed: changed[one.position_id])
        kept = [changed.get(one.position_id, one) for one in kept]
        kept = [one for one in kept if not one.closed_ms]
    assert [one for symbol in SYMBOLS for one in rows.of(symbol)] == sorted(
        kept, key=lambda one: SYMBOLS.index(one.symbol)
    )
    assert len(rows) == len(kept)
    assert rows.symbols() == {one.symbol for one in kept}
    names = {one.position_id for one in kept}
    assert [rows.holds(one) for one in made] == [one.position_id in names for one in made]


def test_every_field_of_a_shadow_is_kept_or_follows_from_another() -> None:
    derived = {"position_id", "signal_id", "symbol", "position_side"}
    assert derived | {*NUMBERS} | {*OF_THE_END} == set(ShadowPosition.__struct_fields__)
    assert len(derived) + len(NUMBERS) + len(OF_THE_END) == len(ShadowPosition.__struct_fields__)


def test_a_closed_shadow_is_not_taken() -> None:
    with pytest.raises(ValueError, match="is closed"):
        ShadowRows().add(msgspec.structs.replace(shadow(), closed_ms=1))


def test_a_step_that_fails_changes_nothing() -> None:
    rows = ShadowRows()
    made = [shadow(opened_ms=300_000 * n) for n in range(3)]
    for one in made:
        rows.add(one)

    def step(one: ShadowPosition) -> ShadowPosition:
        if one == made[2]:
            raise ArithmeticError
        return msgspec.structs.replace(one, closed_ms=1)

    with pytest.raises(ArithmeticError):
        rows.change("AUSDT", step)
    assert rows.of("AUSDT") == made
    assert len(rows) == 3


def test_names_in_a_strategys_place_that_never_come_again_leave_with_their_shadows() -> None:
    rows = ShadowRows()
    for number in range(3_000):
        made = [shadow(opened_ms=300_000 * number, strategy=f"{number}/{part}") for part in "ab"]
        for one in made:
            rows.add(one)
            assert rows.holds(one)
        assert rows.of("AUSDT") == made
        rows.change("AUSDT", lambda one: msgspec.structs.replace(one, closed_ms=1))
        assert not any(rows.holds(one) for one in made)
    assert held_bytes(rows) < 20_000


def test_a_full_book_takes_a_tenth_of_a_kilobyte_a_shadow() -> None:
    rows = ShadowRows()
    for number in range(20_000):
        rows.add(shadow(f"A{number % 200}USDT", 300_000 * (number // 200)))
    assert held_bytes(rows) / len(rows) < 110
