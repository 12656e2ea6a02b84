"""What a cluster wants to be told, as a TOML file, and the templates of slurm/ with it filled in.

Whatever comes from a file or a recipe ends up as a value that Slurm's parser or bash reads, so each is held to what its
place allows and quoted; nothing is ever pasted in as code.
"""

import re
import shlex
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from megatron_joy.errors import UserError

TEMPLATES = Path(__file__).parents[1] / "slurm"
DATA_MERGE = "data_merge.sbatch"
OPEN, CLOSE = "# >>> site", "# <<< site"
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY", re.IGNORECASE)
SAFE_PATH = re.compile(r"[\w./@+=,:-]+")


def _printable(value: str) -> str:
    if not value.isprintable() or not value:
        raise ValueError("expects printable text in one line")
    return value


Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.@+:/|&-]+(,[A-Za-z0-9_.@+:/-]+)*$")]
Text = Annotated[str, AfterValidator(_printable)]
Option = Annotated[str, Field(pattern=r"^--[a-z][a-z-]*(=[\w.,:/@+*%\[\]-]+)?$")]
Time = Annotated[str, Field(pattern=r"^(\d+-)?\d+(:\d\d){0,2}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Container(_Strict):
    """In what ranks run. The supervisor stays outside, on the batch host."""

    kind: Literal["pyxis", "apptainer"]
    image: Text
    mounts: list[Text] = Field(default_factory=list, description="FROM:TO, or FROM:TO:ro.")
    python: Text = Field("python3", description="Inside the container.")


class Supervision(_Strict):
    """When a run is restarted; docs/launch.md has the policy."""

    restarts: NonNegativeInt = Field(10, description="How often a run may fail or hang.")
    first_wait: NonNegativeFloat = Field(5.0, description="Seconds before a restart, doubled each time.")
    preflight: bool = Field(False, description="Measure the nodes first; unfit ones are left out (docs/preflight.md).")
    hang_factor: PositiveFloat = Field(10.0, description="Limit of a step, in medians of a step.")
    hang_least: PositiveFloat = Field(60.0, description="Smallest limit of a step, seconds.")
    hang_slow: PositiveFloat = Field(1800.0, description="Limit of starting, validation and checkpoint, seconds.")

    def options(self) -> list[str]:
        """For `launch.in_slurm`."""
        valued = self.model_dump(exclude={"preflight"})
        flags = ["--preflight"] if self.preflight else []
        return [*(f"--{name.replace('_', '-')}={value}" for name, value in valued.items()), *flags]


class DataJobs(_Strict):
    """What jobs of a data pipeline have instead of the run's; they need CPUs, a core for each task of an array."""

    partition: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    time: Time | None = None
    cpus_per_task: PositiveInt | None = Field(None, description="Of the job that closes the accounts: its workers.")
    sbatch: list[Option] = Field(default_factory=list, description="Further options, as --mem=8G.")


class Site(_Strict):
    """A site file. Every key may be left out."""

    account: Word | None = None
    partition: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    reservation: Word | None = None
    time: Time | None = None
    signal_seconds: Annotated[int, Field(gt=0, le=65_535)] = Field(300, description="Warning before the time is up.")
    cpus_per_task: PositiveInt | None = None
    sbatch: list[Option] = Field(default_factory=list, description="Further options, as --exclusive or --mem=0.")
    modules: list[Word] = Field(default_factory=list, description="Loaded in this order.")
    interface: Word | None = Field(None, description="Network interface of NCCL and gloo.")
    python: Text | None = Field(None, description="The batch host's Python; none: the one that submits.")
    gpu: Text | None = Field(None, description="What memory is planned for: a GPU of `joy plan`.")
    environment: dict[Name, Text] = Field(default_factory=dict, description="Variables of ranks and supervisor.")
    container: Container | None = None
    supervisor: Supervision = Field(default_factory=Supervision)
    data: DataJobs = Field(default_factory=DataJobs, description="Jobs of `joy data run --executor slurm`.")


def load_site(path: Path | None) -> Site:
    """A site file, checked; every default without one. Raises UserError with all that is wrong, a line each."""
    if path is None:
        return Site.model_validate({})
    try:
        site = Site.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"--site {path}: cannot be read ({error.strerror}); name a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--site {path}: not TOML, {error}; mend the syntax there") from None
    except ValidationError as error:
        raise UserError("\n".join(_problem(path, one) for one in error.errors())) from None
    for name in site.environment:
        if SECRET.search(name):
            raise UserError(
                f"--site {path}: environment.{name}: looks like a secret, which a script must not hold; export it in "
                "the shell that submits, jobs inherit it"
            )
    return site


def _problem(path: Path, error: Mapping[str, object]) -> str:
    where = ".".join(str(part) for part in error["loc"])  # type: ignore[attr-defined]
    if error["type"] == "extra_forbidden":
        return f"--site {path}: {where}: no such key; known are {', '.join(Site.model_fields)}"
    return f"--site {path}: {where} = {error['input']!r}: {error['msg']}"


def header(text: str, options: Mapping[str, str | None]) -> str:
    """A template with these #SBATCH options; None takes one out, "" gives one without a value."""
    lines, left = [], {name: value for name, value in options.items() if value is not None}
    last = 0
    for line in text.splitlines():
        found = re.match(r"#SBATCH --([a-z-]+)", line)
        name = found[1] if found else ""
        if name in options:
            if name not in left:
                continue
            line = _directive(name, left.pop(name))
        lines.append(line)
        last = len(lines) if found else last
    lines[last:last] = [_directive(name, value) for name, value in left.items()]
    return "\n".join(lines) + "\n"


def _directive(name: str, value: str) -> str:
    return f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}"


def site_region(site: Site, python: str, supervisor: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """The lines of bash between a template's two marks."""
    lines = [f"module load {shlex.join(site.modules)}"] if site.modules else []
    variables = dict(site.environment)
    if site.interface:
        variables = {"NCCL_SOCKET_IFNAME": site.interface, "GLOO_SOCKET_IFNAME": site.interface} | variables
    lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    options = list(supervisor)
    inside, box = ["-m", "megatron_joy.cli.main"], site.container
    command = f'("$python" {shlex.join(inside)})'
    if box is not None and box.kind == "pyxis":
        options.append(f"--step-option=--container-image={box.image}")
        if box.mounts:
            options.append(f"--step-option=--container-mounts={','.join(box.mounts)}")
        command = f"({shlex.join([box.python, *inside])})"
    elif box is not None:
        mounts = [word for mount in box.mounts for word in ("--bind", mount)]
        command = f"({shlex.join(['apptainer', 'exec', '--nv', *mounts, box.image, box.python, *inside])})"
    lines += [f"python={shlex.quote(python)}", f"rank_command={command}"]
    lines += [f"supervisor_options=({shlex.join(options)})", f"set -- {shlex.join(arguments)}"]
    return lines


def fill_in(template: str, options: Mapping[str, str | None], region: Sequence[str]) -> str:
    """A template of slurm/ as it is submitted."""
    try:
        text = (TEMPLATES / template).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{TEMPLATES / template}: not there; run from a clone, `pip install -e .`") from None
    before, _, rest = text.partition(OPEN)
    after = rest.partition(CLOSE)[2]
    return header(before, options) + "\n".join([f"{OPEN}: filled in", *region, CLOSE]) + after


def site_options(site: Site) -> dict[str, str | None]:
    """The #SBATCH options that are the site's."""
    named = ("account", "partition", "qos", "constraint", "reservation", "time")
    options: dict[str, str | None] = {name: getattr(site, name) for name in named if getattr(site, name)}
    options["signal"] = f"B:USR1@{site.signal_seconds}"
    if site.cpus_per_task:
        options["cpus-per-task"] = str(site.cpus_per_task)
    return options | _further(site.sbatch)


def _further(words: Sequence[str]) -> dict[str, str]:
    parts = (word.removeprefix("--").partition("=") for word in words)
    return {name: value for name, _, value in parts}


def data_script(site: Site, template: str) -> str:
    """A template of a data pipeline's jobs as it is submitted.

    Whole nodes, signals and network interfaces are the ranks'; an array's tasks take none of them from the site.
    """
    own = site.data.model_dump(exclude={"sbatch", "cpus_per_task"}, exclude_none=True)
    shared = {
        name: getattr(site, name) for name in ("account", "partition", "qos", "constraint", "reservation", "time")
    }
    options = {name: value for name, value in (shared | own).items() if value} | _further(site.data.sbatch)
    if site.data.cpus_per_task and template == DATA_MERGE:
        options["cpus-per-task"] = str(site.data.cpus_per_task)
    lines = [f"module load {shlex.join(site.modules)}"] if site.modules else []
    lines += [f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()]
    return fill_in(template, options, [*lines, f"python=({shlex.join(_data_python(site))})"])


def _data_python(site: Site) -> list[str]:
    """The command that a data pipeline's jobs call Python with."""
    box = site.container
    if box is None:
        return [site.python or sys.executable]
    if box.kind == "apptainer":
        return [
            "apptainer",
            "exec",
            *(word for mount in box.mounts for word in ("--bind", mount)),
            box.image,
            box.python,
        ]
    mounts = [f"--container-mounts={','.join(box.mounts)}"] if box.mounts else []
    return ["srun", "--ntasks=1", f"--container-image={box.image}", *mounts, box.python]
