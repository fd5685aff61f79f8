"""Power loss leaves the end of SQLite's log cut off or wrong. Opening finds what was committed before that, no more."""

import random
import shutil
import struct
from pathlib import Path

import pytest

from cbp_server.store.database import open_database
from cbp_server.store.journal import Entry, EntryKind, Journal

#: Bytes of the log's header, and of the header of each page in it: https://sqlite.org/fileformat2.html#the_write_ahead_log
_LOG_HEADER, _FRAME_HEADER = 32, 24


def entry(position: int) -> Entry:
    generator = random.Random(position)
    return Entry(
        learner_uid="a",
        position=position,
        kind=EntryKind.BATCH,
        payload=generator.randbytes(generator.randrange(20_000)),
        producer="web",
        epoch=1,
        sequence=position,
    )


def end_of(log: Path) -> int:
    """Where the log ends: behind it are frames of an earlier round, which have other salts."""
    content = log.read_bytes()
    page_size, salts = struct.unpack(">I", content[8:12])[0], content[16:24]
    end = _LOG_HEADER
    while content[end + 8 : end + 16] == salts:
        end += _FRAME_HEADER + page_size
    return end


class CrashedDatabase:
    """What is on disk after a crash, with where each commit ended in the log and how many entries there were then."""

    def __init__(self, directory: Path, *, rounds: int) -> None:
        engine = open_database("", directory / "running")
        journal = Journal(engine)
        self._generator = random.Random(rounds)
        self.entries: list[Entry] = []
        for _ in range(rounds - 1):  # after each the log begins again at its start, over the one before
            self._append(journal, commits=30)
            with engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(RESTART)")
        log = directory / "running" / "journal.db-wal"
        self.commits: list[tuple[int, int]] = []
        if rounds > 1:
            self.commits.append((0, len(self.entries)))
        for _ in range(12):
            self._append(journal, commits=1)
            self.commits.append((end_of(log), len(self.entries)))
        self.directory = directory / "crashed"
        self.directory.mkdir()
        for name in ("journal.db", "journal.db-wal"):
            shutil.copy(directory / "running" / name, self.directory)
        engine.dispose()

    def _append(self, journal: Journal, commits: int) -> None:
        for _ in range(commits):
            size = self._generator.randrange(1, 5)
            group = [entry(len(self.entries) + number) for number in range(1, size + 1)]
            journal.append(group, sync=self._generator.random() < 0.5)
            self.entries += group

    def copy(self, target: Path) -> Path:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.directory, target)
        return target

    def survivors(self, offset: int) -> int:
        """How many entries were committed by what lies before `offset` in the log."""
        return max((entries for end, entries in self.commits if end <= offset), default=0)

    def offsets(self) -> list[int]:
        """Places in the log: around the ends of commits and of pages, and anywhere."""
        end = self.commits[-1][0]
        frames = range(_LOG_HEADER, end, _FRAME_HEADER + 4096)
        near = [place + step for place, _ in self.commits[-8:] for step in (-1, 0, 1)]
        near += [frame + self._generator.randrange(_FRAME_HEADER) for frame in self._generator.sample(frames, 15)]
        anywhere = [self._generator.randrange(end) for _ in range(15)]
        return sorted({offset for offset in [*near, *anywhere, 0, 1, _LOG_HEADER] if 0 <= offset < end})


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda rounds: f"round-{rounds}")
def crashed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CrashedDatabase:
    directory = tmp_path_factory.mktemp("torn")
    (directory / "running").mkdir()
    return CrashedDatabase(directory, rounds=request.param)


def check(crashed: CrashedDatabase, directory: Path, offset: int) -> None:
    """The entries up to `offset` are there and no others, and the log goes on behind them."""
    survivors = crashed.survivors(offset)
    for _ in range(2):
        engine = open_database("", directory)
        journal = Journal(engine)
        assert list(journal.read("a", 0)) == crashed.entries[:survivors], offset
        survivors += 1
        journal.append([crashed.entries[survivors - 1] if survivors <= len(crashed.entries) else entry(survivors)])
        engine.dispose()
    assert journal.bounds("a") == (1, survivors)


def test_an_undamaged_log_is_read_whole(crashed, tmp_path):
    engine = open_database("", crashed.copy(tmp_path / "copy"))
    assert list(Journal(engine).read("a", 0)) == crashed.entries
    engine.dispose()


def test_a_log_that_is_cut_off_is_read_up_to_there(crashed, tmp_path):
    for offset in crashed.offsets():
        directory = crashed.copy(tmp_path / "copy")
        with (directory / "journal.db-wal").open("r+b") as log:
            log.truncate(offset)
        check(crashed, directory, offset)


def test_a_log_with_a_flipped_bit_is_read_up_to_there(crashed, tmp_path):
    generator = random.Random(11)
    for offset in crashed.offsets():
        directory = crashed.copy(tmp_path / "copy")
        with (directory / "journal.db-wal").open("r+b") as log:
            log.seek(offset)
            (byte,) = log.read(1)
            log.seek(offset)
            log.write(bytes([byte ^ 1 << generator.randrange(8)]))
        check(crashed, directory, offset)


def test_a_log_whose_end_is_zeros_or_noise_is_read_up_to_there(crashed, tmp_path):
    """As file systems leave it that had the new length on disk, but not the content."""
    generator = random.Random(12)
    for offset in crashed.offsets()[::3]:
        directory = crashed.copy(tmp_path / "copy")
        size = (directory / "journal.db-wal").stat().st_size
        with (directory / "journal.db-wal").open("r+b") as log:
            log.seek(offset)
            log.write(generator.choice([bytes, generator.randbytes])(size - offset))
        check(crashed, directory, offset)
