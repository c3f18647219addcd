"""Words of others on a card: names, prompts and licences come from configs and strangers' folders, and stay words there."""

import re
import unicodedata

LONGEST = 200  # characters of a prompt on a card
STATEMENT = 2000  # of a sentence with numbers
SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&])")  # to Markdown, HTML and LaTeX on the hub's pages
LICENCE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")
LINK = re.compile(r"https://[A-Za-z0-9][A-Za-z0-9._~:/?#@!&=+,;%-]{0,300}|LICENSE[A-Za-z0-9._-]{0,60}")


def one_line(text: object, longest: int = LONGEST) -> str:
    """The text on one line, cut at so many characters; control, format and private characters become blanks."""
    clean = "".join(" " if unicodedata.category(sign)[0] in "CZ" else sign for sign in str(text))
    words = " ".join(clean.split())
    return words if len(words) <= longest else f"{words[: longest - 3]}..."


def plain_words(text: object, longest: int = LONGEST) -> str:
    """The text on one line of Markdown, also in a table, where nothing in it is more than text."""
    return SPECIAL.sub(r"\\\1", one_line(text, longest))
