"""Run an exported file, or verify a bundle: `python -m visionattn_runtime`, or `python run.py` in a bundle."""

import sys
from pathlib import Path

from visionattn_runtime.command import main

if __name__ == "__main__":
    sys.exit(main(folder=str(Path(__file__).resolve().parent)))
