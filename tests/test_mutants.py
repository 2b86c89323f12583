"""The tests can tell: a few of the bugs in mutants.py, planted.

(`python tests/mutants.py` plants them all.)
"""

import pytest

from mutants import CATALOGUE, FAST, ROOT, caught_by, patched


def test_every_patch_still_applies():
    ids = [mutant.id for mutant in CATALOGUE]
    assert set(FAST) <= set(ids) and len(ids) >= 200 and len(set(ids)) == len(ids)
    for mutant in CATALOGUE:
        compile(patched(mutant), mutant.file, "exec")
        for name in mutant.tests.split(" -k ")[0].split():
            assert (ROOT / "tests" / f"test_{name}.py").exists(), mutant.id


@pytest.mark.parametrize("id", FAST)
def test_a_planted_bug_is_caught(id):
    assert caught_by(next(mutant for mutant in CATALOGUE if mutant.id == id))
