"""What a batch carries to a worker."""

import pickle

from service.analysis.worker import Task
from service.settings import StrategySettings


def test_a_task_arrives_as_it_was_sent_and_the_next_batch_finds_the_same_one():
    task = Task("/data/candles.mmap", StrategySettings(name="ict_smc", options={"stop_atr": 3.0}), True)
    arrived, again = (pickle.loads(pickle.dumps(task)) for _ in range(2))
    assert (arrived.store_path, arrived.strategy, arrived.collect) == (
        task.store_path,
        task.strategy,
        task.collect,
    )
    assert again is arrived


def test_a_task_with_other_options_is_another_one():
    tasks = [Task("/data/candles.mmap", StrategySettings(options={"stop_atr": x}), True) for x in (1.0, 2.0)]
    arrived = [pickle.loads(pickle.dumps(task)) for task in tasks]
    assert [task.strategy.options["stop_atr"] for task in arrived] == [1.0, 2.0]
    assert arrived[0].sent != arrived[1].sent
