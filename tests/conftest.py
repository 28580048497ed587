"""What tests of several kinds share: their order beside one another, and a PostgreSQL for those that ask."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres_server import PostgresServer, new_server

KINDS = ("acceptance", "simulation", "integration", "unit")
"""From what takes longest to what takes least."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Several test processes begin with the longest tests, so that all of them end at about the same time.

    A single one keeps the order of the files: who looks at one part sees it from top to bottom.
    """
    if hasattr(config, "workerinput"):
        items.sort(key=_haste)


def _haste(item: pytest.Item) -> tuple[float, int]:
    slow = item.get_closest_marker("slow")
    return (-slow.kwargs["about_s"] if slow else 0.0, KINDS.index(_kind(item)))


def _kind(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A running server that all tests of a process share: use schemas of your own, never stop it."""
    server = new_server()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A server of the test's own, not started yet."""
    server = new_server()
    try:
        yield server
    finally:
        server.remove()
