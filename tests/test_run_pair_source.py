"""Which shards a process of a pod reads, copies and hashes before it trains."""

import numpy as np
import pytest
from test_runtime_mesh import v5e_chips

from proreflow_jax.data import loader, record_plan
from proreflow_jax.run.pair_source import group_readers, process_shards
from proreflow_jax.runtime import mesh

PLAN = {"examples": 64, "shard_size": 2}  # 32 shards
BATCH, HOSTS = 32, 4


@pytest.mark.parametrize("axes", [(1, -1, 1), (-1, 2, 2)])
@pytest.mark.parametrize("groups", [1, 4, 16])
def test_every_row_finds_its_shard_and_every_shard_is_hashed_once(axes: tuple[int, int, int], groups: int) -> None:
    machine = mesh.make_mesh(*axes, v5e_chips(1, 4))
    readers, hashes = group_readers(machine, BATCH, groups), []
    for host in range(HOSTS):
        read, hashed = process_shards(PLAN, readers, host)
        rows = mesh.own_rows(machine, BATCH, host)
        places = [p for step in range(4) for p in loader.batch_places(step, rows, BATCH, 0, PLAN["examples"], groups)]
        assert {place // PLAN["shard_size"] for place in places} <= set(read)
        hashes += hashed
    assert sorted(hashes) == list(range(record_plan.shard_count(PLAN)))


def test_a_host_of_many_reads_few_shards_in_groups_and_all_in_one() -> None:
    machine = mesh.make_mesh(-1, -1, 1, v5e_chips(1, 16))  # 256 chips, 64 hosts
    batch, plan = 512, {"examples": 512, "shard_size": 2}  # 256 shards
    most = lambda groups: max(len(process_shards(plan, group_readers(machine, batch, groups), h)[0]) for h in range(64))
    assert most(1) == 256 and most(256) == 4  # a host has four chips
    assert np.unique(mesh.own_rows(machine, batch, 0)).size == 8
