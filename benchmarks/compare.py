"""All comparisons with transformers: prefill, decoding, time to the first token, training. Takes about ten minutes.

    pip install -r requirements.txt torch transformers && python benchmarks/compare.py

It runs inference.py and training.py, which print more details and have options of their own.
"""

import subprocess
import sys
from pathlib import Path

for part in ("inference.py", "training.py"):
    print(f"== {part}", flush=True)
    subprocess.run([sys.executable, Path(__file__).with_name(part)], check=True)
