"""What the table says, and which exit code it ends with."""

import pytest

from service.check.result import Check, as_json, exit_code, failed, lines, passed, skipped, warned

GOOD = [passed("a", "fine"), warned("b", "hm", "look")]
PASSES = failed("c", "no answer", "wait", transient=True)
HANGS = skipped("d", "c failed", transient=True)
STAYS = failed("e", "the key may withdraw", "make another")


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ([], 0),
        ([PASSES], 69),
        ([PASSES, HANGS], 69),
        ([PASSES, HANGS, STAYS], 1),
        ([skipped("f", "nobody knows")], 1),
    ],
)
def test_only_where_all_that_fails_may_pass_by_itself_starting_again_is_advised(bad: list[Check], code: int):
    checks = GOOD + bad
    assert exit_code(checks) == code
    assert as_json(checks)["transient"] is (code == 69)
    assert ("started again" in list(lines(checks))[-1]) is (code == 69)


def test_a_row_says_that_it_may_pass_by_itself():
    rows = list(lines([PASSES, STAYS]))
    assert "no answer (may pass by itself)" in rows[0]
    assert "by itself" not in rows[2]
