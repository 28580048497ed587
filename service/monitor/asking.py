"""Ask the daemon that runs in a data directory, over its control socket."""

import json
import socket
from pathlib import Path
from typing import Any

from service.errors import DaemonUnreachable, NobodyListens
from service.monitor.control import SOCKET_NAME, short_path

ANSWER_LIMIT_S = 30.0


def ask(directory: Path, question: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """The daemon's answer.

    Raises: NobodyListens: no socket, or a dead one; DaemonUnreachable: it does not answer, or refuses.
    """
    advice = "is it running? name its data directory with --data-dir"
    try:
        with short_path(directory) as path, socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(limit_s)
            connection.connect(path)
            connection.sendall(json.dumps(question).encode() + b"\n")
            with connection.makefile("rb") as stream:
                line = stream.readline()
    except (OSError, TimeoutError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        nobody = isinstance(error, (ConnectionRefusedError, FileNotFoundError, NotADirectoryError))
        unreachable = NobodyListens if nobody else DaemonUnreachable
        raise unreachable(f"no daemon answers at {directory / SOCKET_NAME}: {reason}; {advice}") from None
    if not line:
        raise DaemonUnreachable(f"the daemon at {directory} ended the connection; ask again") from None
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise DaemonUnreachable(f"the daemon at {directory} refused: {answer['error']}")
    return answer
