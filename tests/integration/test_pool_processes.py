"""Worker processes: their work, their deaths and their replacements."""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future

import pytest

from service.analysis import inline
from service.analysis.inline import InlineExecutor
from service.analysis.nursery import spawn_nursery
from service.analysis.pool import NurseryPool, WorkersUnavailable, open_pool
from service.analysis.worker import describe_strategy
from service.errors import StrategyInvalid, WorkerLost
from service.monitor.budget import Level
from service.monitor.guard import MemoryGuard
from service.records import Load
from service.settings import AnalysisSettings, MonitorSettings, StrategySettings
from tests.recorder import Recorder

# Functions of the standard library serve as tasks: workers know no test module.
WAIT_FOR_EVER = (time.sleep, 3_600)


async def result(future):
    return await asyncio.wrap_future(future)


def alive(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False  # also when it ends between the two looks


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  processes end without telling the loop
            await asyncio.sleep(0.01)


@pytest.fixture
async def pool():
    pool = NurseryPool(spawn_nursery(), 2, limit_s=30.0, memory_limit_bytes=1_000_000_000)
    yield pool
    pool.shutdown()


async def test_tasks_run_in_other_processes_and_answer(pool):
    futures = [pool.submit(divmod, n, 7) for n in range(100)]
    assert [await result(f) for f in futures] == [divmod(n, 7) for n in range(100)]
    pids = {await result(pool.submit(os.getpid)) for _ in range(10)}
    assert pids <= set(pool.pids)
    assert os.getpid() not in pids


async def test_a_preferred_worker_gets_the_task_while_it_has_room_and_nobody_waits_for_it(pool):
    await until(lambda: len(pool.pids) == 2)
    first, second = pool.pids
    for _ in range(5):
        assert await result(pool.submit_to(1, os.getpid)) == second
        assert await result(pool.submit_to(2, os.getpid)) == first  # counted around
    hung = [pool.submit_to(1, *WAIT_FOR_EVER) for _ in range(2)]
    assert await result(pool.submit_to(1, os.getpid)) == first
    assert [future.done() for future in hung] == [False, False]


async def test_a_preferred_worker_that_is_gone_is_no_obstacle(pool):
    await until(lambda: len(pool.pids) == 2)
    for pid in list(pool.pids):
        os.kill(pid, signal.SIGKILL)
    await until(lambda: pool.lost == 2)
    assert await result(pool.submit_to(1, divmod, 9, 7)) == (1, 2)


async def test_answers_larger_than_a_socket_buffer_arrive_whole(pool):
    assert await result(pool.submit(bytes, 5_000_000)) == bytes(5_000_000)
    assert await result(pool.submit(len, bytes(5_000_000))) == 5_000_000


async def test_an_error_of_a_task_comes_back_as_itself_or_as_text(pool):
    with pytest.raises(ZeroDivisionError):
        await result(pool.submit(divmod, 1, 0))
    with pytest.raises(RuntimeError, match="JSONDecodeError"):
        await result(pool.submit(json.loads, "{"))
    with pytest.raises(StrategyInvalid, match="nobody"):
        await result(pool.submit(describe_strategy, StrategySettings(name="nobody")))
    assert pool.lost == 0


async def test_a_killed_worker_costs_its_task_and_is_replaced(pool):
    hung = pool.submit(*WAIT_FOR_EVER)
    first = set()
    await until(lambda: len(pool.pids) == 2)
    first.update(pool.pids)
    others = [pool.submit(divmod, n, 7) for n in range(20)]
    for pid in list(pool.pids):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerLost):
        await result(hung)
    done = await asyncio.gather(*map(result, others), return_exceptions=True)
    assert sum(isinstance(d, WorkerLost) for d in done) <= 1  # at most what the other one was at
    await until(lambda: len(pool.pids) == 2)
    assert not first & set(pool.pids)
    assert pool.lost == 2


async def test_a_hung_task_is_killed_at_its_limit_and_what_waited_behind_it_is_not_lost():
    pool = NurseryPool(spawn_nursery(), 1, limit_s=0.5, memory_limit_bytes=1_000_000_000)
    try:
        hung = pool.submit(*WAIT_FOR_EVER)
        behind = [pool.submit(divmod, 9, 7), pool.submit(divmod, 8, 7)]
        with pytest.raises(WorkerLost, match="time limit"):
            await result(hung)
        assert [await result(f) for f in behind] == [(1, 2), (1, 1)]
    finally:
        pool.shutdown()


async def test_a_task_can_be_killed_by_hand(pool):
    hung = pool.submit(*WAIT_FOR_EVER)
    await until(lambda: len(pool.pids) == 2)
    assert pool.kill(hung)
    with pytest.raises(WorkerLost, match="on request"):
        await result(hung)
    assert not pool.kill(hung)


async def test_a_worker_that_grows_beyond_its_limit_is_replaced_between_tasks():
    pool = NurseryPool(spawn_nursery(), 1, limit_s=30.0, memory_limit_bytes=60_000_000)
    try:
        leaky = await result(pool.submit(os.getpid))
        # interning keeps the text: a leak that survives the task
        await result(pool.submit(exec, "import sys; sys.leak = bytes(bytearray(b'x') * 80_000_000)"))
        await until(lambda: pool.replaced == 1)
        assert await result(pool.submit(os.getpid)) != leaky
        assert pool.lost == 0
        await until(lambda: not alive(leaky))
    finally:
        pool.shutdown()


async def test_what_waits_beside_a_worker_that_grew_too_large_is_done_by_another():
    pool = NurseryPool(spawn_nursery(), 1, limit_s=30.0, memory_limit_bytes=60_000_000)
    try:
        grow = "import sys; sys.leak = bytes(bytearray(b'x') * 80_000_000)"
        tasks = [
            pool.submit(exec, grow),
            pool.submit(os.getpid),
            pool.submit(exec, grow),
            pool.submit(os.getpid),
        ]
        _, first, _, second = [await result(task) for task in tasks]
        assert first != second
        assert (pool.lost, pool.replaced) == (0, 2)
    finally:
        pool.shutdown()


async def test_the_settings_say_after_how_many_batches_a_worker_is_replaced():
    async with open_pool(AnalysisSettings(workers=1, worker_max_batches=2), spawn_nursery()) as pool:
        pids = [await result(pool.submit(os.getpid)) for _ in range(5)]
    assert len(set(pids)) == 3


async def test_workers_are_replaced_on_request_and_by_age(pool):
    await until(lambda: len(pool.pids) == 2)
    before = set(pool.pids)
    pool.replace_workers("test")
    await until(lambda: len(pool.pids) == 2 and not before & set(pool.pids))
    aged = NurseryPool(spawn_nursery(), 1, limit_s=30.0, memory_limit_bytes=10**9, max_tasks=3)
    try:
        pids = [await result(aged.submit(os.getpid)) for _ in range(7)]
        assert len(set(pids)) == 3
    finally:
        aged.shutdown()


async def test_a_lost_nursery_is_replaced_and_work_goes_on(pool):
    await result(pool.submit(os.getpid))
    old = pool.nursery_pid
    os.kill(old, signal.SIGKILL)
    # Workers die with their nursery; one that was still starting is not lost, it is started by the next.
    await until(lambda: pool.nursery_pid != old and len(pool.pids) == 2)
    assert await result(pool.submit(divmod, 9, 7)) == (1, 2)


async def test_a_nursery_that_cannot_start_fails_the_work_with_its_reason(monkeypatch):
    from service.analysis import nursery

    def broken():
        ours, theirs = nursery.socket.socketpair()
        with theirs:
            theirs.set_inheritable(True)
            program = f"import socket; socket.socket(fileno={theirs.fileno()}).sendall(b'no numpy here')"
            pid = os.posix_spawn(sys.executable, [sys.executable, "-c", program], dict(os.environ))
        return nursery.Nursery(pid, ours)

    pool = NurseryPool(broken(), 1, limit_s=30.0, memory_limit_bytes=10**9, respawn=broken)
    try:
        with pytest.raises(WorkersUnavailable):
            await result(pool.submit(os.getpid))
    finally:
        pool.shutdown()


async def test_no_process_is_left_when_the_pool_closes_even_with_a_hung_worker():
    async with open_pool(AnalysisSettings(workers=2), spawn_nursery()) as pool:
        hung = pool.submit(*WAIT_FOR_EVER)
        await until(lambda: len(pool.pids) == 2)
        pids = [pool.nursery_pid, *pool.pids]
    with pytest.raises(WorkerLost, match="closed"):
        await result(hung)
    await until(lambda: not any(map(alive, pids)))
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(os.getpid)


_DAEMON = """
import asyncio, os, signal, sys, time
from service.analysis.nursery import start_nursery
nursery = start_nursery()
from service.analysis.pool import NurseryPool
async def main():
    pool = NurseryPool(nursery, 2, limit_s=60.0, memory_limit_bytes=10**9)
    pool.submit(time.sleep, 3600)
    while len(pool.pids) < 2:
        await asyncio.sleep(0.01)
    pool.submit(print, "a worker's print goes nowhere")
    print(nursery.pid, *pool.pids, flush=True)
    await asyncio.sleep(3600)
asyncio.run(main())
"""


def test_nothing_outlives_a_killed_daemon_and_workers_print_nowhere():
    with subprocess.Popen(
        [sys.executable, "-c", _DAEMON], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as daemon:
        pids = [int(word) for word in daemon.stdout.readline().split()]
        assert len(pids) == 3
        assert all(map(alive, pids))
        for pid in pids:
            os.kill(pid, signal.SIGINT)  # as Ctrl-C and a supervisor would
            os.kill(pid, signal.SIGTERM)
        assert all(map(alive, pids))
        daemon.kill()
        out, err = daemon.communicate(timeout=30)
    assert (out, err) == ("", "")
    asyncio.run(until(lambda: not any(map(alive, pids))))


def test_a_forked_nursery_carries_nothing_heavy():
    program = (
        "from service.analysis.nursery import start_nursery\n"
        "import sys\n"
        "assert not {'numpy', 'talib', 'asyncio', 'structlog', 'pandas'} & set(sys.modules)\n"
        "nursery = start_nursery()\n"
        "import asyncio\n"
        "from service.analysis.pool import NurseryPool\n"
        "async def main():\n"
        "    pool = NurseryPool(nursery, 1, limit_s=60.0, memory_limit_bytes=10**9)\n"
        "    code = \"import sys; assert not {'pandas', 'asyncio', 'structlog'} & set(sys.modules)\"\n"
        "    await asyncio.wrap_future(pool.submit(exec, code))\n"
        "    assert 'numpy' not in sys.modules\n"
        "    pool.shutdown()\n"
        "asyncio.run(main())\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_inline_executor_answers_fails_and_interrupts():
    executor = InlineExecutor(limit_s=0.2)
    assert executor.submit(divmod, 9, 7).result() == (1, 2)
    assert isinstance(executor.submit(divmod, 9, 0).exception(), ZeroDivisionError)
    with pytest.raises(WorkerLost, match="time limit"):
        executor.submit(*WAIT_FOR_EVER).result()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def raise_signal():
    signal.raise_signal(signal.SIGALRM)


class Late(Future):
    """A future in which the alarm goes off while it takes the result: the task itself is done."""

    def set_result(self, result):
        raise_signal()
        super().set_result(result)

    def set_exception(self, exception):
        raise_signal()
        super().set_exception(exception)


def test_a_limit_that_comes_when_the_task_has_ended_interrupts_nobody(monkeypatch):
    monkeypatch.setattr(inline, "Future", Late)
    executor = InlineExecutor(limit_s=30.0)
    assert executor.submit(divmod, 9, 7).result() == (1, 2)
    assert isinstance(executor.submit(divmod, 9, 0).exception(), ZeroDivisionError)
    with pytest.raises(WorkerLost, match="time limit"):
        executor.submit(raise_signal).result()


async def test_no_workers_means_no_process():
    async with open_pool(AnalysisSettings(workers=0), None) as executor:
        assert isinstance(executor, InlineExecutor)
        assert await result(executor.submit(os.getpid)) == os.getpid()


async def test_the_pool_gets_smaller_and_larger_again(pool):
    await until(lambda: len(pool.pids) == 2)
    pool.resize(1)
    await until(lambda: len(pool.pids) == 1)
    assert await result(pool.submit(divmod, 9, 7)) == (1, 2)
    pool.resize(3)
    await until(lambda: len(pool.pids) == 3)
    assert pool.workers == 3


async def test_workers_told_to_go_while_they_start_are_replaced_and_not_kept_idle(pool):
    pool.resize(1)
    pool.replace_workers("test")
    async with asyncio.timeout(20):
        assert await result(pool.submit(divmod, 9, 7)) == (1, 2)
    pool.resize(2)
    await until(lambda: len(pool.pids) == 2)
    assert pool.replaced == 2
    pids = {await result(pool.submit_to(place, os.getpid)) for place in range(2)}
    assert pids == set(pool.pids)


async def test_tasks_cancelled_while_no_worker_is_free_do_not_pile_up(pool):
    hung = [pool.submit(*WAIT_FOR_EVER) for _ in range(4)]
    for _ in range(3):
        waiting = [pool.submit(divmod, n, 7) for n in range(10)]
        assert all(future.cancel() for future in waiting)
    last = pool.submit(divmod, 9, 7)
    assert pool.depth == len(hung) + 1
    assert last.cancel()


class Memory:
    """A sampler whose readings the test sets."""

    limit_mb = 100.0
    pss_mb_last = 10.0

    def sample(self):
        return Load(memory_fraction=self.pss_mb_last / self.limit_mb, cpu_fraction=0.0)

    def group_fraction(self):
        return 0.0

    def foreign_fraction(self):
        return 0.0

    def pressure_pct(self):
        return None


async def test_a_lost_nursery_between_level_high_and_its_end_costs_no_worker_for_ever(pool):
    memory = Memory()
    settings = MonitorSettings(memory_levels=(0.7, 0.8, 0.9), memory_calm_s=0.0, memory_growth_hours=0.05)
    seconds = itertools.count()
    guard = MemoryGuard(
        settings,
        memory,
        Recorder(),
        workers=pool,
        shrink=lambda on: None,
        flush_early=lambda on: None,
        quiet=lambda on: None,
        stop=lambda reason: None,
        monotonic_s=lambda: float(next(seconds)),
    )
    await result(pool.submit(os.getpid))
    old, its_workers = pool.nursery_pid, set(pool.pids)
    os.kill(old, signal.SIGKILL)
    # one of them may be known as gone after the other
    await until(lambda: pool.nursery_pid != old and its_workers.isdisjoint(pool.pids))
    assert pool.pids == []  # the new ones are starting: none has a process id
    memory.pss_mb_last = 85.0
    guard.sample()
    guard.sample()
    assert (guard.level, pool.workers) == (Level.HIGH, 1)
    memory.pss_mb_last = 10.0
    guard.sample()
    guard.sample()
    assert (guard.level, pool.workers) == (Level.NORMAL, 2)
    async with asyncio.timeout(20):
        assert await result(pool.submit(divmod, 9, 7)) == (1, 2)
    await until(lambda: len(pool.pids) == 2)
