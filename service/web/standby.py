"""What a perpd answers while another one trades its account: alive, and not ready."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog

from service.monitor.metrics import Metric, render
from service.monitor.watchdog import Notifier
from service.settings import WebSettings
from service.web.server import serving

log = structlog.get_logger("web.standby")

EXTENDED_S = 60.0


@asynccontextmanager
async def standing_by(settings: WebSettings, notifier: Notifier, holder: str) -> AsyncIterator[None]:
    """Serve the three pages, and ask the service manager for patience, while the block runs."""
    reason = f"standing by: {holder} trades this account"
    page = {"role": "standby", "reasons": [reason]}
    metrics = render([Metric.gauge("perpd_ready", "1 when ready", 0.0)])
    async with (
        serving(
            settings.host,
            settings.port,
            health=lambda: {"role": "standby"},
            ready=lambda: (False, page),
            metrics=lambda: metrics,
        ) as port,
        asyncio.TaskGroup() as tasks,
    ):
        log.info("serving health while standing by", host=settings.host, port=port)
        patience = tasks.create_task(_ask_for_patience(notifier, reason), name="web.standby")
        try:
            yield
        finally:
            patience.cancel()


async def _ask_for_patience(notifier: Notifier, reason: str) -> None:
    while True:
        notifier.status(reason)
        notifier.extend(EXTENDED_S)
        await asyncio.sleep(EXTENDED_S / 2)
