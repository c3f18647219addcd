"""A checkout with the launch scripts, on a PATH where gcloud, kubectl, Slurm and ssh are the stand-ins of tests/fake_tools."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from proreflow_jax import STOPPED

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(__file__).with_name("fake_tools")
NAMES = {"slurm": ("sbatch", "squeue", "scontrol", "srun"), "gcloud": ("gcloud",), "kubectl": ("kubectl",), "ssh": ("ssh",)}
STOPS = f"echo 'asked to stop'; exit {STOPPED}"  # as a verb that got SIGTERM


class Cloud(NamedTuple):
    """A checkout with the scripts, and what the stand-ins of the clouds keep (their `$FAKE`)."""

    top: Path
    fake: Path
    environment: dict[str, str]

    def launch(self, script: str, *words: str, **more: str) -> subprocess.CompletedProcess:
        """Runs launch/<script> to its end."""
        line = [str(self.top / "launch" / script), *words]
        environment = self.environment | more
        return subprocess.run(line, cwd=self.top, env=environment, capture_output=True, text=True, timeout=60)

    def calls(self, pattern: str = "") -> list[str]:
        """What the stand-ins were asked, where the pattern is found in it."""
        lines = (self.fake / "calls").read_text().splitlines() if (self.fake / "calls").exists() else []
        return [line for line in lines if re.search(pattern, line)]

    def set(self, **files: str) -> None:
        """Files that the stand-ins read."""
        for name, text in files.items():
            (self.fake / name).write_text(text)

    def verbs(self) -> list[str]:
        """The slice's life: what was created, set up, started, followed and deleted, in order."""
        words = r"queued-resources (create|delete)|tpu_worker.sh (setup|start|follow|pack)|(rsync)"
        return [next(filter(None, found.groups())) for line in self.calls() if (found := re.search(words, line))]


def build(tmp_path: Path) -> Cloud:
    """A checkout with nothing but the scripts, all tools stand-ins, and no waiting."""
    top, fake, tools = tmp_path / "checkout", tmp_path / "fake", tmp_path / "bin"
    shutil.copytree(ROOT / "launch", top / "launch")
    subprocess.run(["git", "init", "--quiet", top], check=True)
    for folder in (fake / "bucket" / "digits" / "export", fake / "home", fake / "worker-bin", tools):
        folder.mkdir(parents=True)
    for tool, names in NAMES.items():
        for name in names:
            (tools / name).symlink_to(TOOLS / tool)
    for name in ("python3", "curl", "sudo"):
        (fake / "worker-bin" / name).symlink_to(TOOLS / "worker")
    quick = {"LAUNCH_POLL": "0.01", "LAUNCH_SETTLE": "2", "LAUNCH_GRACE": "1", "FAKE": str(fake), "HOME": str(tmp_path)}
    path = f"{tools}:{os.environ['PATH']}"
    made = Cloud(top, fake, {name: v for name, v in os.environ.items() if name != "XLA_FLAGS"} | quick | {"PATH": path})
    made.set(lives="WAITING_FOR_RESOURCES PROVISIONING ACTIVE\n" * 3)
    return made
