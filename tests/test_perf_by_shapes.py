"""plan's table of a slice by shapes alone; and the state a chip of whole models at 64, 256 and 1,024 chips.

Nothing is compiled.
"""

import json
import math

import jax
import pytest
import verb
from full_size import SD_15, SD_35_MEDIUM, SDXL
from test_runtime_mesh import v5e_chips

from configs.sd15 import get_config
from proreflow_jax.models import network
from proreflow_jax.perf import by_shapes, chips, estimate, jobs, resident, tpu_compile
from proreflow_jax.run import open, train_state
from proreflow_jax.run.check_config import changed
from proreflow_jax.runtime import mesh

pytestmark = pytest.mark.usefixtures("quick")
MODELS = {
    "sd15": (network.make_unet, SD_15),
    "sdxl": (network.make_unet, SDXL),
    "sd35_medium": (network.make_transformer, SD_35_MEDIUM),
}
SLICES = {64: (1, 8), 256: (1, 16), 1024: (4, 16)}  # chips -> (slices, side)


@pytest.mark.parametrize("name", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow), "sd35_medium"])
def test_a_chip_s_state_is_what_the_mesh_promises_on_any_slice(name, caplog):
    make, config = MODELS[name]
    shapes = train_state.trainable(make(config))
    total = sum(math.prod(shape.shape) for shape in shapes.values())
    for slices, side in SLICES.values():
        machine = mesh.make_mesh(-1, -1, 1, v5e_chips(slices, side), slices=slices)
        where = train_state.parameter_shardings(get_config(), machine, shapes)
        one = {n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where[n]) for n, s in shapes.items()}
        assert resident.bytes_on_device(one) / (4 * total / machine.shape["fsdp"]) == pytest.approx(1, abs=0.001)
        train_state.warn_of_whole_weights(get_config(), machine, shapes)
    assert caplog.messages == []
    widest = mesh.make_mesh(1, 1024, 1, v5e_chips(1, 32))
    assert train_state.whole_share(get_config(), widest, shapes) > 0.38
    train_state.warn_of_whole_weights(get_config(), widest, shapes)
    (line,) = caplog.messages
    assert "% of the weights stay whole on each device" in line and "--config.mesh.fsdp" in line and "\n" not in line


@pytest.fixture
def pod(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 chips in the place of libtpu's; nothing may be compiled."""

    def refuse(*_: object) -> None:
        raise AssertionError("nothing is compiled")

    monkeypatch.setattr(tpu_compile, "devices", lambda name, slices: v5e_chips(slices, 16))
    monkeypatch.setattr(tpu_compile, "prepare_compiler", lambda: None)
    monkeypatch.setattr(tpu_compile, "compile_for", refuse)
    monkeypatch.setattr(jobs, "_counted", lambda *job: 1e12)


LARGE = {  # of the tiny model on 256 chips and on 1,024
    "mesh__fsdp": -1,
    "train__batch": 1024,
    "pairs__batch": 1024,
    "pairs__shard_size": 1024,
    "pairs__examples": 4096,
    "train__groups": 4,
}


@pytest.mark.parametrize("slices", [1, 4])
def test_a_large_slice_is_told_by_shapes(tmp_path, outline_only, pod, slices):
    words = verb.tiny_flags(tmp_path, outline_only, mesh__slices=slices, **LARGE)
    ended = verb.run("plan", *words, "--slice=v5e:16x16", "--stage=4", "--share=0.5", f"--json={tmp_path / 'plan.json'}")
    assert ended.code == 0, ended.err
    assert "Computed; nothing was compiled, nothing ran." in ended.out and "at 50 % of it, an assumption (--share" in ended.out
    said = json.loads((tmp_path / "plan.json").read_text())
    alike, by_name = said["by_shapes"], {job["job"]: job for job in said["jobs"]}
    assert (alike["chips"], alike["hosts"]) == (256 * slices, 64 * slices)
    assert alike["mesh"] == {"data": 4 * slices, "fsdp": 64, "tensor": 1}
    assert alike["state"]["whole"] > 0 and alike["state"]["bytes"] > alike["state"]["promised"]  # widths of 8: 64 is too many
    train, pairs = by_name["train"], by_name["pairs"]
    assert train["hours"] == pytest.approx(2 * train["full_speed_hours"])
    assert train["chip_hours"] == pytest.approx(256 * slices * train["hours"])
    assert train["seconds"] == pytest.approx(train["useful_flops"] / (256 * slices * 197e12 * 0.5))
    rows = 1024 / train["seconds"] / (64 * slices)
    assert train["host"]["rows_per_second"] == pytest.approx(rows)
    assert (train["between_slices_bytes"] > 0) == (slices > 1) == ("slices     a chip sends" in ended.out)
    assert "written_bytes_per_second" in pairs["host"] and "written_bytes_per_second" not in train["host"]
    assert train["host"]["copied_bytes"] < train["storage"]["pairs"]  # a host's chips are of few groups


def test_a_table_of_a_small_slice_is_asked_for_and_counts_what_is_sent(tmp_path, outline_only, monkeypatch):
    monkeypatch.setattr(tpu_compile, "devices", lambda name, slices: jax.devices())
    place, config = estimate.target("v5e:2x4", ""), verb.tiny_config(tmp_path, outline_only, mesh__fsdp=-1)

    def sent(name: str, **fields: object) -> list[float] | None:
        one = open.open_outline(changed(config, {n.replace("__", "."): v for n, v in fields.items()}), jax.devices())
        stage = one.stages[0]
        job = jobs.jobs(one, stage)[name]._replace(useful=lambda: 1e9)
        return by_shapes.job_numbers(one, stage, job, place, 1.0)["sent_bytes"]

    shapes = open.open_outline(config, jax.devices()).base.denoiser.shapes
    weights = sum(4 * math.prod(shape.shape) for shape in shapes.values())
    cut = sent("sample")[0]
    assert 0 < cut <= weights and sent("sample") == [cut, 4 * cut]
    assert sent("pairs") == [cut, 4 * cut]  # four windows of a step
    assert sent("train") == [cut + weights] * 2  # gathered once, and the sum of gradients
    assert sent("train", train__remat="inputs") == [2 * cut + weights] * 2
    assert sent("train", train__accumulation=2) == [2 * (cut + weights)] * 2
    assert sent("train", pairs__mode="online") == [2 * cut + weights, 5 * cut + weights]
    assert sent("train", pairs__mode="online", mesh__teacher="whole") == [cut + weights] * 2
    assert sent("train", mesh__fsdp=1) == [weights] * 2
    assert sent("train", mesh__tensor=2) is None


def test_slices_that_are_compiled_are_none_of_those_that_are_told_by_shapes():
    assert [chips.is_large(name) for name in ("v5e:4x4", "v5e:16x16", "v5p:8x8x16", "v6e:8x16")] == [False, True, True, False]
    assert not any(set(chips.SLICES[family]) & set(shapes) for family, shapes in chips.LARGE.items())
    assert chips.chip_count("v5p:8x8x16") == 1024
