"""A slice of `benchmarks/soundness.py`, which holds random and adversarial cases of everything against its oracles."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_slice_of_the_study_has_no_violation():
    command = [sys.executable, str(ROOT / "benchmarks" / "soundness.py"), "--cases", "200", "--seed", "11"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " 0 violations" in ran.stdout
