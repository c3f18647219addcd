"""The launch scripts that start processes: a pod on this machine, plain hosts, Slurm, and what tells stopped from finished."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_cloud import ROOT, STOPPED, STOPS, Cloud, build

BEGAN = 'echo began; echo >>"$FAKE/began"'
TRAPS = f"trap 'echo asked to stop: saved; exit {STOPPED}' TERM; {BEGAN}; while :; do sleep 0.05; done"
CPUS = len(os.sched_getaffinity(0))
SHOW = 'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS $JAX_PLATFORMS $XLA_FLAGS $NPROC $0"'


@pytest.fixture
def cloud(tmp_path):
    return build(tmp_path)


def interrupt(cloud: Cloud, line: list[str], number: int, processes: int, **more: str) -> tuple[int, str]:
    """Sends the signal to a command once so many of its processes have begun; its exit code and all it said."""
    line = [str(cloud.top / "launch" / line[0]), *line[1:]] if line[0].endswith(".sh") else line
    environment, pipe = cloud.environment | more, subprocess.PIPE
    with subprocess.Popen(line, cwd=cloud.top, env=environment, stdout=pipe, text=True, start_new_session=True) as process:
        try:
            wait_for(lambda: len(read(cloud.fake / "began")) == processes)
            process.send_signal(number)
            return process.wait(timeout=20), process.stdout.read()
        finally:
            process.kill()


def wait_for(ready: Callable[[], bool]) -> None:
    """Until it is true, 20 seconds at most."""
    for _ in range(400):
        if ready():
            return
        time.sleep(0.05)
    raise TimeoutError


def read(path: Path) -> str:
    """What the file holds, nothing if there is none."""
    return path.read_text() if path.exists() else ""


def logs(cloud: Cloud) -> list[str]:
    """The logs of the processes, in order."""
    return [path.read_text() for path in sorted((cloud.top / "pod-logs").iterdir())]


def test_a_local_pod_is_one_job_of_processes_on_loopback(cloud):
    done = cloud.launch("local_pod.sh", "-n", "2", "-d", "32", "--", "sh", "-c", SHOW, "(4, 2)", XLA_FLAGS="--xla_a=1")
    assert (done.returncode, done.stderr) == (0, "")
    first, second = logs(cloud)
    assert done.stdout == first  # process 0 is shown
    address = first.split()[4]
    assert address.startswith("127.0.0.1:") and int(address.rpartition(":")[2]) > 1023
    rest = f"of 2 at {address} cpu --xla_a=1 --xla_force_host_platform_device_count=32 {max(64, CPUS)} (4, 2)\n"
    assert (first, second) == (f"0 {rest}", f"1 {rest}")


def test_the_first_failure_ends_a_local_pod_with_its_code(cloud):
    waits = 'until [ "$(wc -l <"$FAKE/began")" = 2 ]; do sleep 0.05; done; exit 7'
    roles = ["trap '' TERM", waits, "trap 'echo saved; exit 0' TERM"]
    verb = (
        f"case $JAX_PROCESS_ID in 0) {roles[0]};; 1) {roles[1]};; 2) {roles[2]};; esac; {BEGAN}; while :; do sleep 0.05; done"
    )
    cloud.set(began="")
    done = cloud.launch("local_pod.sh", "-n", "3", "--", "sh", "-c", verb, LAUNCH_GRACE="0.5")
    assert done.returncode == 7 and "exit code 7" in done.stderr  # SIGKILL ended process 0
    assert logs(cloud)[2] == "began\nsaved\n"


def test_one_line_tells_of_a_failure_where_the_others_end_in_time(cloud):
    fails = '[ $JAX_PROCESS_ID = 0 ] || { until [ -s "$FAKE/began" ]; do sleep 0.05; done; exit 7; }'
    cloud.set(began="")
    done = cloud.launch("local_pod.sh", "--", "sh", "-c", f"{fails}; trap 'exit 0' TERM; {BEGAN}; while :; do sleep 0.05; done")
    assert done.returncode == 7 and done.stderr.count("\n") == 1, done.stderr


def test_a_process_that_is_done_does_not_end_the_others(cloud):
    done = cloud.launch("local_pod.sh", "--", "sh", "-c", "[ $JAX_PROCESS_ID = 0 ] || exit 0; sleep 0.5; echo whole")
    assert (done.returncode, done.stdout) == (0, "whole\n")


@pytest.mark.parametrize(("number", "name", "code"), [(signal.SIGTERM, "TERM", STOPPED), (signal.SIGINT, "INT", 130)])
def test_signals_go_to_every_process_of_a_local_pod(cloud, number, name, code):
    caught = f"trap 'echo {name}; exit {code}' {name}; {BEGAN}; while :; do sleep 0.05; done"
    assert interrupt(cloud, ["local_pod.sh", "--", "sh", "-c", caught], number, 2) == (code, f"began\n{name}\n")
    assert logs(cloud) == [f"began\n{name}\n"] * 2


@pytest.mark.parametrize(("number", "name", "code"), [(signal.SIGTERM, "TERM", STOPPED), (signal.SIGINT, "INT", 130)])
def test_a_process_that_hears_late_still_ends_by_the_signal_that_was_sent(cloud, number, name, code):
    pause = "[ $JAX_PROCESS_ID = 0 ] && pause=0.05 || pause=1"  # a shell's trap runs when its child has ended
    caught = f"{pause}; trap 'echo {name}; exit {code}' {name}; {BEGAN}; while :; do sleep $pause; done"
    assert interrupt(cloud, ["local_pod.sh", "--", "sh", "-c", caught], number, 2) == (code, f"began\n{name}\n")
    assert logs(cloud) == [f"began\n{name}\n"] * 2


@pytest.mark.parametrize(
    ("verb", "code"),
    [("exit 0", 0), (STOPS, STOPPED), ("exit 1", 1), ("exit 2", 2), ("kill -TERM $$", STOPPED), ("echo asked to stop: no", 0)],
)
def test_a_stopped_verb_is_told_from_a_finished_one_by_its_code_alone(cloud, verb, code):
    done = cloud.launch("verb.sh", "sh", "-c", f"echo begins; {verb}")
    assert done.returncode == code and done.stdout.startswith("begins\n")


def test_the_code_of_a_stopped_verb_is_one_and_no_script_reads_its_words():
    texts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "launch").iterdir()}
    assert f"\nSTOPPED={STOPPED}\n" in texts["common.sh"]
    assert [name for name, text in texts.items() if "asked to stop" in text] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_every_way_to_stop_reaches_the_verb_as_sigterm(cloud, number):
    code, shown = interrupt(cloud, ["verb.sh", "sh", "-c", TRAPS], number, 1)
    assert (code, shown) == (STOPPED, "began\nasked to stop: saved\n")


def test_plain_hosts_are_one_job(cloud):
    hosts = ("--hosts=me@a,b", f"--folder={cloud.top}", "--port=9", "--", "sh", "-c", f"{SHOW}; {STOPS}")
    done = cloud.launch("hosts.sh", *hosts, JAX_PLATFORMS="")
    assert done.returncode == STOPPED and "asked to stop" in done.stdout
    assert [log.split("  ")[0] for log in logs(cloud)] == ["0 of 2 at a:9", "1 of 2 at a:9"]
    assert {line.split()[4] for line in cloud.calls("^ssh -tt -oBatchMode=yes ")} == {"me@a", "b"}


def test_a_slurm_job_that_was_stopped_goes_back_into_the_queue(cloud):
    done = cloud.launch("slurm.sh", "--", "sh", "-c", f"{SHOW}; {STOPS}", JAX_PLATFORMS="")
    said = (cloud.fake / "batch.log").read_text()
    assert done.returncode == 0 and "0 of 2 at gpu3:61447" in said and "1 of 2 at gpu3:61447" in said
    assert cloud.calls("requeue") == ["scontrol requeue 7"] and (cloud.fake / "batch.code").read_text() == f"{STOPPED}\n"
    cloud.launch("slurm.sh", "--restarts=3", "--", "sh", "-c", STOPS, SLURM_RESTART_COUNT="3")
    cloud.launch("slurm.sh", "--", "sh", "-c", "exit 3")
    assert len(cloud.calls("requeue")) == 1 and (cloud.fake / "batch.code").read_text() == "3\n"
    cloud.set(queue="7\n")
    assert cloud.launch("slurm.sh", "--", "sh").returncode == 0 and len(cloud.calls("sbatch")) == 3  # it is queued already


def test_sigterm_reaches_the_verbs_through_slurm(cloud):
    batch = cloud.launch("slurm.sh", "--dry-run", "--", "sh", "-c", TRAPS).stdout.removesuffix("sbatch\n")
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "gpu[3-4]"}
    code, shown = interrupt(cloud, ["bash", "-c", batch], signal.SIGTERM, 2, **job)
    assert code == STOPPED and shown.count("asked to stop: saved") == 2 and cloud.calls("requeue")
