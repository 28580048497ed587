"""Finding and refusing strategies."""

from importlib.metadata import EntryPoint, EntryPoints

import pytest

from service.errors import SettingsInvalid, StrategyInvalid
from service.strategies.ict_smc import IctSmc
from service.strategies.loader import load_strategy

GOOD = """
class Mine:
    name = "mine"
    timeframes = ("5m",)
    candles = 10

    def __init__(self, options):
        self.options = options

    def analyse(self, view):
        return None
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "mine.py"
        path.write_text(text)
        return f"{path}:Mine"

    return write


def test_the_founding_strategy_is_known_by_name():
    assert isinstance(load_strategy("ict_smc", {}), IctSmc)


def test_a_file_and_class_are_loaded_with_the_options(write):
    strategy = load_strategy(write(GOOD), {"period": 3.0})
    assert strategy.options == {"period": 3.0}


def test_an_installed_strategy_is_found_by_its_entry_point(monkeypatch):
    point = EntryPoint("theirs", "service.strategies.ict_smc:IctSmc", "perpd.strategies")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: EntryPoints([point]))
    assert isinstance(load_strategy("theirs", {}), IctSmc)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\ny = x / 0\n", ["mine.py:2", "ZeroDivisionError"]),
        ("def broken(:\n", ["mine.py:1", "SyntaxError"]),
        ("import not_there_at_all\n", ["mine.py:1", "not_there_at_all"]),
        ("class Other:\n    pass\n", ["no class 'Mine'", "Other"]),
        (
            GOOD.replace("self.options = options", "raise RuntimeError('no')"),
            ["mine.py:8", "RuntimeError: no"],
        ),
        (GOOD.replace('"mine"', "None"), ["name"]),
        (GOOD.replace('"mine"', '"a:b"'), ["name"]),
        (GOOD.replace('("5m",)', '("7m",)'), ["timeframes", "15m"]),
        (GOOD.replace("candles = 10", "candles = 0"), ["candles"]),
        (GOOD.replace("def analyse", "def analyze"), ["analyse"]),
    ],
)
def test_a_broken_strategy_is_refused_naming_file_line_and_cause(write, text, words):
    with pytest.raises(StrategyInvalid) as caught:
        load_strategy(write(text), {})
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_missing_file_and_an_unknown_name_say_so():
    with pytest.raises(StrategyInvalid, match="does not exist"):
        load_strategy("nowhere/mine.py:Mine", {})
    with pytest.raises(StrategyInvalid, match="known are ict_smc"):
        load_strategy("nobody", {})


def test_an_unknown_option_of_the_founding_strategy_is_an_invalid_setting():
    with pytest.raises(SettingsInvalid, match="unknown option 'x'"):
        load_strategy("ict_smc", {"x": 1.0})
