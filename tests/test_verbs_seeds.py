"""Seeds of 64 bits, as UIs give them: both words count, and what was drawn from one word is drawn still."""

import jax
import numpy as np
import pytest
import tiny
from verb import run, tiny_config, tiny_flags

from proreflow_jax.data import loader
from proreflow_jax.run.stages import PAIR_KEY, fold_seed, run_key, seed_key

pytestmark = pytest.mark.usefixtures("quick")


def test_both_words_of_a_seed_count():
    seeds = [0, 5, 5 + 2**32, 5 + 2**33, 2**32 - 1, 2**63, 2**64 - 1]
    data = [tuple(jax.random.key_data(seed_key(seed)).tolist()) for seed in seeds]
    assert len(set(data)) == len(seeds)


@pytest.mark.parametrize("seed", [0, 5, 2**31, 2**32 - 1])
def test_a_seed_of_one_word_is_what_it_was(seed):
    assert jax.random.key_data(seed_key(seed)).tolist() == jax.random.key_data(jax.random.key(seed)).tolist()


def test_both_words_of_a_seed_are_folded_into_a_key():
    key, words = jax.random.key(7), lambda key: tuple(jax.random.key_data(key).tolist())
    assert len({words(fold_seed(key, seed)) for seed in (5, 5 + 2**32, 5 + 2**33, 2**63, 2**64 - 1)}) == 5
    for seed in (0, 5, 2**32 - 1):  # as before
        assert words(fold_seed(key, seed)) == words(jax.random.fold_in(key, seed))


def test_a_run_has_a_key_of_its_own_for_both_words(tmp_path):
    keys = [run_key(tiny_config(tmp_path, tmp_path, seed=seed), PAIR_KEY, 4) for seed in (5, 5 + 2**32, 2**64 - 1)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 3
    assert len({tuple(loader.epoch_places(range(20), seed, 20)) for seed in (5, 5 + 2**32, 2**64 - 1)}) == 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("seeds") / "model")


def test_sample_draws_from_all_64_bits(model, tmp_path):
    pictures = []
    for seed in (5, 5 + 2**32, 2**63, 2**64 - 1):
        own = ["--stage=0", "--steps=1", "--count=1", f"--seed={seed}", f"--out={tmp_path}/x.png"]
        ended = run("sample", *tiny_flags(tmp_path, model), *own)
        assert ended.code == 0, ended.err
        pictures.append((tmp_path / "x.png").read_bytes())
    assert len(set(pictures)) == 4


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_outside_is_refused(model, tmp_path, seed):
    ended = run("sample", *tiny_flags(tmp_path, model), "--stage=0", f"--seed={seed}", f"--out={tmp_path}/x.png")
    assert ended.code == 2 and f"--seed={seed}" in ended.err and "18446744073709551615" in ended.err, ended.err
    assert len(ended.err.splitlines()) == 1 and not (tmp_path / "x.png").exists()
    assert np.iinfo(np.uint64).max == 2**64 - 1
