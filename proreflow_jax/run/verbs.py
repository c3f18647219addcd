"""The command `proreflow`: the list of verbs, the version, and one verb by its name. Imports no verb before it runs it."""

import ast
import runpy
import sys
from difflib import get_close_matches

from proreflow_jax import __version__
from proreflow_jax.run.config_files import PACKAGE
from proreflow_jax.runtime.endings import USER_ERROR, leave_readers, say

ORDER = ("distill", "sample", "evaluate", "export")  # what most people run, first
PAGE = """proreflow {version}: makes Stable Diffusion draw in 4 or 2 steps

    proreflow <verb> [--config=NAME or FILE] [flags]        or: python -m proreflow_jax.<verb> ...

{verbs}

`proreflow <verb> --help` lists a verb's flags; `proreflow --version` says the version."""


def verbs() -> dict[str, str]:
    """{verb: first line of its page}, read from the files of the package's root."""
    names = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("_"))
    names.sort(key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    pages = {name: ast.get_docstring(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))) for name in names}
    return {name: page.partition("\n")[0] for name, page in pages.items()}


def main(words: list[str] | None = None) -> int:
    """Runs a verb, which ends the process by itself; gives back the exit code of everything else.

    words: behind the command; by default those of the process.
    """
    words = sys.argv[1:] if words is None else words
    first = words[0] if words else "--help"
    verb = first if first.startswith("-") else first.replace("-", "_")
    try:
        if verb in ("--help", "-h", "help"):
            rows = "\n".join(f"  {name:<12}{line}" for name, line in verbs().items())
            sys.stdout.write(f"{PAGE.format(version=__version__, verbs=rows)}\n")
            return 0
        if verb == "--version":
            sys.stdout.write(f"proreflow {__version__}\n")
            return 0
    finally:
        leave_readers()
    if verb not in (known := verbs()):
        close = get_close_matches(verb, known, 1)
        mend = f"did you mean {close[0]}?" if close else f"it must be one of {', '.join(known)}"
        say(f"proreflow: {first!r} is no verb: {mend} `proreflow --help` says what each does")
        return USER_ERROR
    sys.argv[1:] = words[1:]
    runpy.run_module(f"proreflow_jax.{verb}", run_name="__main__", alter_sys=True)
    raise AssertionError(f"{verb} came back without an exit code")
