"""A helper of the tests: the folders of the repository that tests read."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
GOLDEN_FOLDER = TESTS / "golden"


def dotted(path: Path) -> str:
    """The dotted name of the module in a file of the repository."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
