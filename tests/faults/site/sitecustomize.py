"""Python runs this at the start of every process that has this directory on its PYTHONPATH."""

import os
import sys
import traceback
from pathlib import Path

if "FAULT_PLAN" in os.environ:
    _TESTS = str(Path(__file__).resolve().parents[2])
    try:
        sys.path.append(_TESTS)  # for long enough to find the package; there is more in tests/ than it
        from faults import injection

        sys.path.remove(_TESTS)
        injection.install()
    except BaseException:
        traceback.print_exc()
        os._exit(86)  # Python itself would go on, without the faults
