"""Who asks: API keys, HMAC SHA256 signatures, timestamps and listen keys."""

import hashlib
import hmac
from collections.abc import Mapping
from urllib.parse import parse_qsl

from service.exchange.simulated.faults import VenueFault

DEFAULT_RECV_WINDOW_MS = 5_000
MAX_RECV_WINDOW_MS = 60_000
AHEAD_LIMIT_MS = 1_000
LISTEN_KEY_LIFE_S = 3_600.0

UNSIGNED = ("timestamp", "recvWindow", "signature")  # of the envelope, not of the request


def parse_parameters(query: str, body: str) -> dict[str, str]:
    """Query and form body, percent-decoded as UTF-8. Raises -1101 for a parameter sent twice."""
    params: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True) + parse_qsl(body, keep_blank_values=True):
        if name in params:
            raise VenueFault(-1101, f"Duplicate values for a parameter detected: '{name}'.")
        params[name] = value
    return params


def signed_text(query: str, body: str) -> str:
    """The exact text a client signs: query string then body, as sent, without the signature."""
    return _without_signature(query) + _without_signature(body)


def _without_signature(text: str) -> str:
    if "signature=" not in text:
        return text
    return "&".join(part for part in text.split("&") if not part.startswith("signature="))


def sign(secret: str, text: str) -> str:
    return hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()


class Keys:
    """The API keys the venue knows, each with its secret and one account."""

    def __init__(self, secrets: Mapping[str, str], speed: float) -> None:
        self._secrets = dict(secrets)
        self._speed = speed

    def known(self, api_key: str | None) -> str:
        """Raises -2014 for a key that is missing or malformed, -2015 for one nobody registered."""
        if not api_key:
            raise VenueFault(-2014, "API-key format invalid.", 401)
        if api_key not in self._secrets:
            raise VenueFault(-2015, "Invalid API-key, IP, or permissions for action.", 401)
        return api_key

    def check_signed(
        self, api_key: str | None, query: str, body: str, params: Mapping[str, str], now_ms: int
    ) -> str:
        """The account of a signed request. Raises -1102, -1021, -1022, -2014, -2015."""
        key = self.known(api_key)
        self._check_time(params, now_ms)
        signature = params.get("signature", "")
        if not signature:
            raise VenueFault(-1102, _missing("signature"))
        expected = sign(self._secrets[key], signed_text(query, body))
        if not hmac.compare_digest(expected.encode(), signature.encode()):
            raise VenueFault(-1022, "Signature for this request is not valid.")
        return key

    def _check_time(self, params: Mapping[str, str], now_ms: int) -> None:
        timestamp = _whole("timestamp", params.get("timestamp", ""))
        window_ms = DEFAULT_RECV_WINDOW_MS
        if params.get("recvWindow"):
            window_ms = _whole("recvWindow", params["recvWindow"])
            if window_ms > MAX_RECV_WINDOW_MS:
                raise VenueFault(-1131, "recvWindow must be less than 60000")
        # Both limits speak of a network's delay, which is wall time whatever the market's speed: at 60,
        # 5,000 ms of market time would be 83 ms. So an accelerated market stretches them by its speed.
        stretch = max(1.0, self._speed)
        if timestamp > now_ms + AHEAD_LIMIT_MS * stretch:
            raise VenueFault(
                -1021, f"Timestamp for this request was {AHEAD_LIMIT_MS}ms ahead of the server's time."
            )
        if now_ms - timestamp > window_ms * stretch:
            raise VenueFault(-1021, "Timestamp for this request is outside of the recvWindow.")


def _missing(name: str) -> str:
    return f"Mandatory parameter '{name}' was not sent, was empty/null, or malformed."


def _whole(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise VenueFault(-1102, _missing(name))
    return int(text)


class ListenKeys:
    """One listen key per account, alive for 60 minutes of wall time after its last renewal.

    Wall time, like every limit that watches a client's behaviour rather than the market.
    A second POST gives the same key again, so two clients of one account share it.
    """

    def __init__(self) -> None:
        self._accounts: dict[str, str] = {}  # listen key -> account
        self._expires_s: dict[str, float] = {}
        self._made = 0

    def create(self, account: str, now_s: float) -> str:
        for key, owner in self._accounts.items():
            if owner == account:
                self._expires_s[key] = now_s + LISTEN_KEY_LIFE_S
                return key
        self._made += 1
        key = hashlib.sha256(f"{account}/{self._made}/{now_s}".encode()).hexdigest()
        self._accounts[key] = account
        self._expires_s[key] = now_s + LISTEN_KEY_LIFE_S
        return key

    def renew(self, account: str, now_s: float) -> str:
        """Raises -1125 when the account has none."""
        if account not in self._accounts.values():
            raise VenueFault(-1125, "This listenKey does not exist.")
        return self.create(account, now_s)

    def delete(self, account: str) -> str | None:
        """The key that was closed, if there was one."""
        for key, owner in self._accounts.items():
            if owner == account:
                self._forget(key)
                return key
        return None

    def account(self, listen_key: str) -> str | None:
        return self._accounts.get(listen_key)

    def expire(self, now_s: float) -> list[str]:
        """Forget and return the keys nobody renewed."""
        gone = [key for key, at_s in self._expires_s.items() if at_s <= now_s]
        for key in gone:
            self._forget(key)
        return gone

    def _forget(self, key: str) -> None:
        del self._accounts[key]
        del self._expires_s[key]
