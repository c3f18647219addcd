"""Wrong input ends a verb with one line on stderr and exit code 2: no traceback, and not a byte written."""

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
from safetensors.numpy import load_file, save_file
from verb import CONFIG, DEVICES, PROMPTS, Ended, run, tiny_flags

pytestmark = pytest.mark.usefixtures("quick")

UNET = "unet/diffusion_pytorch_model.safetensors"
VERBS = ("distill", "make_pairs", "train", "sample", "export", "evaluate", "pretrain")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """A copy of the model to be spoilt."""
    return Path(shutil.copytree(model, tmp_path / "broken"))


def written(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refused(folder: Path, verb: str, words: list[str], *needles: str) -> Ended:
    """Runs the verb and holds it to the promise; the line must hold every needle."""
    (folder / "prompts.txt").exists() or (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    before = written(folder)
    ended = run(verb, *words)
    assert ended.code == 2, ended
    *before_it, line = ended.err.splitlines()
    assert len(before_it) <= 1 and all(f"{folder}/runs/" in text for text in before_it), ended.err  # what the job would do
    assert ended.out == "" and line.startswith(f"{verb}: ") and "Traceback" not in line
    for needle in needles:
        assert needle in line, line
    assert written(folder) == before
    return ended


FIELDS = [  # overrides of the tiny config, what the line must name
    ({"train__bach": 3}, ("bach", "batch")),
    ({"nonsense": 3}, ("nonsense",)),
    ({"train__steps": "many"}, ("train.steps", "many")),
    ({"train__steps": "1.5"}, ("train.steps", "1.5")),
    ({"loss__alpha": "big"}, ("loss.alpha", "big")),
    ({"stages": "(7,)"}, ("7 windows", "1000", "--config.stages")),
    ({"stages": "(8, 3)"}, ("3", "--config.stages")),
    ({"stages": "(4, 8)"}, ("(4, 8)", "--config.stages")),
    ({"stages": "(4, 4)"}, ("(4, 4)", "--config.stages")),
    ({"stages": "()"}, ("--config.stages is empty",)),
    ({"stages": "(0,)"}, ("0 windows", "--config.stages")),
    ({"stages": "(-2,)"}, ("-2 windows", "--config.stages")),
    ({"stages": "(4.0, 2.0)"}, ("whole numbers", "--config.stages")),
    ({"stages": "eight"}, ("whole numbers", "--config.stages")),
    ({"train__batch": 12, "mesh__data": 8}, ("12", "8 devices", "--config.train.batch")),
    ({"train__accumulation": 3}, ("3", "--config.train.accumulation")),
    ({"pairs__batch": 24}, ("24", "--config.pairs.shard_size=16")),
    ({"pairs__batch": 4, "mesh__data": 8}, ("4", "8 devices", "--config.pairs.batch")),
    ({"pairs__batch": 0}, ("--config.pairs.batch=0",)),
    ({"pairs__examples": 0}, ("--config.pairs.examples",)),
    ({"pairs__substeps": 0}, ("--config.pairs.substeps=0",)),
    ({"pairs__steps": 0}, ("--config.pairs.steps=0",)),
    ({"pairs__batch": 10**9}, ("--config.pairs.batch=1000000000",)),
    ({"train__batch": 10**9}, ("--config.train.batch=1000000000", "65536")),
    ({"student__lora__rank": 10**6}, ("--config.student.lora.rank=1000000",)),
    ({"student__lora__alpha": "inf"}, ("--config.student.lora.alpha=inf",)),
    ({"loss__huber": "nan"}, ("--config.loss.huber=nan",)),
    ({"optimizer__learning_rate": "1e400"}, ("--config.optimizer.learning_rate=inf",)),
    ({"optimizer__weight_decay": "inf"}, ("--config.optimizer.weight_decay=inf",)),
    ({"optimizer__clip_norm": "nan"}, ("--config.optimizer.clip_norm=nan",)),
    ({"optimizer__clip_norm": 1e-300}, ("--config.optimizer.clip_norm=1e-300", "0 (off)")),
    ({"evaluate__batch": 0}, ("--config.evaluate.batch=0",)),
    ({"evaluate__guidance": "nan"}, ("--config.evaluate.guidance=nan",)),
    ({"evaluate__study__sizes": "(0.1, 1e400)"}, ("--config.evaluate.study.sizes=", "inf")),
    ({"conditioning__crop": "(0, -1)"}, ("--config.conditioning.crop=(0, -1)",)),
    ({"pairs__guidance": "nan"}, ("--config.pairs.guidance=nan",)),
    ({"pairs__prompt_dropout": 1.5}, ("--config.pairs.prompt_dropout=1.5",)),
    ({"loss__alpha": -1}, ("--config.loss.alpha=-1",)),
    ({"loss__alpha": "nan"}, ("--config.loss.alpha=nan",)),
    ({"loss__window_start_prob": 2}, ("--config.loss.window_start_prob=2",)),
    ({"train__steps": 0}, ("train.steps", "0")),
    ({"train__ema": 1}, ("--config.train.ema=1",)),
    ({"train__log_every": 0}, ("--config.train.log_every=0",)),
    ({"checkpoint__every": 0}, ("--config.checkpoint.every=0",)),
    ({"checkpoint__keep": 0}, ("--config.checkpoint.keep=0",)),
    ({"seed": -1}, ("--config.seed=-1",)),
    ({"name": "../elsewhere"}, ("../elsewhere",)),
    ({"model__dtype": "float8"}, ("--config.model.dtype='float8'", "bfloat16")),
    ({"model__teacher_dtype": "int8"}, ("--config.model.teacher_dtype='int8'",)),
    ({"pairs__mode": "memory"}, ("--config.pairs.mode='memory'", "online")),
    ({"pairs__start": "middle"}, ("--config.pairs.start='middle'", "noise")),
    ({"pairs__start": "data"}, ("--config.pairs.start=data", "--config.data.kind=prompts")),
    ({"pairs__teacher": "me"}, ("--config.pairs.teacher='me'", "base")),
    ({"pairs__solver": "rk4"}, ("--config.pairs.solver='rk4'", "heun")),
    ({"pairs__storage": "float64"}, ("--config.pairs.storage='float64'",)),
    ({"data__kind": "csv"}, ("--config.data.kind='csv'", "tfds")),
    ({"data__max_bad": 2}, ("--config.data.max_bad=2",)),
    ({"data__threads": 0}, ("--config.data.threads=0",)),
    ({"student__prediction": "eps"}, ("eps", "--config.student.prediction")),
    ({"student__path": "curved"}, ("curved", "--config.student.path")),
    ({"student__path": "first_order", "student__prediction": "velocity"}, ("first_order", "--config.student.path")),
    ({"loss__space": "pixels"}, ("--config.loss.space='pixels'", "velocity")),
    ({"optimizer__schedule": "steps"}, ("--config.optimizer.schedule='steps'", "cosine")),
    ({"optimizer__learning_rate": "nan"}, ("--config.optimizer.learning_rate",)),
    ({"optimizer__warmup_steps": 100}, ("--config.optimizer.warmup_steps=100",)),
    ({"optimizer__decay_rules": "(('(', True),)"}, ("--config.optimizer.decay_rules", "regular expression")),
    ({"mesh__rules": "(('.*', 'sharded'),)"}, ("--config.mesh.rules", "sharded", "fsdp")),
    ({"mesh__rules": "(1,)"}, ("--config.mesh.rules", "pair")),
    ({"mesh__fsdp": 3}, ("--config.mesh.fsdp=3", f"{DEVICES} devices")),
]


def fields_only(value: object) -> str:
    """A test's name: its fields, without what the line must hold."""
    return " ".join(f"{name}={text}" for name, text in value.items()) if isinstance(value, dict) else ""


@pytest.mark.parametrize(("fields", "needles"), FIELDS, ids=fields_only)
def test_a_wrong_field_is_refused(tmp_path, model, fields, needles):
    refused(tmp_path, "distill", tiny_flags(tmp_path, model, **fields), *needles)


@pytest.mark.parametrize(
    ("fields", "needles"),
    [
        ({"export__stages": "(3,)"}, ("3", "--config.stages", "[4, 2]")),
        ({"student__lora__rank": 999}, ("--config.student.lora.rank=999", "full rank")),
        ({"pairs__steps": 300}, ("300 steps", "--config.pairs.steps")),
        ({"student__prediction": "velocity"}, ("--config.student.prediction=velocity", "scheduler", "--config.export.stages")),
        ({"mesh__rules": "(('conv', 'fsdp'),)"}, ("--config.mesh.rules",)),
        ({"optimizer__decay_rules": "(('conv', True),)"}, ("--config.optimizer.decay_rules",)),
        ({"data__path": "no/such/file.txt"}, ("no/such/file.txt", "--config.data.path")),
        ({"data__kind": "tfds", "data__path": "no/such/folder"}, ("no/such/folder", "--config.data.path")),
        (
            {"data__kind": "webdataset", "data__path": "{0..3}.tar", "data__caption_key": "txt"},
            ("4 of 4", "--config.data.path"),
        ),
        ({"data__kind": "parquet", "data__path": "no/such/folder"}, ("no/such/folder", "--config.data.path")),
        ({"data__kind": "folder", "data__path": "no/such/folder"}, ("no/such/folder", "--config.data.path")),
        ({"data__kind": "digits", "pairs__start": "data", "data__resolution": 32}, ("--config.data.resolution=32", "8")),
    ],
    ids=fields_only,
)
def test_what_only_the_model_or_the_data_show_is_refused_before_anything_is_written(tmp_path, model, fields, needles):
    refused(tmp_path, "distill", tiny_flags(tmp_path, model, **fields), *needles)


@pytest.mark.parametrize(("text", "needle"), [(b"\n \n", "no prompt"), (b"one\ntw\xff\n", "line 2"), (b"a" * 5000, "line 1")])
def test_a_bad_prompts_file_is_refused(tmp_path, model, text, needle):
    (tmp_path / "prompts.txt").write_bytes(text)
    refused(tmp_path, "distill", tiny_flags(tmp_path, model), "prompts.txt", needle, "--config.data.path")


def test_a_missing_model_is_refused(tmp_path):
    refused(tmp_path, "distill", tiny_flags(tmp_path, tmp_path / "none"), str(tmp_path / "none"), "--config.model.path")
    (tmp_path / "model.ckpt").write_bytes(b"not looked at")
    refused(tmp_path, "distill", tiny_flags(tmp_path, tmp_path / "model.ckpt"), "pickle", "convert it where you trust it")


def spoil_unet(folder: Path, change) -> None:
    path = folder / UNET
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def spoil_json(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def lack(tensors):
    del tensors["conv_in.weight"]


def infect(tensors):
    tensors["conv_in.weight"][0, 0, 0, 0] = float("nan")


def cut(folder):
    path = folder / UNET
    path.write_bytes(path.read_bytes()[:-1000])


SPOILT = [
    ("a tensor is missing", lambda folder: spoil_unet(folder, lack), ("unet", "conv_in.weight", "missing")),
    ("a weight is no number", lambda folder: spoil_unet(folder, infect), ("unet", "conv_in.weight", "not finite")),
    ("the file is cut", cut, ("unet", "safetensors")),
    ("a pickle instead", lambda folder: (folder / UNET).write_bytes(b"\x80\x04."), ("safetensors",)),
    ("no tokenizer", lambda folder: shutil.rmtree(folder / "tokenizer"), ("tokenizer", "--config.model.path")),
    ("no scheduler", lambda folder: shutil.rmtree(folder / "scheduler"), ("scheduler", "--config.model.path")),
    ("no JSON", lambda folder: (folder / "unet" / "config.json").write_text("{"), ("config.json", "JSON")),
    (
        "unknown prediction type",
        lambda folder: spoil_json(folder / "scheduler" / "scheduler_config.json", prediction_type="score"),
        ("prediction_type", "score", "epsilon"),
    ),
    (
        "unknown betas",
        lambda folder: spoil_json(folder / "scheduler" / "scheduler_config.json", beta_schedule="secret"),
        ("secret",),
    ),
    (
        "latents are scaled by nothing",
        lambda folder: spoil_json(folder / "vae" / "config.json", scaling_factor=0),
        ("scaling_factor=0", "vae"),
    ),
    (
        "latents are scaled by NaN",
        lambda folder: spoil_json(folder / "vae" / "config.json", scaling_factor=float("nan")),
        ("scaling_factor=NaN", "vae"),
    ),
    ("other sizes", lambda folder: spoil_json(folder / "unet" / "config.json", block_out_channels=[8, 24]), ("unet", "shape")),
]


@pytest.mark.parametrize(("spoil", "needles"), [row[1:] for row in SPOILT], ids=[row[0] for row in SPOILT])
def test_a_spoilt_model_is_refused(tmp_path, broken, spoil, needles):
    spoil(broken)
    refused(tmp_path, "distill", tiny_flags(tmp_path, broken), *needles)


@pytest.mark.parametrize(
    ("verb", "words", "needles"),
    [
        ("train", ["--stage=3"], ("--stage=3", "[4, 2]")),
        ("train", ["--stage=four"], ("stage", "four")),
        ("train", ["--stage=4"], ("pairs", "make_pairs --stage=4")),
        ("train", ["--stage=2"], ("stage-4", "DONE.json", "train --stage=4")),
        ("make_pairs", ["--stage=3"], ("--stage=3", "[4, 2]")),
        ("make_pairs", ["--stage=2"], ("stage-4", "DONE.json")),
        ("make_pairs", ["--stage=4", "--config.pairs.mode=online"], ("--config.pairs.mode=online",)),
        ("sample", ["--stage=2", "--steps=1"], ("1 sampling steps", "windows, 2", "--steps")),
        ("sample", ["--stage=0", "--steps=-1"], ("-1",)),
        ("sample", ["--stage=3"], ("--stage=3",)),
        ("sample", ["--stage=2", "--out={folder}/x.png"], ("stage-2", "DONE.json")),
        ("sample", ["--stage=0", "--out={folder}/x.jpg"], ("x.jpg", ".png")),
        ("sample", ["--stage=0", "--prompt="], ("--prompt is empty",)),
        ("sample", ["--stage=0", "--prompts={folder}/none.txt"], ("none.txt", "--prompts")),
        ("sample", ["--stage=0", "--count=0"], ("--count=0",)),
        ("sample", ["--stage=0", "--guidance=much"], ("guidance", "much")),
        ("sample", ["--stage=0", "--guidance=nan"], ("--guidance=nan",)),
        ("sample", ["--stage=0", "--seed=-1"], ("--seed=-1",)),
        ("sample", ["--stage=0", "--steps=1001"], ("--steps=1001",)),
        ("merge", ["--scale=nan"], ("--scale=nan",)),
        ("merge", ["--scale=1e400"], ("--scale=inf",)),
        ("export", ["--stage=4", "--rank=0"], ("--rank=0",)),
        ("export", ["--stage=3"], ("--stage=3", "[4, 2]")),
        ("export", ["--stage=4"], ("stage-4", "DONE.json")),
        ("export", ["--stage=4", "--config.student.prediction=diff_eps"], ("diff_eps", "scheduler")),
        ("evaluate", ["--config.data.kind=digits"], ("stage-4", "DONE.json")),
        ("evaluate", [], ("--config.data.kind=prompts", "digits")),
        ("evaluate", ["--config.data.kind=digits", "--config.evaluate.batch=0"], ("--config.evaluate.batch=0",)),
        ("evaluate", ["--config.data.kind=digits", "--config.evaluate.examples=17"], ("--config.evaluate.examples=17",)),
        ("distill", ["--config.profile.steps=(4, 2)"], ("--config.profile.steps=(4, 2)",)),
        ("distill", ["--config.compilation_cache=s3://bucket/x"], ("--config.compilation_cache=s3://bucket/x",)),
        ("train", ["--stage=4", "--config.data.kind=cached"], ("holds no cache", "--config.data.path")),
        ("distill", ["digits"], ("'digits' is not a flag", "--help")),
        ("distill", ["--stagee=2"], ("stagee", "--help")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_each_verb_refuses_what_it_cannot_do(tmp_path, model, monkeypatch, verb, words, needles):
    monkeypatch.chdir(tmp_path)
    words = [word.format(folder=tmp_path) for word in words]
    replaced = {word.partition("=")[0] for word in words}
    default = [word for word in tiny_flags(tmp_path, model) if word.partition("=")[0] not in replaced]
    refused(tmp_path, verb, [*default, *words], *needles)


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        (None, "none.py"),
        ("x = (\n", "SyntaxError"),
        ("x = (\n", "none.py, line 1"),
        ("x = 1\n", "get_config"),
        ("def get_config():\n    return 1 / 0\n", "none.py, line 2: ZeroDivisionError: division by zero"),
        ("def get_config():\n    values = {}\n    return values['x']\n", "none.py, line 3: KeyError: x"),
        ("def get_config():\n    return int('x')\n", "none.py, line 2: ValueError: invalid literal"),
        ("def get_config():\n    import sys\n    sys.exit(0)\n", "none.py, line 3: SystemExit: 0"),
        ("raise SystemExit\n", "none.py, line 1: SystemExit"),
        ("import nowhere\n", "none.py, line 1: ModuleNotFoundError"),
    ],
)
def test_a_bad_config_file_is_refused(tmp_path, text, needle):
    path = tmp_path / "none.py"
    if text is not None:
        path.write_text(text)
    refused(tmp_path, "distill", [f"--config={path}"], needle, "--help")


OLD = """
from configs.{name} import get_config as whole
from ml_collections import ConfigDict

def get_config():
    fields = whole().copy_and_resolve_references().to_dict()
    del fields{field}
    return ConfigDict(fields)
"""


@pytest.mark.parametrize(
    ("verb", "name", "field", "needle"),
    [
        ("pretrain", "digits_base", "['samples']", "--config lacks samples"),
        ("distill", "digits", "['wandb']", "--config lacks wandb"),
        ("distill", "digits", "['loss']['huber']", "--config lacks loss.huber"),
    ],
)
def test_a_config_file_of_before_a_field_is_refused(tmp_path, verb, name, field, needle):
    path = tmp_path / "mine.py"
    path.write_text(OLD.format(name=name, field=field))
    words = [f"--config={path}", f"--config.root={tmp_path / 'runs'}", *(["--out=x"] if verb == "pretrain" else [])]
    refused(tmp_path, verb, words, needle, "the package's own configs")


def test_pretraining_needs_a_folder_that_is_not_there(tmp_path):
    config = f"--config={CONFIG.with_name('digits_base.py')}"
    root = f"--config.root={tmp_path / 'runs'}"
    refused(tmp_path, "pretrain", [config, root], "--out is empty")
    refused(tmp_path, "pretrain", [config, root, f"--out={tmp_path}"], str(tmp_path), "--out")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_explains_every_flag(verb, word):
    config = CONFIG.with_name("digits_base.py") if verb == "pretrain" else CONFIG
    ended = run(verb, f"--config={config}", word)
    assert ended.code == 0 and ended.err == ""
    explained = dict(re.findall(r"^  --(\w+)=.*\n      (\S.*)$", ended.out, re.MULTILINE))
    source = (Path(__file__).parent.parent / "proreflow_jax" / f"{verb}.py").read_text()
    own = re.findall(r'"(\w+)": \(', source[source.index("__main__") :])
    assert explained.keys() == {"config", "traceback", *own}
    assert all(len(text.split()) >= 3 for text in explained.values()), explained
    assert f"python -m proreflow_jax.{verb}" in ended.out


def test_traceback_shows_where_an_error_was_raised(tmp_path, model):
    with pytest.raises(ValueError, match="7 windows"):
        run("distill", *tiny_flags(tmp_path, model, stages="(7,)"), "--traceback")
