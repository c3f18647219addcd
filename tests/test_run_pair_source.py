"""Which shards a process of a pod reads, copies and hashes before it trains."""

import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
import verb
from test_runtime_mesh import v5e_chips

from proreflow_jax.data import loader, record_plan, records
from proreflow_jax.jobs import train
from proreflow_jax.run import open, pair_source
from proreflow_jax.run.experiment import PLANNED, Experiment, stage_plan
from proreflow_jax.run.pair_source import group_readers, process_shards
from proreflow_jax.runtime import mesh

pytestmark = pytest.mark.usefixtures("quick")

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
    for groups, most in ((1, 256), (256, 4)):  # a host has four chips
        readers = group_readers(machine, batch, groups)
        assert max(len(process_shards(plan, readers, host)[0]) for host in range(64)) == most
    assert np.unique(mesh.own_rows(machine, batch, 0)).size == 8


def with_pairs(experiment: Experiment, patch: pytest.MonkeyPatch) -> list[Path]:
    """Records of the first stage whose field `first` is their number, as if a teacher had made them; the shards."""
    patch.setattr(pair_source, "handed_on", lambda *_: "base")
    stage = experiment.stages[0]
    plan, folder = stage_plan(experiment, stage, "base", PLANNED), stage.folder / "pairs"
    records.fix_plan(folder, plan)
    for shard in range(record_plan.shard_count(plan)):
        rows = ({"first": np.array(i, np.int32)} for i in record_plan.shard_range(plan, shard))
        records.write_shard(folder, plan, shard, rows)
    assert records.publish(folder, plan)
    return sorted(folder.glob("*.array_record"))


def test_batches_of_a_stage_keep_groups_apart_and_one_group_is_the_sequence_of_before(tmp_path, outline_only, monkeypatch):
    taken = {}
    for groups in (1, 2):
        config = verb.tiny_config(tmp_path, outline_only, train__groups=groups, name=f"groups-{groups}")
        experiment = open.open_outline(config, jax.devices())
        with_pairs(experiment, monkeypatch)
        stage = experiment.stages[0]
        with train.batches_from(experiment, stage, pair_source.open_pairs(experiment, stage), 0) as batches:
            taken[groups] = np.stack([np.asarray(batch["first"]) for _, batch in itertools.islice(batches, 4)])
    assert taken[1].reshape(-1).tolist() == loader.epoch_places(range(64), 0, 32)  # two epochs
    first, second = np.split(taken[2], 2, axis=1)
    assert (sorted(first[:2].reshape(-1)), sorted(second[:2].reshape(-1))) == (list(range(16)), list(range(16, 32)))


def test_a_host_misses_no_shard_of_others_and_says_which_of_its_own_is_missing(tmp_path, outline_only, monkeypatch):
    sizes = {"pairs__examples": 64, "train__groups": 4}
    experiment = open.open_outline(verb.tiny_config(tmp_path, outline_only, **sizes), v5e_chips(1, 4))
    shards, plan = with_pairs(experiment, monkeypatch), {"examples": 64, "shard_size": 16}
    read, _ = process_shards(plan, group_readers(experiment.mesh, 16, 4), 1)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    others = set(range(4)) - set(read)
    assert others and read
    for shard in others:
        shards[shard].unlink()
    pair_source.open_pairs(experiment, experiment.stages[0])
    shards[read[0]].unlink()
    with pytest.raises(FileNotFoundError, match=shards[read[0]].name):
        pair_source.open_pairs(experiment, experiment.stages[0])
