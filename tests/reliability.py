"""What the long proofs share: how often and from which seed, a line of what came of each, commands as processes of their own.

Environment: RELIABILITY_<NAME> changes a number, RELIABILITY_SEED repeats a run, RELIABILITY_REPORT is a file that every
proof appends its line to. docs/reliability.md has the commands.
"""

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from verb import ROOT, environment, tiny_flags

PATIENCE = 900  # seconds, for machines that do other things too
DRAFTS = ("*tmp*", "*.old.*", "*.writing")  # names of what is half-written


def number(name: str, default: int) -> int:
    """How often, or how long: RELIABILITY_<NAME>, or the default."""
    return int(os.environ.get(f"RELIABILITY_{name}", default))


SEED = number("SEED", int(time.time()))


def chance(promise: str) -> random.Random:
    """The random numbers of one proof; its seed is printed, so that the run can be repeated."""
    report(promise, seed=SEED)
    return random.Random(f"{SEED} {promise}")


def report(promise: str, **numbers: object) -> None:
    """Prints one line, and appends it to RELIABILITY_REPORT."""
    text = json.dumps({"proof": promise, "at": time.strftime("%Y-%m-%d %H:%M"), **numbers}, default=str)
    sys.__stderr__.write(f"{text}\n")
    if where := os.environ.get("RELIABILITY_REPORT"):
        with open(where, "a", encoding="utf-8") as file:
            file.write(f"{text}\n")


def command(folder: Path, verb: str, *words: str, devices: int = 1, **fields: object) -> dict:
    """Arguments of subprocess for a verb on folder/model, its run below folder/runs."""
    return {
        "args": [sys.executable, "-m", f"proreflow_jax.{verb}", *tiny_flags(folder, folder / "model", **fields), *words],
        "env": environment(folder / f"programs-{devices}", devices),
        "cwd": ROOT,
        "text": True,
        "stderr": subprocess.PIPE,
        "stdout": subprocess.DEVNULL,
    }


def finish(folder: Path, verb: str, *words: str, **fields: object) -> str:
    """Runs a verb to its end, which is good; what it said on stderr."""
    ended = subprocess.run(**command(folder, verb, *words, **fields), timeout=PATIENCE)
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


def drafts(folder: Path) -> list[str]:
    """What is half-written below a folder."""
    return sorted({str(path.relative_to(folder)) for name in DRAFTS for path in folder.rglob(name)})


@contextmanager
def running(**arguments: object) -> Iterator[subprocess.Popen]:
    """A process that does not outlive the block."""
    with subprocess.Popen(**arguments) as process:
        try:
            yield process
        finally:
            process.kill()


def usage(pid: int | str) -> dict[str, int]:
    """Of a process: resident memory of its own in KiB, open descriptors, threads."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    return {"memory": int(status["RssAnon"].split()[0]), "descriptors": descriptors, "threads": int(status["Threads"])}


@contextmanager
def pod(
    folder: Path, verb: str, *words: str, processes: int, devices: int, args: list[str] | None = None, **fields: object
) -> Iterator[list]:
    """The processes of one job, none of which outlives the block; process k writes what it says to folder/<k>.log.

    args: another program in the place of the verb.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = command(folder, verb, *words, devices=devices, **fields)
    arguments["args"] = args or arguments["args"]
    threads = str(max(len(os.sched_getaffinity(0)), processes * devices))  # XLA cuts sums by threads
    job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes), "NPROC": threads} if processes > 1 else {}
    members = []
    try:
        for k in range(processes):
            with (folder / f"{k}.log").open("w") as log:
                own = arguments["env"] | job | {"NPROC": threads} | ({"JAX_PROCESS_ID": str(k)} if processes > 1 else {})
                members.append(subprocess.Popen(**arguments | {"env": own, "stderr": log, "stdout": log}))
        yield members
    finally:
        for member in members:
            member.kill()
            member.wait()


def logs(folder: Path, processes: int) -> list[str]:
    """What the processes of the last `pod` said."""
    return [(folder / f"{k}.log").read_text() for k in range(processes)]


def await_ends(members: list[subprocess.Popen], patience: float = PATIENCE) -> list[int]:
    """Their exit codes."""
    deadline = time.monotonic() + patience
    return [member.wait(timeout=max(0.1, deadline - time.monotonic())) for member in members]


def await_file(folder: Path, patterns: tuple[str, ...], members: list[subprocess.Popen], known: set[str]) -> bool:
    """Waits until a file or folder of one of the patterns appears below the folder; False if the job ended before."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if any(str(path) not in known for pattern in patterns for path in folder.glob(pattern)):
            return True
        if members[0].poll() is not None:
            return False
        time.sleep(0.001)
    raise TimeoutError(f"{patterns} never appeared in {folder}")
