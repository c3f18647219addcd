"""A whole job from images: the same student whatever the layout of its data; other data in the same place is refused."""

import pytest
from made_images import LAYOUTS, encode, members, originals, write_tar
from verb import run, tiny_flags

from proreflow_jax.storage.atomic import read_json

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]
SHORT = {"stages": "(2,)", "export__stages": "()", "train__steps": 2, "optimizer__warmup_steps": 0, "pairs__examples": 16}


def distilled(folder, model, layout, **fields):
    """How distill ends from a folder's layout, with one bad image among its examples."""
    if not folder.exists():
        (folder / "images").mkdir(parents=True)
        data = LAYOUTS[layout](folder / "images", originals({3: encode(3)[:90]}))
        (folder / "words").write_text("\n".join(f"--config.data.{name}={value}" for name, value in data.items()))
    words = tiny_flags(folder, model, data__max_bad=0.2, data__cache=folder / "index", pairs__start="data", **SHORT, **fields)
    return run("distill", *words, *(folder / "words").read_text().splitlines())


@pytest.mark.parametrize("mode", ["online", "stored"])
def test_every_layout_makes_the_same_student(tmp_path, model, mode):
    found = {}
    for layout in ("webdataset", "parquet", "jsonl"):
        ended = distilled(tmp_path / layout, model, layout, pairs__mode=mode)
        assert ended.code == 0, ended.err
        assert "bad example" in ended.err
        found[layout] = read_json(tmp_path / layout / "runs" / "tiny" / "stage-2" / "DONE.json")["digest"]
    assert len(set(found.values())) == 1, found


def test_a_stage_under_way_refuses_other_shards_and_takes_other_threads(tmp_path, model):
    ended = distilled(tmp_path / "a", model, "webdataset", pairs__mode="online")
    assert ended.code == 0, ended.err
    ended = distilled(tmp_path / "a", model, "webdataset", pairs__mode="online", data__threads=5)
    assert ended.code == 0, ended.err
    write_tar(tmp_path / "a" / "images" / "a-001.tar", members(originals()[4:] * 40, 3))
    ended = distilled(tmp_path / "a", model, "webdataset", pairs__mode="online")
    assert ended.code == 2 and "shards" in ended.err and len(ended.err.strip().splitlines()) == 1, ended.err


def test_more_bad_images_than_allowed_end_the_job_with_one_line(tmp_path, model):
    assert distilled(tmp_path / "a", model, "jsonl", pairs__mode="online").code == 0
    for path in sorted((tmp_path / "a" / "images" / "b").iterdir())[:4]:
        path.write_bytes(b"no image")
    ended = distilled(tmp_path / "a", model, "jsonl", pairs__mode="online", name="second")
    assert ended.code == 2 and "--config.data.max_bad=0.2 allows 1" in ended.err, ended.err
