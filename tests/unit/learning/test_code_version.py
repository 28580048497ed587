"""No result outlives the code it was computed with."""

import os
import sys
from pathlib import Path

import pytest

from service.learning.code_version import code_version
from service.learning.loaded_modules import Module, decode_modules, loaded_modules
from service.settings import StrategySettings

FOUNDING = StrategySettings()


def modules_of(strategy: StrategySettings, *, apart: bool = False) -> list[Module]:
    return decode_modules(loaded_modules(strategy, apart=apart))


def test_the_strategys_own_modules_are_among_those_that_count() -> None:
    names = {name for name, _ in modules_of(FOUNDING)}
    assert {"service.strategies.ict_smc", "service.strategies.base", "numpy", "talib"} <= names
    assert "json" not in names


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # the test process may have threads
def test_a_copy_of_the_process_sees_what_the_process_sees() -> None:
    assert modules_of(FOUNDING, apart=True) == modules_of(FOUNDING)


def test_the_same_code_has_the_same_version_and_other_options_another() -> None:
    modules = modules_of(FOUNDING)
    assert code_version(FOUNDING, modules) == code_version(StrategySettings(), modules)
    other = StrategySettings(options={"stop_atr": 3.0})
    assert code_version(other, modules) != code_version(FOUNDING, modules)


def test_a_changed_file_of_a_users_strategy_or_its_helper_changes_the_version(tmp_path: Path) -> None:
    helper, user = tmp_path / "its_helper.py", tmp_path / "mine.py"
    helper.write_text("A = 1\n")
    user.write_text(
        "import its_helper\n"
        "class Mine:\n"
        "    name, timeframes, candles = 'mine', ('5m',), 2\n"
        "    def __init__(self, options): pass\n"
        "    def analyse(self, view): return None\n"
    )
    strategy = StrategySettings(name=f"{user}:Mine")
    sys.path.insert(0, str(tmp_path))
    try:
        modules = modules_of(strategy)
    finally:
        sys.path.remove(str(tmp_path))
        del sys.modules["its_helper"]
    versions = {code_version(strategy, modules)}
    helper.write_text("A = 2\n")
    versions.add(code_version(strategy, modules))
    user.write_text(user.read_text() + "\n")
    versions.add(code_version(strategy, modules))
    user.unlink()
    versions.add(code_version(strategy, modules))
    assert len(versions) == 4


def test_an_installed_package_counts_by_its_content_and_neither_by_its_place_nor_its_time(
    tmp_path: Path,
) -> None:
    versions = []
    for machine, content, written_s in (
        ("one", "A = 1", 1e9),
        ("two", "A = 1", 2e9),
        ("three", "A = 2", 1e9),
    ):
        file = tmp_path / machine / "site-packages" / "some.py"
        file.parent.mkdir(parents=True)
        file.write_text(content)
        os.utime(file, (written_s, written_s))
        versions.append(code_version(FOUNDING, [("some", str(file))]))
    assert versions[0] == versions[1]
    assert versions[0] != versions[2]
