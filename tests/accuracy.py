"""`make accuracy`: the estimates of memory and of time against what other people measured; exit 1 below a gate.

    python tests/accuracy.py [FOLDER] [--rows] [--markdown]
"""
import sys
from pathlib import Path

from fsdl_devinfra.validation import memory_accuracy, time_accuracy, tuning_accuracy

if __name__ == "__main__":
    flags = [a for a in sys.argv[1:] if a.startswith("-")]
    folder = next((a for a in sys.argv[1:] if not a.startswith("-")), str(Path(__file__).parent / "data" / "ground_truth"))
    memory = memory_accuracy.main([folder, *flags])
    print()
    tuning = tuning_accuracy.main([folder, *flags])
    print()
    time = time_accuracy.main([folder, *flags])
    sys.exit(memory or tuning or time)
