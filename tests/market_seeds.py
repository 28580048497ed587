"""Seeds that no other test of the run uses: on the shared PostgreSQL, a seed is a market's own schema."""

import itertools

MARKET_SEEDS = itertools.count(1_000_000)
