"""`make accuracy`: memory estimates against published measurements; exits 1 below the gate.  python tests/accuracy.py [FOLDER] [--rows] [--markdown]"""
import sys
from pathlib import Path

from fsdl_devinfra.memory.accuracy import main

if __name__ == "__main__":
    folder = str(Path(__file__).parent / "data" / "ground_truth")
    sys.exit(main(sys.argv[1:] if any(not a.startswith("-") for a in sys.argv[1:]) else [folder, *sys.argv[1:]]))
