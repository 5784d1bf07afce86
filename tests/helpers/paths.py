"""A helper of the tests: the folders of the repository that they read."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
GOLDEN_FOLDER = TESTS / "golden"
