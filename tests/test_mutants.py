"""The tests can tell: a few of the bugs in mutants.py, planted. (`python tests/mutants.py` plants them all.)"""

from concurrent.futures import ThreadPoolExecutor

import pytest

from mutants import CATALOGUE, FAST, caught_by, patched


def test_every_patch_still_applies():
    assert len(CATALOGUE) >= 40 and len({m.id for m in CATALOGUE}) == len(CATALOGUE)
    for mutant in CATALOGUE:
        compile(patched(mutant), mutant.file, "exec")


@pytest.fixture(scope="module")
def catches():
    """{id: the test that failed}, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FAST, pool.map(caught_by, [m for id in FAST for m in CATALOGUE if m.id == id])))


@pytest.mark.parametrize("id", FAST)
def test_a_planted_bug_is_caught(id, catches):
    assert catches[id]
