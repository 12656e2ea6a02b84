"""The console script: exit codes, one line for a mistake, and commands that load only when called."""

import json
import subprocess
import sys
import types

import pytest

from megatron_joy.cli import main as cli
from megatron_joy.cli.main import COMMANDS, load_command, main
from megatron_joy.errors import UserError, WorkError


def joy(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_joy.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"]])
def test_without_arguments_help_is_printed_and_lists_every_command(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in COMMANDS)
    assert "Example:" in printed


def test_help_and_torch_free_commands_do_not_import_torch() -> None:
    program = (
        "import sys; from megatron_joy.cli.main import main; "
        "codes = [main(['--help']), main(['recipe', 'list']), main(['recipe', 'show', 'joyai_tiny'])]; "
        "assert codes == [0, 0, 0], codes; assert 'torch' not in sys.modules; assert 'megatron' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_registered_command_loads_and_its_help_has_an_example(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = load_command(name).commands[name]
    subcommands = getattr(command, "commands", {})
    for path in [[name], *([name, sub] for sub in subcommands)]:
        assert main([*path, "--help"]) == 0
        printed = capsys.readouterr().out
        assert f"joy {' '.join(path)}" in printed
        if path[-1] not in COMMANDS or not subcommands:
            assert "xample" in printed, f"joy {' '.join(path)} --help shows no example"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rcipe"], "joy rcipe: no such command; the nearest is `joy recipe`"),
        (["recipe", "shw"], "No such command 'shw'"),
        (["recipe", "show", "--sise"], "--size"),
        (["recipe", "show"], "which recipe?"),
        (["recipe", "show", "joyai_tiny", "train.stepz=1"], "the nearest known key is train.steps"),
        (["recipe", "show", "nothing_like_it"], "no such file or shipped recipe"),
        (["recipe", "show", "joyai_tiny", "--size", "--describe"], "ask for one of them"),
        (["doctor", "--jsn"], "--json"),
        (["recipe", "show", "joyai_tiny", "layout.tensor_model_parallel_size=3"], "must divide"),
    ],
)
def test_a_users_mistake_exits_2_with_one_line_and_prints_nothing(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert said in printed.err


def test_the_process_itself_exits_2_without_a_traceback() -> None:
    done = joy("recipe", "show", "joyai_tiny", "train.stepz=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: command line: train.stepz = 1: unknown key; the nearest known key is train.steps\n"


def test_several_errors_are_several_lines() -> None:
    done = joy("recipe", "show", "joyai_tiny", "train.stepz=1", "seed=-3")
    assert done.returncode == 2
    assert [line.startswith("error: command line: ") for line in done.stderr.splitlines()] == [True, True]


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (UserError("no such thing"), 2, "error: no such thing\n"),
        (WorkError("the disk is full"), 1, "error: the disk is full\n"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(75), 75, ""),
    ],
)
def test_what_a_command_raises_becomes_its_exit_code(
    raised: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command() -> None:
        raise raised

    monkeypatch.setitem(sys.modules, "fake_command", types.SimpleNamespace(command=command))
    monkeypatch.setitem(cli.COMMANDS, "fake", cli.Command("fake_command", "raises"))
    # A command that leaves by itself (pretrain after SIGTERM) keeps its own code.
    with pytest.raises(SystemExit) as left:
        sys.exit(main(["fake"]))
    assert left.value.code == code
    assert capsys.readouterr().err == said


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = [sys.executable, "-m", "megatron_joy.cli.main", "recipe", "show", "--describe"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_recipe_list_and_show_speak_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "list", "--json"]) == 0
    assert {entry["name"] for entry in json.loads(capsys.readouterr().out)} >= {"joyai_48b_a3b", "joyai_tiny"}
    assert main(["recipe", "show", "joyai_tiny", "seed=9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 9


def test_describe_gives_each_key_a_type_a_default_and_a_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "show", "--describe", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["key"] for row in rows} >= {"name", "model.vocab_size", "data.train.N.weight", "run.folder"}
    assert all(row["type"] and row["default"] and len(row["description"]) > 10 for row in rows)
    assert main(["recipe", "show", "joyai_tiny", "--describe"]) == 0
    assert "int > 0; default 1; here 2" in capsys.readouterr().out
