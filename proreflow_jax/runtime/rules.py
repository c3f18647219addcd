"""Ordered (regex, value) tables over parameter names: one meaning for sharding, weight decay and whatever comes next.

The first rule whose regex is found in the name (`re.search`) decides; a name without a rule is an error, so that a
renamed layer can never slip into a default nobody chose.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any


def first_match(rules: Sequence[tuple[str, Any]], names: Iterable[str], flag: str) -> dict[str, Any]:
    """{name: value of the first rule that matches}. `flag` is the flag that mends the table.

    Raises ValueError, one line, naming every name no rule matches.
    """
    compiled = [(re.compile(pattern), value) for pattern, value in rules]
    found = {name: [value for pattern, value in compiled if pattern.search(name)][:1] for name in names}

    lost = [name for name, values in found.items() if not values]
    if lost:
        raise ValueError(f"no rule of {flag} matches {', '.join(lost)}: end the table with ('.*', ...)")
    return {name: values[0] for name, values in found.items()}
