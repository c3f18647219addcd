"""Captions alone, from a text file with one a line."""

import os
from pathlib import Path

from proreflow_jax import MissingFile, UserError
from proreflow_jax.data.images import LINE_LIMIT, control_character
from proreflow_jax.storage import atomic


class Prompts:
    """Captions from a text file, one a line: `source[i] -> {"caption": str}`. Blank lines are skipped, ends stripped.

    Args:
        path: the file, in UTF-8.
        flag: the flag that names it, for messages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no caption at all, or a line that is no UTF-8, is longer than LINE_LIMIT bytes or holds control
            characters. The error names the line's number.
    """

    def __init__(self, path: str | os.PathLike, flag: str = "--config.data.path") -> None:
        path = Path(path).expanduser()
        if not path.is_file():
            raise MissingFile(f"{path} is not a file: {flag} must name a text file with one prompt a line")
        self._prompts = []
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LINE_LIMIT + 2), b""), 1):
                prompt = _prompt(line, f"{path}, line {number}", flag)
                if prompt:
                    self._prompts.append(prompt)
        if not self._prompts:
            raise UserError(f"{path} holds no prompt: {flag} must name a text file with one prompt a line")

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> dict[str, str]:
        if not 0 <= index < len(self):
            raise IndexError(f"prompt {index} is outside 0 .. {len(self) - 1}")
        return {"caption": self._prompts[index]}


def _prompt(line: bytes, where: str, flag: str) -> str:
    if len(line.rstrip(b"\r\n")) > LINE_LIMIT:
        raise UserError(f"{where} is longer than {LINE_LIMIT} bytes: shorten it ({flag})")
    try:
        text = line.decode("utf-8").removeprefix("\ufeff").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start + 1}): save the file as UTF-8 ({flag})") from error
    if control_character(text):
        raise UserError(f"{where} holds a control character: take it out ({flag})")
    return text


def prompts_identity(path: str | os.PathLike) -> dict[str, str]:
    """The hash of the file's bytes."""
    return {"prompts": atomic.sha256(Path(path).expanduser())}
