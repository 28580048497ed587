"""Keys, signatures, timestamps and listen keys of the simulated venue."""

from urllib.parse import urlencode

import pytest

from service.exchange.simulated.auth import (
    LISTEN_KEY_LIFE_S,
    Keys,
    ListenKeys,
    parse_parameters,
    sign,
    signed_text,
)
from service.exchange.simulated.faults import VenueFault

NOW = 1_700_000_000_000


def check(query: str, body: str = "", *, key: str | None = "k", speed: float = 1.0) -> str:
    keys = Keys({"k": "secret"}, speed)
    return keys.check_signed(key, query, body, parse_parameters(query, body), NOW)


def signed(query: str, body: str = "") -> tuple[str, str]:
    signature = f"&signature={sign('secret', query + body)}"
    return (query, body + signature) if body else (query + signature, body)


def code_of(query: str, body: str = "", **options: object) -> int:
    with pytest.raises(VenueFault) as refusal:
        check(query, body, **options)  # type: ignore[arg-type]
    return refusal.value.code


def test_the_venues_own_example_has_the_published_signature() -> None:
    # Binance's documentation, "SIGNED endpoint examples for POST /fapi/v1/order".
    secret = "2b5eb11e18796d12d88f13dc27dbbd02c2cc51ff7059765ed9821957d82bb4d9"
    text = (
        "symbol=BTCUSDT&side=BUY&type=LIMIT&quantity=1&price=9000&timeInForce=GTC"
        "&recvWindow=5000&timestamp=1591702613943"
    )
    assert sign(secret, text) == "3c661234138461fcc7a7d8746c6558c9842d4e10870d2ecbedf7777cad694af9"


@pytest.mark.parametrize(
    ("query", "body"),
    [
        (f"symbol=BTCUSDT&timestamp={NOW}", ""),
        ("", f"timestamp={NOW}"),
        ("symbol=BTCUSDT", f"timestamp={NOW}"),
    ],
)
def test_a_signature_covers_query_and_body_as_sent(query: str, body: str) -> None:
    assert check(*signed(query, body)) == "k"


def test_a_non_ascii_symbol_is_signed_percent_encoded() -> None:
    query = urlencode({"symbol": "币安人生USDT", "timestamp": NOW})
    assert check(*signed(query)) == "k"
    assert parse_parameters(*signed(query))["symbol"] == "币安人生USDT"


def test_the_signature_may_stand_anywhere() -> None:
    text = f"timestamp={NOW}&symbol=X"
    query = f"timestamp={NOW}&signature={sign('secret', text)}&symbol=X"
    assert signed_text(query, "") == text
    assert check(query) == "k"


def test_a_changed_parameter_breaks_the_signature() -> None:
    query, _ = signed(f"quantity=1&timestamp={NOW}")
    assert code_of(query.replace("quantity=1", "quantity=2")) == -1022


@pytest.mark.parametrize(("key", "code"), [(None, -2014), ("", -2014), ("stranger", -2015)])
def test_an_unknown_key_is_refused(key: str | None, code: int) -> None:
    assert code_of(signed(f"timestamp={NOW}")[0], key=key) == code


@pytest.mark.parametrize(
    ("query", "code"),
    [
        (f"timestamp={NOW - 5_001}", -1021),
        (f"timestamp={NOW - 101}&recvWindow=100", -1021),
        (f"timestamp={NOW + 1_001}", -1021),
        ("symbol=X", -1102),
        ("timestamp=soon", -1102),
        (f"timestamp={NOW}&recvWindow=60001", -1131),
    ],
)
def test_a_timestamp_outside_the_window_is_refused(query: str, code: int) -> None:
    assert code_of(signed(query)[0]) == code


@pytest.mark.parametrize("query", [f"timestamp={NOW - 5_000}", f"timestamp={NOW + 1_000}"])
def test_a_timestamp_on_the_windows_edge_is_accepted(query: str) -> None:
    assert check(signed(query)[0]) == "k"


def test_the_window_is_wall_time_in_an_accelerated_market() -> None:
    assert check(signed(f"timestamp={NOW - 300_000}")[0], speed=60) == "k"
    assert code_of(signed(f"timestamp={NOW - 300_001}")[0], speed=60) == -1021


def test_a_parameter_sent_twice_is_refused() -> None:
    with pytest.raises(VenueFault) as refusal:
        parse_parameters("symbol=A", "symbol=B")
    assert refusal.value.code == -1101


def test_clients_of_one_account_share_a_listen_key() -> None:
    keys = ListenKeys()
    first = keys.create("a", 0.0)
    assert keys.create("a", 10.0) == first
    assert keys.create("b", 0.0) != first
    assert keys.account(first) == "a"


def test_a_listen_key_lives_an_hour_after_its_last_renewal() -> None:
    keys = ListenKeys()
    key = keys.create("a", 0.0)
    keys.renew("a", 100.0)
    assert keys.expire(LISTEN_KEY_LIFE_S + 99.9) == []
    assert keys.expire(LISTEN_KEY_LIFE_S + 100.0) == [key]
    assert keys.account(key) is None
    with pytest.raises(VenueFault) as refusal:
        keys.renew("a", LISTEN_KEY_LIFE_S + 101.0)
    assert refusal.value.code == -1125
    assert keys.create("a", LISTEN_KEY_LIFE_S + 102.0) != key


def test_a_deleted_listen_key_is_gone() -> None:
    keys = ListenKeys()
    key = keys.create("a", 0.0)
    assert keys.delete("a") == key
    assert keys.delete("a") is None
    assert keys.account(key) is None
