"""What the fuzzer found worth keeping, and as many mutations as there is time for: no surprises."""

import tarfile

import mutations
import pytest
import seeds
from loading import load
from pick import CORPUS

MUTATIONS = 1500


@pytest.fixture(scope="module")
def originals() -> dict[str, bytes]:
    return seeds.seeds()


def test_originals_are_accepted(originals):
    assert all(load(data) for data in originals.values())


def test_corpus():
    with tarfile.open(CORPUS) as archive:
        inputs = [archive.extractfile(member).read() for member in archive]
    assert len(inputs) > 30
    assert {load(data) for data in inputs} == {True, False}


def test_mutations(originals):
    """Up to three at once."""
    outcomes = {True: 0, False: 0}
    for seed in range(MUTATIONS):
        data = list(originals.values())[seed % len(originals)]
        for again in range(1 + seed % 3):
            data = mutations.mutate(data, seed + MUTATIONS * again) or data
        outcomes[load(data)] += 1
    assert min(outcomes.values()) > MUTATIONS / 20  # both happen
