"""The Triton kernels in Triton's interpreter, on the CPU.

Triton decides when it is imported whether kernels are compiled or interpreted, so each of the files
``interpreted_*.py`` runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

HERE = Path(__file__).resolve().parent

#: What numpy says of the way in which Triton 3.6's interpreter reads the bounds of a loop.
LOOP_BOUNDS = "ignore:Conversion of an array with ndim > 0:DeprecationWarning"


@pytest.mark.parametrize("file", sorted(path.name for path in HERE.glob("interpreted_*.py")))
def test_interpreted(file: str) -> None:
    pytest.importorskip("triton")
    if numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip("with numpy 2.4 and later Triton's interpreter takes no loop bound from memory")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", LOOP_BOUNDS, "-x", str(HERE / file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
