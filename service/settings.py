"""Settings: typed, frozen, layered file < environment < flags, decoded once at start.

Every setting stands in `config/default.toml` with its unit and reason. Secrets come from the
environment or from systemd credentials only, and are never printed.
"""

import os
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from service.errors import SettingsInvalid

Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Positive = Annotated[float, Meta(gt=0.0)]
NonNegative = Annotated[float, Meta(ge=0.0)]
Count = Annotated[int, Meta(ge=0)]
AtLeastOne = Annotated[int, Meta(ge=1)]
Port = Annotated[int, Meta(ge=0, le=65_535)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One table of the settings file."""


class RunSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    mode: Literal["sim", "paper", "live"] = "sim"
    live_confirmed: bool = False
    cycles: Count = 0
    data_dir: str = ".perpd"
    drain_limit_s: Positive = 20.0


class ExchangeSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    rest_url: str = "https://fapi.binance.com"
    stream_url: str = "wss://fstream.binance.com"
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
    quote_asset: str = "USDT"
    contract_types: tuple[str, ...] = ("PERPETUAL",)
    candles: Annotated[int, Meta(ge=120, le=1_500)] = 200
    min_age_days: NonNegative = 7.0
    min_quote_volume: NonNegative = 0.0
    exclude: tuple[str, ...] = ()
    universe_refresh_s: Positive = 3_600.0
    stale_after_s: Positive = 60.0
    bootstrap_concurrency: Annotated[int, Meta(ge=1, le=64)] = 16


class CycleSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    interval_s: Positive = 60.0
    collect_garbage: bool = True


class AnalysisSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    workers: Annotated[int, Meta(ge=0, le=64)] = 2
    batch_factors: tuple[Positive, Positive, Positive] = (2.0, 1.5, 1.0)
    memory_thresholds: tuple[Fraction, Fraction] = (0.50, 0.65)
    cpu_thresholds: tuple[Fraction, Fraction] = (0.40, 0.60)
    batch_limit_s: Positive = 10.0
    collect_after_batch: bool = True
    worker_memory_limit_mb: Positive = 150.0
    feature_cache_entries: Count = 100
    feature_cache_ttl_s: Positive = 1_800.0


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
    max_shadows: AtLeastOne = 5_000
    stop_working_type: Literal["CONTRACT_PRICE", "MARK_PRICE"] = "MARK_PRICE"
    answer_limit_s: Positive = 10.0
    unprotected_limit_s: Positive = 15.0
    reconcile_s: Positive = 60.0


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


class ArchiveSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    buffer_records: AtLeastOne = 50
    flush_after_s: Positive = 5.0
    segment_bytes: Annotated[int, Meta(ge=4_096)] = 67_108_864


class MonitorSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    sample_s: Positive = 5.0
    operations: AtLeastOne = 500
    operations_per_kind: AtLeastOne = 100
    memory_limit_mb: NonNegative = 0.0
    lag_alarm_ms: Positive = 100.0


class WebSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    host: str = "127.0.0.1"
    port: Port = 0


class LogSettings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    level: Literal["debug", "info", "warn", "error"] = "info"
    format: Literal["auto", "json", "console"] = "auto"
    repeat_window_s: NonNegative = 10.0
    repeats_per_window: AtLeastOne = 5


class Settings(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings. `secrets` never appears in a file, in `perpd config` or in a log line."""

    run: RunSettings = RunSettings()
    exchange: ExchangeSettings = ExchangeSettings()
    sim: SimSettings = SimSettings()
    market: MarketSettings = MarketSettings()
    cycle: CycleSettings = CycleSettings()
    analysis: AnalysisSettings = AnalysisSettings()
    strategy: StrategySettings = StrategySettings()
    trading: TradingSettings = TradingSettings()
    risk: RiskSettings = RiskSettings()
    archive: ArchiveSettings = ArchiveSettings()
    monitor: MonitorSettings = MonitorSettings()
    web: WebSettings = WebSettings()
    log: LogSettings = LogSettings()
