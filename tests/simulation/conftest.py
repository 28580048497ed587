"""What the simulation's tests share."""

import pytest
import structlog


@pytest.fixture(autouse=True)
def _quiet():
    """Thousands of lines a second are of no use; a seed that fails is run again with --log."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    yield
    structlog.configure(**before)
