"""The daemon as a process, against a venue that misbehaves, killed on the way: a short version of
`perpd simulate --sockets`."""

import pytest

from service.simulation.sockets import run


@pytest.mark.slow(about_s=31)
def test_a_killed_daemon_keeps_its_promises_over_real_sockets(tmp_path):
    verdict = run(tmp_path, seed=1, hours=1.0, kills=3, speed=240.0, calm_s=12.0)
    assert verdict.violations == ()
    assert verdict.kills == 3
    assert verdict.restarts >= 3
    assert sum(verdict.faults.values()) > 0
