"""Tells somebody of a run's start, stop, error, finish and alarms: a command, or a webhook. Never waits for either.

A message is sent by a thread of its own. What can't be delivered is dropped and said in `problems`; a run goes on
without its messages. The webhook's address is a secret: it comes from the environment and is in no message of ours.
"""

import json
import os
import queue
import re
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from urllib.parse import urlsplit

from megatron_joy.errors import UserError
from megatron_joy.recipe.schema import NotifySection

WAITING = 32  # messages that may wait to be sent; later ones are dropped
WORDS = ("kind", "run", "step", "message", "text")
ALARM_SECONDS = 300.0  # between two alarms of the same kind


@dataclass(frozen=True)
class Message:
    """One thing that happened to a run. `text` is a line for a person."""

    kind: str
    run: str
    step: int
    message: str
    host: str
    time: float = field(default_factory=time.time)

    @property
    def text(self) -> str:
        """One line with everything that matters."""
        return f"{self.run}: {self.kind} at step {self.step}: {self.message}"

    def body(self) -> bytes:
        """JSON, as a command reads it and a webhook gets it; `text` is what chat programs show."""
        return json.dumps(asdict(self) | {"text": self.text}, ensure_ascii=False).encode()


def check(settings: NotifySection, environment: Mapping[str, str] | None = None) -> None:
    """Refuses with UserError a webhook whose variable isn't set or holds no address; the address is not shown."""
    name = settings.webhook_env
    if name is None:
        return
    address = (os.environ if environment is None else environment).get(name)
    if not address:
        raise UserError(
            f"run.notify.webhook_env = {name}: the environment has no such variable; export {name}=https://..."
        )
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"run.notify.webhook_env = {name}: the variable holds no address; expected https://host/...")


class Notifier:
    """Sends messages of the kinds that the recipe wants, in order."""

    def __init__(self, settings: NotifySection, environment: Mapping[str, str] | None = None) -> None:
        env = os.environ if environment is None else environment
        self.settings = settings
        self._address = env.get(settings.webhook_env) if settings.webhook_env else None
        self._queue: queue.Queue[Message | None] = queue.Queue(WAITING)
        self._problems: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._alarms: dict[str, float] = {}
        self._thread: threading.Thread | None = None

    def send(self, message: Message) -> None:
        """Returns at once."""
        if message.kind not in self.settings.on or (message.kind == "alarm" and self._too_soon(message)):
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="notify", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait(message)
        except queue.Full:
            self._problems.put(f"a notification was dropped: {WAITING} wait already")

    def _too_soon(self, message: Message) -> bool:
        kind = message.message.partition(":")[0]
        before, self._alarms[kind] = self._alarms.get(kind), message.time
        return before is not None and message.time - before < ALARM_SECONDS

    def problems(self) -> list[str]:
        """What could not be delivered since the last call, and why."""
        found = []
        while not self._problems.empty():
            found.append(self._problems.get())
        return found

    def close(self) -> None:
        """Waits for what is being sent, at most `timeout_seconds`."""
        if self._thread is None:
            return
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(self.settings.timeout_seconds)

    def _work(self) -> None:
        while (message := self._queue.get()) is not None:
            for name, way in (("command", self._call), ("webhook", self._post)):
                try:
                    problem = way(message)
                except Exception as error:  # a message must never end a run
                    problem = type(error).__name__  # its text may hold the address
                if problem is not None:
                    self._problems.put(f"run.notify.{name}: the {message.kind} was not delivered: {problem}")

    def _call(self, message: Message) -> str | None:
        """Runs the command without a shell: JSON on its input, and what WORDS names in braces in its words."""
        if not self.settings.command:
            return None
        values = asdict(message) | {"text": message.text}
        pattern = rf"\{{({'|'.join(WORDS)})\}}"
        words = [re.sub(pattern, lambda found: str(values[found[1]]), word) for word in self.settings.command]
        try:
            done = subprocess.run(
                words,
                input=message.body(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=self.settings.timeout_seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"no end within {self.settings.timeout_seconds:g} s"
        except OSError as error:
            return f"{words[0]}: {error.strerror}"
        return f"{words[0]} left with exit code {done.returncode}" if done.returncode else None

    def _post(self, message: Message) -> str | None:
        if self._address is None:
            return None
        import httpx

        headers = {"Content-Type": "application/json"}
        seconds = self.settings.timeout_seconds
        answer = httpx.post(self._address, content=message.body(), headers=headers, timeout=seconds)
        return None if answer.is_success else f"HTTP {answer.status_code}"
