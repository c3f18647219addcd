"""Every number that a user may name has a range, and nothing that is no number is in one."""

import ast
import importlib
import math
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from test_configs import flat

from proreflow_jax import UserError
from proreflow_jax.run.ranges import ELSEWHERE, RANGES, check_range, check_ranges, field_range

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "common"))
VERBS = sorted(path for path in (ROOT / "proreflow_jax").glob("*.py") if path.stem != "__init__")


def numbers(value: object) -> bool:
    """Whether a field holds numbers, or may hold some."""
    if isinstance(value, tuple | list):
        return all(numbers(item) for item in value)
    return isinstance(value, int | float) and not isinstance(value, bool)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_number_of_every_config_has_a_range_and_lies_in_it(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    check_ranges(config)
    for field, value in flat(config).items():
        if not numbers(value) or field.startswith("mesh.rules"):
            continue
        assert any(re.fullmatch(pattern, field) for pattern, _ in RANGES), field
        for bad in (math.nan, math.inf, -math.inf, None, True):
            if field_range(field) is not ELSEWHERE:
                with pytest.raises(UserError, match=f"--config.{field}="):
                    check_range(bad, field_range(field), f"--config.{field}")


def test_a_number_in_a_tuple_is_looked_at():
    check_ranges(ConfigDict({"evaluate": {"study": {"sizes": (0.1, 0.2)}}}))
    with pytest.raises(UserError, match=r"--config.evaluate.study.sizes=\(0.1, nan\) must be in"):
        check_ranges(ConfigDict({"evaluate": {"study": {"sizes": (0.1, math.nan)}}}))


@pytest.mark.parametrize("path", VERBS, ids=lambda path: path.stem)
def test_every_number_of_every_verb_s_flags_has_a_range(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Dict):
            for row in (value for value in node.values if isinstance(value, ast.Tuple)):
                default = row.elts[0]
                if isinstance(default, ast.Constant) and type(default.value) in (int, float):
                    assert len(row.elts) == 3, f"{path.name}: {ast.unparse(row)}"
