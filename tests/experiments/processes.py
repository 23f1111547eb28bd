"""A server of processes: what `python -m MODULE ARGUMENTS` does, without importing PyTorch each time."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120  # seconds, for machines that do much else

# Importing PyTorch takes seconds, so this process does it once and then splits into others.
_SERVER = """
import json, os, runpy, signal, sys, traceback
import sklearn.datasets, torch._dynamo
import experiments.launch.execute, experiments.launch.processes, experiments.launch.plan
from experiments.folder.environment import git_commit

# Not ignored, as it is where nohup started the tests.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
git_commit()  # remembered
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        process, status = os.waitpid(request["wait"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if process else None), flush=True)
    elif process := os.fork():
        print(process, flush=True)
    else:
        break
else:
    os._exit(0)
os.chdir(request["directory"])
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for number, path in enumerate(request["output"], start=1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
sys.argv = [request["module"], *request["arguments"]]
exec(request["before"])
code = 1
try:
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
except SystemExit as end:
    code = end.code
except BaseException:
    traceback.print_exc()
sys.stdout.flush()
os._exit(code)  # taking PyTorch apart takes seconds, too
"""


@contextlib.contextmanager
def server() -> Iterator[Callable[..., Any]]:
    """The function that sends a request to a server of processes and returns its answer."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command, pipe = [sys.executable, "-c", _SERVER], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        assert process.stdout.readline() == "ready\n"

        def ask(**request: Any) -> Any:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask


class StartedProcess:
    """What `python -m MODULE ARGUMENTS` does, in a process of its own."""

    def __init__(self, ask: Callable[..., Any], scratch: Path, module: str, arguments: list[str], before: str) -> None:
        self._ask, self._code = ask, None
        self._output, self._errors = scratch / "output", scratch / "errors"
        self.id = ask(
            module=module,
            arguments=arguments,
            directory=str(Path.cwd()),
            output=[str(self._output), str(self._errors)],
            before=before,
        )

    def poll(self) -> int | None:
        """The exit code, minus the number of the signal that ended it, None while it runs."""
        if self._code is None:
            self._code = self._ask(wait=self.id)
        return self._code

    def wait(self, seconds: float = PATIENCE) -> int:
        end = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                pytest.fail(f"a process has not ended within {seconds} s")
            time.sleep(0.005)
        return code

    def send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.id, number)

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def errors(self) -> str:
        return self._errors.read_text()
