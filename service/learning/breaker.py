"""A circuit breaker: what failed is left alone for a while, longer each time, and told once."""

import time
from collections.abc import Callable

import structlog

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 120.0

log = structlog.get_logger("learning.features")


class Breaker:
    """Says whether a part may be tried now.

    Closed: it may. After a failure it is open for a pause; then one attempt decides: success closes it,
    failure doubles the pause. The first failure is one warning, the recovery one info line.
    """

    def __init__(self, name: str, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._monotonic_s = monotonic_s
        self._pause_s = 0.0
        self._until_s = 0.0
        self.failures = 0

    @property
    def closed(self) -> bool:
        return not self._pause_s or self._monotonic_s() >= self._until_s

    def failed(self, reason: str) -> None:
        self.failures += 1
        if not self._pause_s:
            log.warning(
                "feature cache: second tier fails, results are computed instead",
                tier=self._name,
                reason=reason,
            )
        self._pause_s = min(self._pause_s * 2 or _FIRST_PAUSE_S, _LONGEST_PAUSE_S)
        self._until_s = self._monotonic_s() + self._pause_s

    def succeeded(self) -> None:
        if self._pause_s:
            self._pause_s = 0.0
            log.info("feature cache: second tier works again", tier=self._name)
