"""Files that are whole or absent, and folders that belong to one run."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from zotuner.errors import ZotunerError

LOCK, OWNER = ".lock", ".owner"  # in a run's folder: held by the process that writes to it, and who that is
RUN_MARKS = ("config.yaml", "metrics.jsonl")  # a folder that holds both is a run's


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file aside, syncs it and renames it into place: a reader sees the old content or the new."""
    data = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def sync(path: Path) -> None:
    """Sees to it that a file, or what a folder lists, outlives the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def built_aside(target: Path) -> Iterator[Path]:
    """A folder to fill: it appears as `target`, in place of what was there, when the block ends well, and only then."""
    target = target.resolve()  # "." has no name, and a link is not to be replaced itself
    target.parent.mkdir(parents=True, exist_ok=True)
    room = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    aside, before = room / "new", room / "old"
    aside.mkdir()
    try:
        yield aside
        for path in [*aside.rglob("*"), aside]:
            path.chmod(0o755 if path.is_dir() else 0o644)  # some libraries write files for their owner alone
            sync(path)
        if target.exists():
            target.rename(before)
        aside.rename(target)
        sync(target.parent)
    except BaseException:
        if before.exists() and not target.exists():
            before.rename(target)
        raise
    finally:
        shutil.rmtree(room, ignore_errors=True)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Around what writes to an output folder.

    Raises:
        ZotunerError: The machine refuses it.
    """
    try:
        yield
    except OSError as error:
        raise ZotunerError(f"{out}: cannot be written: {error.strerror or error}; choose another --out") from None


def is_run(folder: Path) -> bool:
    """Whether a folder is one that a run filled."""
    return all((folder / mark).is_file() for mark in RUN_MARKS)


def is_vacant(out: Path, what: str) -> bool:
    """Whether a folder for a "run", "tuner" or "model" is empty, or can be made.

    Raises:
        ZotunerError: There is a file in its place, or in that of a folder above it; or it cannot be looked into.
    """
    try:
        return _is_vacant(out, what)
    except OSError as error:
        raise ZotunerError(f"{out}: cannot be used: {error.strerror or error}; choose another --out") from None


def _is_vacant(out: Path, what: str) -> bool:
    if out.exists() and not out.is_dir():
        raise ZotunerError(f"{out}: expected a folder for the {what}, found a file; choose another --out")
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ZotunerError(f"{out}: cannot be made, since {above} is a file; choose another --out")
    return not out.is_dir() or all(path.name in (LOCK, OWNER) for path in out.iterdir())


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """The folder of a run belongs to this process for a while; the system ends the claim of a process that dies.

    Folders that were made for it go again, if nothing came into them.

    Raises:
        ZotunerError: Another process writes to it, or it cannot be written.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise ZotunerError(f"{out}: {_owner(out)} is writing to it; wait for it, or choose another --out") from None
    except OSError as error:
        raise ZotunerError(f"{out}: cannot be written: {error.strerror or error}; choose another --out") from None
    try:
        write_atomically(out / OWNER, f"{os.getpid()} {socket.gethostname()}\n")
        yield
    finally:
        (out / OWNER).unlink(missing_ok=True)
        (out / LOCK).unlink(missing_ok=True)
        lock.release()
        for folder in made:
            if any(folder.iterdir()):
                break
            folder.rmdir()


def _owner(out: Path) -> str:
    try:
        pid, host = (out / OWNER).read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return "another process"
    return f"process {pid}" if host == socket.gethostname() else f"process {pid} on {host}"


def has_writer(out: Path) -> bool | None:
    """Whether a process writes to the folder of a run; None where that is a matter of another machine."""
    try:
        pid, host = (out / OWNER).read_text(encoding="utf-8").split()
        return _lives(int(pid)) if host == socket.gethostname() else None
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return None


def _lives(pid: int) -> bool:
    """Whether a process runs; one that ended but that nobody waited for, as in a container without init, does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def writer(out: Path) -> int | None:
    """The process of this machine that writes to the folder of a run; None where there is none."""
    try:
        return int((out / OWNER).read_text(encoding="utf-8").split()[0]) if has_writer(out) else None
    except (OSError, ValueError):  # it has just ended
        return None


def check_out(out: Path, overwrite: bool, inputs: Sequence[Path | None] = ()) -> None:
    """Refuses an output folder that holds something, unless it is a run that may be overwritten.

    Args:
        out: The folder.
        overwrite: Whether a run that it holds may go.
        inputs: What the new run reads: none of it may lie in a folder that is overwritten.

    Raises:
        ZotunerError: The folder holds another run, or anything that no run wrote, or an input.
    """
    if is_vacant(out, "run"):
        return
    if not is_run(out):
        raise ZotunerError(f"{out}: expected an empty folder or a run, found other files; choose another --out")
    if not overwrite:
        raise ZotunerError(f"{out}: holds another run; choose another --out, or pass --overwrite to replace it")
    for path in inputs:
        if path is not None and path.exists() and path.resolve().is_relative_to(out.resolve()):
            raise ZotunerError(f"{path}: lies in --out, which would be emptied; choose another --out")


def claim_out(out: Path, overwrite: bool, config: str) -> None:
    """Empties a `locked` output folder, after `check_out`; writes the marks of a run, `config.yaml` first."""
    check_out(out, overwrite)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for path in out.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in (LOCK, OWNER):
                path.unlink()
        write_atomically(out / RUN_MARKS[0], config)
        (out / RUN_MARKS[1]).touch()
