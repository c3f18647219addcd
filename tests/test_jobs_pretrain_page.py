"""The page of a base model's training, from the files of its run; and that no training depends on page or pictures."""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import digits_base, emoji_base
from proreflow_jax import UserError
from proreflow_jax.evaluation.page import costs, sections
from proreflow_jax.evaluation.page.document import document
from proreflow_jax.evaluation.page.facts import Change
from proreflow_jax.evaluation.page.markup import number
from proreflow_jax.jobs import pretrain_facts, pretrain_pictures, run_page
from proreflow_jax.jobs.pretrain_facts import Standing, read_pretraining
from proreflow_jax.run import nearest_config
from proreflow_jax.run.check_config import changed, flat
from proreflow_jax.storage import atomic, sealed

BEGUN, UNDER_WAY = {"vae": 0, "diffusion": 0}, {"vae": 800, "diffusion": 1000}


def config(**fields: object):
    return changed(digits_base.get_config(), {name.replace("__", "."): value for name, value in fields.items()})


def write_lines(folder: Path, steps: range, **numbers: float) -> list[dict]:
    rng = np.random.default_rng(0)
    draw = lambda: {name: float(rng.uniform(0.1, 0.9)) for name in numbers}
    lines = [{"step": step, **draw(), "seconds": 0.5, "wait_device": 0.1, "wait_input": 0.0} for step in steps]
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 1050, "lo')
    return lines


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The autoencoder is finished, the diffusion killed at step 1000 of 5500."""
    folder = tmp_path / "base"
    write_lines(folder / "vae", range(50, 801, 50), loss=1, error=1, kl=1)
    write_lines(folder / "diffusion", range(50, 1001, 50), loss=1)
    (folder / "diffusion" / "1000").mkdir()
    (folder / "diffusion" / "1000" / "state").write_bytes(b"0" * 1000)
    record = {"prompts": ["a <b>waffle", "two", "three", "four"], "count": 2, "tile": 8, "gap": 4, "steps": 10, "guidance": 2.0}
    (folder / "samples").mkdir()
    atomic.write_json(folder / "samples" / "samples.json", record)
    for name, steps in (("vae", (500, 800)), ("diffusion", (500, 1000))):
        (folder / "samples" / name).mkdir()
        for step in steps:
            picture = np.full((16, 36, 3), step % 251, np.uint8)
            Image.fromarray(picture).save(folder / "samples" / name / f"step-{step:08d}.png")
    return folder


def legends(page: str) -> list[str]:
    """The newest number of each curve."""
    return re.findall(r"</i>mean <b>(.*?)</b>", page)


def test_a_training_under_way_has_its_numbers_pictures_and_costs(run):
    value = read_pretraining(run, flat(config()), Standing(UNDER_WAY, "out", False))
    page = document(value)
    last = {name: json.loads((run / name / "metrics.jsonl").read_text().splitlines()[-2]) for name in ("vae", "diffusion")}
    keys = [("vae", "loss"), ("vae", "error"), ("vae", "kl"), ("diffusion", "loss")]
    assert legends(page) == [number(last[name][key]) for name, key in keys] and page.count("<svg") == 4
    assert sections.headline(value) == "diffusion: 1,000 of 5,500 steps; about 37 min 30 s left in all"
    assert "<span>autoencoder</span>" in page and "<span>done</span>" in page
    assert dict(costs.costs(value).facts)["training"] == "15 min 0 s"
    assert costs.network_calls(value) == 1000 * 128 * 3 and value.disk["diffusion"] > 1000
    assert page.count("data:image/png") == 6  # of each training the left half and two pictures
    assert page.count("<li>a &lt;b&gt;waffle</li>") == 2 and "--ratio:1.000" in page and "<b>waffle" not in page
    assert "in 10 steps, guidance 2.0" in page and "windows" not in page and "base model" not in page
    assert [(box.title, box.kind) for box in value.boxes[2:]] == [
        ("autoencoder", "done"), ("diffusion", "begun"), ("model", "waiting")
    ]  # fmt: skip


def test_nothing_on_it_is_from_elsewhere(run):
    page = document(read_pretraining(run, flat(config()), Standing(UNDER_WAY, "<script src=x>", False)))
    assert page.count("<script") == 1 and not re.search(r"https?://|<link|<iframe", page)
    assert all(
        address.startswith("data:") for address in re.findall(r"""src=['"]?([^'" >]+)""", page.replace("&lt;script src=x", ""))
    )


def test_there_is_a_page_from_the_first_minute_on(tmp_path, caplog):
    run = tmp_path / "base"
    run.mkdir()
    c = config(root=str(tmp_path), name="base")
    show = run_page.reporter(c, lambda *place: read_pretraining(*place, Standing(BEGUN, "out", False)))
    with caplog.at_level(logging.INFO):
        show()
        show()
    (line,) = [record.getMessage() for record in caplog.records if "report.html" in record.getMessage()]
    assert line == f"page: {run / 'report.html'}; `proreflow watch --run={run}` shows it as it grows"
    page = (run / "report.html").read_text()
    assert "autoencoder: 0 of 800 steps; the time left is not known yet" in page and "0 of 5,500 steps" in page
    assert "not begun" in page and "random weights" in page


def test_the_time_left_is_of_the_part_while_the_other_has_no_rate(tmp_path):
    write_lines(tmp_path / "vae", range(50, 401, 50), loss=1)
    run = read_pretraining(tmp_path, flat(config()), Standing({"vae": 400, "diffusion": 0}, "out", False))
    assert sections.headline(run) == "autoencoder: 400 of 800 steps; about 3 min 20 s left of this part"


def test_a_finished_training_says_so_and_names_its_model(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "weights").write_text("1")
    sealed.seal(out, {"model": "base"})
    run = read_pretraining(run, flat(config(start=str(out))), Standing({"diffusion": 5500}, str(out), True))
    page = document(run)
    assert sections.headline(run) == "finished" and page.count(sealed.read_record(out)["seal"][:12]) == 2
    assert "taken over from the start" in page and [stage.name for stage in run.stages] == ["diffusion"]


@pytest.mark.parametrize("base", [digits_base, emoji_base])
def test_what_differs_from_the_config_is_on_it(base, run):
    c = changed(base.get_config(), {"diffusion.batch": 7, "name": "mine"})
    value = read_pretraining(run, flat(c), Standing(UNDER_WAY, "out", False))
    default = base.get_config().diffusion.batch
    assert value.config_name == base.get_config().name and value.changes == [Change("diffusion.batch", str(default), "7")]
    assert nearest_config.compare(flat(base.get_config())) == (base.get_config().name, [])


def test_damaged_files_leave_the_rest_of_the_page(run):
    (run / "samples" / "samples.json").write_text('{"half": ')
    (run / "samples" / "vae" / "step-00000500.png").write_bytes(b"cut")
    (run / "vae" / "metrics.jsonl").write_text("[]\nnull\n\xff")
    page = document(read_pretraining(run, flat(config()), Standing(UNDER_WAY, "out", False)))
    assert page.count("<svg") == 1 and "diffusion: 1,000 of 5,500" in page


def test_pictures_lie_beside_those_of_the_training(tmp_path):
    images = np.arange(9 * 8 * 8 * 3, dtype=np.uint32).astype(np.uint8).reshape(9, 8, 8, 3)
    texts = [(f"picture {i}", "another wording") for i in range(9)]
    c = config(samples__rows=2, samples__columns=2)
    sheet = pretrain_pictures.choose_sheet(c, images, texts)
    assert sheet.prompts == ["picture 0", "picture 2", "picture 5", "picture 8"]
    keep = pretrain_pictures.keeper(tmp_path, sheet, lambda params: 255 - sheet.images)
    keep(7, {})
    picture = np.asarray(Image.open(tmp_path / "step-00000007.png"))
    assert picture.shape == (16, 2 * 16 + 4, 3)
    np.testing.assert_array_equal(picture[8:, :8], images[5])
    np.testing.assert_array_equal(picture[:8, 28:], 255 - images[2])
    assert pretrain_pictures.choose_sheet(config(samples__rows=0), images, texts) is None


def test_a_picture_that_fails_is_one_warning(tmp_path, caplog):
    sheet = pretrain_pictures.Sheet(np.zeros((1, 8, 8, 3), np.uint8), ["one"], 1)

    def broken(params: dict) -> np.ndarray:
        raise RuntimeError("out of memory\nsecond line")

    pretrain_pictures.keeper(tmp_path, sheet, broken)(1, {})
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "was not drawn" in record.getMessage() and not list(tmp_path.iterdir())


def test_pictures_of_no_steps_are_refused_in_a_line():
    with pytest.raises(UserError, match=r"--config\.samples\.steps=0 must be in \[1, 1000\]"):
        pretrain_pictures.check_pictures(config(samples__steps=0))


def test_saved_steps_are_those_of_the_newest_checkpoint(tmp_path):
    assert pretrain_facts.saved_steps(tmp_path / "no", 10) == 0
    for name in ("2", "4", "12", "draft"):
        (tmp_path / name).mkdir()
    assert pretrain_facts.saved_steps(tmp_path, 10) == 10 and pretrain_facts.saved_steps(tmp_path, 20) == 12
