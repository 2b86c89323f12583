"""Write the starting point of the exercises: specdec.py, without the bodies of their functions.

    python tests/starter.py > my_specdec.py           # all of them
    python tests/starter.py verify > my_specdec.py    # only these

What the exercises ask for is in tests/EXERCISES.md.
"""

import ast
import sys
import textwrap
from pathlib import Path

SPECDEC = Path(__file__).parent.parent / "specdec.py"
EXERCISES = (
    "to_probs", "bernoulli", "categorical", "Rows.newest", "Rows.append", "read_prompts",
    "plain_rounds", "verify", "ModelDrafter.propose", "ModelDrafter.unread", "ModelDrafter.commit",
    "speculative_round", "speculative_rounds", "expected_tokens", "NGramDrafter.propose",
    "verify_block", "Coupled.__call__", "AutoK.propose", "AutoK.learn", "ancestors", "verify_tree",
    "TreeDrafter.own_round",
)  # fmt: skip


def functions_of(source):
    """{name: its node}; a method's name is that of its class, a dot, and its own."""
    functions = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = node
        elif isinstance(node, ast.ClassDef):
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            functions |= {f"{node.name}.{method.name}": method for method in methods}
    return functions


def starter(source, exercises=EXERCISES):
    """The source; each of these functions does no more than raise an error that names it.

    Signature and docstring stay; where there is no docstring, the comments stay.
    """
    lines, functions = source.splitlines(), functions_of(source)
    missing = [name for name in exercises if name not in functions]
    if missing:
        raise ValueError(f"specdec.py has no function {', '.join(missing)}")
    # From the end of the file, so that the line numbers of the rest stay right.
    for name in sorted(set(exercises), key=lambda name: -functions[name].lineno):
        node = functions[name]
        body, indent = node.body[0], " " * node.body[0].col_offset
        stub = [f'{indent}raise NotImplementedError("exercise {name} is not done yet")']
        if ast.get_docstring(node):
            start = body.end_lineno
        else:
            start = body.lineno - 1
            while lines[start - 1].startswith(f"{indent}#"):
                start -= 1
            comments = [n for n in lines[start : node.end_lineno] if n.startswith(f"{indent}#")]
            stub = comments + stub
        lines[start : node.end_lineno] = stub
    return "\n".join(lines) + "\n"


def main(words):
    """-> exit status."""
    if {"-h", "--help"} & set(words):
        names = textwrap.fill(f"The exercises: {', '.join(EXERCISES)}", 100)
        text = f"{__doc__}\n{names}\n"
    else:
        for word in words:
            if word not in EXERCISES:
                print(f"starter.py: no exercise {word!r}; --help lists them", file=sys.stderr)
                return 2
        text = starter(SPECDEC.read_text(encoding="utf-8"), words or EXERCISES)
    try:
        with open(1, "w", encoding="utf-8", closefd=False) as out:
            out.write(text)
    except OSError as error:
        print(f"starter.py: cannot write: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
