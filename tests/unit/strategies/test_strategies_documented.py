"""docs/strategies.md keeps up with the code."""

import re
from pathlib import Path

import msgspec

from service.strategies.ict_smc import IctSmcOptions

DOCUMENT = (Path(__file__).resolve().parents[3] / "docs" / "strategies.md").read_text()


def test_every_option_is_documented_with_its_default():
    documented = {}
    for names, defaults, _ in re.findall(
        r"^\| ([a-z_0-9, ]+) \| ([0-9., ]+) \| (.+) \|$", DOCUMENT, re.MULTILINE
    ):
        documented.update(zip(names.split(", "), map(float, defaults.split(", ")), strict=True))
    assert documented == msgspec.structs.asdict(IctSmcOptions())
