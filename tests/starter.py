"""Write the starting point of the exercises: specdec.py with the bodies of the exercise functions taken out.

    python tests/starter.py > my_specdec.py           # all of them
    python tests/starter.py verify > my_specdec.py    # only these
"""

import ast
import sys
from pathlib import Path

SPECDEC = Path(__file__).parent.parent / "specdec.py"
EXERCISES = (
    "to_probs", "bernoulli", "categorical", "plain_rounds", "ratio", "residual", "verify", "Drafter.propose", "catch_up",
    "ModelDrafter.commit", "speculative_rounds", "expected_tokens", "expected_speed_up", "best_k", "NGramDrafter.propose", "verify_block",
    "verify_coupled", "ancestors",
)  # fmt: skip


def starter(source, exercises=EXERCISES):
    """The source with the body of each exercise replaced, but for its docstring, by a NotImplementedError that names it."""
    lines, found = source.splitlines(), []
    tree = ast.parse(source).body
    functions = [("", node) for node in tree] + [(f"{c.name}.", node) for c in tree if isinstance(c, ast.ClassDef) for node in c.body]
    for prefix, node in sorted(functions, key=lambda f: -f[1].lineno):  # from the end, so that line numbers stay right
        if isinstance(node, ast.FunctionDef) and prefix + node.name in exercises:
            found.append(prefix + node.name)
            first = node.body[1] if ast.get_docstring(node) else node.body[0]
            indent = " " * first.col_offset
            start = (node.body[0].end_lineno if ast.get_docstring(node) else first.lineno - 1)
            lines[start : node.end_lineno] = [f'{indent}raise NotImplementedError("exercise {prefix}{node.name} is not done yet")']
    if sorted(found) != sorted(exercises):
        raise ValueError(f"specdec.py no longer has the exercises {set(exercises) - set(found)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(starter(SPECDEC.read_text(), sys.argv[1:] or EXERCISES), end="")
