"""The tests can tell: a few of the bugs in mutants.py, planted. (`python tests/mutants.py` plants them all.)"""

import pytest

from mutants import CATALOGUE, FAST, caught_by, patched


def test_every_patch_still_applies():
    assert set(FAST) <= {m.id for m in CATALOGUE} and len(CATALOGUE) >= 40 and len({m.id for m in CATALOGUE}) == len(CATALOGUE)
    for mutant in CATALOGUE:
        compile(patched(mutant), mutant.file, "exec")


@pytest.mark.parametrize("id", FAST)
def test_a_planted_bug_is_caught(id):
    assert caught_by(next(m for m in CATALOGUE if m.id == id))
