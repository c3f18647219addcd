"""The house stands as designed: its floors, what the library folders never contain, configs that explain themselves."""

import ast
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "proreflow_jax"
GROUND = ("flow", "models", "storage")  # these import nothing of ours
ERRORS = {"UserError", "MissingFile", "RunFailed", "STOPPED"}  # of the package itself: how a job ends; every room may use them
OWN = {*ERRORS, "__version__"}
LIBRARY = {*GROUND, "data", "runtime", "pretrained", "reflow", "evaluation"}
RUN = {*LIBRARY, "run"}
MAY = {  # room -> rooms of ours that it may import beside itself
    **{room: set() for room in GROUND},
    "data": {"storage"},
    "runtime": {"storage"},
    "pretrained": {"models", "storage"},
    "reflow": {"flow", "models", "runtime", "storage"},
    "evaluation": {"flow", "models", "pretrained", "runtime", "storage"},
    "run": LIBRARY,
    "jobs": RUN,
    "exports": RUN,
    "perf": {*RUN, "jobs", "exports"},
    "reproduction": {*RUN, "jobs", "exports"},
}
HEAVY = ("torch", "tensorflow", "diffusers", "transformers", "sklearn", "matplotlib")
PICKLES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
WORDS = ("TODO", "FIXME", "XXX", "torch.load", "allow_pickle=True")
BLOCKS = ("ConfigDict", "optimizer")  # calls that make a block of fields
NAMED = re.compile(r"(?<![\w/.])((?:proreflow_jax|configs|tests|launch)/[\w/.-]*\w\.(?:py|md|json|sh|yaml))\b")
MEGABYTE = 1 << 20
POSITIONAL = 6  # parameters of a function; more are keyword-only, or fields of one value
VALUES = {"flow", "jump", "loss", "parameterization", "reading", "recipe", "stage", "w", "window"}  # passed whole

CROWDED = {  # "file function" that still breaks the row: take out what is mended
    *(
        "exports/windowed_scheduler.py __init__",
        "exports/windowed_scheduler.py _velocity",
    ),  # the first: diffusers' config fields
    "models/attention_kernels.py choose_attention",
    *("models/attention.py __init__", "models/unet.py __init__"),
}
UNPACKED = {  # "file *name", likewise
    *("jobs/study_flow.py *labels", "perf/dummy_arrays.py *like", "perf/jobs.py *options"),
    *("pretrained/tokenizer.py *around", "reflow/loop.py *pending"),
}


def imports(path: Path, package: str) -> set[str]:
    """Dotted names that a file imports, `package` being the dotted name of its folder; `from a import b` gives a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def library(root: Path) -> Iterator[tuple[str, Path, set[str]]]:
    """(room, file, what it imports) of every file in a room of the package."""
    for room in MAY:
        for path in sorted((root / PACKAGE / room).rglob("*.py")):
            yield room, path, imports(path, ".".join(path.parent.relative_to(root).parts))


def verbs(root: Path) -> list[Path]:
    """The files of the package's root."""
    return [path for path in sorted((root / PACKAGE).glob("*.py")) if path.name not in ("__init__.py", "__main__.py")]


def top(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def floors(root: Path, room: str) -> list[str]:
    """Every import of a room that its row does not allow, one line each."""
    lines = []
    for _, path, names in (entry for entry in library(root) if entry[0] == room):
        where = str(path.relative_to(root))
        ours = {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE}.")} - OWN
        lines += [f"{where} imports {other}" for other in sorted(ours - MAY[room] - {room})]
        lines += [f"{where} imports {PACKAGE} itself" for name in names if name == PACKAGE]
    return lines


def root_row(root: Path) -> list[str]:
    """Every root file that is no verb, or that imports another root file, one line each."""
    lines, names = [], {path.stem for path in verbs(root)}
    for path in verbs(root):
        ours = {name.split(".")[1] for name in imports(path, PACKAGE) if name.startswith(f"{PACKAGE}.")}
        lines += [f"{path.name} imports {other}" for other in sorted(ours & names)]
        if not re.search(r"\n    cli\.start\([^\n]*\)\n\Z", path.read_text(encoding="utf-8")):
            lines.append(f"{path.name} does not end in cli.start")
    return lines


def libraries(root: Path) -> list[str]:
    """Every breach of who may import flax, orbax and jax, one line each."""
    lines = []
    for room, path, names in library(root):
        where = str(path.relative_to(root))
        lines += [f"{where} imports flax" for _ in top(names) & {"flax"} if room != "models"]
        keeper = (room, path.name) == ("runtime", "checkpoint.py")
        lines += [f"{where} imports orbax" for _ in top(names) & {"orbax"} if not keeper]
        lines += [f"{where} imports {name}" for name in sorted(top(names) & {"jax", "jaxlib"}) if room in ("data", "storage")]
    for path in verbs(root):
        lines += [f"{path.name} imports {name}" for name in sorted(top(imports(path, PACKAGE)) & {"flax", "orbax"})]
    for path in sorted((root / "configs").glob("*.py")):
        ours = {n for n in imports(path, "configs") if n.split(".")[0] == PACKAGE}
        lines += [f"configs/{path.name} imports {n}" for n in sorted(ours)]
    return lines


def layering(root: Path) -> list[str]:
    """Every breach of all rows."""
    return [*(line for room in MAY for line in floors(root, room)), *libraries(root)]


def forbidden(root: Path) -> list[str]:
    """Every pickle, torch.load, bare except, print and unfinished note in the library folders, one line each."""
    found = []
    for _, path, names in library(root):
        where = str(path.relative_to(root))
        found += [f"{where} imports {name}" for name in sorted(top(names) & PICKLES)]
        text = path.read_text(encoding="utf-8")
        found += [f"{where} holds {word}" for word in WORDS if word in text]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                found.append(f"{where}:{node.lineno} bare except")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "eval", "exec"):
                found.append(f"{where}:{node.lineno} {node.func.id}")
    return found


def crowded(root: Path) -> set[str]:
    """ "file function" of every function of the package with more than POSITIONAL positional parameters."""
    breaches = set()
    for path in sorted((root / PACKAGE).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
                if len([name for name in names if name not in ("self", "cls")]) > POSITIONAL:
                    breaches.add(f"{path.relative_to(root / PACKAGE)} {node.name}")
    return breaches


def unpacked(root: Path) -> set[str]:
    """ "file *name" of every call that unpacks a value of VALUES, or a tuple that the same function wrote out.

    Parameters that travel together are one value; arguments are written where they are passed.
    """
    breaches = set()
    for path in sorted((root / PACKAGE).rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            nodes = list(ast.walk(function))
            assigned = [node for node in nodes if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)]
            tuples = {target.id for node in assigned for target in node.targets if isinstance(target, ast.Name)}
            for argument in (a for node in nodes if isinstance(node, ast.Call) for a in node.args):
                if isinstance(argument, ast.Starred):
                    name = ast.unparse(argument.value)
                    if name in tuples or name.split(".")[-1] in VALUES:
                        breaches.add(f"{path.relative_to(root / PACKAGE)} *{name}")
    return breaches


def uncommented(path: Path) -> list[str]:
    """Fields of a config file (c.a.b = value, or name=value inside dict(...)) whose line holds no comment.

    Lines that only open a block (`c.a = ConfigDict()`) or take a commented one from configs.common need none.
    """
    with tokenize.open(path) as file:
        commented = {token.start[0] for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.COMMENT}
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            block = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in BLOCKS
            if not block and node.end_lineno not in commented:
                found.append(f"{path.name}:{node.lineno} {ast.unparse(node.targets[0])}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
            lines = [(word.value.lineno, word.arg) for word in node.keywords]
            found += [f"{path.name}:{line} {name}" for line, name in lines if line not in commented]
    return found


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("room", MAY)
def test_the_floors_hold(room):
    assert (ROOT / PACKAGE / room).is_dir()
    assert floors(ROOT, room) == []


def test_every_folder_is_a_room():
    folders = {path.name for path in (ROOT / PACKAGE).iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - {"assets"} == set(MAY)


def test_the_root_holds_verbs_alone():
    assert root_row(ROOT) == []


def test_libraries_have_their_rooms():
    assert libraries(ROOT) == []
    assert len(list(library(ROOT))) > 30  # the walk sees the house


@pytest.mark.parametrize(
    ("text", "breach"),
    [
        ("from proreflow_jax import b\n\nif __name__ == '__main__':\n    cli.start(b.run)\n", "a.py imports b"),
        ("from proreflow_jax.b import run\n\nif __name__ == '__main__':\n    cli.start(run)\n", "a.py imports b"),
        ("VALUE = 1\n", "a.py does not end in cli.start"),
    ],
)
def test_a_root_file_that_is_no_verb_is_seen(tmp_path, text, breach):
    write(tmp_path, "proreflow_jax/a.py", text)
    write(tmp_path, "proreflow_jax/b.py", "if __name__ == '__main__':\n    cli.start(run)\n")
    assert root_row(tmp_path) == [breach]


@pytest.mark.parametrize(
    ("name", "text", "breach"),
    [
        ("proreflow_jax/flow/a.py", "from proreflow_jax.models import unet\n", "proreflow_jax/flow/a.py imports models"),
        ("proreflow_jax/flow/a.py", "if 1:\n    import proreflow_jax.runtime\n", "proreflow_jax/flow/a.py imports runtime"),
        ("proreflow_jax/models/a.py", "from ..reflow import loop\n", "proreflow_jax/models/a.py imports reflow"),
        ("proreflow_jax/runtime/a.py", "from proreflow_jax import data\n", "proreflow_jax/runtime/a.py imports data"),
        ("proreflow_jax/reflow/a.py", "from proreflow_jax.data import loader\n", "proreflow_jax/reflow/a.py imports data"),
        ("proreflow_jax/evaluation/a.py", "from proreflow_jax.run import cli\n", "proreflow_jax/evaluation/a.py imports run"),
        ("proreflow_jax/jobs/a.py", "from proreflow_jax.exports import card\n", "proreflow_jax/jobs/a.py imports exports"),
        ("proreflow_jax/jobs/a.py", "from proreflow_jax import train\n", "proreflow_jax/jobs/a.py imports train"),
        ("proreflow_jax/storage/a.py", "import jax\n", "proreflow_jax/storage/a.py imports jax"),
        ("proreflow_jax/reflow/a.py", "from flax import nnx\n", "proreflow_jax/reflow/a.py imports flax"),
        ("proreflow_jax/runtime/mesh.py", "import orbax.checkpoint\n", "proreflow_jax/runtime/mesh.py imports orbax"),
        ("proreflow_jax/train.py", "import orbax.checkpoint\n", "train.py imports orbax"),
        ("proreflow_jax/data/a.py", "import jax.numpy as jnp\n", "proreflow_jax/data/a.py imports jax"),
        ("configs/a.py", "from proreflow_jax.flow import windows\n", "configs/a.py imports proreflow_jax.flow.windows"),
    ],
)
def test_a_broken_floor_is_seen(tmp_path, name, text, breach):
    write(tmp_path, name, text)
    assert layering(tmp_path) == [breach]


def test_permitted_imports_are_no_breach(tmp_path):
    write(tmp_path, "proreflow_jax/reflow/a.py", "import jax\nfrom proreflow_jax.flow import windows\nfrom . import step\n")
    write(tmp_path, "proreflow_jax/models/a.py", "from flax import nnx\nfrom proreflow_jax.models import unet\n")
    write(tmp_path, "proreflow_jax/runtime/checkpoint.py", "import orbax.checkpoint\n")
    write(tmp_path, "proreflow_jax/data/a.py", "from jaxtyping import UInt8\nfrom . import files\n")
    write(tmp_path, "configs/a.py", "from configs.common import optimizer\nfrom configs.digits import get_config\n")
    assert layering(tmp_path) == []


WORKED_OUT = re.compile(
    r"\b(teacher_flow|student_flow|pair_recipe|loss_recipe|state_target|state_places|trained_shapes|parent_stage|places)\("
)


def asking(root: Path, block: str, field: str) -> set[str]:
    """The files that compare a config's <block>.<field> with something."""
    files = set()
    for path in (root / PACKAGE).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = (
                [part for part in ast.walk(node) if isinstance(part, ast.Attribute)] if isinstance(node, ast.Compare) else []
            )
            if any(part.attr == field and ast.unparse(part.value).split(".")[-1] == block for part in parts):
                files.add(str(path.relative_to(root / PACKAGE)))
    return files


def test_what_a_stage_is_is_worked_out_in_run_alone():
    rooms = [path for room in MAY if room != "run" for path in (ROOT / PACKAGE / room).rglob("*.py")]
    lines = [f"{path.relative_to(ROOT)}: {line}" for path in [*rooms, *verbs(ROOT)] for line in path.read_text().splitlines()]
    assert [line for line in lines if WORKED_OUT.search(line)] == []


@pytest.mark.parametrize(("block", "field"), [("pairs", "mode"), ("data", "kind")])
def test_few_files_ask_for_a_mode(block, field):
    assert 0 < len(asking(ROOT, block, field)) <= 3


def test_who_asks_for_a_mode_is_seen(tmp_path):
    write(tmp_path, "proreflow_jax/jobs/a.py", "def f(config):\n    return config.data.kind in ('digits',)\n")
    write(tmp_path, "proreflow_jax/jobs/b.py", "def f(data):\n    return data.kind\n")
    assert asking(tmp_path, "data", "kind") == {"jobs/a.py"}


def test_the_library_contains_nothing_forbidden():
    assert forbidden(ROOT) == []


@pytest.mark.parametrize(
    ("text", "breach"),
    [
        ("import pickle\n", "imports pickle"),
        ("x = torch.load('a')\n", "holds torch.load"),
        ("try:\n    f()\nexcept:\n    pass\n", ":3 bare except"),
        ("def f():\n    print('x')\n", ":2 print"),
        ("x = 1  # TODO\n", "holds TODO"),
    ],
)
def test_what_is_forbidden_is_seen(tmp_path, text, breach):
    write(tmp_path, "proreflow_jax/data/a.py", text)
    (line,) = forbidden(tmp_path)
    assert breach in line


def test_functions_take_six_positional_parameters_at_most():
    assert crowded(ROOT) == CROWDED


def test_values_are_passed_whole():
    assert unpacked(ROOT) == UNPACKED


@pytest.mark.parametrize(
    ("text", "breaches"),
    [
        ("def f(a, b, c, d, e, f, g):\n    pass\n", {"flow/a.py f"}),
        ("class A:\n    def f(self, a, b, c, d, e, f, *, g):\n        pass\n", set()),
        ("def f(x, reading):\n    return g(x, *reading)\n", {"flow/a.py *reading"}),
        ("def f(weights):\n    return g(*weights.flow)\n", {"flow/a.py *weights.flow"}),
        ("def f(p, x):\n    triple = (p.a, p.b, x)\n    return lambda: g(*triple)\n", {"flow/a.py *triple"}),
        ("def f(x, *rest):\n    return g(*x.shape, *rest)\n", set()),
    ],
)
def test_a_crowded_function_and_an_unpacked_value_are_seen(tmp_path, text, breaches):
    write(tmp_path, "proreflow_jax/flow/a.py", text)
    assert crowded(tmp_path) | unpacked(tmp_path) == breaches


def test_every_field_of_every_config_is_explained():
    assert [line for path in sorted((ROOT / "configs").glob("*.py")) for line in uncommented(path)] == []


def test_an_unexplained_field_is_seen(tmp_path):
    write(tmp_path, "a.py", "c.a = 1  # one\nc.b = 2\nc.d = ConfigDict()\nd = dict(\n    e=1,  # e\n    f=2,\n)\n")
    assert uncommented(tmp_path / "a.py") == ["a.py:2 c.b", "a.py:6 f"]


def test_the_training_install_is_free_of_torch_and_tensorflow():
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    lists = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    names = {re.match(r"[A-Za-z0-9_-]+", requirement)[0].lower() for requirement in ast.literal_eval(lists["TRAINING"])}
    assert "jax" in names
    assert names.isdisjoint({*HEAVY, "scikit-learn", "tensorflow-cpu", "torchvision", "accelerate"})
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup")
    install = next(word.value for word in call.keywords if word.arg == "install_requires")
    assert ast.unparse(install) == "TRAINING"


def every_module():
    """An import of every file, since verbs import theirs late; but for those that run beside diffusers."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / PACKAGE).rglob("*.py")}
    names -= {name.removesuffix(".py").replace("/", ".") for name in ALONE} | {f"{PACKAGE}.__main__"}
    return f"import {', '.join(sorted(name.removesuffix('.__init__') for name in names))}"


def test_all_can_be_imported_where_torch_and_tensorflow_are_not_installed():
    block = f"import sys; sys.modules.update(dict.fromkeys({HEAVY})); "  # None there: importing it raises ImportError
    subprocess.run([sys.executable, "-c", block + every_module()], cwd=ROOT, check=True, timeout=120)


def test_none_of_it_is_imported_where_it_is_installed(tmp_path):
    """Not through the libraries either: tensorboardX takes torch if it is there, seconds of every start."""
    used = f"from {PACKAGE}.runtime.curves import Curves; Curves(sys.argv[1], 0).close()"
    unused = f"print(sorted({ {*HEAVY, 'google.cloud.storage'} } & sys.modules.keys()))"
    code = "\n".join(("import sys", every_module(), used, unused))
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, check=True, timeout=120, capture_output=True, text=True).stdout == "[]\n"


ALONE = {
    f"{PACKAGE}/{name}.py": {"torch", "diffusers"}
    for name in ("exports/replay_in_diffusers", "perf/against_diffusers", "exports/windowed_scheduler")
}
ALONE[f"{PACKAGE}/exports/replay_in_diffusers.py"] |= {"transformers"}  # T5 of a single file, which diffusers opens wrongly


def test_only_what_runs_beside_diffusers_imports_torch():
    wanted = {str(path.relative_to(ROOT)): top(imports(path, PACKAGE)) & set(HEAVY) for path in (ROOT / PACKAGE).rglob("*.py")}
    wanted = {name: heavy - {"sklearn", "matplotlib"} for name, heavy in wanted.items()}  # these: inside functions alone
    assert {name: heavy for name, heavy in wanted.items() if heavy} == ALONE


def test_the_embedded_model_is_small_and_holds_no_code():
    folder = ROOT / PACKAGE / "assets" / "digits"
    if not folder.is_dir():
        pytest.skip("the base model is not embedded yet")
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in paths) <= 12 * MEGABYTE
    assert {path.suffix for path in paths} <= {".safetensors", ".json", ".txt", ".md"}


def test_the_file_map_is_the_house():
    text = (ROOT / "docs" / "inside.md").read_text(encoding="utf-8")
    found = re.search(r"## File map\n+```\n(.*?)```", text, re.DOTALL)
    assert found, "docs/inside.md has no file map"
    folders = set(re.findall(r"^ *(\w+)/", found[1], re.MULTILINE))
    files = {name for line in found[1].splitlines() for name in re.match(r" *((?:\w+\.py *)*)", line)[1].split()}
    there = {path.name for path in (ROOT / PACKAGE).iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - {"assets"} == (there | {PACKAGE, "configs", "docs", "launch", "tests"}) - {"assets"}
    assert files == {path.name for path in (ROOT / PACKAGE).glob("*.py")} - {"__init__.py"}


@pytest.mark.parametrize("page", ["README.md", "docs/inside.md"])
def test_a_page_names_paths_that_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert sorted(name for name in set(NAMED.findall(text)) if not (ROOT / name).exists()) == []
