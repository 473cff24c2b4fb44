"""Rows that are done and stay done: killed writers, full disks, damage, two runs on one file.

What runs in a process of its own is a function of this file too: see `start`.
"""

import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from runner.common.errors import ConfigError, JournalError
from runner.common.files import check_writable, write_whole
from runner.results.fingerprint import WEIGHT_SAMPLE_BYTES, Fingerprint, fingerprint
from runner.results.journal import Journal
from tests.conftest import ROOT

IDS = tuple(f"{'00' if row % 2 else 'é'}{row * 7919}" for row in range(400))
CLASSES = 3
OURS = Fingerprint({"pooling": "padded-mean", "weights": "sha256:1234"})
OTHER = Fingerprint({"pooling": "mean", "weights": "sha256:5678"})
RESUMED = "30 of 400 rows are done"


def open_journal(path, resume="auto", *, prints=OURS, ids=IDS):
    return Journal.open(Path(path), fingerprint=prints, ids=ids, classes=CLASSES, resume=resume)


def expected(rows):
    """Every row has its own probabilities, so that a swapped row shows."""
    rows = np.asarray(rows)
    table = np.stack([rows + 1, rows % 7 + 1, np.full_like(rows, 50)], axis=1).astype("float64")
    return (table / table.sum(axis=1, keepdims=True)).astype("float32")


def add(journal, rows, how="full"):
    journal.add(
        rows, expected(rows), how=how, worker="replica 0", lengths=[row + 5 for row in rows]
    )


def check_rows(done, rows):
    assert done.rows.tolist() == list(rows)
    np.testing.assert_array_equal(done.probabilities, expected(done.rows))
    assert done.lengths.tolist() == [row + 5 for row in rows]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def start(function, *arguments):
    """Run a function of this file in a process of its own."""
    code = (
        f"import sys; from tests.results.test_journal import *; {function.__name__}(*sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def path(tmp_path):
    folder = tmp_path / "out #1?"
    folder.mkdir()
    return folder / "submission.csv.journal"


@pytest.fixture
def written(path):
    """A journal of 30 rows that was closed."""
    with open_journal(path) as journal:
        for first in range(0, 30, 3):
            add(journal, range(first, first + 3))
    return path


def test_round_trip(path):
    with open_journal(path) as journal:
        assert journal.notes == ()
        assert len(journal.done().rows) == 0
        assert journal.done().probabilities.shape == (0, CLASSES)
        add(journal, [5, 3], how="shortened")
        add(journal, np.array([399]))
        add(journal, [3, 4], how="full")
        add(journal, [])
        check_rows(journal.done(), [3, 4, 5, 399])
    journal.close()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with open_journal(path, "require") as journal:
        assert journal.notes == (f"resuming {path}: 4 of 400 rows are done",)
        done = journal.done()
        check_rows(done, [3, 4, 5, 399])
        assert done.how == ("full", "full", "shortened", "full")
        assert (done.rows.dtype, done.lengths.dtype) == (np.int64, np.int64)
        assert done.probabilities.dtype == np.float32
        add(journal, [0])
    check_rows(open_and_close(path), [0, 3, 4, 5, 399])
    with sqlite3.connect(path) as connection:
        worker, at = connection.execute("SELECT worker, finished_at FROM rows").fetchone()
    connection.close()
    assert worker == "replica 0"
    assert time.time() - 60 < at <= time.time()


def open_and_close(path, resume="require"):
    with open_journal(path, resume) as journal:
        return journal.done()


def test_what_a_power_cut_needs(path):
    """No test can cut the power: that each commit waits for the disk is SQLite's to do."""
    for _ in range(2):
        with open_journal(path) as journal:
            asked = ("journal_mode", "synchronous", "locking_mode")
            values = [journal._connection.execute(f"PRAGMA {name}").fetchone() for name in asked]
            assert values == [("wal",), (2,), ("exclusive",)]


def test_only_probabilities_are_done(path):
    with open_journal(path) as journal:
        for bad in ([np.nan, 0.5, 0.5], [-0.1, 0.6, 0.5], [0.5, 0.5, 0.5], [np.inf, -np.inf, 1]):
            table = np.array([[0.5, 0.25, 0.25], bad], "float32")
            with pytest.raises(JournalError, match=f"bug.*row 8 \\(id {IDS[8]}\\)"):
                journal.add([7, 8], table, how="full", worker="", lengths=[1, 1])
        with pytest.raises(JournalError, match=r"bug.*\(2, 3\)"):
            journal.add([7, 8], np.ones((2, 4)) / 4, how="full", worker="", lengths=[1, 1])
        check_rows(journal.done(), [])


def write_on(path):
    """Say what is done as soon as it is."""
    with open_journal(path) as journal:
        print(*journal.notes, flush=True)
        done = len(journal.done().rows)
        for first in range(done, len(IDS) - 4, 4):
            add(journal, range(first, first + 4))
            print(first + 4, flush=True)
        time.sleep(60)


def test_killed_writers_lose_at_most_the_batch_in_flight(path):
    moments = random.Random(3)
    said = 0
    for _ in range(2):
        with start(write_on, path) as writer:
            note = writer.stdout.readline()
            assert (f"{said} of 400" in note) if said else note == "\n"
            for _ in range(moments.randrange(5, 20)):
                said = int(writer.stdout.readline())
            time.sleep(moments.uniform(0, 0.01))
            writer.kill()
            said = int((writer.stdout.read().split() or [said])[-1])
        done = open_and_close(path)
        assert len(done.rows) in (said, said + 4)
        check_rows(done, range(len(done.rows)))
        said = len(done.rows)


def be_killed_often(folder, trials):
    """Kill writers that were forked off, half of them while they make the journal and half while
    they add to it, and go on from what each left."""
    moments = random.Random(4)
    made = half_made = 0
    for trial in range(int(trials)):
        path = Path(folder, f"{trial}.journal")
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            journal = open_journal(path)
            for first in range(0, 400, 4):
                os.write(write, f"{first}\n".encode())
                add(journal, range(first, first + 4))
            os._exit(0)
        os.close(write)
        with open(read) as said:
            started = [int(said.readline())] if trial % 2 else []
            time.sleep(10 ** moments.uniform(-4, -1.5))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            started += map(int, said)
        exists = path.exists()
        with open_journal(path) as journal:
            done = journal.done()
            check_rows(done, range(len(done.rows)))
            if started:
                assert len(done.rows) in (started[-1], started[-1] + 4), journal.notes
                assert "resuming" in journal.notes[0]
                made += 1
            elif exists:
                assert "half-written" in journal.notes[0] or " 0 of 400" in journal.notes[0]
                half_made += 1
            add(journal, [399])
        left = {file.name for file in Path(folder).glob(f"{trial}.*")}
        assert left <= {path.name, f"{path.name}.1"}, left
    print(made, half_made)


@pytest.mark.parametrize("trials", [24, pytest.param(200, marks=pytest.mark.slow)])
def test_writers_killed_at_any_moment(tmp_path, trials):
    with start(be_killed_often, tmp_path, trials) as process:
        made, half_made = map(int, process.stdout.read().split())
    assert process.returncode == 0
    # When a kill comes is the machine's to say: of a few, all may come late or early.
    assert made + half_made > 0
    if trials >= 200:
        assert made >= trials // 2
        assert half_made > 0, "no kill came while a journal was made"


def test_a_wal_that_was_half_written(path, tmp_path):
    """Of a -wal that is cut or wrong at any place, the whole batches before it are kept."""
    with start(write_on, path) as writer:
        while writer.stdout.readline() != "80\n":
            pass
        writer.kill()
    wal_name = path.name + "-wal"
    main, wal = path.read_bytes(), (path.parent / wal_name).read_bytes()
    counts = []
    for number, place in enumerate(np.linspace(0, len(wal), 17).astype(int)):
        for kind in ("cut", "wrong"):
            folder = tmp_path / f"{kind}{number}"
            folder.mkdir()
            (folder / path.name).write_bytes(main)
            rest = b"" if kind == "cut" else bytes(255 - byte for byte in wal[place:])
            (folder / wal_name).write_bytes(wal[:place] + rest)
            done = open_and_close(folder / path.name)
            check_rows(done, range(len(done.rows)))
            assert len(done.rows) % 4 == 0
            assert [file.name for file in folder.iterdir()] == [path.name]
            counts.append(len(done.rows))
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] >= 80
    assert len(set(counts)) > 10


def edit(*statements):
    def damage(path):
        connection = sqlite3.connect(path)
        with connection:
            for statement in statements:
                connection.execute(statement)
        connection.close()

    return damage


def cut_to(share):
    def damage(path):
        size = path.stat().st_size
        os.truncate(path, share if isinstance(share, int) else int(size * share))

    return damage


def write_at(place, data):
    def damage(path):
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(data)

    return damage


def flip(path):
    data, blob = bytearray(path.read_bytes()), expected([7]).tobytes()
    assert data.count(blob) == 1
    data[data.index(blob) + 2] ^= 1
    path.write_bytes(data)


def lose_the_beginning(path):
    path.write_bytes(b"")
    path.with_name(path.name + "-wal").write_bytes(b"what was written since")


def make_table_less(path):
    path.unlink()
    edit("PRAGMA user_version = 1")(path)


def forge(table):
    """Rows whose checksum agrees and which are wrong all the same."""

    def damage(path):
        blob = np.array(table, "<f4").tobytes()
        crc = zlib.crc32(blob, zlib.crc32(f"{IDS[3]}\0full\0{8}".encode()))
        edit(f"UPDATE rows SET probabilities = x'{blob.hex()}', crc32 = {crc} WHERE row = 3")(path)

    return damage


DAMAGES = {
    "cut in half": (cut_to(0.5), "is damaged"),
    "cut to a page": (cut_to(4096), "is damaged"),
    "cut to 200 bytes": (cut_to(200), "(is damaged|is half-written)"),
    "cut to 50 bytes": (cut_to(50), "(is damaged|is half-written)"),
    "cut to 10 bytes": (cut_to(10), "(is damaged|is half-written)"),
    "empty": (cut_to(0), "is half-written.*no tables"),
    "zeros": (lambda path: path.write_bytes(bytes(8192)), "is damaged"),
    "table-less": (make_table_less, "is half-written.*no tables"),
    "its beginning is gone": (lose_the_beginning, "is damaged.*beginning"),
    "header": (write_at(20, bytes(20)), "is damaged"),
    "page": (write_at(4096, b"\xff" * 3000), "is damaged"),
    "a page that is free and used": (write_at(32, bytes([0, 0, 0, 3, 0, 0, 0, 1])), "is damaged"),
    "flipped": (flip, f"is damaged.*checksum of row 7, id {IDS[7]}"),
    "schema": (edit("UPDATE meta SET value = 99 WHERE key = 'schema'"), "schema is 99, not 1"),
    "no meta": (
        edit("DELETE FROM meta WHERE key = 'fingerprint'"),
        "does not say to which run it belongs",
    ),
    "bad meta": (edit("UPDATE meta SET value = '[]' WHERE key = 'fingerprint'"), "which run"),
    "no rows table": (edit("DROP TABLE rows"), "is damaged.*no such table"),
    "classes": (edit("UPDATE meta SET value = 4 WHERE key = 'classes'"), "400 rows of 4 classes"),
    "id": (edit("UPDATE rows SET id = 'x' WHERE row = 3"), f"row 3 has id x, not {IDS[3]}"),
    "row": (edit("UPDATE rows SET row = 400 WHERE row = 3"), "has row 400 of 400"),
    "negative row": (edit("UPDATE rows SET row = -1 WHERE row = 3"), "has row -1 of 400"),
    "how": (edit("UPDATE rows SET how = 'short' WHERE row = 3"), "checksum of row 3"),
    "length": (edit("UPDATE rows SET length = 1 WHERE row = 3"), "checksum of row 3"),
    "blob": (
        edit("UPDATE rows SET probabilities = x'00' WHERE row = 3"),
        "does not have 3 classes",
    ),
    "text": (edit("UPDATE rows SET how = CAST(x'ff' AS TEXT) WHERE row = 3"), "is damaged"),
    "NaN": (forge([np.nan, 0.5, 0.5]), "row 3, id .* does not hold probabilities"),
    "sum": (forge([0.5, 0.25, 0.2502]), "does not hold probabilities"),
    "negative": (forge([1.5, -0.25, -0.25]), "does not hold probabilities"),
}


@pytest.mark.parametrize(("damage", "why"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_explained_and_kept_aside(written, damage, why):
    damage(written)
    before = files_of(written.parent)
    with pytest.raises(ConfigError, match=f"require cannot go on: .*journal .*{why}"):
        open_journal(written, "require")
    assert files_of(written.parent) == before
    aside = written.with_name(written.name + ".1")
    with open_journal(written) as journal:
        (note,) = journal.notes
        check_rows(journal.done(), [])
        add(journal, [1])
    assert re.search(why, note)
    assert note.endswith(f"kept as {aside}, starting afresh")
    check_rows(open_and_close(written), [1])
    after = files_of(written.parent)
    after.pop(written.name)
    assert after == {name.replace(".journal", ".journal.1"): data for name, data in before.items()}


def test_never_keeps_damage_aside_too(written):
    write_at(20, bytes(20))(written)
    with open_journal(written, "never") as journal:
        assert "is damaged" in journal.notes[0]
        check_rows(journal.done(), [])
    assert files_of(written.parent).keys() == {written.name, written.name + ".1"}


@pytest.mark.parametrize("resume", ["auto", "require", "never"])
@pytest.mark.parametrize("state", ["absent", "same", "killed", "other"])
def test_resume(path, tmp_path, resume, state):
    if state != "absent":
        journal = open_journal(path, prints=OTHER if state == "other" else OURS)
        add(journal, range(30))
        if state == "killed":
            for name, data in files_of(path.parent).items():
                (tmp_path / name).write_bytes(data)
        journal.close()
    if state == "killed":
        path = tmp_path / path.name
        assert path.with_name(path.name + "-wal").is_file()
    goes_on = state in ("same", "killed") and resume != "never"
    if resume == "require" and not goes_on:
        why = "is not there" if state == "absent" else "pooling was mean, is padded-mean"
        before = files_of(path.parent)
        with pytest.raises(ConfigError, match=why):
            open_journal(path, resume)
        assert files_of(path.parent) == before
        return
    with open_journal(path, resume) as journal:
        check_rows(journal.done(), range(30) if goes_on else [])
    aside = path.with_name(path.name + ".1")
    if goes_on:
        notes = [f"resuming {path}: {RESUMED}"]
    elif state == "absent":
        notes = []
    elif resume == "never":
        notes = [f"{path} is not resumed (--resume never): kept as {aside}, starting afresh"]
    else:
        differs = "pooling was mean, is padded-mean; the content of the weights differs"
        notes = [f"{path} belongs to another run ({differs}): kept as {aside}, starting afresh"]
    assert list(journal.notes) == notes
    assert aside.exists() == (len(notes) == 1 and not goes_on)
    assert not path.with_name(path.name + "-wal").exists()
    if aside.exists():
        assert not path.with_name(aside.name + "-wal").exists()
        with open_journal(aside, "require", prints=OTHER if state == "other" else OURS) as kept:
            check_rows(kept.done(), range(30))


def test_the_first_free_name(written):
    written.with_name(written.name + ".1").write_text("mine")
    written.with_name(written.name + ".2-wal").write_text("mine")
    open_and_close(written, "never")
    with open_journal(written, "never") as journal:
        assert f"kept as {written}.4" in journal.notes[0]
    check_rows(open_and_close(written.with_name(written.name + ".3")), range(30))
    assert written.with_name(written.name + ".1").read_text() == "mine"


def test_a_wal_whose_journal_is_gone(written):
    written.unlink()
    written.with_name(written.name + "-wal").write_bytes(b"rows")
    with open_journal(written) as journal:
        assert "is gone" in journal.notes[0]
        add(journal, [1])
    assert written.with_name(written.name + ".1-wal").read_bytes() == b"rows"


def test_a_second_run_is_refused(path):
    with start(write_on, path) as first:
        while first.stdout.readline() != "40\n":
            pass
        os.kill(first.pid, signal.SIGSTOP)
        names = {file.name for file in path.parent.iterdir()}
        for resume in ("auto", "require", "never"):
            with pytest.raises(ConfigError, match=r"Another run uses .*; wait"):
                open_journal(path, resume)
        with pytest.raises(ConfigError, match="Another run"):
            open_journal(path, prints=OTHER)
        assert {file.name for file in path.parent.iterdir()} == names
        os.kill(first.pid, signal.SIGCONT)
        assert first.stdout.readline() == "44\n", "the first does not notice"
        first.kill()
    assert len(open_and_close(path).rows) >= 44


def test_a_second_run_in_one_process_is_refused_and_opens_nothing(path):
    with open_journal(path) as journal:
        with pytest.raises(ConfigError, match="Another run"):
            open_journal(path)
        with start(open_journal, path) as second:
            pass
        assert second.returncode != 0, "the lock has gone"
        add(journal, [1])
    check_rows(open_and_close(path), [1])


def race(folder, trials):
    """Let four runs open one journal at the same moment, and say how each fared."""
    for trial in range(int(trials)):
        path = Path(folder, f"{trial}.journal")
        state = ("absent", "same", "other", "empty", "damaged")[trial % 5]
        if state == "empty":
            path.touch()
        elif state != "absent":
            with open_journal(path, prints=OTHER if state == "other" else OURS) as journal:
                add(journal, range(30))
        if state == "damaged":
            write_at(20, bytes(20))(path)
        gate, result = os.pipe(), os.pipe()
        runs = []
        for _ in range(4):
            runs.append(os.fork())
            if runs[-1] == 0:
                os.close(gate[1])
                os.read(gate[0], 1)
                try:
                    journal = open_journal(path)
                    os.write(result[1], b"O")
                except ConfigError as error:
                    os.write(result[1], b"R" if "Another run" in str(error) else b"?")
                except BaseException:
                    os.write(result[1], b"?")
                time.sleep(60)
        os.close(gate[1])
        fared = b"".join(os.read(result[0], 1) for _ in runs)
        for pid in runs:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(gate[0])
        asides = len(list(Path(folder).glob(f"{trial}.journal.*")))
        rows = len(open_and_close(path).rows)
        print(state, bytes(sorted(fared)).decode(), asides, rows)


@pytest.mark.parametrize("trials", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_runs_that_start_together(tmp_path, trials):
    with start(race, tmp_path, trials) as process:
        lines = process.stdout.read().splitlines()
    assert process.returncode == 0
    kept = [f"{state} ORRR 1 0" for state in ("damaged", "empty", "other")]
    assert set(lines) == {*kept, "absent ORRR 0 0", "same ORRR 0 30"}


def make_database(path):
    edit("CREATE TABLE theirs (a)", "INSERT INTO theirs VALUES (1)")(path)


def make_killed_database(path):
    """One whose tables are in its -wal alone."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE theirs (a)")
    files = files_of(path.parent)
    connection.close()
    for name, data in files.items():
        (path.parent / name).write_bytes(data)


def make_damaged_database(path):
    make_database(path)
    write_at(100, b"\xff" * 3000)(path)


NOT_JOURNALS = {
    "csv": (lambda path: path.write_text("id,prompt\n1,a\n"), "not an SQLite database"),
    "short": (lambda path: path.write_text("x"), "not an SQLite database"),
    "database": (make_database, "another program's database"),
    "killed database": (make_killed_database, "another program's database"),
    "damaged database": (make_damaged_database, "another program's database"),
    "folder": (lambda path: path.mkdir(), "a folder"),
    "pipe": (os.mkfifo, "must name a file"),
}


@pytest.mark.parametrize("resume", ["auto", "require", "never"])
@pytest.mark.parametrize(("make", "why"), NOT_JOURNALS.values(), ids=NOT_JOURNALS)
def test_what_is_no_journal_is_left_untouched(path, resume, make, why):
    make(path)
    before, names = files_of(path.parent), set(path.parent.iterdir())
    with pytest.raises(ConfigError, match=rf"--journal must name .*journal.*{why}|{why}"):
        open_journal(path, resume)
    assert files_of(path.parent) == before
    assert set(path.parent.iterdir()) == names


def test_folders_and_links(path, tmp_path):
    with pytest.raises(ConfigError, match="--journal must be in a folder that exists"):
        open_journal(tmp_path / "absent" / "x.journal")
    link = tmp_path / "link.journal"
    link.symlink_to(path)
    with open_journal(link) as journal:
        add(journal, [1])
    assert link.is_symlink()
    check_rows(open_and_close(path), [1])


@pytest.fixture
def no_umask():
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("no_umask")
def test_only_the_owner_reads_it(path):
    def modes():
        return {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}

    wal = path.name + "-wal"
    with open_journal(path) as journal:
        add(journal, [1])
        assert modes() == {path.name: 0o600, wal: 0o600}
    path.chmod(0o644)
    with open_journal(path, "require") as journal:
        add(journal, [2])
        assert modes() == {path.name: 0o600, wal: 0o600}
    open_and_close(path, "never")
    assert modes() == {path.name: 0o600, path.name + ".1": 0o600}


@pytest.mark.usefixtures("no_umask")
def test_a_private_file(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    (tmp_path / f".report.json.{os.getpid()}.partial").write_text("of a killed process")
    write_whole(path, "new", private=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    write_whole(tmp_path / "s.csv", "x")
    assert stat.S_IMODE((tmp_path / "s.csv").stat().st_mode) == 0o666
    assert files_of(tmp_path) == {"report.json": b"new", "s.csv": b"x"}


def test_what_killed_processes_left_is_swept(tmp_path):
    gone, old = subprocess.Popen(["true"]), time.time() - 3600
    gone.wait()
    for name, age in {
        f".s.csv.{gone.pid}.partial": old,
        f".s.{gone.pid}.rehearsal.csv": old,
        f"..s.{gone.pid}.rehearsal.csv.{gone.pid}.partial": old,
        f".s.csv.{os.getpid()}.partial": old,  # alive
        f".s.csv.{gone.pid + 1}.partial.kept": time.time(),  # of another machine, being written
        f".other.csv.{gone.pid}.partial": old,
        f"s.csv.{gone.pid}.partial": old,  # the person's own
    }.items():
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (age, age))
    check_writable("--output", tmp_path / "s.csv")
    assert set(files_of(tmp_path)) == {
        f".s.csv.{os.getpid()}.partial",
        f".s.csv.{gone.pid + 1}.partial.kept",
        f".other.csv.{gone.pid}.partial",
        f"s.csv.{gone.pid}.partial",
    }


def add_tens(journal):
    for first in range(10, 400, 10):
        add(journal, range(first, first + 10))


def test_no_room(path):
    with open_journal(path) as journal:
        add(journal, [1, 2])
        pages = journal._connection.execute("PRAGMA page_count").fetchone()[0]
        journal._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(JournalError) as failure:
            add_tens(journal)
        done = journal.done()
        first = 10 * round(len(done.rows) / 10) + 10
        check_rows(done, [1, 2, *range(10, first)])
        for part in (f"{len(done.rows)} of 400 rows are safe in {path}", "full", "there is room"):
            assert part in str(failure.value)
        journal._connection.execute("PRAGMA max_page_count = 10000")
        add_tens(journal)
        assert len(journal.done().rows) == 392


def fill_a_small_disk(path, mebibytes):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    size = int(float(mebibytes) * 2**20)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        with open_journal(path) as journal:
            while True:
                for first in range(0, 400, 4):
                    add(journal, range(first, first + 4))
    except (JournalError, ConfigError) as error:
        print(type(error).__name__, error)


@pytest.mark.parametrize("mebibytes", [0.05, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_disk_that_takes_no_more(path, mebibytes):
    with start(fill_a_small_disk, path, mebibytes) as process:
        said = process.stdout.read()
    assert process.returncode == 0
    assert said.startswith("JournalError The journal cannot be written: disk I/O error"), said
    rows = int(said.split(" of 400 rows are safe in ")[0].split()[-1])
    check_rows(open_and_close(path), range(rows))


def test_no_room_to_begin_with(path):
    with start(fill_a_small_disk, path, 0.003) as process:
        said = process.stdout.read()
    assert said.startswith("ConfigError --journal cannot be used"), said
    assert list(path.parent.iterdir()) == []


@pytest.fixture
def rescue_folder(tmp_path, monkeypatch):
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def removed(path):
    shutil.rmtree(path.parent)


def moved(path):
    path.parent.rename(path.parent.with_name("elsewhere"))


def replaced(path):
    path.with_name("new").write_text("theirs")
    path.with_name("new").rename(path)
    path.with_name(path.name + "-wal").unlink()
    path.with_name(path.name + "-wal").write_text("theirs too")


@pytest.mark.parametrize("change", [removed, moved, replaced])
def test_a_journal_that_is_no_longer_there(written, rescue_folder, change):
    with open_journal(written) as journal:
        add(journal, [30, 31])
        change(written)
        with pytest.raises(JournalError) as failure:
            add(journal, [32])
    (rescued,) = rescue_folder.iterdir()
    assert str(written) in str(failure.value)
    assert f"A copy of all 33 finished rows is safe in {rescued}" in str(failure.value)
    assert f"--journal {rescued}" in str(failure.value)
    assert stat.S_IMODE(rescued.stat().st_mode) == 0o600
    with open_journal(rescued, "require") as journal:
        check_rows(journal.done(), range(33))
        add(journal, [33])
    check_rows(open_and_close(rescued), range(34))
    if change is replaced:
        assert written.read_text() == "theirs"
        assert written.with_name(written.name + "-wal").read_text() == "theirs too"


def test_what_counts_as_done_is_on_the_disk(written, rescue_folder, monkeypatch):
    """Of each batch by SQLite, of the copy of a lost journal by our own hand."""
    with open_journal(written) as journal:
        (synchronous,) = journal._connection.execute("PRAGMA synchronous").fetchone()
        assert synchronous == 2, "FULL: each commit waits for the disk"

    def fail(descriptor):
        raise OSError("no disk")

    with open_journal(written) as journal:
        removed(written)
        monkeypatch.setattr("os.fsync", fail)
        with pytest.raises(JournalError, match="could not be saved: no disk"):
            add(journal, [30])


def test_a_journal_that_cannot_be_rescued(written, rescue_folder):
    rescue_folder.rmdir()
    with open_journal(written) as journal:
        removed(written)
        with pytest.raises(JournalError, match=r"and all 31 finished rows could not be saved"):
            add(journal, [30])


@pytest.fixture
def inputs(tmp_path):
    """Everything that decides an answer, on a small scale."""
    for name in ("config", "vocabulary", "kernel", "bias", "lora"):
        (tmp_path / name).write_text(name)
    (tmp_path / "weights").write_bytes(bytes(3 * WEIGHT_SAMPLE_BYTES))

    return {
        "settings": {"pooling": "mean", "sequence_length": 512, "text_format": "raw"},
        "versions": {"jax": "0.10.2", "keras": "3.15.1"},
        "ids": ["1", "2"],
        "texts": ["a", "b\ud800"],
        "preset_files": [tmp_path / "config", tmp_path / "vocabulary"],
        "weight_files": [tmp_path / "weights"],
        "head_files": [tmp_path / "kernel", tmp_path / "bias"],
        "lora_file": tmp_path / "lora",
    }


def write(name, data):
    return lambda inputs: (inputs["lora_file"].parent / name).write_bytes(data)


CHANGES = {
    "pooling": (
        lambda inputs: inputs["settings"].update(pooling="last"),
        "pooling was mean, is last",
    ),
    "length": (
        lambda inputs: inputs["settings"].update(sequence_length=64),
        "sequence length was 512, is 64",
    ),
    "format": (
        lambda inputs: (inputs["settings"].update(text_format="turns"), inputs.update(texts="xy")),
        "text format was raw, is turns",
    ),
    "new": (lambda inputs: inputs["settings"].update(top="k"), "top was none, is k"),
    "jax": (lambda inputs: inputs["versions"].update(jax="0.11"), "jax was 0.10.2, is 0.11"),
    "keras": (lambda inputs: inputs["versions"].pop("keras"), "keras was 3.15.1, is none"),
    "text": (
        lambda inputs: inputs.update(texts=["ab", ""]),
        "the content of the test set differs",
    ),
    "order": (
        lambda inputs: inputs.update(texts=["b\ud800", "a"]),
        "the content of the test set differs",
    ),
    "id": (lambda inputs: inputs.update(ids=["1", "3"]), "the content of the test set differs"),
    "config": (write("config", b"{}"), "the content of the preset config and tokenizer differs"),
    "tokenizer": (
        write("vocabulary", b""),
        "the content of the preset config and tokenizer differs",
    ),
    "kernel": (write("kernel", b"1"), "the content of the head differs"),
    "bias": (write("bias", b"1"), "the content of the head differs"),
    "lora": (write("lora", b"1"), "the content of the LoRA file differs"),
    "no lora": (lambda inputs: inputs.update(lora_file=None), "LoRA file was given, is none"),
    "last weight": (
        write("weights", bytes(3 * WEIGHT_SAMPLE_BYTES - 1) + b"1"),
        "the content of the weights differs",
    ),
    "first weight": (
        write("weights", b"1" + bytes(3 * WEIGHT_SAMPLE_BYTES - 1)),
        "the content of the weights differs",
    ),
    "size": (
        write("weights", bytes(3 * WEIGHT_SAMPLE_BYTES + 1)),
        "the content of the weights differs",
    ),
}


@pytest.mark.parametrize(("change", "difference"), CHANGES.values(), ids=CHANGES)
def test_what_changes_an_answer_is_named(inputs, path, change, difference):
    before, again = fingerprint(**inputs), fingerprint(**inputs)
    assert before == again
    assert before.digest == again.digest
    assert before.differences(again.parts) == []
    open_journal(path, prints=before).close()
    with open_journal(path, "require", prints=again):
        pass
    change(inputs)
    after = fingerprint(**inputs)
    assert after.digest != before.digest
    assert after.differences(before.parts) == [difference]
    with pytest.raises(ConfigError) as failure:
        open_journal(path, "require", prints=after)
    assert f"belongs to another run ({difference})" in str(failure.value)
    with open_journal(path, prints=after) as journal:
        assert f"belongs to another run ({difference}): kept as" in journal.notes[0]


def test_the_digest_knows_names_and_not_their_order():
    digests = [Fingerprint(parts).digest for parts in ({"a": "1", "b": "2"}, {"b": "2", "a": "1"})]
    assert digests[0] == digests[1]
    assert Fingerprint({"a": "2", "b": "1"}).digest != digests[0]
    assert len(digests[0]) == 64
