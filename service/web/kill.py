"""The kill switch over HTTP, for those who know the token (PERPD_API_TOKEN); without one it is not there.

GET /api/v1/kill shows it. POST /api/v1/stop-entries, reduce-only, flatten and resume act on it, with a JSON
object {"reason": "..."} as body; resume needs one. A command that changes less than it says, as it finds
a severer level set or nothing to lift, is answered with 200 and the words in "answer". Every request
carries `Authorization: Bearer TOKEN`. A wrong token is logged, and answered late, so that no more tokens can
be tried in a second than connections are served; the right one is never kept waiting by them.
"""

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
import structlog

from service.monitor.control import BadQuestion
from service.web.server import Answer, Api, ApiRequest, json_answer, problem

log = structlog.get_logger("web.kill")

ROOT = "/api/v1/"
WRONG_TOKEN_S = 1.0
ACTIONS = {
    "stop-entries": "no_entries",
    "reduce-only": "reduce_only",
    "flatten": "flatten",
    "resume": "resume",
}
Ask = Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
"""Answers the same questions as the control socket."""


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    reason: str = ""


def kill_api(token: str, ask: Ask) -> Api:
    """The pages below /api/v1/. Args: token: not empty."""

    async def answer(request: ApiRequest) -> Answer:
        if not hmac.compare_digest(request.token.encode(), token.encode()):
            log.warning("a wrong API token was refused", path=request.path, given=bool(request.token))
            await asyncio.sleep(WRONG_TOKEN_S)
            return problem(401)
        name = request.path.removeprefix(ROOT)
        if name == "kill" and request.method in ("GET", "HEAD"):
            return json_answer(200, await ask({"do": "show"}))
        action = ACTIONS.get(name)
        if action is None or request.method != "POST":
            return problem(404)
        try:
            reason = msgspec.json.decode(request.body or b"{}", type=_Body).reason
            question = {"do": action, "reason": reason, "by": "HTTP API"}
            return json_answer(200, await ask(question))
        except (msgspec.MsgspecError, BadQuestion) as error:
            return json_answer(400, {"status": "error", "error": str(error)})

    return answer
