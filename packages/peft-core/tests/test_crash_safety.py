"""A save over an old checkpoint, with a failure at every single operation on the file system.

Three kinds of failure. An error or an interrupt at the n-th operation, before or after it took effect. A dead
process: from the n-th operation on nothing happens any more, clean-up included. A power cut: of what was not
flushed, any part may be lost. Each n from 1 until the save completes; whatever fails, the directory must
read as the old checkpoint or the new one, and a retry must work.
"""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hostile.corpus import CONFIG as GOOD_CONFIG
from hostile.corpus import Case, good, packed, write
from records_by_hand import HandConfig, digest_of_directory, digest_of_record, record

from peft_core import files
from peft_core.checkpoint import read, save
from peft_core.errors import CheckpointError
from peft_core.locating import CONFIG, WEIGHTS

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the operations are those of POSIX systems")

OPERATIONS = ("open", "write", "fsync", "replace", "unlink", "mkdir", "scandir")


def old() -> Any:
    return record(0)


def new() -> Any:
    # Another config as well: a mixture of the two directories would be seen.
    return record(1, config=HandConfig(target_modules=["q_proj", "v_proj"], lora_alpha=64))


def newer() -> Any:
    return record(2, config=HandConfig(target_modules=["q_proj", "v_proj"], lora_alpha=5))


class Crash(BaseException):
    """The process is gone."""


# ---- where a save starts from


def from_nothing(directory: Path) -> str | None:
    return None


def from_empty(directory: Path) -> str | None:
    directory.mkdir()
    return None


def from_ours(directory: Path) -> str | None:
    save(directory, old())
    return digest_of_record(old())


def from_another_writers(directory: Path) -> str | None:
    write(
        Case("", "", "", packed(good(), {"format": "pt"}), str(GOOD_CONFIG).replace("'", '"').encode()),
        directory,
    )
    return digest_of_directory(directory)


def from_an_interrupted_save(directory: Path) -> str | None:
    """`newer` is committed, but its config is in the journal; and a writer died before its commit."""
    save(directory, old())
    config = (directory / CONFIG).read_bytes()
    save(directory, newer())
    os.rename(directory / CONFIG, directory / f".{CONFIG}.0123.tmp")
    (directory / CONFIG).write_bytes(config)
    (directory / f".{WEIGHTS}.4567.tmp").write_bytes(b"half a fi")
    (directory / f".{CONFIG}.4567.tmp").write_bytes(b"{")
    return digest_of_record(newer())


def from_a_damaged_file(directory: Path) -> str | None:
    save(directory, old())
    os.truncate(directory / WEIGHTS, 100)
    return None


STARTS = [
    from_nothing,
    from_empty,
    from_ours,
    from_another_writers,
    from_an_interrupted_save,
    from_a_damaged_file,
]


def state_of(directory: Path) -> str | None:
    """The digest of what a reader finds; None where there is nothing to read."""
    try:
        return digest_of_directory(directory)
    except CheckpointError:
        return None


def entries(directory: Path) -> list[str]:
    return sorted(os.listdir(directory)) if directory.exists() else []


# ---- failing the n-th operation


class Failing:
    """Wraps the operations of `os`: the `at`-th fails, and after a crash all that follow do."""

    def __init__(self, at: int, how: Callable[[], BaseException], *, after: bool, dead: bool) -> None:
        self.at, self.how, self.after, self.dead = at, how, after, dead
        self.count = 0

    def wrap(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.dead and self.count > self.at:
                raise Crash
            if self.count != self.at:
                return original(*args, **kwargs)
            if name == "write":  # half of it gets through
                original(args[0], args[1][: len(args[1]) // 2])
            elif self.after:
                result = original(*args, **kwargs)
                if name == "open":
                    os.close(result)
                elif name == "scandir":
                    result.close()
            raise self.how()

        return operation


@contextmanager
def failing(fault: Failing) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, fault.wrap(name, getattr(os, name)))
        yield


def full_disk() -> BaseException:
    return OSError(errno.ENOSPC, "No space left on device")


FAULTS = [
    pytest.param(full_disk, False, id="error_before"),
    pytest.param(full_disk, True, id="error_after"),
    pytest.param(KeyboardInterrupt, False, id="interrupt_before"),
    pytest.param(KeyboardInterrupt, True, id="interrupt_after"),
]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("how", "after"), FAULTS)
def test_an_error_at_every_operation(
    how: Callable[[], BaseException], after: bool, start: Callable[[Path], str | None], tmp_path: Path
) -> None:
    wanted = digest_of_record(new())
    states: list[str | None] = []
    for n in itertools.count(1):
        directory = tmp_path / str(n)
        before = start(directory)
        fault = Failing(n, how, after=after, dead=False)
        raised: BaseException | None = None
        try:
            with failing(fault):
                save(directory, new())
        except (CheckpointError, KeyboardInterrupt) as error:
            raised = error
        if fault.count < n:
            break
        assert raised is None or isinstance(raised, KeyboardInterrupt) or "No space left" in str(raised)
        state = state_of(directory)
        assert state in ((before, wanted) if raised else (wanted,)), f"operation {n}"
        states.append(state)
        if raised and state == wanted:
            # After the commit: what could be finished was, so that readers who know no journal are right too.
            assert entries(directory) == [CONFIG, WEIGHTS]
        elif start is not from_an_interrupted_save:
            assert not [e for e in entries(directory) if e.endswith(".tmp")], f"operation {n} left files behind"
        save(directory, new())
        assert state_of(directory) == wanted
        assert entries(directory) == [CONFIG, WEIGHTS]
    assert n > 15
    assert wanted in states  # failures after the commit were among them
    assert before in states


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("after", [False, True])
def test_a_dead_process_at_every_operation(after: bool, start: Callable[[Path], str | None], tmp_path: Path) -> None:
    wanted = digest_of_record(new())
    states: list[str | None] = []
    for n in itertools.count(1):
        directory = tmp_path / str(n)
        before = start(directory)
        fault = Failing(n, Crash, after=after, dead=True)
        try:
            with failing(fault):
                save(directory, new())
        except Crash:
            pass
        if fault.count < n:
            break
        state = state_of(directory)
        assert state in (before, wanted), f"operation {n}"
        states.append(state)
        save(directory, newer())
        assert state_of(directory) == digest_of_record(newer())
        assert entries(directory) == [CONFIG, WEIGHTS], f"operation {n} left files behind"
    assert wanted in states
    assert states[0] == before
    # Once new, new for good: the commit is one moment.
    assert states == sorted(states, key=lambda state: state == wanted)


# ---- a power cut


class Disk:
    """Records what a save does, and gives the states a power cut may leave.

    The model: content of a file is there once the file was flushed; before that the file may be empty.
    Names in a directory are there once the directory was flushed; of later changes any part, in any order.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.contents: dict[int, list[bytes]] = {}
        self.flushed: set[int] = set()
        self.names: dict[str, int] = {}
        for path in directory.iterdir():
            number = len(self.contents)
            self.contents[number] = [path.read_bytes()]
            self.flushed.add(number)
            self.names[path.name] = number
        self.live = dict(self.names)
        self.pending: list[tuple[str, str, int]] = []
        self.open: dict[int, int | None] = {}
        self.states: list[list[dict[str, bytes]]] = []

    def remember(self) -> None:
        found = []
        for size in range(len(self.pending) + 1):
            for chosen in itertools.combinations(self.pending, size):
                names = dict(self.names)
                for gone, name, number in chosen:
                    names.pop(gone, None)
                    if name:
                        names[name] = number
                found.append({n: b"".join(self.contents[i]) if i in self.flushed else b"" for n, i in names.items()})
        self.states.append(found)

    @contextmanager
    def recording(self) -> Iterator[None]:
        real = {name: getattr(os, name) for name in ("open", "write", "fsync", "replace", "unlink")}

        def open_(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            descriptor: int = real["open"](path, flags, *args, **kwargs)
            self.open[descriptor] = None
            if flags & os.O_CREAT:
                number = len(self.contents)
                self.contents[number] = []
                self.open[descriptor] = self.live[Path(path).name] = number
                self.pending.append(("", Path(path).name, number))
                self.remember()
            return descriptor

        def write_(descriptor: int, data: Any) -> int:
            number = self.open[descriptor]
            assert number is not None
            self.contents[number].append(bytes(data))
            self.remember()
            count: int = real["write"](descriptor, data)
            return count

        def fsync(descriptor: int) -> None:
            number = self.open[descriptor]
            if number is not None:
                self.flushed.add(number)
            else:
                for gone, name, changed in self.pending:
                    self.names.pop(gone, None)
                    if name:
                        self.names[name] = changed
                self.pending.clear()
            self.remember()

        def replace(source: Any, target: Any) -> None:
            number = self.live.pop(Path(source).name)
            self.live[Path(target).name] = number
            self.pending.append((Path(source).name, Path(target).name, number))
            self.remember()
            real["replace"](source, target)

        def unlink(path: Any, *args: Any, **kwargs: Any) -> None:
            self.live.pop(Path(path).name, None)
            self.pending.append((Path(path).name, "", -1))
            self.remember()
            real["unlink"](path, *args, **kwargs)

        fakes = {"open": open_, "write": write_, "fsync": fsync, "replace": replace, "unlink": unlink}
        with pytest.MonkeyPatch.context() as patch:
            for name, function in fakes.items():
                patch.setattr(os, name, function)
            yield
        assert {name: path.read_bytes() for path in self.directory.iterdir() for name in [path.name]} == {
            name: b"".join(self.contents[number]) for name, number in self.live.items()
        }  # the model agrees with the disk


@pytest.mark.parametrize("start", [from_empty, from_ours, from_another_writers, from_an_interrupted_save])
def test_a_power_cut_at_every_operation(start: Callable[[Path], str | None], tmp_path: Path) -> None:
    directory = tmp_path / "a"
    before = start(directory)
    disk = Disk(directory)
    with disk.recording():
        save(directory, new())
    wanted = digest_of_record(new())
    seen: dict[tuple[tuple[str, bytes], ...], str | None] = {}
    for moment, states in enumerate(disk.states):
        for state in states:
            key = tuple(sorted(state.items()))
            if key not in seen:
                left = tmp_path / f"left{len(seen)}"
                left.mkdir()
                for name, content in state.items():
                    (left / name).write_bytes(content)
                seen[key] = state_of(left)
            assert seen[key] in (before, wanted), f"moment {moment}: {sorted(state)}"
    # Durable: when the save has returned, no cut brings the old one back.
    assert {seen[tuple(sorted(state.items()))] for state in disk.states[-1]} == {wanted}
    assert set(seen.values()) == {before, wanted}


def test_the_power_cut_test_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any one of the flushes of the directory, or of the files, some cut leaves a mixture."""
    directory = tmp_path / "a"
    monkeypatch.setattr(files, "sync_directory", lambda path: None)
    with pytest.raises(AssertionError):
        test_a_power_cut_at_every_operation(from_ours, tmp_path)
    assert directory.exists()


# ---- several writers


WRITER = """
import sys
sys.path[:0] = sys.argv[3:]
from records_by_hand import HandConfig, record
from peft_core.checkpoint import save
number, directory = int(sys.argv[1]), sys.argv[2]
for i in range(60):
    alpha = 10 * number + i % 2
    save(directory, record(alpha, config=HandConfig(target_modules=["q_proj", "v_proj"], lora_alpha=alpha)))
    print(i, flush=True)
"""


def possible(numbers: range) -> set[str]:
    configs = {
        a: HandConfig(target_modules=["q_proj", "v_proj"], lora_alpha=a) for n in numbers for a in (10 * n, 10 * n + 1)
    }
    return {digest_of_record(record(alpha, config=config)) for alpha, config in configs.items()}


def start_writer(number: int, directory: Path) -> subprocess.Popen[bytes]:
    here = [str(Path(__file__).parent), str(Path(files.__file__).parents[1])]
    return subprocess.Popen([sys.executable, "-c", WRITER, str(number), str(directory), *here], stdout=subprocess.PIPE)


def test_processes_that_save_into_one_directory(tmp_path: Path) -> None:
    allowed = possible(range(1, 3))
    writers = [start_writer(number, tmp_path) for number in (1, 2)]
    reads = 0
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"0\n"
        while any(writer.poll() is None for writer in writers):
            assert digest_of_directory(tmp_path) in allowed  # a reader in between sees one or the other, whole
            reads += 1
        assert [writer.wait() for writer in writers] == [0, 0]
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert reads > 0
    assert digest_of_directory(tmp_path) in allowed
    assert entries(tmp_path) == [CONFIG, WEIGHTS]


def test_a_writer_that_is_killed(tmp_path: Path) -> None:
    writer = start_writer(1, tmp_path)
    assert writer.stdout is not None
    for _ in range(20):
        writer.stdout.readline()
    writer.kill()
    writer.communicate()
    assert digest_of_directory(tmp_path) in possible(range(1, 2))
    save(tmp_path, new())
    assert digest_of_directory(tmp_path) == digest_of_record(new())
    assert entries(tmp_path) == [CONFIG, WEIGHTS]


def test_threads_that_save_and_read_one_directory(tmp_path: Path) -> None:
    made = [record(a, config=HandConfig(target_modules=["q_proj", "v_proj"], lora_alpha=a)) for a in (1, 2, 3)]
    allowed = {digest_of_record(item) for item in made}
    save(tmp_path, made[0])
    problems: list[BaseException] = []

    def work(task: Callable[[], object]) -> None:
        try:
            for _ in range(40):
                task()
        except BaseException as error:
            problems.append(error)

    def look() -> None:
        assert digest_of_directory(tmp_path) in allowed

    tasks: list[Callable[[], object]] = [
        look,
        look,
        *(lambda item=item: save(tmp_path, item) for item in made),
    ]
    threads = [threading.Thread(target=work, args=(task,)) for task in tasks]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not problems
    assert entries(tmp_path) == [CONFIG, WEIGHTS]


def test_a_living_writers_files_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no locks, a temporary file may be in use."""
    save(tmp_path, old())
    (tmp_path / f".{WEIGHTS}.0123.tmp").write_bytes(b"half")
    monkeypatch.setattr(files, "_fcntl", None)
    save(tmp_path, new())
    assert f".{WEIGHTS}.0123.tmp" in entries(tmp_path)
    assert digest_of_directory(tmp_path) == digest_of_record(new())


def test_a_reader_waits_for_a_writer_between_its_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, old())
    renamed, go_on = threading.Event(), threading.Event()
    original = os.replace

    def slow(source: Any, target: Any) -> None:
        if Path(target).name == CONFIG:
            # Even without its journal in sight.
            os.rename(source, f"{source}.hidden")
            renamed.set()
            go_on.wait(10)
            os.rename(f"{source}.hidden", source)
        original(source, target)

    monkeypatch.setattr(os, "replace", slow)
    writer = threading.Thread(target=save, args=(tmp_path, new()))
    writer.start()
    assert renamed.wait(10)
    timer = threading.Timer(0.2, go_on.set)
    timer.start()
    with read(tmp_path) as file:
        assert file.config["lora_alpha"] == 64
    writer.join()
    timer.join()


# ---- one file alone


def test_write_atomically_at_every_operation(tmp_path: Path) -> None:
    for dead in (False, True):
        for n in itertools.count(1):
            path = tmp_path / f"{dead}{n}" / "x"
            path.parent.mkdir()
            files.write_atomically(path, b"old")
            fault = Failing(n, Crash, after=False, dead=dead)
            try:
                with failing(fault):
                    files.write_atomically(path, b"new")
            except Crash:
                pass
            assert path.read_bytes() in (b"old", b"new")
            assert dead or entries(path.parent) == ["x"]
            if fault.count < n:
                break
        assert n > 5
