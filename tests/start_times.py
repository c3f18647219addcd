"""How long a verb takes to say something, in seconds: median, lowest and highest of several turns.

    python tests/start_times.py                      # this checkout
    python tests/start_times.py --beside=OTHER       # and another one in turns, as before and after a change

Nothing here is a test: times are the machine's. tests/test_run_verbs.py holds what they rest on, that jax is not imported.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "an empty program": ["-c", "pass"],
    "import jax": ["-c", "import jax"],
    "proreflow --help": ["-m", "proreflow_jax", "--help"],
    "sample --help": ["-m", "proreflow_jax.sample", "--help"],
    "a misspelt flag": ["-m", "proreflow_jax.sample", "--stgae=2"],
    "a misspelt field": ["-m", "proreflow_jax.distill", "--config=configs/digits.py", "--config.train.bach=3"],
}


def seconds(root: Path, words: list[str]) -> float:
    """One start, to its end."""
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=root, env=environment, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--beside", type=Path, help="another checkout, in turns with this one")
    flags = parser.parse_args()
    roots = [ROOT, *([flags.beside.resolve()] if flags.beside else [])]
    for name, words in COMMANDS.items():
        for root in roots:
            seconds(root, words)  # files are in memory and compiled from here on
        times = [[seconds(root, words) for root in roots] for _ in range(flags.turns)]
        for root, column in zip(roots, zip(*times, strict=True), strict=True):
            row = f"{name:<18} {statistics.median(column):6.2f}  {min(column):6.2f} .. {max(column):6.2f}  {root}"
            sys.stdout.write(f"{row}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
