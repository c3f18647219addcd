"""bench: arrays in the place of weights, what is timed and how, numbers that fit each other, the input, diffusers beside it."""

import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import verb

from proreflow_jax.perf import chips, dummy_arrays, input_rate, jobs, measure, output_rate
from proreflow_jax.run import open

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def opened(outline_only, tmp_path_factory):
    """The tiny chain's outline on the eight devices, a batch split over them."""
    return open.open_outline(verb.tiny_config(tmp_path_factory.mktemp("runs"), outline_only), jax.devices())


@pytest.mark.slow
def test_stand_ins_have_the_shapes_and_places_of_the_job_and_a_step_on_them_is_finite(opened):
    job = jobs.jobs(opened, opened.stages[0])["train"]
    made = dummy_arrays.filled(opened, job.rest)
    described = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), tree)
    assert described(made) == described(job.rest)
    weights = {name: np.asarray(value) for name, value in made[0].params.items()}
    assert all(np.any(value) for name, value in weights.items() if not name.endswith("bias"))
    held = job.hold(made)
    assert described(held) == described(job.arguments)
    state, numbers = job.jitted(*held)
    assert state.step == 1 and all(np.isfinite(value).all() for value in jax.tree.leaves(jax.device_get(numbers)))


def test_tiny_arrays_have_the_names_of_the_job_and_are_split_where_its_own_are(tmp_path, outline_only):
    config = verb.tiny_config(tmp_path, outline_only, mesh__data=2, mesh__fsdp=4)
    sharded = open.open_outline(config, jax.devices())
    job = jobs.jobs(sharded, sharded.stages[0])["train"]
    small = dummy_arrays.tiny(job.arguments)
    assert jax.tree.structure(small) == jax.tree.structure(job.arguments)
    split = lambda tree: [leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(tree)]
    assert split(small) == split(job.arguments) and {*split(small)} == {True, False}
    assert max(leaf.size for leaf in jax.tree.leaves(small)) == 8 * 8


class Sent:
    """A result on its way; what is waited for is written down."""

    def __init__(self, number: int, said: list) -> None:
        self.number, self.said = number, said

    def block_until_ready(self) -> None:
        self.said.append(("waited", self.number))


def test_in_a_row_a_call_is_sent_before_the_one_in_front_is_waited_for():
    said = []

    def call() -> Sent:
        said.append(("sent", len([what for what, _ in said if what == "sent"])))
        return Sent(said[-1][1], said)

    measure.in_a_row(call, 3)
    assert said == [("sent", 0), ("sent", 1), ("waited", 0), ("sent", 2), ("waited", 1), ("waited", 2)]
    said.clear()
    measure.each_alone(call, 2)
    assert said == [("sent", 0), ("waited", 0), ("sent", 1), ("waited", 1)]


def test_a_call_takes_the_state_that_the_call_before_left():
    program = lambda state, other: (state + other, {"loss": state})
    call = measure.Caller(program, SimpleNamespace(classes=("state", "batch")), (1, 10))
    assert [call()["loss"] for _ in range(3)] == [1, 11, 21]
    call = measure.Caller(program, SimpleNamespace(classes=("frozen", "batch")), (1, 10))
    assert [call() for _ in range(2)] == [(11, {"loss": 1})] * 2


def test_utilisation_is_of_the_peak_of_all_devices_and_unknown_where_that_is():
    found = measure.work(2 * 197e12, 4.0, 2, chips.CHIPS["v5e"])
    assert (found["flops_per_second"], found["utilisation"]) == (0.5 * 197e12, 0.25)
    assert measure.work(1e9, 1.0, 2, None)["utilisation"] is None


def test_the_numbers_of_a_run_fit_each_other(tmp_path, outline_only, opened):
    words = verb.tiny_flags(tmp_path, outline_only)
    ended = verb.run(
        "bench",
        *words,
        "--stage=4",
        "--jobs=train,sample",
        "--steps=3",
        "--warmup=0",
        "--input",
        f"--json={tmp_path / 'bench.json'}",
    )
    assert ended.code == 0, ended.err
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["machine"] | {"cores": 0} == {
        "platform": "cpu",
        "kind": "cpu",
        "devices": 8,
        "cores": 0,
        "jax": jax.__version__,
    }
    assert [(job["stage"], job["job"]) for job in found["jobs"]] == [(4, "train"), (4, "sample")]
    for job in found["jobs"]:
        times = job["seconds"]
        assert times["least"] <= times["quartiles"][0] <= times["median"] <= times["quartiles"][1] <= times["most"]
        assert times["count"] == 3 == job["host_seconds"]["count"]
        assert job["images_per_second"] == pytest.approx(job["images"] / times["median"])
        assert job["images_per_second_in_a_row"] == pytest.approx(job["images"] / job["seconds_in_a_row"])
        assert job["flops_per_second"] == pytest.approx(job["useful_flops"] / times["median"])
        assert job["host_seconds_of_arguments"]["median"] > 0 and job["compile_seconds"] > 0
        memory = job["memory"]
        assert 0 < memory["temporaries"] < memory["compiled"] < memory["process_peak"] and memory["peak"] is None
    train, sample = found["jobs"]
    assert train["input"]["wanted_per_second"] == train["images_per_second_in_a_row"] and "input" not in sample
    held = len(jax.tree.leaves(jobs.train_job(opened, opened.stages[0], opened).arguments))
    assert train["arrays"] == held and f"{held:,} such arrays" in ended.out
    assert "stage 4, train: 16 images a call, 2 at once on a device" in ended.out and "peak unknown" in ended.out


def test_the_input_is_held_against_a_wanted_rate_and_says_which_input_it_was(tmp_path, model):
    words = [*verb.tiny_flags(tmp_path, model), "--stage=4", "--input", f"--json={tmp_path / 'bench.json'}"]
    ended = verb.run("bench", *words, "--rate=1e9")
    assert ended.code == 0, ended.err
    pairs, train, sample = json.loads((tmp_path / "bench.json").read_text())["jobs"]
    assert "seconds" not in train and "input" not in sample
    assert pairs["input"]["input"] == "captions, --config.data.kind=prompts"
    assert train["input"]["input"] == "random pair records of the same size"
    for found in (pairs["input"], train["input"]):
        assert found["rows"] == 20 * 16 and found["ratio"] == pytest.approx(found["rows_per_second"] / 1e9)
    assert ended.out.count("STARVES THE STEP") == 2
    slow = verb.run("bench", *words, "--rate=0.001", "--jobs=train", "--config.pairs.mode=online")
    assert "captions, --config.data.kind=prompts" in slow.out and "keeps up" in slow.out


def test_rows_of_the_input_are_timed_until_they_lie_on_the_devices(opened, monkeypatch):
    seen = []
    monkeypatch.setattr(input_rate.jax, "block_until_ready", lambda batch: seen.append(batch) or batch)
    found = input_rate.rate(opened, opened.stages[0], "pairs", 1)
    assert len(seen) == 21 and found["rows"] == 20 * 16
    assert seen[0]["ids"].sharding.num_devices == 8 and int(seen[1]["index"][0]) == 16


def test_the_output_is_written_and_the_chips_wait_is_computed(tmp_path, outline_only):
    flags = verb.tiny_flags(tmp_path, outline_only, pairs__storage="float16")
    words = [*flags, "--stage=4", "--jobs=pairs,train", "--output", "--rate=100", f"--json={tmp_path / 'bench.json'}"]
    ended = verb.run("bench", *words)
    assert ended.code == 0, ended.err
    pairs, train = json.loads((tmp_path / "bench.json").read_text())["jobs"]
    assert "output" not in train and pairs["output"]["bytes"] == 5 * 64 * 2 + 4 + 8 * 4
    assert all(pairs["output"][name] > 0 for name in output_rate.Rates._fields)
    assert [*pairs["output"]["idle"]] == ["4", "16", "64", "256"] and "for 100 pairs/s a chip: 4 " in ended.out


def test_chips_wait_for_what_no_host_writes_behind_them():
    """Ten shards of four batches; a host has four chips."""
    sizes = SimpleNamespace(batch=1024, shard_size=4096, examples=40960)
    idle = lambda chips, per_chip=100.0, **rates: output_rate.idle_share(
        output_rate.Rates(**{"fetch": 0.0, "write": 0.0, "finish": 0.0} | rates), chips, per_chip, sizes
    )
    assert [idle(chips) for chips in (4, 64)] == pytest.approx([0, 0])
    last = 1.024 / (102.4 + 1.024)  # the last batch has nothing behind it
    assert idle(4, fetch=1e-3) == pytest.approx(last) and idle(4, write=1e-3) == pytest.approx(last)
    assert idle(4, write=5e-3) == pytest.approx(0.5, abs=0.01)  # half as fast as the chips
    assert idle(64, write=5e-3) == pytest.approx(1 - 6.4 / (5.92 + 20.48))  # ten hosts write a shard each, the last from 5.92 s
    assert idle(4, finish=1e-3) == pytest.approx(4.096 / (102.4 + 4.096))  # two batches of 2.56 s hide all but the last end
    assert idle(4, finish=1e-2) == pytest.approx(0.77, abs=0.01)


def test_a_batch_of_several_shards_is_written_by_as_many_hosts():
    """Behind the last batch of 2,048 a host has a shard of 512 to write, not all of it."""
    sizes = SimpleNamespace(batch=2048, shard_size=512, examples=40960)
    idle = output_rate.idle_share(output_rate.Rates(0.0, 1e-3, 1e-3), 256, 1.0, sizes)
    assert idle == pytest.approx(2 * 0.512 / (160 + 2 * 0.512))


def test_wrong_words_end_in_one_line(tmp_path, outline_only):
    words = verb.tiny_flags(tmp_path, outline_only)
    for wrong, said in {
        "--steps=0": "--steps=0 must be in [1, 1000000]",
        "--warmup=-1": "--warmup=-1 must be in [0, 1000000]",
        "--rows=0": "--rows=0 must be in [1, 65536]",
        "--rate=-2": "--rate=-2.0 must be in [0, 1e+09]",
        "--rate=nan": "--rate=nan must be in [0, 1e+09]",
        "--rate=5": "--rate=5.0 is of the whole job with --input, of one chip with --output: add one of them",
        "--stage=3": "--stage=3 is not a stage",
        "--jobs=train,all": "--jobs='all' must be one of pairs, train, sample",
        "--against=torch": "--against='torch' must be one of diffusers",
        "--json=/dev/null/bench.json": "--json=/dev/null/bench.json: the folder /dev/null can't be made",
        "--config.model.path=no/such": "no/such",
    }.items():
        ended = verb.run("bench", *words, wrong)
        assert ended.code == 2 and said in ended.err and ended.err.count("\n") == 1, ended.err


def test_ours_and_diffusers_take_turns_on_the_same_weights(tmp_path, outline_only):
    pytest.importorskip("diffusers")
    words = [*verb.tiny_flags(tmp_path, outline_only), "--against=diffusers", "--steps=3", "--rows=2"]
    ended = verb.run("bench", *words, f"--json={tmp_path / 'bench.json'}")
    assert ended.code == 0, ended.err
    found = json.loads((tmp_path / "bench.json").read_text())
    against = found["against"]
    assert "jobs" not in found and against["largest_difference"] < 1e-4
    assert against["dtype"] == "float32" and against["images"] == 2 and against["ratio"]["count"] == 3
    low, high = against["ratio"]["least"], against["ratio"]["most"]
    assert low * against["theirs"]["least"] <= against["ours"]["most"] <= high * against["theirs"]["most"]
    assert "ours / theirs" in ended.out


@pytest.mark.slow
@pytest.mark.parametrize(("member", "t5"), [("3.5-medium", True), ("3-medium", False)])
def test_a_transformer_and_diffusers_take_turns_too(tmp_path, member, t5):
    """Without T5 ours reads one row of text for diffusers' 256."""
    pytest.importorskip("diffusers")
    import tiny_sd3

    flags = verb.tiny_flags(tmp_path, tiny_sd3.write(tmp_path / "model", member, t5), student__prediction="velocity")
    ended = verb.run("bench", *flags, "--against=diffusers", "--steps=1", "--rows=2", f"--json={tmp_path / 'bench.json'}")
    assert ended.code == 0, ended.err
    against = json.loads((tmp_path / "bench.json").read_text())["against"]
    assert (against["network"], against["images"]) == ("transformer", 2) and against["largest_difference"] < 1e-4


def test_without_torch_the_comparison_names_the_extra(tmp_path, outline_only, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "proreflow_jax.perf.against_diffusers", raising=False)
    monkeypatch.delattr("proreflow_jax.perf.against_diffusers", raising=False)
    ended = verb.run("bench", *verb.tiny_flags(tmp_path, outline_only), "--against=diffusers")
    assert (
        ended.code == 2
        and "pip install torch diffusers transformers accelerate peft (the extra `export-check`)" in ended.err
        and ended.err.count("\n") == 1
    )
