"""Settings: typed, frozen, layered file < environment < flags, decoded once at start.

Every setting stands in `config/default.toml` with its unit and reason. Secrets come from the
environment or from systemd credentials only, and are never printed.
"""

import os
import tomllib
import types
import typing
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from service.errors import SettingsInvalid

Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Positive = Annotated[float, Meta(gt=0.0, le=1e12)]  # the upper bound keeps infinity out
NonNegative = Annotated[float, Meta(ge=0.0, le=1e12)]
Count = Annotated[int, Meta(ge=0)]
AtLeastOne = Annotated[int, Meta(ge=1)]
Port = Annotated[int, Meta(ge=0, le=65_535)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One table of the settings file."""


class RunSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    mode: Literal["sim", "paper", "live"] = "sim"
    live_confirmed: bool = False
    cycles: Count = 0
    data_dir: str = ""
    drain_limit_s: Positive = 20.0
    lease_s: Annotated[float, Meta(ge=1.0, le=3_600.0)] = 30.0
    database_wait_s: NonNegative = 60.0


class ExchangeSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    rest_url: str = "https://fapi.binance.com"
    stream_url: str = "wss://fstream.binance.com"
    wallet_url: str = "https://api.binance.com"
    wallet_unknown_accepted: bool = False
    recv_window_ms: Annotated[int, Meta(ge=1, le=60_000)] = 5_000
    request_limit_s: Positive = 10.0
    weight_reserve_fraction: Fraction = 0.25
    streams_per_connection: Annotated[int, Meta(ge=1, le=1024)] = 200
    renew_after_s: Annotated[float, Meta(gt=0.0, lt=86_400.0)] = 82_800.0
    silence_limit_s: Positive = 60.0
    margin_type: Literal["ISOLATED", "CROSSED"] = "ISOLATED"


class SimSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    url: str = ""
    seed: Count = 1
    symbols: Annotated[int, Meta(ge=1, le=700)] = 200
    speed: Annotated[float, Meta(gt=0.0, le=100_000.0)] = 60.0
    replay: str = ""
    from_time: str = ""
    until_time: str = ""
    deposit: Positive = 10_000.0
    maker_fee_fraction: Fraction = 0.0002
    taker_fee_fraction: Fraction = 0.0005
    spread_bps: NonNegative = 2.0
    slippage_bps_per_million: NonNegative = 5.0
    latency_ms: NonNegative = 0.0
    stream_messages_per_s: AtLeastOne = 2_000


class MarketSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    symbols: Annotated[int, Meta(ge=1, le=1_000)] = 200
    quote_asset: Literal["USDT"] = "USDT"
    contract_types: tuple[str, ...] = ("PERPETUAL",)
    candles: Annotated[int, Meta(ge=120, le=1_500)] = 200
    min_age_days: NonNegative = 7.0
    min_quote_volume: NonNegative = 0.0
    exclude: tuple[str, ...] = ()
    universe_refresh_s: Positive = 3_600.0
    stale_after_s: Positive = 60.0
    bootstrap_concurrency: Annotated[int, Meta(ge=1, le=64)] = 16


class CycleSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    interval_s: Annotated[float, Meta(ge=1.0, le=86_400.0)] = 60.0
    close_wait_s: NonNegative = 3.0
    deadline_fraction: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.75
    collect_garbage: bool = True
    collect_limit_ms: Positive = 1.0


class AnalysisSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    workers: Annotated[int, Meta(ge=0, le=64)] = 2
    batch_factors: tuple[Positive, Positive, Positive] = (2.0, 1.5, 1.0)
    memory_thresholds: tuple[Fraction, Fraction] = (0.50, 0.65)
    cpu_thresholds: tuple[Fraction, Fraction] = (0.40, 0.60)
    batch_limit_s: Positive = 10.0
    collect_after_batch: bool = True
    worker_memory_limit_mb: Positive = 150.0
    worker_max_batches: Count = 10_000


class FeatureSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    ttl_s: Annotated[float, Meta(ge=0.0, le=1e9)] = 1_800.0
    max_entries: Count = 100
    slot_bytes: Annotated[int, Meta(ge=0, le=1_048_576)] = 2_048
    redis_limit_ms: Annotated[float, Meta(gt=0.0, le=1_000.0)] = 25.0


class StrategySettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str = "ict_smc"
    options: dict[str, float] = {}


class TradingSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    entries: bool = True
    min_confidence: Fraction = 0.45
    max_signals: AtLeastOne = 10
    top_signals: Count = 3
    max_positions: Count = 3
    shadow_hours: Positive = 96.0
    max_shadows: AtLeastOne = 20_000
    stop_working_type: Literal["CONTRACT_PRICE", "MARK_PRICE"] = "MARK_PRICE"
    answer_limit_s: Positive = 10.0
    unprotected_limit_s: Positive = 15.0
    trail_r: NonNegative = 0.0
    reconcile_s: Positive = 60.0
    foreign: Literal["ignore", "adopt", "protect"] = "ignore"
    foreign_stop_fraction: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.05


class RiskSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    margin_fraction: Fraction = 0.10
    min_margin_fraction: Fraction = 0.03
    max_margin_fraction: Fraction = 0.13
    loss_fraction: Fraction = 0.01
    min_leverage: Annotated[int, Meta(ge=1, le=125)] = 3
    max_leverage: Annotated[int, Meta(ge=1, le=125)] = 20
    history_trades: AtLeastOne = 30
    caution_losses: AtLeastOne = 6
    caution_day_loss_fraction: Fraction = 0.03
    caution_confidence: Fraction = 0.70
    caution_win_fraction: Fraction = 0.60
    day_loss_fraction: Fraction = 0.15
    breaker_drawdown_fraction: Fraction = 0.20
    final_drawdown_fraction: Fraction = 0.30
    cooldown_minutes: Annotated[float, Meta(ge=0.0, le=43_200.0)] = 60.0


KillLevelName = Literal["no_entries", "reduce_only", "flatten"]


class KillSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    loss_level: KillLevelName = "no_entries"
    fault_level: KillLevelName = "no_entries"
    latch_faults: bool = True
    loss_streak: Count = 15
    order_window: AtLeastOne = 20
    order_error_fraction: Fraction = 0.5
    stale_fraction: Fraction = 0.5
    stale_s: NonNegative = 300.0
    unprotected_s: NonNegative = 60.0
    clock_offset_ms: NonNegative = 5_000.0
    memory: bool = True


class ArchiveSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    buffer_records: AtLeastOne = 50
    buffers_bytes: Count = 81_920
    flush_after_s: Positive = 5.0
    segment_bytes: Annotated[int, Meta(ge=4_096)] = 67_108_864
    journal_bytes: Annotated[int, Meta(ge=65_536, le=1_073_741_824)] = 4_194_304
    compact: bool = True
    compact_every_s: Annotated[float, Meta(ge=1.0, le=86_400.0)] = 900.0
    compact_memory_mb: Annotated[int, Meta(ge=96, le=65_536)] = 128
    keep_days: dict[str, float] = {}
    keep_mb: dict[str, float] = {}


class MonitorSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    sample_s: Positive = 5.0
    operations: Count = 500
    operations_per_kind: Count = 100
    memory_limit_mb: NonNegative = 0.0
    memory_levels: tuple[Fraction, Fraction, Fraction] = (0.70, 0.80, 0.90)
    memory_hysteresis: Fraction = 0.05
    memory_calm_s: NonNegative = 60.0
    memory_pressure_pct: Annotated[float, Meta(ge=0.0, le=100.0)] = 10.0
    memory_growth_mb_per_hour: NonNegative = 4.0
    memory_growth_hours: Annotated[float, Meta(ge=0.05, le=168.0)] = 3.0
    lag_alarm_ms: Positive = 100.0


class WebSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    host: str = "127.0.0.1"
    port: Port = 0


class LogSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    level: Literal["debug", "info", "warn", "error"] = "info"
    format: Literal["auto", "json", "console"] = "auto"
    repeat_window_s: NonNegative = 10.0
    repeats_per_window: AtLeastOne = 20


class Settings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings. `secrets` never appears in a file, in `perpd config` or in a log line."""

    run: RunSettings = RunSettings()
    exchange: ExchangeSettings = ExchangeSettings()
    sim: SimSettings = SimSettings()
    market: MarketSettings = MarketSettings()
    cycle: CycleSettings = CycleSettings()
    analysis: AnalysisSettings = AnalysisSettings()
    features: FeatureSettings = FeatureSettings()
    strategy: StrategySettings = StrategySettings()
    trading: TradingSettings = TradingSettings()
    risk: RiskSettings = RiskSettings()
    kill: KillSettings = KillSettings()
    archive: ArchiveSettings = ArchiveSettings()
    monitor: MonitorSettings = MonitorSettings()
    web: WebSettings = WebSettings()
    log: LogSettings = LogSettings()


class Secrets(msgspec.Struct, frozen=True, kw_only=True):
    """What must never be printed. Empty where it is not given."""

    api_key: str = ""
    api_secret: str = ""
    api_token: str = ""
    redis_url: str = ""  # it may hold a password
    database_url: str = ""  # holds the database's password; empty keeps state in SQLite

    def values(self) -> tuple[str, ...]:
        password = urllib.parse.urlsplit(self.database_url).password or ""
        # one of three letters would be found in every other word
        parts = (password, urllib.parse.unquote(password)) if len(password) > 3 else ()
        whole = (getattr(self, name) for name in self.__struct_fields__)
        return tuple(dict.fromkeys(value for value in (*whole, *parts) if value))


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """The effective settings, where each `section.key` came from, and the secrets apart."""

    settings: Settings
    sources: dict[str, str]
    secrets: Secrets


SMALLEST_SLOT_BYTES = 64
VENUE_AHEAD_S = 1.0
"""How far ahead of the venue's time it takes a timestamp: a request stays valid for so much longer."""
ARCHIVE_STREAMS = frozenset(
    {
        "signals",
        "decisions",
        "orders",
        "fills",
        "positions",
        "adjustments",
        "shadow_outcomes",
        "cycles",
    }
)
"""What `archive.keep_days` and `archive.keep_mb` may name; `archive/schema.py` says what each holds."""
ENVIRONMENT_PREFIX = "PERPD_"
SECRET_NAMES = {
    "api_key": ("PERPD_API_KEY", "binance_key"),
    "api_secret": ("PERPD_API_SECRET", "binance_secret"),
    "api_token": ("PERPD_API_TOKEN", "perpd_api_token"),
    "redis_url": ("REDIS_URL", "redis_url"),
    "database_url": ("DATABASE_URL", "database_url"),
}
OTHER_NAMES = {"PERPD_CONFIG"}


def section_types() -> dict[str, type[Section]]:
    """Each section's name and record, in the order of the settings file."""
    return typing.get_type_hints(Settings, include_extras=True)


def load(
    file: Path | None, environment: Mapping[str, str] = os.environ, flags: Mapping[str, Any] | None = None
) -> Loaded:
    """Read the settings in layers: defaults < file < environment (`PERPD_SECTION__KEY`) < flags.

    Args: flags: `section.key` to value, only those the user gave.
    Raises: SettingsInvalid: naming the source, the key, what was found and what is allowed.
    """
    layers: list[tuple[str, dict[str, Any]]] = []
    if file is not None:
        layers.append((str(file), _read_file(file)))
    layers.append(("environment", _read_environment(environment)))
    layers.append(("flag", dict(flags or {})))
    sections = section_types()
    values: dict[str, dict[str, Any]] = {name: {} for name in sections}
    sources: dict[str, str] = {}
    for source, entries in layers:
        for dotted, raw in entries.items():
            section, key, value = _checked(source, dotted, raw, sections)
            values[section][key] = value
            sources[dotted] = _source_name(source, dotted)
    built = {name: record(**values[name]) for name, record in sections.items()}
    settings = Settings(**built)  # type: ignore[arg-type]
    _check_together(settings, sources)
    secrets = _read_secrets(environment)
    if secrets.database_url and settings.run.mode == "live":
        _check_lease(settings, sources)
    return Loaded(settings=settings, sources=sources, secrets=secrets)


def _source_name(source: str, dotted: str) -> str:
    if source == "environment":
        return f"environment {variable_name(dotted)}"
    return f"flag for {dotted}" if source == "flag" else source


def variable_name(dotted: str) -> str:
    """The environment variable of one setting, such as PERPD_RUN__DATA_DIR."""
    return ENVIRONMENT_PREFIX + dotted.replace(".", "__").upper()


def _read_file(file: Path) -> dict[str, Any]:
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsInvalid(
            f"{file}: cannot be read: {error.strerror}; name a TOML file with --config"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsInvalid(f"{file}: is not valid TOML: {error}") from None
    entries: dict[str, Any] = {}
    for section, table in document.items():
        if not isinstance(table, dict):
            raise SettingsInvalid(
                f"{file}: '{section}' stands outside a section; settings live in tables such as [market]"
            )
        entries.update({f"{section}.{key}": value for key, value in table.items()})
    return entries


def _read_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    if environment.get("RAILWAY_VOLUME_MOUNT_PATH"):
        entries["run.data_dir"] = environment["RAILWAY_VOLUME_MOUNT_PATH"]
    if environment.get("PORT"):
        entries["web.port"] = _from_text("PORT", environment["PORT"], int)
        entries["web.host"] = "::"  # a platform that sets PORT asks from outside this host
    secret_variables = {variable for variable, _ in SECRET_NAMES.values()}
    types_by_key = {f"{name}.{key}": kind for name, key, kind in _all_keys()}
    for variable, text in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in secret_variables | OTHER_NAMES:
            continue
        dotted = variable[len(ENVIRONMENT_PREFIX) :].lower().replace("__", ".", 1)
        if dotted not in types_by_key:
            raise SettingsInvalid(
                f"environment: {variable} names no setting; "
                f"variables are PERPD_SECTION__KEY, for instance {variable_name('market.symbols')}"
            )
        entries[dotted] = _from_text(variable, text, types_by_key[dotted])
    return entries


def _all_keys() -> list[tuple[str, str, Any]]:
    return [
        (name, key, kind)
        for name, record in section_types().items()
        for key, kind in typing.get_type_hints(record, include_extras=True).items()
    ]


def _from_text(variable: str, text: str, kind: Any) -> Any:
    """A variable's text as TOML would read it; text settings need no quotes."""
    plain = _plain(kind)
    if plain is str or typing.get_origin(plain) is Literal:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        raise SettingsInvalid(f"environment: {variable} is {text!r}; allowed is {describe(kind)}") from None


def _checked(
    source: str, dotted: str, raw: Any, sections: Mapping[str, type[Section]]
) -> tuple[str, str, Any]:
    section, _, key = dotted.partition(".")
    where = variable_name(dotted) if source == "environment" else f"{source}: {dotted}"
    if section not in sections:
        raise SettingsInvalid(f"{where}: there is no section [{section}]; there are {', '.join(sections)}")
    keys = typing.get_type_hints(sections[section], include_extras=True)
    if key not in keys:
        raise SettingsInvalid(f"{where}: there is no such setting; [{section}] has {', '.join(keys)}")
    try:
        return section, key, msgspec.convert(raw, keys[key])
    except msgspec.ValidationError:
        raise SettingsInvalid(f"{where} is {raw!r}; allowed is {describe(keys[key])}") from None


def _plain(kind: Any) -> Any:
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def describe(kind: Any) -> str:
    """A setting's type in words: what the user may write."""
    if typing.get_origin(kind) is Annotated:
        base, *metas = typing.get_args(kind)
        bounds = [
            f"{word} {value}"
            for meta in metas
            for word, value in (
                ("at least", meta.ge),
                ("above", meta.gt),
                ("at most", meta.le),
                ("below", meta.lt),
            )
            if value is not None
        ]
        return f"{describe(base)} {' and '.join(bounds)}"
    if typing.get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        if Ellipsis in parts:
            return f"a list, each {describe(parts[0])}"
        return f"a list of {len(parts)}, each {describe(parts[0])}"
    if typing.get_origin(kind) is dict:
        return "a table of name = number"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(kind, str(kind)) if not isinstance(kind, types.UnionType) else str(kind)


def _check_together(settings: Settings, sources: Mapping[str, str]) -> None:
    """Rules that hold between settings."""

    def fail(key: str, words: str) -> typing.NoReturn:
        raise SettingsInvalid(f"{sources.get(key, 'defaults')}: {key}: {words}")

    risk, trading = settings.risk, settings.trading
    if risk.min_leverage > risk.max_leverage:
        fail("risk.min_leverage", f"{risk.min_leverage} is above risk.max_leverage {risk.max_leverage}")
    if not risk.min_margin_fraction <= risk.margin_fraction <= risk.max_margin_fraction:
        fail("risk.margin_fraction", "must lie between risk.min_margin_fraction and risk.max_margin_fraction")
    if not risk.caution_day_loss_fraction <= risk.day_loss_fraction:
        fail("risk.day_loss_fraction", "must not be below risk.caution_day_loss_fraction")
    if not risk.breaker_drawdown_fraction <= risk.final_drawdown_fraction:
        fail("risk.final_drawdown_fraction", "must not be below risk.breaker_drawdown_fraction")
    if trading.top_signals > trading.max_signals:
        fail(
            "trading.top_signals", f"{trading.top_signals} is above trading.max_signals {trading.max_signals}"
        )
    analysis = settings.analysis
    for key in ("memory_thresholds", "cpu_thresholds"):
        low, high = getattr(analysis, key)
        if low > high:
            fail(f"analysis.{key}", f"the first, {low}, is above the second, {high}")
    if 0 < settings.features.slot_bytes < SMALLEST_SLOT_BYTES:
        fail("features.slot_bytes", f"a slot has at least {SMALLEST_SLOT_BYTES} bytes; 0 is without a file")
    for name in ("keep_days", "keep_mb"):
        if unknown := set(getattr(settings.archive, name)) - ARCHIVE_STREAMS - {"default"}:
            fail(
                f"archive.{name}",
                f"no stream {sorted(unknown)}; there are {', '.join(sorted(ARCHIVE_STREAMS))}, and default",
            )
    levels = settings.monitor.memory_levels
    if not levels[0] < levels[1] < levels[2]:
        fail("monitor.memory_levels", f"{list(levels)} must rise from elevated over high to critical")


def _check_lease(settings: Settings, sources: Mapping[str, str]) -> None:
    """The third of a lease in which a holder no longer sends must outlive whatever it sent last."""
    lease_s, window_ms = settings.run.lease_s, settings.exchange.recv_window_ms
    least_s = (window_ms / 1000 + VENUE_AHEAD_S) * 3
    if lease_s > least_s:
        return
    source = sources.get("run.lease_s", "defaults")
    raise SettingsInvalid(
        f"{source}: run.lease_s: {lease_s:g} s is too short for exchange.recv_window_ms {window_ms}: a "
        f"request stays valid at the venue for so long, and another perpd could trade meanwhile; "
        f"set run.lease_s above {least_s:g}, or lower exchange.recv_window_ms"
    )


def _read_secrets(environment: Mapping[str, str]) -> Secrets:
    """From the environment, else from the systemd credentials directory."""
    found: dict[str, str] = {}
    directory = environment.get("CREDENTIALS_DIRECTORY", "")
    for name, (variable, credential) in SECRET_NAMES.items():
        value = environment.get(variable, "")
        if not value and directory:
            path = Path(directory) / credential
            value = path.read_text(encoding="utf-8") if path.is_file() else ""
        found[name] = value.strip()
    check_database_url(found["database_url"], "DATABASE_URL")
    return Secrets(**found)


def check_database_url(url: str, source: str, instead: str = "nothing for SQLite") -> None:
    """Raises SettingsInvalid. Nothing of the URL is quoted: a wrong one may hold the password anywhere.

    Args: source: where it was given; instead: what else is allowed there.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        usable = not url or (parts.scheme in ("postgres", "postgresql") and parts.port != 0)
    except ValueError:
        usable = False
    if not usable:
        raise SettingsInvalid(
            f"{source} is no address of a PostgreSQL database; allowed is "
            f"postgresql://HOST:PORT/DATABASE with user and password before the host, or {instead}"
        )


def effective(loaded: Loaded) -> list[tuple[str, Any, str]]:
    """Every setting in force as (section.key, plain value, where it came from); no secret is among them."""
    rows = []
    for section, table in msgspec.to_builtins(loaded.settings).items():
        for key, value in table.items():
            dotted = f"{section}.{key}"
            rows.append((dotted, value, loaded.sources.get(dotted, "default")))
    return rows
