"""How long a cycle's analysis may take, in wall time."""

import pytest

from service.cycle import deadline_s
from service.settings import CycleSettings


@pytest.mark.parametrize(
    ("interval_s", "speed", "seconds"),
    [(60.0, 1.0, 45.0), (10.0, 1.0, 7.5), (60.0, 20.0, 2.25), (60.0, 60.0, 2.0), (60.0, 6_000.0, 2.0)],
)
def test_the_deadline_is_a_share_of_the_interval_and_never_a_blink(
    interval_s: float, speed: float, seconds: float
) -> None:
    assert deadline_s(CycleSettings(interval_s=interval_s), speed) == seconds
