"""Eight fake devices on the CPU for every test, set before jax is imported; no compilation cache from outside.

Fixtures that several files of verbs share, and the order of files: under xdist two processes take files from the front of one
queue, so what takes long must not come last. `make test` tells xdist to keep this order (--no-loadscope-reorder).
"""

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
FLAGS = {  # of XLA, unless the environment has them
    "--xla_force_host_platform_device_count": "8",
    "--xla_cpu_use_fusion_emitters": "false",  # the older emitters compile small programs in two thirds of the time
}
for flag, value in FLAGS.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()

if threading.current_thread() is threading.main_thread():  # a shell's background jobs inherit "ignored", and so would ours
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)

LONG = (  # files of more than half a minute, the longest first
    "test_verbs_chain.py",
    "test_perf_resident.py",  # needs no finished run, which the first file makes
    "test_verbs_kill.py",
    "test_verbs_seen.py",
    "test_run_python.py",
    "test_verbs_lora.py",
    "test_docs_python.py",
    "test_verbs_reproduce.py",
    "test_verbs_families.py",
    "test_verbs_emoji_scores.py",
    "test_reflow_train_step.py",
    "test_runtime_faults.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the long files first, all others behind them as they were. Raises UsageError for a name that is no file."""
    missing = [name for name in LONG if not Path(__file__).with_name(name).is_file()]
    if missing:
        raise pytest.UsageError(f"LONG in {__file__} names {', '.join(missing)}, which is not in that folder")
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all processes that run tests."""
    home = tmp_path_factory.getbasetemp()
    return home.parent if "PYTEST_XDIST_WORKER" in os.environ else home


@pytest.fixture(scope="session")
def programs(together: Path) -> Path:
    """A folder for compiled programs. A process that reads one while another writes it compiles it too."""
    folder = together / "programs"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def quick(programs: Path) -> Iterator[None]:
    """The verbs that a file runs, quickly: `usefixtures("quick")`."""
    from verb import quickly  # imports jax and the package, which most files of tests do not want here

    with quickly(programs):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny whole model, the file's own, as a diffusers folder."""
    import tiny

    return tiny.write_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="session")
def finished(programs: Path, together: Path) -> Path:
    """A folder with a finished run of the tiny model, made once for all processes that run tests: take `chain`.

    What the job said is in said.txt.
    """
    import tiny
    from filelock import FileLock
    from verb import quickly, run, tiny_flags

    folder = together / "finished"
    folder.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "said.txt").exists():
            model = tiny.write_model(folder / "model")
            with quickly(programs):
                ended = run("distill", *tiny_flags(folder, model, profile__steps="(3, 4)"))
            assert ended.code == 0, ended.err
            (folder / "said.txt").write_text(ended.err)
    return folder


@pytest.fixture(scope="module")
def chain(finished: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of `model`, runs/tiny, of 4 then 2 windows, and its exports; tests only read it."""
    folder = tmp_path_factory.mktemp("chain")
    shutil.copytree(finished / "runs", folder / "runs")
    (folder / "prompts.at").write_text(str(finished / "prompts.txt"))  # a run remembers where its prompts lie
    return folder


@pytest.fixture(scope="module")
def outline_only(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without weights and without a tokenizer: its JSON configs alone."""
    folder = tmp_path_factory.mktemp("outline") / "model"
    kept = lambda folder, names: [name for name in names if "." in name and not name.endswith("config.json")]
    shutil.copytree(model, folder, ignore=lambda where, names: [n for n in kept(where, names) if n != "model_index.json"])
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    assert not list(folder.rglob("*.safetensors"))
    return folder
