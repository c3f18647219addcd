"""Checkpoints: bit-equal round trips on any mesh, no wrong byte used, no failed save silent."""

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import PyTree

from proreflow_jax import RunFailed
from proreflow_jax.runtime import mesh as mesh_lib
from proreflow_jax.runtime.checkpoint import Checkpoints, digest, fold

# The first is large enough to lie in a file of its own, outside the tree that tensorstore checksums.
SHAPES = {"conv_in.weight": (256, 64), "conv_in.bias": (7,), "norm.weight": (32,)}


class State(NamedTuple):
    """A training state in miniature: every kind of leaf a real one has."""

    step: jax.Array
    params: dict
    ema: dict
    opt: optax.OptState


def host_state(seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    params = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    params["conv_in.bias"][:3] = [-0.0, np.nan, np.inf]  # bits, not values
    opt = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)
    opt = jax.tree.map(lambda x: np.asarray(rng.integers(0, 9, np.shape(x)), np.asarray(x).dtype), opt)
    half = {name: np.asarray(value, jnp.bfloat16) for name, value in params.items()}
    return State(np.int32(seed), params, half, opt)


def placed(tree: PyTree, devices: int) -> PyTree:
    """The tree as arrays, each leaf split over `devices` devices where it divides."""
    mesh = mesh_lib.make_mesh(data=1, fsdp=devices, devices=jax.devices()[:devices])

    def put(leaf: np.ndarray) -> jax.Array:
        spec = mesh_lib.fsdp_spec(np.shape(leaf), mesh)
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)


def abstract(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def bits(tree: PyTree) -> list[tuple[str, tuple, bytes]]:
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


@pytest.fixture
def two_steps(tmp_path: Path) -> Path:
    """A folder with good checkpoints of steps 1 and 2."""
    with Checkpoints(tmp_path / "c") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, placed(host_state(step), 8), {"position": step * 10})
    return tmp_path / "c"


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_restores_bit_equal_on_another_topology(two_steps: Path, devices: int) -> None:
    target = placed(host_state(9), devices)
    with Checkpoints(two_steps) as checkpoints:
        step, state, meta = checkpoints.restore(None, abstract(target))
    assert (step, meta) == (2, {"position": 20})
    assert jax.tree.structure(state) == jax.tree.structure(target)
    assert bits(state) == bits(host_state(2))
    assert [x.sharding for x in jax.tree.leaves(state)] == [x.sharding for x in jax.tree.leaves(target)]
    assert digest(state) == digest(placed(host_state(2), 8)) == digest(host_state(2))


def test_an_older_step_can_be_asked_for(two_steps: Path) -> None:
    with Checkpoints(two_steps, read_only=True) as checkpoints:
        assert checkpoints.latest() == 2
        step, state, meta = checkpoints.restore(1, placed(host_state(), 4))
        assert (step, meta) == (1, {"position": 10}) and bits(state) == bits(host_state(1))
        with pytest.raises(FileNotFoundError, match="no checkpoint of step 7"):
            checkpoints.restore(7, placed(host_state(), 4))


def test_a_part_is_read_alone(two_steps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves that nobody asks for are neither read nor missed; those that are read are held against their digests."""
    part = lambda state: state._replace(params={}, opt=())
    whole, names, real = abstract(placed(host_state(), 4)), [], Checkpoints._read_leaves
    monkeypatch.setattr(Checkpoints, "_read_leaves", lambda self, step, *a: names.extend(a[0]) or real(self, step, *a))
    with Checkpoints(two_steps, read_only=True) as checkpoints:
        step, state, meta = checkpoints.restore(None, part(whole), part=True)
        assert (step, meta) == (2, {"position": 20}) and bits(state) == bits(part(host_state(2)))
        assert sorted(names) == sorted(["step", *(f"ema/{name}" for name in SHAPES)])
        with pytest.raises(ValueError, match="is not expected"):
            checkpoints.restore(None, part(whole))
        with pytest.raises(ValueError, match="another is missing"):
            checkpoints.restore(None, {"another": whole.step}, part=True)
    for path in array_files(two_steps, 2):
        flip(path)
    with Checkpoints(two_steps, read_only=True) as checkpoints, pytest.raises(ValueError, match="step 2 .* is damaged"):
        checkpoints.restore(2, part(whole), part=True)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2, every=5) as checkpoints:
        for step in (5, 10, 15):
            assert checkpoints.due(step) and not checkpoints.due(step + 1)
            checkpoints.save(step, {"x": jnp.ones(3)}, {})
    assert sorted(os.listdir(tmp_path)) == ["10", "15"]


def test_donating_the_state_after_a_save_does_not_change_it(tmp_path: Path) -> None:
    bump = jax.jit(lambda x: x + 1, donate_argnums=0)
    state = placed({"x": np.zeros((1024, 256), np.float32)}, 8)["x"]
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            state = bump(state)
            checkpoints.save(step, {"x": state}, {})
            state = bump(bump(state))
        checkpoints.wait()
        for step, value in [(2, 4.0), (3, 7.0)]:
            got = checkpoints.restore(step, {"x": state}).state["x"]
            np.testing.assert_array_equal(np.asarray(got), value)


def array_files(folder: Path, step: int) -> list[Path]:
    return [path for path in sorted((folder / str(step) / "state").rglob("d/*")) if path.stat().st_size]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [flip, truncate, zero, Path.unlink])
def test_damaged_arrays_are_named_and_the_step_before_is_taken(
    two_steps: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    files = array_files(two_steps, 2)
    assert files
    for path in files:
        damage(path)
    with Checkpoints(two_steps) as checkpoints, caplog.at_level(logging.WARNING):
        step, state, _ = checkpoints.restore(None, placed(host_state(), 8))
    assert step == 1 and bits(state) == bits(host_state(1))
    assert f"checkpoint of step 2 in {two_steps} is damaged" in caplog.text


def test_every_flipped_bit_of_the_values_is_seen(two_steps: Path) -> None:
    """Flips all over all files of the newest step: the state is that of step 2 or of step 1, never a third."""
    good = {1: bits(host_state(1)), 2: bits(host_state(2))}
    target, rng = placed(host_state(), 1), np.random.default_rng(0)
    taken = []
    files = [path for path in sorted((two_steps / "2").rglob("*")) if path.is_file() and path.stat().st_size]
    for path in files * 2:
        original = path.read_bytes()
        data = bytearray(original)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        with Checkpoints(two_steps, read_only=True) as checkpoints:
            step, state, meta = checkpoints.restore(None, target)
        path.write_bytes(original)
        assert bits(state) == good[step] and meta == {"position": step * 10}
        taken.append(step)
    assert taken.count(1) >= len(files) // 4


def test_a_changed_data_position_is_refused(two_steps: Path, caplog: pytest.LogCaptureFixture) -> None:
    (path,) = [path for path in (two_steps / "2" / "meta").iterdir() if b'"position"' in path.read_bytes()]
    path.write_bytes(path.read_bytes().replace(b'"position": 20', b'"position": 28'))
    assert b"28" in path.read_bytes()
    with Checkpoints(two_steps) as checkpoints:
        assert checkpoints.restore(None, placed(host_state(), 8)).meta == {"position": 10}
    assert "step 2" in caplog.text and "meta is not what was saved" in caplog.text


def test_a_step_under_another_name_is_refused(two_steps: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.move(two_steps / "1", two_steps / "3")
    with Checkpoints(two_steps) as checkpoints:
        assert checkpoints.restore(None, placed(host_state(), 8)).step == 2
    assert "step 1 under another name" in caplog.text


def test_swapped_arrays_are_refused(two_steps: Path) -> None:
    shutil.rmtree(two_steps / "2" / "state")
    shutil.copytree(two_steps / "1" / "state", two_steps / "2" / "state")
    with Checkpoints(two_steps) as checkpoints:
        assert checkpoints.restore(None, placed(host_state(), 8)).step == 1


def test_if_none_is_good_the_run_stops(two_steps: Path) -> None:
    for step in (1, 2):
        for path in array_files(two_steps, step):
            flip(path)
    with Checkpoints(two_steps) as checkpoints, pytest.raises(ValueError, match=r"no good checkpoint in .*\[2, 1\]"):
        checkpoints.restore(None, placed(host_state(), 8))


def test_a_damaged_step_makes_room_for_the_next_save(two_steps: Path) -> None:
    for path in array_files(two_steps, 2):
        flip(path)
    with Checkpoints(two_steps) as checkpoints:
        assert checkpoints.restore(None, placed(host_state(), 8)).step == 1
        checkpoints.save(2, placed(host_state(2), 8), {})
        checkpoints.finish(2)
    assert sorted(os.listdir(two_steps)) == ["1", "2"]


def other(change: str) -> State:
    state = host_state()
    bias = "conv_in.bias"
    if change == "dtype":
        return state._replace(params={**state.params, bias: state.params[bias].astype(np.float16)})
    if change == "shape":
        return state._replace(params={**state.params, bias: state.params[bias][:-1]})
    if change == "missing":
        return state._replace(params={**state.params, "new.weight": np.zeros(3, np.float32)})
    return state._replace(params={name: value for name, value in state.params.items() if name != bias})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("dtype", r"params/conv_in\.bias is float32\[7\], not float16\[7\]"),
        ("shape", r"params/conv_in\.bias is float32\[7\], not float32\[6\]"),
        ("missing", r"params/new\.weight is missing"),
        ("extra", r"params/conv_in\.bias is not expected"),
    ],
)
def test_a_target_that_differs_is_refused(two_steps: Path, change: str, message: str) -> None:
    """Refused outright: another config is no damage, so no older step is tried."""
    with Checkpoints(two_steps) as checkpoints, pytest.raises(ValueError, match=message) as error:
        checkpoints.restore(None, placed(other(change), 8))
    assert "\n" not in str(error.value) and "step 2" in str(error.value)


def test_a_target_without_shardings_is_refused(two_steps: Path) -> None:
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), host_state())
    with Checkpoints(two_steps) as checkpoints, pytest.raises(ValueError, match="no sharding for step"):
        checkpoints.restore(None, bare)


def test_finish_reads_back_what_was_saved(tmp_path: Path) -> None:
    state = placed(host_state(3), 8)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, {})
        digests = checkpoints.finish(3)
    assert digests == digest(state)
    assert fold(digests) == fold(digest(host_state(3))) != fold(digest(host_state(4)))
    with Checkpoints(tmp_path) as checkpoints:  # killed between the last save and DONE.json
        assert checkpoints.finish(3, abstract(state)) == digests


def test_finish_refuses_a_damaged_step(two_steps: Path) -> None:
    for path in array_files(two_steps, 2):
        flip(path)
    with Checkpoints(two_steps) as checkpoints, pytest.raises(RunFailed, match=r"step 2 in .* is damaged right after"):
        checkpoints.finish(2, placed(host_state(), 8))


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.latest() is None
        with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
            checkpoints.restore(None, placed(host_state(), 8))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Checkpoints(tmp_path / "nowhere", read_only=True)


def test_a_reader_leaves_a_living_run_alone(two_steps: Path) -> None:
    half = two_steps / "3.orbax-checkpoint-tmp-1"
    half.mkdir()
    with Checkpoints(two_steps, read_only=True) as checkpoints:
        assert checkpoints.restore(None, placed(host_state(), 8)).step == 2
        with pytest.raises(RuntimeError, match="read-only"):
            checkpoints.save(3, placed(host_state(), 8), {})
    assert half.exists()
    with Checkpoints(two_steps) as checkpoints:  # the writer sweeps, at the latest before its next save
        checkpoints.save(3, placed(host_state(), 8), {})
    assert sorted(os.listdir(two_steps)) == ["2", "3"]


def test_one_step_is_not_saved_twice(two_steps: Path) -> None:
    with Checkpoints(two_steps) as checkpoints, pytest.raises(RuntimeError, match=r"step 2 .*already exists"):
        checkpoints.save(2, placed(host_state(), 8), {})


def test_meta_must_be_json(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(TypeError, match="JSON"):
        checkpoints.save(1, {"x": jnp.ones(2)}, {"x": object()})
    assert os.listdir(tmp_path) == []


def test_meta_survives_json(tmp_path: Path) -> None:
    meta = {"b": [1, 2.5, None], "a": {"ü": "x", "tiny": 1e-300, "big": 2**62}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(2)}, meta)
        checkpoints.wait()
        assert checkpoints.restore(1, {"x": jnp.ones(2)}).meta == json.loads(json.dumps(meta))


def test_ctrl_c_during_a_save_takes_effect_when_the_save_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Checkpoints(tmp_path / "c") as checkpoints:
            whole = checkpoints._manager.save

            def save(*args: object, **kwargs: object) -> bool:
                os.kill(os.getpid(), signal.SIGINT)
                return whole(*args, **kwargs)

            monkeypatch.setattr(checkpoints._manager, "save", save)
            checkpoints.save(1, placed(host_state(1), 8), {"position": 10})
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
        assert checkpoints.latest() == 1
        assert bits(checkpoints.restore(1, abstract(placed(host_state(1), 4))).state) == bits(host_state(1))
