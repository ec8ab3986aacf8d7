from __future__ import annotations

import subprocess
import sys


def test_text_never_loads_torch_or_jinja():
    """Jinja runs in the templates' own process alone."""
    code = (
        "import sys, quire.text.defaults, quire.text.prompt, quire.text.stream;"
        "print([name for name in ('torch', 'transformers', 'jinja2') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
