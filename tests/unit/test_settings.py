"""Settings: layers, messages, and the promise that each one is documented and read."""

import re
import tomllib
from pathlib import Path

import pytest

from service.archive.schema import STREAMS
from service.errors import SettingsInvalid
from service.settings import ARCHIVE_STREAMS, Settings, effective, load, section_types, variable_name

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "config"
ALL_KEYS = [f"{name}.{key}" for name, record in section_types().items() for key in record.__struct_fields__]


def test_the_default_file_says_what_is_built_in():
    assert load(CONFIG / "default.toml", {}).settings == Settings()


@pytest.mark.parametrize("name", ["default", "paper", "live"])
def test_each_settings_file_has_every_setting_with_a_comment(name):
    lines = (CONFIG / f"{name}.toml").read_text().splitlines()
    section, documented = "", []
    for before, line in zip(["", *lines], lines, strict=False):
        if match := re.fullmatch(r"\[(\w+)\]", line):
            section = match[1]
        elif match := re.match(r"(\w+) = ", line):
            documented.append(f"{section}.{match[1]}")
            assert before.startswith("#") or re.match(r"\w+ = ", before), f"{line!r} has no comment above it"
    assert documented == ALL_KEYS
    load(CONFIG / f"{name}.toml", {})


@pytest.mark.parametrize("dotted", ALL_KEYS)
def test_each_setting_is_read_somewhere(dotted):
    section, key = dotted.split(".")
    sources = [p for p in (ROOT / "service").rglob("*.py") if p.name != "settings.py"]
    pattern = re.compile(rf"\.{key}\b")
    assert any(pattern.search(source.read_text()) for source in sources), f"nobody reads [{section}] {key}"


def test_environment_wins_over_file_and_flags_win_over_both(tmp_path):
    file = tmp_path / "f.toml"
    file.write_text("[market]\nsymbols = 10\ncandles = 150\n[cycle]\ninterval_s = 30\n")
    loaded = load(
        file,
        {"PERPD_MARKET__SYMBOLS": "20", "PERPD_CYCLE__INTERVAL_S": "45", "HOME": "/"},
        {"market.symbols": 30},
    )
    assert loaded.settings.market.symbols == 30
    assert loaded.settings.market.candles == 150
    assert loaded.settings.cycle.interval_s == 45
    assert loaded.sources["market.symbols"] == "flag for market.symbols"
    assert loaded.sources["cycle.interval_s"] == "environment PERPD_CYCLE__INTERVAL_S"
    assert loaded.sources["market.candles"] == str(file)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[market]\nsymbls = 3", ["market.symbls", "no such setting", "symbols"]),
        ("[markets]\nsymbols = 3", ["[markets]", "run, exchange"]),
        ("[market]\nsymbols = 'many'", ["market.symbols", "'many'", "a whole number at least 1"]),
        ("[market]\nsymbols = 0", ["market.symbols is 0", "at least 1 and at most 1000"]),
        ("[run]\nmode = 'turbo'", ["run.mode", "'turbo'", "'sim' or 'paper' or 'live'"]),
        ("[risk]\nmin_leverage = 30", ["risk.min_leverage", "above risk.max_leverage"]),
        ("[archive.keep_days]\nsignls = 3", ["archive.keep_days", "'signls'", "signals"]),
        ("[archive.keep_mb]\nsignls = 3", ["archive.keep_mb", "'signls'", "default"]),
        ("symbols = 3", ["outside a section"]),
        ("[market\n", ["not valid TOML"]),
    ],
)
def test_a_wrong_file_names_file_key_found_and_allowed(tmp_path, text, words):
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(SettingsInvalid) as caught:
        load(file, {})
    for word in [*words, "wrong.toml"]:
        assert word in str(caught.value)


def test_retention_may_name_every_stream_of_the_archive_and_nothing_else(tmp_path):
    assert set(STREAMS) == ARCHIVE_STREAMS
    kept = dict.fromkeys((*STREAMS, "default"), 3.0)
    file = tmp_path / "kept.toml"
    file.write_text("[archive.keep_days]\n" + "\n".join(f"{name} = 3" for name in kept))
    assert load(file, {}).settings.archive.keep_days == kept


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SettingsInvalid, match=r"nowhere\.toml: cannot be read"):
        load(tmp_path / "nowhere.toml", {})


def test_an_unknown_variable_is_refused():
    with pytest.raises(SettingsInvalid, match="PERPD_MARKET__SYMBLS names no setting"):
        load(None, {"PERPD_MARKET__SYMBLS": "3"})


def test_a_variable_of_the_wrong_type_names_itself_and_what_is_allowed():
    with pytest.raises(SettingsInvalid, match="PERPD_MARKET__SYMBOLS is 'x'; allowed is a whole number"):
        load(None, {"PERPD_MARKET__SYMBOLS": "x"})


def test_a_platform_port_binds_every_address():
    settings = load(None, {"PORT": "8080"}).settings
    assert (settings.web.host, settings.web.port) == ("::", 8080)


def test_secrets_come_from_the_environment_or_from_credentials_and_are_no_settings(tmp_path):
    (tmp_path / "binance_secret").write_text("s3cret\n")
    loaded = load(None, {"PERPD_API_KEY": "k3y", "CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert (loaded.secrets.api_key, loaded.secrets.api_secret) == ("k3y", "s3cret")
    assert not any("s3cret" in str(row) or "k3y" in str(row) for row in effective(loaded))


def test_every_setting_has_its_own_variable():
    assert variable_name("market.symbols") == "PERPD_MARKET__SYMBOLS"
    assert len({variable_name(key) for key in ALL_KEYS}) == len(ALL_KEYS)


def test_the_live_file_does_not_confirm_itself():
    live = tomllib.loads((CONFIG / "live.toml").read_text())
    assert live["run"]["mode"] == "live"
    assert live["run"]["live_confirmed"] is False


LIVE_ON_A_DATABASE = {"DATABASE_URL": "postgresql://a:b@h/d", "PERPD_RUN__MODE": "live"}


@pytest.mark.parametrize(
    ("lease_s", "window_ms", "least"),
    [("18", "5000", "above 18"), ("30", "60000", "above 183"), ("2", "1", "above 3.003")],
)
def test_a_lease_that_its_last_request_outlives_is_refused_with_the_numbers(lease_s, window_ms, least):
    given = {"PERPD_RUN__LEASE_S": lease_s, "PERPD_EXCHANGE__RECV_WINDOW_MS": window_ms}
    with pytest.raises(SettingsInvalid) as caught:
        load(None, LIVE_ON_A_DATABASE | given)
    for word in ("PERPD_RUN__LEASE_S", f"{lease_s} s is too short", window_ms, least):
        assert word in str(caught.value)
    load(None, given)  # SQLite: no other perpd can take over
    load(None, LIVE_ON_A_DATABASE | given | {"PERPD_RUN__MODE": "sim"})  # no venue, no money


def test_the_defaults_hold_on_a_database():
    load(None, LIVE_ON_A_DATABASE)
    load(None, LIVE_ON_A_DATABASE | {"PERPD_RUN__LEASE_S": "18.1"})
