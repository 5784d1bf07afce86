"""Everything beside transformers in one go: prefill, decoding, start to first token, training. About ten minutes.

    pip install -r requirements.txt torch transformers && python benchmarks/compare.py

Each part is a script of its own with more to say and to set: inference.py and training.py.
"""

import subprocess
import sys
from pathlib import Path

for part in ("inference.py", "training.py"):
    print(f"== {part}", flush=True)
    subprocess.run([sys.executable, Path(__file__).with_name(part)], check=True)
