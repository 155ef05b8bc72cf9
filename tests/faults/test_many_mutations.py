"""`tests/test_mutated_files.py` at length."""

from test_mutated_files import mutated_comparisons, mutated_ratings


def test_5000_mutated_comparisons(tmp_path):
    accepted = mutated_comparisons(tmp_path, 5000, seed=20)
    print(f"5,000 mutated JSONL files: {accepted} read as they stand, {5000 - accepted} refused by file and line")
    assert 0 < accepted < 5000


def test_1000_mutated_ratings(tmp_path):
    accepted = mutated_ratings(tmp_path, 1000, seed=20)
    print(f"1,000 mutated rating files: {accepted} read as they stand, {1000 - accepted} refused by file and line")
    assert 0 < accepted < 1000
