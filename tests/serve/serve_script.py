"""Serves the fake engine, as `quire serve` serves a real one: `serve_script.py MODEL_DIR STATE_DIR`."""

from __future__ import annotations

import sys
from pathlib import Path

from quire.serve.engine_process import EngineCommand


def main() -> int:
    model_dir, state = map(Path, sys.argv[1:])
    fake = str(Path(__file__).parent / "fake_engine.py")
    command = EngineCommand(argv=("env", f"FAKE_ENGINE_STATE={state}", sys.executable, fake), config={})
    process = command.start()
    import uvloop

    from quire.config.server import ServerConfig
    from quire.serve.run import Launch, run

    launch = Launch(command=command, process=process, model_dir=model_dir, model_names=("tiny",))
    return uvloop.run(run(ServerConfig(port=0, log_level="error"), launch))


if __name__ == "__main__":
    sys.exit(main())
