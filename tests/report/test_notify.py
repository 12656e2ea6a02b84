"""Somebody is told of a run by a real command and a real HTTP server; a run does not wait for them or fail by them."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megatron_joy.errors import UserError
from megatron_joy.recipe import load_recipe
from megatron_joy.recipe.schema import NotifySection
from megatron_joy.report import notify
from megatron_joy.report.notify import Message, Notifier
from tests.train.minuscule import EP2, make_home, train

KEEP = """
import sys
with open(sys.argv[1], "ab") as told:
    told.write(sys.stdin.buffer.read() + b"\\n")
with open(sys.argv[1] + ".words", "w") as words:
    words.write(sys.argv[2])
"""


class Server:
    """Takes posts, answers with `status`, after `delay` seconds."""

    def __init__(self) -> None:
        self.posts: list[tuple[str, dict[str, Any]]] = []
        self.status, self.delay = 200, 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.posts.append((self.path, json.loads(body)))
                time.sleep(outer.delay)
                self.send_response(outer.status)
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}/secret-token"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    started = Server()
    yield started
    started.http.shutdown()
    started.http.server_close()


def message(kind: str = "stop", text: str = "stopped as asked", at: float = 0.0) -> Message:
    return Message(kind, "tiny", 7, text, "host1", at)


def hook(**settings: Any) -> NotifySection:
    return NotifySection.model_validate({"webhook_env": "HOOK"} | settings)


def test_a_webhook_gets_the_message_as_json(server: Server) -> None:
    notifier = Notifier(hook(), {"HOOK": server.address})
    notifier.send(message())
    notifier.close()
    assert server.posts == [
        (
            "/secret-token",
            {
                "kind": "stop",
                "run": "tiny",
                "step": 7,
                "message": "stopped as asked",
                "host": "host1",
                "time": 0.0,
                "text": "tiny: stop at step 7: stopped as asked",
            },
        )
    ]
    assert notifier.problems() == []


def test_what_is_not_wanted_is_not_told_and_alarms_do_not_flood(server: Server) -> None:
    notifier = Notifier(hook(on=["alarm"]), {"HOOK": server.address})
    for kind, text, at in (
        ("stop", "stopped", 0.0),
        ("alarm", "spike: loss 9", 0.0),
        ("alarm", "spike: loss 8", 10.0),
        ("alarm", "straggler: rank 3", 20.0),
        ("alarm", "spike: loss 7", 1000.0),
    ):
        notifier.send(message(kind, text, at))
    notifier.close()
    assert [body["message"] for _, body in server.posts] == ["spike: loss 9", "straggler: rank 3", "spike: loss 7"]


def test_a_command_gets_json_and_words_and_no_shell(tmp_path: Path) -> None:
    told = tmp_path / "told"
    command = [sys.executable, "-c", KEEP, str(told), "{kind} {step}; {unknown}"]
    notifier = Notifier(NotifySection(command=command))
    notifier.send(message(text="$(touch /tmp/never) {run}"))
    notifier.close()
    assert notifier.problems() == []
    assert json.loads(told.read_text())["message"] == "$(touch /tmp/never) {run}"
    assert Path(f"{told}.words").read_text() == "stop 7; {unknown}"


def test_a_server_that_hangs_holds_nobody_up(server: Server) -> None:
    server.delay = 5.0
    notifier = Notifier(hook(timeout_seconds=0.5), {"HOOK": server.address})
    for _ in range(3 * notify.WAITING):
        notifier.send(message())
    notifier.close()
    assert len(server.posts) < notify.WAITING  # nobody waited until each was sent, nor until the queue was
    assert any("dropped" in problem for problem in notifier.problems())


def test_what_can_not_be_delivered_is_said_without_the_address(server: Server) -> None:
    server.status = 500
    command = ["/nonexistent/program"]
    for address, said in ((server.address, "HTTP 500"), ("http://127.0.0.1:1/secret-token", "ConnectError")):
        notifier = Notifier(hook(command=command), {"HOOK": address})
        notifier.send(message())
        notifier.close()
        assert notifier.problems() == [
            "run.notify.command: the stop was not delivered: /nonexistent/program: No such file or directory",
            f"run.notify.webhook: the stop was not delivered: {said}",
        ]


def test_an_address_that_is_missing_or_none_is_refused_and_not_shown() -> None:
    notify.check(hook(), {"HOOK": "https://hooks.example.org/x"})
    with pytest.raises(UserError, match=r"webhook_env = HOOK: the environment has no such variable; export HOOK="):
        notify.check(hook(), {})
    with pytest.raises(UserError, match="holds no address") as refused:
        notify.check(hook(), {"HOOK": "secret-token"})
    assert "secret-token" not in str(refused.value)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and recipe."""
    return make_home(tmp_path_factory.mktemp("home"))


def test_settings_without_anybody_to_tell_are_refused(home: Path) -> None:
    with pytest.raises(UserError, match=r"run\.notify\.on .* has no effect"):
        load_recipe(str(home / "minuscule.toml"), ['run.notify.on=["stop"]'])


def test_a_run_tells_once_of_its_start_and_its_end(home: Path, tmp_path: Path) -> None:
    told = tmp_path / "told"
    command = f"run.notify.command={json.dumps([sys.executable, '-c', KEEP, str(told), 'x'])}"
    assert train(home, tmp_path / "run", EP2, command).codes == [0, 0]
    lines = [json.loads(line) for line in told.read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("start", 0), ("finish", 8)]
