import pytest

from service.clock import ManualClock
from service.monitor.status import Status


@pytest.fixture
def status() -> Status:
    made = Status(ManualClock(1_000_000), interval_s=60.0)
    made.archive_writable = lambda: True
    return made


def test_it_is_ready_once_a_cycle_has_finished_on_fresh_data(status: Status):
    assert status.ready()[1]["reasons"] == ["no cycle has finished yet"]
    status.cycle_finished(fresh=3, stale=0)
    assert status.ready() == (True, {"status": "ready", "reasons": []})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: setattr(s, "archive_writable", lambda: False), "archive cannot be written"),
        (lambda s: setattr(s, "equity_known", lambda: False), "equity is not known"),
        (lambda s: s.cycle_finished(fresh=0, stale=4), "4 symbols are stale"),
        (lambda s: s._clock.advance_to(1_000_000 + 121_000), "finished 121 s ago"),
    ],
)
def test_each_thing_that_is_missing_is_a_reason(status: Status, change, words: str):
    status.cycle_finished(fresh=3, stale=0)
    change(status)
    ready, answer = status.ready()
    assert not ready
    assert words in answer["reasons"][0]
