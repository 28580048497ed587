"""Who comes first when time is short."""

from service.analysis.backlog import Backlog

SYMBOLS = [f"S{i}" for i in range(6)]


def order(backlog: Backlog, first: frozenset[str] = frozenset()) -> list[str]:
    return [SYMBOLS[i] for i in backlog.ordered(range(6), SYMBOLS, first)]


def test_open_positions_come_first_and_the_others_as_they_are_given() -> None:
    assert order(Backlog(), frozenset({"S4", "S2"})) == ["S2", "S4", "S0", "S1", "S3", "S5"]


def test_a_symbol_shed_three_times_running_comes_before_the_liquid_ones() -> None:
    backlog = Backlog()
    for _ in range(2):
        backlog.note(["S4", "S5"])
        assert order(backlog) == SYMBOLS
    backlog.note(["S4", "S5"])
    assert order(backlog, frozenset({"S3"})) == ["S3", "S4", "S5", "S0", "S1", "S2"]


def test_one_cycle_that_reached_it_puts_a_symbol_back_into_its_place() -> None:
    backlog = Backlog()
    for shed in (["S5"], ["S5"], [], ["S5"]):
        backlog.note(shed)
    assert order(backlog) == SYMBOLS


def test_nobody_is_left_out_for_ever_when_the_time_is_never_enough() -> None:
    backlog = Backlog()
    reached = dict.fromkeys(SYMBOLS, 0)
    for _ in range(20):
        turn = order(backlog)
        for symbol in turn[:2]:
            reached[symbol] += 1
        backlog.note(turn[2:])
    assert min(reached.values()) >= 3
    assert reached["S0"] == max(reached.values())
