"""What messages advise: none tells people to delete what took days to make."""

import ast
import re

from verb import ROOT

PACKAGE = ROOT / "proreflow_jax"
ADVICE = re.compile(r"\b(delete|remove|erase|wipe|discard|rm -rf?)\b", re.IGNORECASE)
ALLOWED = {  # file -> the advice that may stand there, for what is made again in minutes or is damaged itself
    "data/records.py": {"delete it and "},  # one damaged shard, or the list of them: markers keep all others
    "data/emoji_packages.py": {"): delete it and run again"},  # a fetched archive that is damaged
    "storage/paths.py": {", or delete old copies"},  # of an object store's files, in a cache
}


def strings(tree: ast.AST) -> set[str]:
    """The texts of a file that advise it, docstrings apart."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body and isinstance(node.body[0], ast.Expr)
    }
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return {node.value for node in texts if id(node) not in docs and ADVICE.search(node.value)}


def test_no_message_tells_people_to_delete_days():
    advice = {path.relative_to(PACKAGE).as_posix(): strings(ast.parse(path.read_text())) for path in PACKAGE.rglob("*.py")}
    assert {name: texts for name, texts in advice.items() if texts} == ALLOWED
