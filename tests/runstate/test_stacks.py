"""A process that was stopped and given up says where it was and ends, whatever else listens to signals in it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from megatron_joy.platform.stop_request import LISTENED
from megatron_joy.runstate.stacks import LAST_SIGNAL, SIGNAL

# As a rank does it: stacks first, then what asks for a stop.
RANK = """
import sys, time
from megatron_joy.platform.stop_request import StopRequest
from megatron_joy.runstate.stacks import dump_on_signal
dump_on_signal(open(sys.argv[1], "a"))
with StopRequest().listening():
    print("ready", flush=True) or [time.sleep(0.1) for _ in iter(int, 1)]  # one line: where it is once it is ready
"""


def test_no_signal_has_two_meanings() -> None:
    assert not {SIGNAL, LAST_SIGNAL} & set(LISTENED)


def test_a_stopped_rank_that_was_given_up_gives_its_stack_and_ends(tmp_path: Path) -> None:
    log = tmp_path / "rank_0.log"
    rank = subprocess.Popen([sys.executable, "-c", RANK, str(log)], stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None and rank.stdout.readline() == "ready\n"
    rank.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, rank.pid, os.WSTOPPED)  # a signal that came before would be cut short in its writing
    rank.send_signal(SIGNAL)
    rank.send_signal(LAST_SIGNAL)
    rank.send_signal(signal.SIGCONT)
    assert rank.wait(timeout=120) == -LAST_SIGNAL
    assert "Current thread" in log.read_text() and 'File "<string>", line 7' in log.read_text()
