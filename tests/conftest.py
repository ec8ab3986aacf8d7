"""For every test: threads that wait asleep, and Triton's kernels interpreted, unless a GPU is to run them.

torch's OpenMP threads otherwise spin at every barrier, and on a machine that also runs something else (another test's
server, a benchmark) a step then takes twenty times as long. Set before torch is loaded; engine processes do it too.
"""

import os

from quire.core.machine import has_gpu_driver

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRITON_INTERPRET", "0" if has_gpu_driver() else "1")
