import sys
from types import SimpleNamespace

from service.bench.observed import Observer

CYCLES = 2_000


async def test_what_the_bench_notes_of_each_cycle_adds_no_block_to_the_daemon_it_measures(tmp_path):
    async def cycle(parts, number):
        return SimpleNamespace(seconds=number / 7, analysis_s=number / 11, garbage_s=number / 13)

    observer = Observer(cycle, tmp_path / "samples", every=CYCLES * 2)
    parts = SimpleNamespace(collector=SimpleNamespace(last_cpu_s=0.0))
    for number in range(2, 100):
        await observer.cycle(parts, number)
    before = sys.getallocatedblocks()
    for number in range(2, CYCLES + 2):
        parts.collector.last_cpu_s = number / 17
        await observer.cycle(parts, number)
    grown = sys.getallocatedblocks() - before
    observer.close()
    assert len(observer.cycle_s) == CYCLES + 98
    assert grown < CYCLES / 10
