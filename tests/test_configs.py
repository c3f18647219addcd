"""Every experiment says every number, its numbers can be carried out on the slices it names, and its commands exist."""

import ast
import importlib
import io
import re
import sys
import tokenize
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from proreflow_jax.data import kinds
from proreflow_jax.flow import windows
from proreflow_jax.perf import chips as chips_of
from proreflow_jax.run import check_config
from proreflow_jax.run.stages import check_counts
from proreflow_jax.runtime import mesh

ROOT = Path(__file__).resolve().parent.parent
FLOWS = ("sd35_medium", "sd3_medium")
LARGE = ("sd15", "sd21", "sdxl", "finetune", *FLOWS)
TFLOP = {"sd15": 0.803, "sd21": 2.141, "sdxl": 6.761, "finetune": 0.803}  # a forward: shared/performance.md, and XLA's count
TFLOP |= {"sd35_medium": 11.25, "sd3_medium": 8.90}  # perf/flops.py, with T5's 256 rows of text
REAL = (*LARGE, "gpu_24gb")  # which has one card, no slices
SLICE = re.compile(r"^ +(v\d[ep]?-\d+) +(\d+) chips (.*)$", re.MULTILINE)
FIELD = re.compile(r"--config\.([\w.]*\w)=([^\s,;]*[^\s,;.:])")
COMMAND = re.compile(r"^    proreflow (\w+) ((?:.*\n {8,})*.*)", re.MULTILINE)


class Machine(NamedTuple):
    """What the checks ask of a mesh."""

    shape: dict[str, int]


def page(name: str) -> str:
    return importlib.import_module(f"configs.{name}").__doc__


def config(name: str, *words: str) -> ConfigDict:
    """A config with overrides, read as the verbs read it."""
    file, _, form = name.partition(":")
    argv = ["test", f"--config={ROOT / 'configs' / file}.py{form and ':'}{form}", *words]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)  # ml_collections looks there for overrides
        patch.delitem(sys.modules, "config_config", raising=False)  # it would merge the next config file into the last
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values)
        values(argv)
        sys.modules.pop("config_config", None)
    return values.config.lock()


def overrides(text: str) -> list[str]:
    return [f"--config.{field}={value}" for field, value in FIELD.findall(text)]


def flat(block: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(block, ConfigDict):
        return {prefix: block}
    return {k: v for name in block for k, v in flat(block[name], f"{prefix}.{name}".strip(".")).items()}


def check(c: ConfigDict, devices: int) -> None:
    """All that can be checked before the base model is read, on so many devices."""
    machine = Machine(dict(zip(mesh.AXES, mesh._fill(tuple(c.mesh[axis] for axis in mesh.AXES), devices), strict=True)))
    check_config.check_config(c, machine)
    check_config.check_export(c, c.name.removesuffix("-paper") in (*FLOWS, "digits_flow"))
    check_counts(c.stages)
    assert set(c.stages) >= set(c.export.stages)
    for before, count in zip((c.stages[0], *c.stages), c.stages, strict=False):
        steps = c.pairs.steps if before == count else c.pairs.substeps * before // count
        windows.check_steps(steps, 1000 // count)
    assert c.pairs.examples % c.pairs.shard_size == 0
    assert c.evaluate.examples % c.evaluate.batch == 0
    assert c.evaluate.batch % (machine.shape["data"] * machine.shape["fsdp"]) == 0


def test_the_emoji_can_be_carried_out_on_two_cores():
    forms = {form: config(f"emoji:{form}") for form in ("demo", "gate", "long")}
    for c in forms.values():
        check(c, 2)
        assert {count for count, _ in c.evaluate.student_steps} == set(c.stages)
    assert flat(forms["demo"]) == flat(config("emoji"))
    gate = forms["gate"].evaluate
    assert max(gate.teacher_steps) == 64 and set(gate.gate.guidance) == {1, 2, 3, 4, 5}
    changed = {name for name, value in flat(forms["demo"]).items() if flat(forms["gate"])[name] != value}
    assert all(name.startswith("evaluate.") for name in changed)  # so it reads the demo's run


def slices(name: str) -> list[tuple[str, int, list[str]]]:
    """(slice, chips, flags on its line) of the docstring's table."""
    return [(kind, int(chips), overrides(rest)) for kind, chips, rest in SLICE.findall(page(name))]


@pytest.mark.parametrize("name", REAL)
def test_it_has_exactly_the_fields_of_the_demo_and_their_types(name):
    demo, large = flat(config("digits")), flat(config(name))
    assert large.keys() == demo.keys()
    assert {f: type(v) for f, v in large.items()} == {f: type(v) for f, v in demo.items()}
    assert config(name).name == name


@pytest.mark.parametrize("name", LARGE)
def test_it_can_be_carried_out_on_every_slice_it_names(name):
    table = slices(name)
    assert len(table) >= 2 and "meant for this one" in page(name)
    for _, chips, words in table:
        check(config(name, *words), chips)


def test_a_slice_that_cannot_carry_it_out_is_refused():
    with pytest.raises(ValueError, match="train.accumulation"):
        check(config("sd15", "--config.train.accumulation=32"), 16)
    with pytest.raises(ValueError, match="pairs.batch=32"):
        check(config("sdxl", "--config.train.accumulation=1"), 64)


@pytest.mark.parametrize("name", REAL)
def test_every_field_its_page_names_exists_and_takes_the_value(name):
    named = FIELD.findall(page(name))
    assert set(dict(named)) <= set(flat(config(name)))
    for field, value in named:
        config(name, f"--config.{field}={value}")


@pytest.mark.parametrize("name", REAL)
def test_its_commands_are_verbs_with_such_flags(name):
    commands = COMMAND.findall(page(name))
    assert [verb for verb, _ in commands] == [*(["cache"] if name in FLOWS else []), "distill", "sample", "export"]
    for verb, words in commands:
        assert f"--config={name}" in words
        source = (ROOT / "proreflow_jax" / f"{verb}.py").read_text(encoding="utf-8")
        assert all(f'"{option}": (' in source for option in re.findall(r"--(?!config)(\w+)=", words))
        check(config(name, *overrides(words)), 1 if name not in LARGE else 4)


def test_the_small_card_s_page_adds_up():
    c, text = config("gpu_24gb"), " ".join(page("gpu_24gb").split())
    check(c, 1)
    check(config("gpu_24gb", "--config.train.accumulation=16", "--config.pairs.batch=4"), 1)  # a card of 16 GB
    pairs = c.pairs.examples * (32 + 8 + 4) * 0.803
    training = len(c.stages) * c.train.steps * c.train.batch * 3 * 0.803
    assert f"pairs {c.pairs.examples:,} x (32 + 8 + 4)" in text and f"{c.train.steps:,} steps x {c.train.batch} images" in text
    assert [float(n) for n in re.findall(r"= ([\d.]+) million", text)] == pytest.approx([pairs / 1e6, training / 1e6], abs=0.06)
    hours = [(pairs + training) / (peak * 0.4) / 3600 for peak in (165, 71)]
    assert [float(n) for n in re.search(r"that is ([\d.]+) hours, or ([\d.]+)\.", text).groups()] == pytest.approx(
        hours, rel=0.05
    )
    factors, images = c.student.lora.rank, c.train.batch // c.train.accumulation
    assert factors == 64 and images == 2 and round(3.4 + 1.7 + 0.5 + 0.2 + images * 6.3) in (18, 19)


def test_the_flags_for_images_go_together():
    c = config("sd15", *overrides(page("sd15").split("With images")[1]))
    assert (c.data.kind, c.pairs.start) == ("tfds", "data")
    check(c, 4)
    demo = config("sd15")
    assert c.pairs.examples == demo.pairs.examples * demo.stages[0]  # as many pairs of the first stage


def test_a_fine_tune_of_another_kind_is_read_by_the_flags_that_its_page_gives():
    words = overrides(page("finetune").split("Of another kind?")[1].split("SDXL")[0])
    c, like = config("finetune", *words), config("sd21")
    assert (c.student.prediction, c.data.resolution) == (like.student.prediction, like.data.resolution)
    check_config.check_student(c, c.model.prediction_type)
    check(c, 8)


@pytest.mark.parametrize(
    ("name", "kind", "side"),
    [("sd15", "epsilon", 512), ("sd21", "v_prediction", 768), ("sdxl", "epsilon", 1024), *((n, "flow", 1024) for n in FLOWS)],
)
def test_the_student_keeps_the_words_of_its_base(name, kind, side):
    c = config(name)
    check_config.check_student(c, kind)
    words = {**check_config.JUMPS, "velocity": "flow"}
    assert words[c.student.prediction] == kind and c.data.resolution == side


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_reads_its_text_from_the_cache_that_its_page_makes(name):
    c, (verb, words) = config(name), COMMAND.findall(page(name))[0]
    assert (verb, c.data.kind, c.cache.text) == ("cache", "cached", True) and f"--out={c.data.path}\n" in f"{words}\n"
    assert re.search(c.student.lora.layers, "transformer_blocks.0.attn.add_q_proj.weight")


@pytest.mark.parametrize("name", LARGE)
def test_it_is_the_papers_where_the_paper_speaks(name):
    c = config(name)
    assert c.stages == (8, 4, 2) and c.export.stages == (4, 2)
    assert c.pairs.guidance == 1 and c.pairs.solver == "ddim" and c.pairs.steps * c.stages[0] == 32
    assert c.pairs.teacher == "previous" and c.student.path == "linear" and c.student.lora.rank == 0
    assert c.loss.space == "velocity"


@pytest.mark.parametrize("name", REAL)
def test_the_recipe_is_the_best_of_the_lab_and_the_papers_own_is_a_form(name):
    c, paper, lab = config(name), config(f"{name}:paper"), flat(config("reproduce:lab"))
    rows = {row: fields for _, row, fields in config("reproduce:lab").reproduce.methods}
    for form, row in ((c, "chain-to-4"), (paper, "ProReflow-II")):
        for field in ("pairs.start", "pairs.substeps", *(f"loss.{name}" for name in c.loss)):
            assert flat(form)[field] == rows[row].get(field, lab[field]), (row, field)
    changed = {field for field, value in flat(c).items() if flat(paper)[field] != value}
    recipe = {"pairs.start", "pairs.substeps", "loss.balance", "loss.start_steps", "loss.window_start_prob"}
    images = set() if name in FLOWS else {"data.kind", "data.path"}  # a cache holds images as it holds text
    assert changed == recipe | images | {"name", "pairs.examples", "pairs.shard_size"}
    assert paper.name == f"{name}-paper" and not kinds.has_captions_alone(paper.data)
    assert paper.pairs.examples == c.pairs.examples * c.stages[0]  # as many pairs of the first stage
    for _, chips, words in slices(name) if name in LARGE else [("", 1, [])]:
        check(config(f"{name}:paper", *words), chips)


def test_steps_between_the_times_a_student_was_taught_at_are_told():
    c = config("sd15")
    assert [n for n in range(2, 9) if not check_config.few_times(c, 2, n)] == [2, 3, 4]  # three: two in one window
    assert [n for n in range(4, 9) if not check_config.few_times(c, 4, n)] == [4]
    assert [n for n in range(2, 9) if not check_config.few_times(config("emoji"), 2, n)] == [2]
    line = check_config.few_times(c, 2, 5)
    assert line.startswith("--steps=5 asks the 2-window student") and "--steps=2 or 4 draws better" in line
    assert not any(check_config.few_times(config(name), 2, n) for name in ("digits", "sd15:paper") for n in range(2, 9))


def test_another_form_is_refused_in_one_line():
    with pytest.raises(ValueError, match="'papre' after configs/sd15.py: must be paper"):
        importlib.import_module("configs.sd15").get_config("papre")


@pytest.mark.parametrize("name", LARGE)
def test_the_pages_arithmetic_is_that_of_its_fields(name):
    c, text = config(name), " ".join(page(name).split())
    tflop = TFLOP[name]
    p, side, first = c.pairs, c.data.resolution // 8, c.stages[0]
    forwards = [p.steps * first, *(p.substeps * before for before in c.stages[:-1])]
    pairs = p.examples * sum(forwards) * tflop / 1e6
    training = len(c.stages) * c.train.steps * c.train.batch * 3 * tflop / 1e6
    sums = f"pairs {p.examples:,} x ({' + '.join(map(str, forwards))}) forwards x "
    assert sums in text and f"{c.train.steps:,} steps x {c.train.batch} images" in text
    said = [float(n) for n in re.findall(r"= ([\d.]+) million", text)]
    assert said == pytest.approx([pairs, training], rel=0.02)

    chips, rate, hours = (
        float(n) for n in re.search(r"\((\d+) x (\d+) TFLOP/s\) that is ([\d.]+) hours at full", text).groups()
    )
    full = (pairs + training) * 1e6 / (chips * rate) / 3600
    slower = [(float(n), float(percent)) for n, percent in re.findall(r"([\d.]+) at the ([\d.]+) % of the peak", text)]
    assert hours == pytest.approx(full, rel=0.04)
    assert [n for n, _ in slower] == pytest.approx([100 * full / percent for _, percent in slower], rel=0.04)
    assert slower or name == "sd21"  # which `plan` was not asked for

    state = side * side * (16 if name in FLOWS else 4) * 2 / 1e9
    disk = [float(n) for n in re.search(r"pairs (\d+) \+ (\d+) \+ (\d+) GB", text).groups()]
    assert disk == pytest.approx([p.examples * (n + 1) * state for n in c.stages], abs=0.6)


def test_a_chips_memory_is_added_up_right():
    sizes = {"sd15": (3.44, 0.5, 6.3), "sd21": (3.46, 1.4, 19.0), "sdxl": (10.27, 3.3, 31.7), "finetune": (3.44, 0.5, 6.3)}
    for name in LARGE:  # float32 weights, text encoders, activations of an image, in GB
        for kind, chips, words in slices(name):
            c = config(name, *words)
            line = next(rest for found, _, rest in SLICE.findall(page(name)) if found == kind)
            each_call = c.train.batch / chips / c.train.accumulation
            if said := re.search(r"(\d+) at once as above", line):  # by plan's account
                limit = chips_of.CHIPS[kind.partition("-")[0]].memory / 2**30
                found = re.findall(r"([\d.]+) of (\d+\.\d+)", " ".join(page(name).split()))
                assert float(said[1]) == each_call, (name, kind)
                assert any(float(used) < float(has) == pytest.approx(limit, abs=0.05) for used, has in found), (
                    name,
                    kind,
                )
                continue
            capacity, fixed, images, each, total = (
                float(n) for n in re.match(r" *(\d+) GB +(\d+) \+ (\d+) x ([\d.]+) = (\d+)", line).groups()
            )
            weights, text, image = sizes[name]
            full = (4 + 1 + 1) * weights / chips + weights + text  # state, gradients, base; in bfloat16 weights, gradients
            if c.student.lora.rank:  # frozen base, its working copy, gradients of the layers with factors
                full = weights / chips + 0.5 * weights + text + 0.5
            assert images == each_call, (name, kind)
            assert (fixed, each, total) == (pytest.approx(full, abs=1), image, pytest.approx(full + images * image, abs=1))
            assert total < capacity


def assigned(name: str) -> dict[str, ast.Assign]:
    """{field: its line} of what a config file sets by `c.field = value`."""
    text = (ROOT / "configs" / f"{name}.py").read_text(encoding="utf-8")
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Attribute)]
    return {ast.unparse(n.targets[0]).removeprefix("c."): n for n in nodes}


def test_what_all_four_have_alike_stands_in_common_alone():
    files = {name: {field: ast.unparse(n.value) for field, n in assigned(name).items()} for name in (*LARGE, "common")}
    common = files.pop("common")
    again = [(name, field) for name, own in files.items() for field in own if own[field] == common.get(field)]
    alike = [field for field, value in files["sd15"].items() if all(own.get(field) == value for own in files.values())]
    assert (again, alike) == ([], [])


@pytest.mark.parametrize("name", LARGE)
def test_a_file_and_common_together_set_every_field(name):
    fields = {field for field in flat(config(name)) if not field.startswith("optimizer.")}
    assert fields <= {*assigned(name), *assigned("common")}


def test_every_line_of_fields_says_what_it_means():
    for name in (*LARGE, "common", "digits", "emoji"):
        text = (ROOT / "configs" / f"{name}.py").read_text(encoding="utf-8")
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        explained = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
        fields = assigned(name)
        silent = [n.lineno for n in fields.values() if n.end_lineno not in explained and ast.unparse(n.value) != "ConfigDict()"]
        assert [line for line in silent if "optimizer(" not in text.splitlines()[line - 1]] == [], name


def test_the_digits_curves_span_a_factor_of_30_from_a_budget_that_holds_a_batch_of_every_stage():
    c, grid = config("reproduce:curves"), config("reproduce:curves").reproduce
    assert len(grid.budgets) >= 3 and grid.budgets[-1] == 30 * grid.budgets[0] and len(grid.seeds) >= 3
    names = {name for _, name, _ in grid.methods}
    assert {grid.baseline, *grid.references, *grid.figures[0][1]} <= names and len(grid.effects) >= 2
    assert grid.pair_share * grid.budgets[0] / 3 >= 32 * c.pairs.batch  # three stages, 32 steps of the teacher
