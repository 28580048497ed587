"""Which modules a strategy's result depends on; asked in the process that runs it.

Apart from `code_version`, because its hashes load OpenSSL, which no worker needs.
"""

import os
import sys

import msgspec

from service.errors import WorkerLost
from service.settings import StrategySettings

Module = tuple[str, str]
"""Name and file of a loaded module."""


def loaded_modules(strategy: StrategySettings, *, apart: bool) -> bytes:
    """Every module outside the standard library that is loaded once the strategy is, for `decode_modules`.

    Runs where the strategy runs. A module that a strategy imports only while it analyses is not seen.

    Args: apart: look in a short-lived copy of this process. To look at a module is to count a reference to
    it, and a worker would keep a copy of each page it shares with its nursery until then: 2 MB.
    Raises: StrategyInvalid, SettingsInvalid: the strategy cannot be loaded. WorkerLost: the copy was.
    """
    from service.strategies.loader import load_strategy

    load_strategy(strategy.name, strategy.options)
    return _seen_by_a_copy() if apart else _encode(_seen())


def decode_modules(found: bytes) -> list[Module]:
    """By name."""
    return msgspec.msgpack.decode(found, type=list[Module])


def _seen() -> list[Module]:
    standard = os.path.dirname(os.__file__) + os.sep
    files = ((name, getattr(module, "__file__", None)) for name, module in list(sys.modules.items()))
    return sorted(
        (name, file)
        for name, file in files
        if isinstance(file, str) and (is_installed(file) or not file.startswith(standard))
    )


def _seen_by_a_copy() -> bytes:
    reading, writing = os.pipe()
    copy = os.fork()
    if not copy:
        try:
            with open(writing, "wb") as pipe:
                pipe.write(_encode(_seen()))
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        found = pipe.read()
    os.waitpid(copy, 0)
    if not found:
        raise WorkerLost("the copy that looks at the loaded modules ended early")
    return found


def is_installed(file: str) -> bool:
    """Whether it belongs to an installed package."""
    return "site-packages" in file or "dist-packages" in file


_encode = msgspec.msgpack.Encoder().encode
