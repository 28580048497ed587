"""An executor at work on an in-memory venue, for each test that asks for a `desk`."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.trading_desk import Desk, Venue, desk_at


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with desk_at(tmp_path, Venue()) as opened:
        yield opened
