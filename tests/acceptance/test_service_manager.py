"""What the service manager hears: ready once trading, alive after each finished cycle, stopping."""

import signal
import socket


def test_the_service_manager_is_told_what_happens(perpd, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(tmp_path / "notify"))
        heard.settimeout(30)
        run = perpd("run", "--symbols", "20", "--speed", "120", NOTIFY_SOCKET=str(tmp_path / "notify"))
        run.read_until("trading")
        for _ in range(2):
            run.read_until("cycle")
        run.process.send_signal(signal.SIGTERM)
        assert run.finish(40) == 0
        heard.setblocking(False)
        messages = []
        while True:
            try:
                messages.append(heard.recv(4096).decode())
            except BlockingIOError:
                break
    kinds = [message.split("\n")[0] for message in messages if not message.startswith("EXTEND")]
    assert kinds[0] == "READY=1"
    assert kinds[1] == "WATCHDOG=1"
    assert kinds[-1] == "STOPPING=1"
    assert kinds.count("READY=1") == kinds.count("STOPPING=1") == 1
    assert kinds.count("WATCHDOG=1") >= 2
