"""R1 and R6: chains of kill -9, one and several processes; the same command goes on, and the end is bit-equal."""

import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from reliability import PATIENCE, await_ends, await_file, chance, drafts, logs, number, pod, report
from test_runtime_faults import STEPS, final, kill_while_saving, worker
from test_verbs_kill import results

pytestmark = pytest.mark.reliability
KILLS = number(
    "KILLS", 60
)  # in all: three fifths of them of a bare writer of checkpoints, a fifth each of one and two processes
CHAIN = {"train__steps": 40, "checkpoint__every": 1, "train__log_every": 10}  # every step is saved: most moments are a save's
SAVE = ("stage-*/checkpoints/*tmp*",)
ANYTHING = (*SAVE, "stage-*/pairs/.tmp*", "stage-*/pairs/*.array_record", "stage-*/DONE.json", "export/.tmp*", "export/*")
LEAVES_S = 15  # seconds for the others of a killed process


def test_killed_while_it_saves_the_last_state_is_bit_equal(tmp_path: Path) -> None:
    """A bare writer: a save every few milliseconds, so that nearly every kill lands in one."""
    rng, kills, half = chance("R1 saves"), KILLS * 3 // 5, 0
    with worker(tmp_path / "whole") as process:
        assert process.wait(timeout=PATIENCE) == 0, process.stderr.read()
    chains, done = 0, 0
    while done < kills:
        chains += 1
        for _ in range(min(4, kills - done)):  # of STEPS saves, four kills after at most four saves each
            half += kill_while_saving(tmp_path / str(chains), rng.randint(1, 4), rng.uniform(0, 0.02))
            done += 1
        with worker(tmp_path / str(chains)) as process:
            assert process.wait(timeout=PATIENCE) == 0, process.stderr.read()
        np.testing.assert_array_equal(final(tmp_path / str(chains), STEPS), final(tmp_path / "whole", STEPS))
        assert drafts(tmp_path / str(chains)) == []
    report("R1 saves", kills=kills, chains=chains, left_a_draft=half)
    assert half >= kills / 2


def kill_once(folder: Path, name: str, processes: int, rng: random.Random) -> tuple[bool, bool, float]:
    """(killed, left something half-written, seconds until the others had ended); not killed: the job came to its end."""
    run = folder / "runs" / name
    known = {str(path) for pattern in ANYTHING for path in run.glob(pattern)}
    with pod(folder, "distill", processes=processes, devices=2 // processes, name=name, **CHAIN) as members:
        for _ in range(rng.randint(1, 4)):
            if not await_file(run, SAVE if rng.random() < 0.75 else ANYTHING, members, known):
                break
            known |= {str(path) for pattern in ANYTHING for path in run.glob(pattern)}
        time.sleep(rng.uniform(0, 0.03))
        victims = rng.choice([members, [rng.choice(members)]])
        if any(member.poll() is not None for member in members):
            assert set(await_ends(members)) == {0}, logs(folder, processes)
            return False, False, 0.0
        for victim in victims:
            victim.send_signal(signal.SIGKILL)
        half, began = bool(drafts(run)), time.monotonic()
        others = [member for member in members if member not in victims]
        codes = await_ends(others)
        assert 0 not in codes and not any("Traceback" in text for text in logs(folder, processes)), logs(folder, processes)
        return True, half, time.monotonic() - began


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_at_random_moments_ends_bit_equal(tmp_path: Path, processes: int) -> None:
    promise = f"R1 runs of {processes}"
    rng, kills, half, runs, waited = chance(promise), KILLS // 5, 0, 1, 0.0
    tiny.write_model(tmp_path / "model")
    finish_job(tmp_path, "whole", processes)
    whole = results(tmp_path / "runs" / "whole")
    done = 0
    while done < kills:
        killed, left, seconds = kill_once(tmp_path, f"killed-{runs}", processes, rng)
        done, half, waited = done + killed, half + left, max(waited, seconds)
        if not killed or done == kills:
            finish_job(tmp_path, f"killed-{runs}", processes)
            assert results(tmp_path / "runs" / f"killed-{runs}") == whole
            assert drafts(tmp_path / "runs" / f"killed-{runs}") == []
            runs += not killed
    report(promise, kills=kills, runs=runs, left_a_draft=half, others_ended_within_s=round(waited, 1))
    assert half >= kills / 2 and (processes == 1 or waited <= LEAVES_S)


def finish_job(folder: Path, name: str, processes: int, verb: str = "distill", **fields: object) -> None:
    fields = fields or CHAIN
    words = ("--stage=4",) if verb == "make_pairs" else ()
    devices = 2 if verb == "distill" else 4
    with pod(folder, verb, *words, processes=processes, devices=devices // processes, name=name, **fields) as members:
        assert set(await_ends(members)) == {0}, logs(folder, processes)


PAIRS = {"pairs__examples": 16 * 60, "pairs__shard_size": 16}


def test_pairs_are_made_by_a_changing_number_of_processes(tmp_path: Path) -> None:
    """R6. Four devices in all; the number of processes is another after each kill."""
    rng, kills, counts = chance("R6"), number("PAIR_KILLS", 12), []
    tiny.write_model(tmp_path / "model")
    finish_job(tmp_path, "whole", 1, "make_pairs", **PAIRS)
    folder, redone = tmp_path / "runs" / "killed" / "stage-4" / "pairs", 0
    for _ in range(kills):
        processes = rng.choice([n for n in (1, 2, 4) if counts[-1:] != [n]])
        before = {path: path.stat().st_mtime_ns for path in folder.glob("[!.]*.done.json")}
        with pod(
            tmp_path, "make_pairs", "--stage=4", processes=processes, devices=4 // processes, name="killed", **PAIRS
        ) as members:
            known = {str(path) for path in folder.glob("*")}
            for _ in range(rng.randint(1, 3)):
                assert await_file(folder, ("*.done.json",), members, known), logs(tmp_path, processes)
                known |= {str(path) for path in folder.glob("*")}
            time.sleep(rng.uniform(0, 0.02))
            for member in members:
                member.send_signal(signal.SIGKILL)
        redone += sum(path.stat().st_mtime_ns != moment for path, moment in before.items())
        counts.append(processes)
    finish_job(tmp_path, "killed", 2, "make_pairs", **PAIRS)
    mine, whole = (
        {path.name: path.read_bytes() for path in (tmp_path / "runs" / name / "stage-4/pairs").iterdir()}
        for name in ("killed", "whole")
    )
    report("R6", kills=kills, processes=counts, files=len(mine), redone=redone, equal=mine == whole)
    assert mine == whole and redone == 0
