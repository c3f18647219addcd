"""R12: no token anywhere, no open door, nothing unpickled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from reliability import await_ends, await_file, command, logs, pod, report

pytestmark = pytest.mark.reliability
TOKEN = "hf_nEvErToBeSeEnAnYwHeRe0123456789"
NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "GOOGLE_API_KEY", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY")
SHORT = {"train__steps": 4, "optimizer__warmup_steps": 1, "checkpoint__every": 2}
CHAIN = (  # verbs, one after the other
    ("distill",),
    ("export", "--stage=4", "--form=lora", "--out={0}/lora"),
    ("export", "--stage=4", "--form=delta", "--out={0}/delta"),
    ("export", "--stage=4", "--form=single-file", "--out={0}/single"),
    ("merge", "--delta={0}/delta", "--out={0}/merged"),
    ("sample", "--stage=4", "--count=1", "--out={0}/x.png"),
    ("sample", "--stage=3"),  # refused
    ("upload", "--folder={0}/merged", "--repo=me/student"),  # no network: refused
)


def test_a_token_is_found_nowhere(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model")
    (tmp_path / "token").write_text(TOKEN)
    texts = []
    for verb, *words in CHAIN:
        arguments = command(tmp_path, verb, *(word.format(tmp_path) for word in words), **SHORT)
        secret = dict.fromkeys(NAMES, TOKEN) | {"HF_TOKEN_PATH": str(tmp_path / "token"), "HF_HUB_OFFLINE": "1"}
        ended = subprocess.run(**arguments | {"env": arguments["env"] | secret, "stdout": subprocess.PIPE}, timeout=900)
        assert ended.returncode == (2 if "--stage=3" in words or verb == "upload" else 0), ended.stderr
        texts += [ended.stdout, ended.stderr]
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "token" and "programs" not in str(path)]
    hits = [str(path) for path in files if TOKEN.encode() in path.read_bytes()]
    report("R12 token", verbs=len(CHAIN), files=len(files), hits=hits + [text for text in texts if TOKEN in text])
    assert hits == [] and not any(TOKEN in text for text in texts)


def listening(pid: int) -> list[str]:
    """Addresses, in hex as the kernel writes them, at which a process or its network listens."""
    sockets = {os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd") if _is_link(pid, name)}
    rows = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]


def _is_link(pid: int, name: str) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:")
    except FileNotFoundError:
        return False


LOOPBACK = ("0100007F:", "00000000000000000000000001000000:", "0000000000000000FFFF00000100007F:")


@pytest.mark.parametrize("processes", [1, 2])
def test_whatever_listens_is_on_loopback(tmp_path: Path, processes: int) -> None:
    tiny.write_model(tmp_path / "model")
    fields = {"train__steps": 100_000, "pairs__mode": "online", "checkpoint__every": 10, "export__stages": "()"}
    with pod(tmp_path, "distill", processes=processes, devices=1, **fields) as members:
        assert await_file(tmp_path / "runs/tiny", ("stage-4/checkpoints/10",), members, set()), logs(tmp_path, processes)
        places = [place for member in members for place in listening(member.pid)]
        for member in members:
            member.terminate()
        await_ends(members)
    report("R12 doors", processes=processes, listening=places)
    assert [place for place in places if not place.startswith(LOOPBACK)] == []
    assert processes == 1 or places  # jax's coordinator at least


# What a process hands to itself through a queue (tensorboardX, from thread to thread) was read from nowhere: it does not count.
WATCHED = """
import runpy, sys, traceback
classes = []
QUEUE = "multiprocessing/queues.py"
def watch(event, arguments):
    callers = lambda: (frame.f_code.co_filename for frame, _ in traceback.walk_stack(None))
    if event == "pickle.find_class" and not any(file.endswith(QUEUE) for file in callers()):
        classes.append(arguments)
sys.addaudithook(watch)
verb, *words = sys.argv[1:]
sys.argv = [verb, *words]
try:
    runpy.run_module(f"proreflow_jax.{verb}", run_name="__main__")
except SystemExit as end:
    code = end.code
sys.stderr.write(f"unpickled {len(classes)} {classes[:5]} code {code}")
"""


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model")
    found = []
    for verb, *words in CHAIN[:6]:
        arguments = command(tmp_path, verb, *(word.format(tmp_path) for word in words), **SHORT)
        arguments["args"] = [sys.executable, "-c", WATCHED, verb, *arguments["args"][3:]]
        ended = subprocess.run(**arguments, timeout=900)
        found.append((verb, ended.stderr.splitlines()[-1]))
    report("R12 pickles", verbs=found)
    assert all(line.endswith("unpickled 0 [] code 0") for _, line in found)
