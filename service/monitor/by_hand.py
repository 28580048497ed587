"""What a person asks of the kill switch, by the control socket or the web."""

from collections.abc import Mapping
from typing import Any

from service.monitor.control import BadQuestion
from service.trading.halting import KillSwitch
from service.trading.killswitch import Level

WORDS_LIMIT = 500


async def answer_by_hand(kill: KillSwitch, question: Mapping[str, Any]) -> Mapping[str, Any]:
    """Perform what a person asks: {"do": a level, "resume" or "show", "reason", "by"}. Raises BadQuestion."""
    action = str(question.get("do", "show"))
    reason, by = (str(question.get(key, "")).strip()[:WORDS_LIMIT] for key in ("reason", "by"))
    if action == "show":
        return kill.state()
    if action == "resume":
        if not reason:
            raise BadQuestion("resuming needs a reason")
        return await kill.resume(reason, by)
    if action not in list(Level):
        raise BadQuestion(f"do is one of {', '.join(Level)}, resume, show")
    return await kill.trip(Level(action), reason, by)
