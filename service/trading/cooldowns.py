"""Symbols on which nothing is opened for a while, since the venue took a position there at a loss limit.

A cooldown follows from how a position ended and when; the store keeps it in the transaction of that end, so
that neither a crash nor a start forgets it.
"""

from collections.abc import Mapping

import structlog

from service.records import CloseReason, Position, RefusalReason
from service.trading.ranking import Refused

log = structlog.get_logger("trading.cooldowns")

MINUTE_MS = 60_000
BEGUN_BY = frozenset({CloseReason.STOP, CloseReason.LIQUIDATION, CloseReason.ADL})


class Cooldowns:
    """By symbol. Args: minutes: `risk.cooldown_minutes`; 0 begins none and ignores those that are kept."""

    def __init__(self, minutes: float) -> None:
        self._minutes = minutes
        self._until_ms: dict[str, int] = {}

    def until_ms(self, position: Position) -> int:
        """When the cooldown that this end of a position began is over (venue time); 0 when it began none."""
        if not position.closed_ms or position.close_reason not in BEGUN_BY or not self._minutes:
            return 0
        return position.closed_ms + round(self._minutes * MINUTE_MS)

    def begin(self, position: Position, now_ms: int) -> None:
        """A position ended, and the store has it; many an end begins nothing."""
        symbol, until_ms = position.symbol, self.until_ms(position)
        if until_ms <= max(now_ms, self._until_ms.get(symbol, 0)):
            return
        self._until_ms[symbol] = until_ms
        log.info(
            "symbol cools down",
            symbol=symbol,
            reason=position.close_reason,
            minutes=round((until_ms - now_ms) / MINUTE_MS, 1),
        )

    def restore(self, kept: Mapping[str, int], now_ms: int) -> None:
        """Args: kept: symbol to the end of its cooldown, as the store has them."""
        if self._minutes:
            self._until_ms = dict(kept)
            if left := self.left(now_ms):
                log.info("symbols cool down", minutes=left)

    def left(self, now_ms: int) -> dict[str, float]:
        """Symbol to the minutes left of its cooldown; those that are over are forgotten."""
        self._until_ms = {symbol: ms for symbol, ms in self._until_ms.items() if ms > now_ms}
        return {symbol: (ms - now_ms) / MINUTE_MS for symbol, ms in sorted(self._until_ms.items())}

    def refusal(self, symbol: str, now_ms: int) -> Refused | None:
        """Why nothing is opened on a symbol, or None."""
        left = self.left(now_ms).get(symbol)
        return None if left is None else refused(left, self._minutes)


def refused(left: float, minutes: float) -> Refused:
    """Args: left: minutes; minutes: the setting, which may have been another when this one began."""
    return Refused(
        reason=RefusalReason.COOLDOWN,
        detail=f"{left:.1f} minutes left since its position ended by stop, liquidation or deleveraging "
        f"(risk.cooldown_minutes {minutes:g})",
    )
