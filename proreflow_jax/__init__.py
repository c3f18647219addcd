"""Progressive reflow: a Stable Diffusion model that draws in 4 or 2 steps. Here is only what every room may raise."""

__version__ = "0.1.0"

STOPPED = 75  # exit code (EX_TEMPFAIL) of a verb that was asked to stop and saved: the same command goes on


class UserError(ValueError):
    """The user's input is wrong: one line that names the value, the rule and the flag that mends it. Verbs exit with 2."""


class MissingFile(UserError, FileNotFoundError):
    """A file or folder that the user named, or that another job has to write first, is not there."""


class RunFailed(RuntimeError):
    """The run can't go on, through no fault of input or code: one line that says what to do. Verbs exit with 1."""
