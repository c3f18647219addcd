"""The launch scripts, run whole against recorded stand-ins of gcloud and kubectl (tests/fake_cloud.py, tests/fake_tools)."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from fake_cloud import ROOT, STOPPED, STOPS, build

SCRIPTS = ("tpu_vm.sh", "gke.sh", "slurm.sh", "hosts.sh", "local_pod.sh", "verb.sh", "tpu_worker.sh")
TPU = ("--project=p", "--zone=z", "--name=n", "--slice=v5e:4x4")
VERB = ("--", "sh", "-c", "echo step $0; sleep 0.1", "(4, 2)")
WAITS = 'echo began; for i in $(seq 400); do [ -e "$FAKE/go" ] && break; sleep 0.05; done; echo whole'
SPOT = (*TPU, "--spot", "--bucket=b", "--confirm=n")


@pytest.fixture
def cloud(tmp_path):
    return build(tmp_path)


@pytest.mark.parametrize("script", [*SCRIPTS, "common.sh"])
def test_shellcheck_finds_nothing(script):
    tool = Path(sys.executable).with_name("shellcheck")  # from the extra `test`
    assert subprocess.run([tool, "-x", ROOT / "launch" / script], capture_output=True, text=True).stdout == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_script_s_head_and_an_unknown_flag_is_refused_in_one_line(cloud, script):
    shown = cloud.launch(script, "--help")
    head = (ROOT / "launch" / script).read_text(encoding="utf-8").splitlines()[1].removeprefix("# ")
    assert (shown.returncode, shown.stderr) == (0, "") and shown.stdout.startswith(head) and f"{script} " in shown.stdout
    wrong = cloud.launch(script, "--nonsense=1")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "--nonsense" in wrong.stderr
    assert cloud.calls() == []


@pytest.mark.parametrize(
    ("script", "words", "shown"),
    [
        ("tpu_vm.sh", ("all", *SPOT, *VERB), "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite"),
        ("tpu_vm.sh", ("create", *TPU[:3], "--slice=v5p:2x2x2"), "--accelerator-type=v5p-16 --runtime-version=v2-alpha-tpuv5 "),
        ("tpu_vm.sh", ("create", *TPU, "--slices=2"), "--node-count=2 --node-prefix=n"),
        ("gke.sh", ("all", "--image=i", *SPOT[2:], *VERB), "kubectl --namespace=default apply"),
        ("gke.sh", ("image", "--image=i"), "docker build --tag i"),
        ("slurm.sh", VERB, "#SBATCH --requeue"),
        ("hosts.sh", ("--hosts=a,b", "--folder=/f", *VERB), "JAX_PROCESS_ID=1"),
        ("local_pod.sh", VERB, "JAX_PROCESS_ID=1"),
        ("verb.sh", VERB[1:], "'(4, 2)'"),
    ],
)
def test_a_dry_run_shows_the_commands_and_runs_none(cloud, script, words, shown):
    before = sorted(cloud.top.rglob("*"))
    done = cloud.launch(script, "--dry-run", *words)
    assert (done.returncode, done.stderr) == (0, "") and shown in done.stdout
    assert cloud.calls() == [] and sorted(cloud.top.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["gcloud", "kubectl"])
def test_the_real_tools_know_every_flag(cloud, tool, tmp_path):
    if not (program := shutil.which(tool)):
        pytest.skip(f"{tool} is not installed here")
    shown = [cloud.launch("gke.sh", "all", "--dry-run", "--image=i", *SPOT[2:], *VERB).stdout]
    shown += [cloud.launch("tpu_vm.sh", "all", "--dry-run", *SPOT, *more, *VERB).stdout for more in ((), ("--slices=2",))]
    lines = {line for text in shown for line in text.splitlines() if line.startswith(f"{tool} ")}
    environment = cloud.environment | {"CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    for line in lines:
        words = [word for word in shlex.split(line)[1:] if not word.startswith("--")]
        depth = {"kubectl": 1, "storage": 2, "compute": 4}  # words that name the command
        page = [program, *words[: depth.get(tool) or depth[words[0]]], "--help"]
        known = subprocess.run(page, env=environment, capture_output=True, text=True, timeout=120).stdout
        known += "--namespace" if tool == "kubectl" else ""  # of every command: kubectl options
        flags = {word.partition("=")[0] for word in shlex.split(line) if word.startswith("--")}
        assert known and {flag for flag in flags if flag not in known} == set(), line
    assert len(lines) >= 3


def test_a_slice_s_whole_life(cloud):
    (cloud.fake / "bucket" / "digits" / "export" / "card").write_text("whole")
    done = cloud.launch("tpu_vm.sh", "all", *SPOT, *VERB)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "setup", "start", "follow", "rsync", "delete"]
    assert "step (4, 2)" in done.stdout and "n: WAITING" in done.stderr
    assert (cloud.top / "collected" / "digits" / "export" / "card").read_text() == "whole"
    assert "step (4, 2)" in (cloud.top / "collected" / "n.log").read_text()
    (start,) = cloud.calls("sh start")
    assert start.endswith(" --config.root=gs://b/runs --zone=z --project=p")
    assert len(cloud.calls("^uv pip install .*proreflow.tpu")) == 1


def test_a_preempted_slice_is_replaced_and_the_same_words_run_again(cloud):
    cloud.set(follow=f"255\n1\n70 SUSPENDING\n{STOPPED} FAILED\n0\n")  # connection, gcloud, then two slices
    done = cloud.launch("tpu_vm.sh", "all", *SPOT, *VERB)
    assert done.returncode == 0, done.stderr
    again = ["delete", "create", "setup", "start", "follow"]
    assert cloud.verbs() == ["create", "setup", "start", "follow", "follow", "follow", *again, *again, "rsync", "delete"]
    assert len(set(cloud.calls("sh start"))) == 1
    assert done.stderr.count("connection lost") == 2 and done.stderr.count("preempted") == 2


def test_a_node_that_is_gone_counts_as_preempted_though_its_queued_resource_is_active(cloud):
    cloud.set(node="PREEMPTED")
    done = cloud.launch("tpu_vm.sh", "create", *TPU, "--restarts=1", "--confirm=n")
    assert done.returncode == 1 and "started again 1 times already" in done.stderr
    assert cloud.verbs() == ["create", "delete", "create"]


def test_without_the_name_typed_nothing_is_deleted(cloud):
    cloud.set(queued="SUSPENDED\n")
    bare = cloud.launch("tpu_vm.sh", "delete", *TPU, LAUNCH_CONFIRM="n", CONFIRM="n")
    other = cloud.launch("tpu_vm.sh", "delete", *TPU, "--confirm=m")
    replace = cloud.launch("tpu_vm.sh", "all", *SPOT[:-1], *VERB)
    cluster = cloud.launch("gke.sh", "delete", "--name=n", LAUNCH_CONFIRM="n")
    assert [done.returncode for done in (bare, other, replace, cluster)] == [2, 2, STOPPED, 2]
    assert all("--confirm=n" in done.stderr for done in (bare, replace, cluster)) and "--confirm=m" in other.stderr
    assert cloud.calls("delete") == []
    assert cloud.launch("tpu_vm.sh", "delete", *TPU, "--confirm", "n").returncode == 0
    assert cloud.launch("tpu_vm.sh", "delete", *TPU, "--confirm", "n").returncode == 0  # there is none: nothing to do
    assert len(cloud.calls("delete")) == 1


def test_each_command_run_again_goes_on(cloud):
    words = ("--", "sh", "-c", WAITS)
    for command in ("create", "setup", "run", "create", "setup", "run"):
        done = cloud.launch("tpu_vm.sh", command, *TPU, *(words if command == "run" else ()))
        assert done.returncode == 0, done.stderr
    assert done.stdout == "is running\n" and len(cloud.calls("create")) == 1 and len(cloud.calls("^uv venv")) == 1
    other = cloud.launch("tpu_vm.sh", "run", *TPU, "--", "another")
    assert other.returncode == 2 and "another command is running here" in other.stderr
    cloud.set(go="")
    followed = cloud.launch("tpu_vm.sh", "follow", *TPU)
    assert followed.returncode == 0 and "whole" in followed.stdout
    collected = cloud.launch("tpu_vm.sh", "collect", *TPU)
    assert collected.returncode == 0 and (cloud.top / "collected" / "n.log").exists()  # from worker 0, without a bucket


def test_a_verb_that_fails_ends_it_and_one_that_was_stopped_is_started_again(cloud):
    cloud.set(queued="ACTIVE\n", once="")
    stops_once = f'if [ -e "$FAKE/once" ]; then rm "$FAKE/once"; {STOPS}; else exit 3; fi'
    failed = cloud.launch("tpu_vm.sh", "all", *TPU, "--bucket=b", "--", "sh", "-c", stops_once)
    assert failed.returncode == 1 and "with exit code 3" in failed.stdout and "costs money" in failed.stderr
    assert cloud.verbs() == ["setup", "start", "follow", "setup", "start", "follow", "rsync"]
    assert cloud.launch("tpu_vm.sh", "all", *SPOT, "--", "sh", "-c", "exit 2").returncode == 1
    assert cloud.verbs()[-5:] == ["setup", "start", "follow", "rsync", "delete"]  # all that counts is on the bucket


def test_a_worker_joins_the_job_that_its_metadata_names(cloud):
    cloud.set(queued="ACTIVE\n")
    show = 'echo "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID ${PATH%%:*}"'
    done = cloud.launch("tpu_vm.sh", "all", *TPU, "--", "sh", "-c", show)
    assert f"10.0.0.1:8482 2 1 {cloud.fake}/home/proreflow/.venv/bin\n" in done.stdout


def test_what_cannot_be_had_ends_with_the_reason(cloud):
    cloud.set(lives="PROVISIONING FAILED\n")
    refused = cloud.launch("tpu_vm.sh", "create", *TPU)
    assert refused.returncode == 1 and refused.stderr.endswith("n: quota exceeded\n")
    cloud.set(down="")
    deaf = cloud.launch("tpu_vm.sh", "all", *SPOT, *VERB)
    assert (
        deaf.returncode == STOPPED
        and cloud.calls("delete") == []
        and "auth tokens" in deaf.stderr
        and "no answer" in deaf.stderr
    )


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("tpu_vm.sh", ("all", *TPU, "--spot", *VERB), "--bucket"),
        ("tpu_vm.sh", ("all", *TPU, "--bucket=b", *VERB, "--config.root=gs://c"), "leave one out"),
        ("tpu_vm.sh", ("create", *TPU[:3], "--slice=v5e-16"), "v5e:4x4"),
        ("tpu_vm.sh", ("run", *TPU), "after --"),
        ("tpu_vm.sh", ("create", *TPU[1:]), "LAUNCH_PROJECT"),
        ("tpu_vm.sh", ("create", *TPU, "--out"), "--out needs a value"),
        ("tpu_vm.sh", ("create", "delete", *TPU), "one command"),
        ("gke.sh", ("run", *TPU[2:], "--image=i", *VERB), "--bucket"),
        ("gke.sh", ("run", *TPU[2:], "--image=i", "--bucket=b", "--chips-per-host=3", *VERB), "--chips-per-host=3"),
        ("slurm.sh", ("--nodes=0", *VERB), "--nodes=0"),
        ("local_pod.sh", ("-n", "two", *VERB), "--processes=two"),
        ("hosts.sh", ("--hosts=a", *VERB), "--folder"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(cloud, script, words, said):
    done = cloud.launch(script, *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr, done.stderr
    assert cloud.calls() == []


def test_ctrl_c_stops_watching_and_the_slice_goes_on(cloud):
    cloud.set(queued="ACTIVE\n")
    line = [cloud.top / "launch" / "tpu_vm.sh", "all", *TPU, "--", "sh", "-c", WAITS]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, cwd=cloud.top, env=cloud.environment, start_new_session=True, **pipes) as watching:
        assert watching.stdout.readline() == "began\n"
        os.killpg(watching.pid, signal.SIGINT)  # as a terminal does
        said = watching.communicate(timeout=20)[1]
    assert watching.returncode == 130 and "goes on" in said and cloud.calls("delete") == []
    deadline = time.monotonic() + 20  # for what ends with the connection; the verb is not of this group, and goes on
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(watching.pid, 0)
            time.sleep(0.05)
    cloud.set(go="")
    assert "whole" in cloud.launch("tpu_vm.sh", "follow", *TPU).stdout


def test_a_token_travels_as_a_file_and_is_shown_nowhere(cloud, tmp_path):
    (tmp_path / "token").write_text("hf_thisIsNoRealTokenButItMustNotLeak")
    cloud.set(queued="ACTIVE\n")
    done = cloud.launch("tpu_vm.sh", "setup", *TPU, f"--hf-token-file={tmp_path / 'token'}")
    assert done.returncode == 0 and not [line for line in [done.stdout, done.stderr, *cloud.calls()] if "hf_" in line]
    kept = cloud.fake / "home" / ".cache" / "huggingface" / "token"
    assert kept.read_text().startswith("hf_") and kept.stat().st_mode & 0o777 == 0o600


def test_a_jobset_is_applied_followed_through_restarts_and_deleted(cloud):
    cloud.set(terminal="-\n-\n-\nCompleted\n")
    words = ("--image=i", *SPOT[2:], "--slices=2", "--", "python", 'a"b', "(4, 2)")
    done = cloud.launch("gke.sh", "run", *words[:-1])
    jobset = yaml.safe_load((cloud.fake / "manifest").read_text())
    done = cloud.launch("gke.sh", "all", *words)
    assert done.returncode == 0, done.stderr
    assert len(cloud.calls(" apply ")) == 2 and len(cloud.calls(" logs ")) == 3 and "step 1" in done.stdout
    assert cloud.verbs() == ["rsync"] and len(cloud.calls("delete jobset n")) == 1
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["spec"]["failurePolicy"]["maxRestarts"] == 100
    (job,) = jobset["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    assert (job["replicas"], pods["parallelism"], pods["completions"]) == (2, 4, 4)
    pod = pods["template"]["spec"]
    assert pod["containers"][0]["command"] == ["launch/verb.sh", "python", 'a"b', "--config.root=gs://b/runs"]
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert re.fullmatch(r"[A-Za-z]\w*", jobset["spec"]["failurePolicy"]["rules"][0]["name"])  # JobSet refuses dashes


def test_a_jobset_that_failed_or_is_gone_is_told(cloud):
    cloud.set(terminal="Failed\n", manifest="")
    failed = cloud.launch("gke.sh", "follow", "--name=n")
    (cloud.fake / "manifest").unlink()
    gone = cloud.launch("gke.sh", "follow", "--name=n")
    assert (failed.returncode, gone.returncode) == (1, 1) and "describe jobset n" in failed.stderr and "none" in gone.stderr
