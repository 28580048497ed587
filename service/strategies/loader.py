"""Find a strategy: one of ours by name, an installed one by entry point, or a file as `path.py:ClassName`."""

import importlib.util
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from zlib import crc32

from service.errors import PerpdError, StrategyInvalid
from service.records import TIMEFRAMES
from service.strategies.base import Strategy

ENTRY_POINT_GROUP = "perpd.strategies"
BUILT_IN = ("ict_smc",)

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,32}")


def load_strategy(name: str, options: dict[str, float]) -> Strategy:
    """Find, import and build a strategy.

    Raises: StrategyInvalid: it is not found, its import or constructor fails (file and line are named), or
    it lacks what the protocol asks for. SettingsInvalid: it does not know an option.
    """
    factory = _find(name)
    try:
        strategy = factory(options)
    except PerpdError:
        raise
    except (Exception, SystemExit) as error:
        raise StrategyInvalid(f"{name}: building it failed: {describe(error)}") from error
    try:
        _check(name, strategy)
    except PerpdError:
        raise
    except (Exception, SystemExit) as error:
        raise StrategyInvalid(f"{name}: it cannot say what it needs: {describe(error)}") from error
    return cast(Strategy, strategy)


def describe(error: BaseException, limit: int = 300) -> str:
    """An exception in one line with the file and line it came from; cut to `limit` characters."""
    if isinstance(error, SyntaxError) and error.filename:
        place = f" ({Path(error.filename).name}:{error.lineno})"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001  an exception of a strategy's own may fail to describe itself
        text = "an error that cannot be shown"
    return f"{type(error).__name__}: {' '.join(text[:limit].split())}"[:limit] + place


def file_mark(name: str) -> str:
    """What the content of a strategy's own file is known by; "" for a strategy that is named otherwise.

    It tells edits apart, no forgeries: a hash that does would load OpenSSL into each worker.
    """
    path = _own_file(name)
    if path is None:
        return ""
    try:
        content = path.read_bytes()
    except OSError:
        return "absent"
    return f"{len(content)}:{crc32(content):08x}"


def _own_file(name: str) -> Path | None:
    path, separator, _ = name.rpartition(":")
    return Path(path).expanduser().resolve() if separator and path.endswith(".py") else None


def _find(name: str) -> Callable[[dict[str, float]], Any]:
    if name == "ict_smc":
        from service.strategies.ict_smc import IctSmc

        return IctSmc
    path = _own_file(name)
    if path is not None:
        return _from_file(path, name.rpartition(":")[2])
    return _from_entry_point(name)


def _from_file(path: Path, class_name: str) -> Callable[[dict[str, float]], Any]:
    if not path.is_file():
        raise StrategyInvalid(f"strategy file {path} does not exist")
    module_name = f"perpd_strategy_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise StrategyInvalid(f"strategy file {path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise StrategyInvalid(f"strategy file {path}: import failed: {describe(error)}") from error
    found = getattr(module, class_name, None)
    if not callable(found):
        classes = [k for k, v in vars(module).items() if isinstance(v, type) and v.__module__ == module_name]
        raise StrategyInvalid(
            f"strategy file {path} has no class {class_name!r}; it has {', '.join(classes) or 'none'}"
        )
    return cast(Callable[[dict[str, float]], Any], found)


def _from_entry_point(name: str) -> Callable[[dict[str, float]], Any]:
    from importlib.metadata import entry_points  # needed for installed strategies only

    group = entry_points(group=ENTRY_POINT_GROUP)
    if name not in group.names:
        known = ", ".join(sorted({*BUILT_IN, *group.names}))
        raise StrategyInvalid(f"no strategy is named {name!r}; known are {known}, or give path.py:ClassName")
    try:
        return cast(Callable[[dict[str, float]], Any], group[name].load())
    except (Exception, SystemExit) as error:
        raise StrategyInvalid(f"strategy {name}: import failed: {describe(error)}") from error


def _check(given: str, strategy: object) -> None:
    name = getattr(strategy, "name", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise StrategyInvalid(f"{given}: name must be 1 to 32 of A-Z a-z 0-9 _ . -, it is {name!r:.60}")
    timeframes = getattr(strategy, "timeframes", None)
    if not (
        isinstance(timeframes, tuple)
        and 0 < len(timeframes) <= len(TIMEFRAMES)
        and all(timeframe in TIMEFRAMES for timeframe in timeframes)
    ):
        allowed = ", ".join(TIMEFRAMES)
        raise StrategyInvalid(f"{given}: timeframes must be a tuple of {allowed}, it is {timeframes!r:.60}")
    candles = getattr(strategy, "candles", None)
    if not isinstance(candles, int) or isinstance(candles, bool) or candles < 1:
        raise StrategyInvalid(f"{given}: candles must be a positive integer, it is {candles!r:.60}")
    if not callable(getattr(strategy, "analyse", None)):
        raise StrategyInvalid(f"{given}: it has no method analyse(view)")
