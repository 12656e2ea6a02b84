"""A rank that a supervisor looks after, without torch: it beats, writes the run's state and does what a script says.

`python supervised_rank.py RUN SCRIPT`; SCRIPT is JSON: for each attempt, from number 1, a list of [action, value],
done by every rank or, with ["rank 1", [action, value]], by one.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from launch.reasons import Reason, tell_launcher
from megatron_joy.platform.rank import rank_info
from megatron_joy.runstate import FENCE_VARIABLE
from megatron_joy.runstate.heartbeat import Heart
from megatron_joy.runstate.stacks import dump_on_signal
from megatron_joy.runstate.state import State, Word, write_state

STEP_SECONDS = 0.05


class Rank:
    """Goes on from where the attempt before was, as training does from a checkpoint."""

    def __init__(self, run: Path) -> None:
        self.run, self.rank, self.fence = run, rank_info().rank, int(os.environ[FENCE_VARIABLE])
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)
        (run / "logs").mkdir(exist_ok=True)
        dump_on_signal(open(run / "logs" / f"rank_{self.rank}.log", "a"))  # noqa: SIM115 (open as long as it runs)
        self.saved = run / f"saved_{self.rank}"
        self.done = int(self.saved.read_text()) if self.saved.exists() else 0
        self.heart = Heart(run, self.rank, self.fence)
        self.heart.beat(self.done, "start")

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def say(self, word: Word) -> None:
        if self.rank == 0:
            write_state(self.run, State(self.fence, word, self.done))

    def leave(self, word: Word, code: int) -> None:
        self.saved.write_text(str(self.done))
        self.heart.beat(self.done, "end")
        self.say(word)
        sys.exit(code)

    def steps(self, last: int) -> None:
        """Trains up to a step, or until it is asked to stop."""
        while self.done < last:
            self.heart.beat(self.done, "step")
            time.sleep(STEP_SECONDS)
            self.done += 1
            self.heart.beat(self.done, "between")
            if self.asked:
                self.leave("stopped", 75)

    def fail(self, reason: list[Any]) -> None:
        """[exit code, message]; what was done is lost."""
        tell_launcher(Reason(self.rank, reason[0], reason[1]))
        sys.exit(reason[0])

    def hang(self, seconds: float) -> None:
        """In the midst of a step."""
        self.heart.beat(self.done, "step")
        time.sleep(seconds)

    def freeze(self, _: Any) -> None:
        """As SIGSTOP from outside."""
        self.heart.beat(self.done, "step")
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1)
        self.leave("finished", 0)  # unless it was ended

    def act(self, action: str, value: Any) -> None:
        if action.startswith("rank "):
            if int(action.removeprefix("rank ")) == self.rank:
                self.act(*value)
        elif action == "save":
            self.saved.write_text(str(self.done))
        elif action == "touch":
            Path(value).touch()
        elif action == "sleep":
            time.sleep(value)
        elif action == "kill":
            os.kill(os.getpid(), value)
        elif action == "finish":
            self.leave("finished", value)
        else:
            getattr(self, action)(value)


def main() -> None:
    """Plays this rank's part in this attempt."""
    run, script = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    rank = Rank(run)
    for action, value in script[rank.fence - 1]:
        rank.act(action, value)


if __name__ == "__main__":
    main()
