"""Who may write a run: a lease that its holder renews, and numbers of attempts that are claimed once.

One launch at a time holds the lease. Each attempt claims the next number (its fence) by creating a file that must not
exist, which file systems that nodes share do atomically. A rank whose number is no longer the newest saves nothing any
more: a node that was frozen, given up and comes back can do no harm.
"""

import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_joy.errors import UserError, WorkError
from megatron_joy.runstate import launch_folder
from megatron_joy.runstate.files import read_json, write_json

LEASE_SECONDS = 60.0  # a lease that was not renewed for so long has no living holder
RENEW_SECONDS = 10.0
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Holder:
    """Who holds the lease. launch: the same for all that belongs to one launch, also after a requeue."""

    launch: str
    host: str
    pid: int
    fence: int
    renewals: int = 0
    released: bool = False

    def __str__(self) -> str:
        return f"{self.launch} (process {self.pid} on {self.host})"


def _lease_path(run: Path) -> Path:
    return launch_folder(run) / "lease.json"


def read_holder(run: Path) -> Holder | None:
    """The lease as it stands, released or not."""
    value = read_json(_lease_path(run))
    try:
        return Holder(**value) if value is not None else None
    except TypeError:
        return None


def _is_dead(holder: Holder) -> bool:
    """Whether it is known at once that a holder lives no more: it said so, or was a process of this host."""
    if holder.released:
        return True
    if holder.host != platform.node():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def refuse_if_held(run: Path, launch: str, wait: bool = False) -> None:
    """Raises UserError when another launch than `launch` holds the lease.

    A holder that has not renewed for LEASE_SECONDS holds nothing. Without `wait` the file's time tells that; with it
    this process watches the lease for so long, which is right whatever the clocks of hosts say.
    """
    first, end = read_holder(run), time.monotonic() + LEASE_SECONDS
    while (holder := read_holder(run)) is not None and holder.launch != launch and not _is_dead(holder):
        renewed = holder != first
        over = time.monotonic() > end if wait else time.time() - _lease_path(run).stat().st_mtime > LEASE_SECONDS
        if over and not renewed:
            return
        if renewed or not wait:
            raise UserError(
                f"run.folder {run}: {holder} trains this run now; wait for it, stop it, or name a new folder"
            )
        time.sleep(_POLL_SECONDS)


class Lease:
    """The lease, held by this process from `take` to `release`."""

    def __init__(self, run: Path, launch: str) -> None:
        self.run, self.launch = run, launch
        self.fence = 0
        self._renewals = 0
        self._renewed = 0.0

    def take(self) -> int:
        """Claims the next attempt's number, and the lease with it. Raises UserError when another launch holds it."""
        refuse_if_held(self.run, self.launch, wait=True)
        claims = launch_folder(self.run) / "claims"
        claims.mkdir(parents=True, exist_ok=True)
        self.fence = newest_claim(self.run) + 1
        try:
            os.close(os.open(claims / f"{self.fence:06d}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            raise UserError(
                f"run.folder {self.run}: another launch began attempt {self.fence} just now; start one of them"
            ) from None
        self._write()
        return self.fence

    def renew(self) -> None:
        """Keeps the lease, when it is time to. Raises WorkError when a later attempt has taken it."""
        if time.monotonic() - self._renewed < RENEW_SECONDS:
            return
        check_fence(self.run, self.fence)
        self._renewals += 1
        self._write()

    def release(self) -> None:
        """Says that nobody trains the run, unless somebody else does."""
        if self.fence and newest_claim(self.run) == self.fence:
            self._write(released=True)

    def _write(self, released: bool = False) -> None:
        holder = Holder(self.launch, platform.node(), os.getpid(), self.fence, self._renewals, released)
        write_json(_lease_path(self.run), asdict(holder))
        self._renewed = time.monotonic()


def newest_claim(run: Path) -> int:
    """The largest number of an attempt; 0 before the first."""
    try:
        names = os.listdir(launch_folder(run) / "claims")
    except FileNotFoundError:
        return 0
    return max((int(name) for name in names if name.isdecimal()), default=0)


def check_fence(run: Path, fence: int) -> None:
    """Raises WorkError when a later attempt than `fence` was begun: this one must write no more."""
    newest = newest_claim(run)
    if newest > fence:
        raise WorkError(f"attempt {fence} of {run} was given up and attempt {newest} begun; this one writes no more")
