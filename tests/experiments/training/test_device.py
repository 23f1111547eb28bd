"""What the process asks of its system."""

import platform
import subprocess
import sys

import pytest
import torch

from experiments.folder.write import RunWriter
from experiments.run import main

FAULTS = """
import resource, sys, torch
from experiments.training.device import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(40):
    if step == 20:
        before = pages()
    torch.ones(2**24)  # 64 MB
print(pages() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for the GNU C library alone")
def test_large_tensors_are_made_of_memory_that_was_freed():
    def faults(how):
        return int(subprocess.check_output([sys.executable, "-c", FAULTS, how], text=True))

    assert faults("keep") < 0.1 * faults("leave")


def test_convolutions_are_float32_in_a_run_and_as_they_were_behind_it(write_config, monkeypatch):
    seen, start = [], RunWriter.start
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(
        RunWriter, "start", lambda *given: seen.append(torch.backends.cudnn.allow_tf32) or start(*given)
    )
    assert main([str(write_config())]) == 0
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32
