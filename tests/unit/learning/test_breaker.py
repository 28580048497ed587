"""What failed is left alone for a while, and told once."""

from structlog.testing import capture_logs

from service.learning.breaker import Breaker


def test_a_failure_opens_it_for_a_pause_that_doubles_until_a_success() -> None:
    now = [100.0]
    breaker = Breaker("Tier", lambda: now[0])
    pauses = []
    for _ in range(8):
        assert breaker.closed
        breaker.failed("gone")
        began_s = now[0]
        while not breaker.closed:
            now[0] += 1.0
        pauses.append(now[0] - began_s)
    assert pauses == [2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 120.0, 120.0]
    breaker.succeeded()
    breaker.failed("gone")
    now[0] += 2.0
    assert breaker.closed
    assert breaker.failures == 9


def test_trouble_is_one_warning_and_its_end_one_line() -> None:
    breaker = Breaker("Tier", lambda: 0.0)
    with capture_logs() as lines:
        breaker.succeeded()
        breaker.failed("No space left on device")
        breaker.failed("No space left on device")
        breaker.succeeded()
        breaker.succeeded()
    assert [line["log_level"] for line in lines] == ["warning", "info"]
    assert lines[0]["reason"] == "No space left on device"
