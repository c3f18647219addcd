"""Whose pictures a model was trained on, in Markdown, of the datasets that this package knows."""

from collections.abc import Iterable

from proreflow_jax.data import emoji_packages

DIGITS = (
    "The handwritten digits of scikit-learn: Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, 1998, UCI "
    "Machine Learning Repository (https://doi.org/10.24432/C50P49), CC-BY-4.0; enlarged, with captions added."
)


def credit_lines(kinds: Iterable[str], page: str = "") -> list[str]:
    """The credits of these kinds of data, and of those that a base model's page names; [] of data of the user's own.

    page: README.md of the base model; one that `pretrain` wrote holds the emoji's table.
    """
    table = emoji_packages.credits_table()
    lines = [DIGITS, ""] if "digits" in kinds else []
    if "emoji" in kinds or table in page:
        names = "Names and keywords of the emoji: emojibase-data (MIT, Miles Johnson)."
        lines += ["These pictures, resized and put on white. CC-BY-4.0 asks to name the authors.", "", table, "", names, ""]
    return lines[:-1]
