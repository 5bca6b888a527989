"""Object stores, on servers on loopback."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from ppflow_jax.checkpoints.card import read_card
from ppflow_jax.data import ranged
from ppflow_jax.data.sources import open_source
from ppflow_jax.errors import InputError, RunError
from ppflow_jax.files import copies, lease, objects
from ppflow_jax.files.disk import atomic, locked, writable_directory
from ppflow_jax.files.objects import Damaged, StoreError
from ppflow_jax.files.place import ObjectPath, place
from ppflow_jax.files.store import (
    find_checkpoint,
    load_stored,
    steps_in,
    stored_tree,
    write_checkpoint,
)
from ppflow_jax.train import metrics_log
from ppflow_jax.train.posthoc import Snapshots
from tests import buckets, commands, tables
from tests.pictures import folder


@pytest.fixture(scope="module")
def stores():
    """Both servers, and the environment that names them."""
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        for env in (stack.enter_context(buckets.gcs()), stack.enter_context(buckets.s3())):
            for name, value in env.items():
                patch.setenv(name, value)
        patch.setattr(fsspec.config, "conf", {})
        fsspec.config.set_conf_env(fsspec.config.conf)  # which it has read when it was imported
        yield


@pytest.fixture(params=["gs", "s3"])
def root(stores, request):
    """A new folder in each of them."""
    return place(f"{request.param}://{buckets.BUCKET}/{request.node.name}")


@pytest.fixture
def gs(stores, request):
    return place(f"gs://{buckets.BUCKET}/{request.node.name}")


def test_paths_are_those_of_pathlib():
    path = place("gs://bucket/a/b.txt")
    assert isinstance(path, ObjectPath) and str(path) == os.fspath(path) == "gs://bucket/a/b.txt"
    assert (path.name, path.suffix, str(path.parent / "c")) == ("b.txt", ".txt", "gs://bucket/a/c")
    assert path.absolute() == path == place(path) and path.relative_to("gs:/bucket").name == "b.txt"
    assert not isinstance(place("runs/b2"), ObjectPath)


def test_objects_are_written_whole_listed_and_removed(root, tmp_path):
    assert not root.exists() and not list(root.iterdir()) and not list(root.rglob("*"))
    with atomic(root / "a.txt") as temporary:
        temporary.write_text("one")
    with pytest.raises(ZeroDivisionError), atomic(root / "half") as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    (root / "below" / "b.bin").write_bytes(bytes(range(100)))
    assert root.is_dir() and not root.is_file() and (root / "a.txt").is_file()
    assert root.children() == [(root / "a.txt", False), (root / "below", True)]
    assert list(root.rglob("*.bin")) == [root / "below" / "b.bin"]
    assert (root / "a.txt").read_text() == "one" and (root / "a.txt").stat().st_size == 3
    assert (root / "below" / "b.bin").read_range(10, 12) == b"\x0a\x0b"
    (root / "below" / "b.bin").download(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == bytes(range(100))
    with pytest.raises(FileExistsError):
        (root / "a.txt").write_bytes(b"two", create=True)
    with pytest.raises(FileNotFoundError, match="not found"):
        (root / "absent").read_bytes()
    root.rmtree()
    assert not root.exists()


def test_what_was_damaged_on_the_way_is_not_used(root, monkeypatch):
    (root / "x").write_bytes(b"whole")
    system = objects.filesystem(objects.scheme_of(str(root)))
    monkeypatch.setattr(system, "cat_file", lambda *_, **__: b"holes")
    with pytest.raises(Damaged):
        (root / "x").read_bytes()


def test_a_lease_keeps_others_out_and_a_dead_holder_does_not(root, capsys):
    with locked(root), pytest.raises(InputError, match=f"in use by process {os.getpid()} on"):
        locked(root).__enter__()
    dead, ended = (subprocess.Popen([sys.executable, "-c", ""]) for _ in range(2))
    dead.wait()
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # it stays until somebody asks
    born = Path(f"/proc/{ended.pid}/stat").read_text().rpartition(")")[2].split()[19]
    mine = json.loads((root / lease.FOLDER / "000001").read_bytes())
    # one that is no more, one that has ended, one whose number is another process's by now
    gone = [(dead.pid, "1"), (ended.pid, born), (os.getpid(), "1")]
    for number, (process, started) in enumerate(gone, 1):
        held = mine | {"process": process, "free": False, "started": started}
        (root / lease.FOLDER / f"{2 * number:06d}").write_bytes(json.dumps(held).encode())
        with locked(root):
            names = [path.name for path in (root / lease.FOLDER).iterdir()]
            assert names == [f"{2 * number + 1:06d}"]
    ended.wait()
    assert "waiting" not in capsys.readouterr().err


def test_a_holder_elsewhere_is_watched(gs, monkeypatch):
    monkeypatch.setattr(lease, "STALE", 1.0)
    monkeypatch.setattr(lease, "BEAT", 0.1)
    with monkeypatch.context() as other, contextlib.ExitStack() as there:
        other.setattr(lease, "_machine", lambda: "another")
        there.enter_context(locked(gs))
        other.undo()
        monkeypatch.setattr(lease, "STALE", 1.0)
        with pytest.raises(InputError, match="in use"):
            locked(gs).__enter__()
    held = json.loads((gs / lease.FOLDER / "000001").read_bytes()) | {"free": False}
    (gs / lease.FOLDER / "000002").write_bytes(json.dumps(held).encode())
    with locked(gs):  # it does not beat
        (gs / lease.FOLDER / "000004").write_bytes(b"{}")
        deadline = time.monotonic() + 5
        while not lease._held[0].lost and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(RunError, match="another process has taken it"), atomic(gs / "x") as t:
            t.write_text("x")
    assert not (gs / "x").exists()


@pytest.fixture
def s3(stores, request):
    return place(f"s3://{buckets.BUCKET}/{request.node.name}")


class Refused(Exception):
    """As gcsfs raises it."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (Refused(403, "no storage.objects.create access"), "no permission"),
        (Refused(403, "The storage quota of the project is exceeded"), "quota .* is full"),
        (Refused(400, "what is this"), "what is this"),
        (FileNotFoundError("x"), "the bucket does not exist"),
    ],
)
def test_what_cannot_be_helped_is_said_at_once(gs, monkeypatch, error, words):
    def fails(*_, **__):
        calls.append(1)
        raise error

    calls = []
    monkeypatch.setattr(objects.filesystem("gs"), "pipe_file", fails)
    with pytest.raises(InputError, match=f"cannot write to {gs}.*{words}"):
        writable_directory(gs)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "error", [Refused(429, "rate limit"), Refused(503, "busy"), ConnectionResetError("reset")]
)
def test_what_passes_is_asked_again_and_counted(gs, monkeypatch, error, capsys):
    monkeypatch.setattr(objects, "PAUSE", 0.001)
    monkeypatch.setattr(objects, "RETRIES", objects.Retries())
    monkeypatch.setattr(objects.atexit, "register", lambda function: None)
    left = [error] * 3

    def request(system):
        if left:
            raise left.pop()
        return "answer"

    assert objects.ask(str(gs), request) == "answer" and objects.RETRIES.count == 3
    assert capsys.readouterr().err.count("asking again") == 1
    left = [error] * objects.TRIES
    with pytest.raises(StoreError, match="does not answer"):
        objects.ask(str(gs), request)


def test_copies_are_compared_with_their_sums(gs, tmp_path, monkeypatch):
    (gs / "x").write_bytes(b"whole")
    (gs / "SHA256SUMS").write_text(f"{hashlib.sha256(b'other').hexdigest()}  x\n")
    with pytest.raises(ValueError, match="x is not as it was written"):
        copies.copied(gs)
    (gs / "SHA256SUMS").write_text(f"{hashlib.sha256(b'whole').hexdigest()}  x\n")
    with copies.here(gs) as folder:
        assert sorted(path.name for path in folder.iterdir()) == ["SHA256SUMS", "x"]
        assert (folder / "x").read_bytes() == b"whole"
    assert not folder.exists()
    system = objects.filesystem("gs")
    monkeypatch.setattr(system, "get_file", lambda url, file: Path(file).write_bytes(b"holes"))
    for sums in ([], [hashlib.sha256(b"whole").hexdigest()]):
        with pytest.raises(Damaged):
            (gs / "x").download(tmp_path / "copy", *sums)
        assert not (tmp_path / "copy").exists()
    monkeypatch.undo()
    (gs / "x").unlink()
    with pytest.raises(ValueError, match="x is not as it was written"):
        copies.copied(gs)


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x"])
def test_checksums_that_name_files_elsewhere_are_refused(gs, name):
    (gs / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(ValueError, match="which is not in the folder"):
        copies.copied(gs)


def test_a_checkpoint_is_written_once(gs):
    write_checkpoint(gs, {"x": np.arange(3)}, {"a": 1})
    with pytest.raises(InputError, match="exists: give a --target"):
        write_checkpoint(gs, {"x": np.arange(3)}, {"a": 1})
    (gs / "checkpoints" / "0" / "SHA256SUMS").unlink()  # as a killed command leaves it
    assert steps_in(gs / "checkpoints") == []
    write_checkpoint(gs, {"x": np.arange(4)}, {"a": 1})
    path = find_checkpoint(gs)
    assert len(load_stored(path, stored_tree(path))["x"]) == 4


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(objects.importlib.util, "find_spec", lambda name: None)
    objects._filesystem.cache_clear()
    with pytest.raises(InputError, match=r"pip install 'ppflow_jax\[gcs\]'"):
        place("gs://bucket/x").exists()


def test_local_paths_import_no_store(tmp_path):
    code = (
        "import sys; from ppflow_jax.files.disk import atomic, locked, writable_directory\n"
        f"p = writable_directory({str(tmp_path)!r})\n"
        "with locked(p), atomic(p / 'x') as t: t.write_text('x')\n"
        "sys.exit(any(m in sys.modules for m in ('fsspec', 'gcsfs', 's3fs', 'aiohttp')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("size", [12, 33_000, 65_382, 65_512, 200_001])
def test_records_are_found_and_read_by_ranges(gs, tmp_path, size):
    from array_record.python.array_record_module import ArrayRecordWriter

    from ppflow_jax.data.records import WRITER_OPTIONS

    values = np.random.default_rng(0)
    records = [values.bytes(size) for _ in range(9)]
    writer = ArrayRecordWriter(str(tmp_path / "a"), WRITER_OPTIONS)
    for record in records:
        writer.write(record)
    writer.close()
    path = gs / "a"
    ranged.save_index(path, tmp_path / "a", len(records), size)
    path.upload(tmp_path / "a")
    reader = ranged.RangedRecords([(path, len(records))], size)
    assert reader.__getitems__([8, 0, 3, 3]) == [records[i] for i in (8, 0, 3, 3)]
    whole = bytearray((tmp_path / "a").read_bytes())
    whole[whole.index(records[3][-10:])] ^= 1
    path.write_bytes(bytes(whole))
    assert reader.__getitems__([2]) == [records[2]]
    with pytest.raises(Damaged, match="record 3"):
        reader.__getitems__([2, 3])


@pytest.mark.parametrize("stage", [False, True])
def test_parquet_is_read_from_copies(root, tmp_path, monkeypatch, stage):
    made = folder(tmp_path / "pictures")
    pictures = [path.read_bytes() for path in sorted(made.glob("*/*"))]
    rows = tables.table(pictures, [0] * 12)
    made = tables.pushed(tmp_path / "d", rows)
    for path in filter(Path.is_file, made.rglob("*")):
        (root / path.relative_to(made)).upload(path)
    kept = str(tmp_path / "stage") if stage else ""
    for path in (root, root / "data" / "train-*.parquet"):
        source = open_source("parquet", str(path), size=16, stage=kept)
        assert [source.fetch(k)[0] for k in range(12)] == pictures
        assert source.identity()["path"] == str(path)
    copied, download = [], ObjectPath.download

    def counted(self, *args):
        copied.append(self.name)
        download(self, *args)

    monkeypatch.setattr(ObjectPath, "download", counted)
    open_source("parquet", str(root), size=16, stage=kept)
    assert len(copied) == (0 if stage else 2)
    (root / "data" / "train-00001-of-00002.parquet").upload(
        made / "data" / "train-00000-of-00002.parquet"
    )
    source = open_source("parquet", str(root), size=16, stage=kept)  # it is another dataset now
    assert [source.fetch(k)[0] for k in range(12)] == pictures[:6] * 2 and len(copied) > 1
    with pytest.raises(InputError, match="nothing is there"):
        open_source("parquet", f"{root}/absent", size=16)


def test_tfds_is_read_from_copies(gs, tmp_path, monkeypatch):
    from tests.pictures import tfds_dataset

    made = sorted(folder(tmp_path / "pictures").glob("*/*"))
    local = Path(tfds_dataset(tmp_path / "tfds", made, [0] * 4 + [1] * 8, 2))
    for path in filter(Path.is_file, local.rglob("*")):
        (gs / path.relative_to(local)).upload(path)
    (gs / "photographs-test.array_record-00000-of-00001").write_bytes(b"never copied")
    copied, download = [], ObjectPath.download
    monkeypatch.setattr(
        ObjectPath, "download", lambda p, f: copied.append(p.name) or download(p, f)
    )
    names = dict(image="picture", label="category")
    ours, theirs = (open_source("tfds", str(p), size=16, **names) for p in (gs, local))
    assert [ours.fetch(k) for k in range(12)] == [theirs.fetch(k) for k in range(12)]
    assert ours.identity() == theirs.identity() and ours.classes() == theirs.classes()
    assert copied and not any("test" in name for name in copied)
    for path, split, words in ((gs, "test[:1]", "Unknown split"), (gs / "x", "train", "no TFDS")):
        with pytest.raises(InputError, match=words):
            open_source("tfds", str(path), size=16, split=split, **names)


@pytest.mark.long
def test_a_run_that_breaks_off_continues_with_the_same_bits(gs, small_run, monkeypatch):
    from ppflow_jax.checkpoints import run

    uploads, upload, metrics = [], run.upload_folder, []

    def breaks_off(folder, target, last):
        uploads.append(target.name)
        metrics.append((gs / "run" / "metrics.jsonl").read_text().count("\n"))
        if len(uploads) == 2:
            (target / "config" / "metadata").upload(folder / "config" / "metadata")
            raise StoreError(5, "the object store does not answer", str(target))
        upload(folder, target, last)

    monkeypatch.setattr(run, "upload_folder", breaks_off)
    code, _, err = commands.train(gs / "run")
    assert code == 1 and "step 4" in err and "that of step 2 is good" in err.splitlines()[-1], err
    assert metrics[0] >= 2  # what a checkpoint is of is there before it
    code, out, err = commands.train(gs / "run")
    assert code == 0 and "continuing from step 2" in out, err
    ours, theirs = (commands.weights(path) for path in (gs / "run", small_run))
    assert all(np.array_equal(ours[k], theirs[k]) for k in theirs)
    rows = [json.loads(x)["step"] for x in (gs / "run/metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 7))
    step = gs / "run" / "checkpoints" / "6"
    assert (step / "commit_success.txt").is_file()  # several processes of Orbax count only these
    largest = max((step / "state").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"x")
    code, _, err = commands.train(gs / "run")
    assert code == 1 and "that of step 4 is intact" in err.splitlines()[-1], err


def test_metrics_are_uploaded_now_and_then_and_when_asked(gs, monkeypatch):
    writer = metrics_log.MetricWriter(gs, 0)
    writer.write(1, {"loss": 2.0})
    assert metrics_log.read_metrics(gs / "metrics.jsonl") == []
    writer.flush()
    assert metrics_log.read_metrics(gs / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    monkeypatch.setattr(metrics_log, "EVERY", 0.0)
    writer.write(2, {"loss": 1.0})
    assert [row["step"] for row in metrics_log.read_metrics(gs / "metrics.jsonl")] == [1, 2]
    monkeypatch.undo()
    writer.write(3, {"loss": 0.5})
    writer.close()
    metrics_log.MetricWriter(gs, 2).close()
    assert [row["step"] for row in metrics_log.read_metrics(gs / "metrics.jsonl")] == [1, 2]
    (events,) = {path.parent for path in gs.rglob("events.*")}
    assert events == gs / "tensorboard"


@pytest.mark.long
def test_averages_of_any_length_are_those_of_a_disk(gs, tmp_path):
    args = ["--config.train.posthoc_ema=(0.05,0.1)", "--config.train.steps=4"]
    args += ["--config.sample.count=1", "--config.sample.steps=1"]
    made = {}
    for name, run in {"disk": tmp_path / "run", "store": gs / "run"}.items():
        code, _, err = commands.train(run, *args, variant=":sit")
        assert code == 0 and f"kept in {run}/posthoc_ema" in err, err
        target = run.parent / f"{name}_007"
        command = [f"--source={run}", "--posthoc_ema=0.07", f"--target={target}"]
        code, out, err = commands.run("convert.__main__", *command)
        assert code == 0 and "after 4 updates, of 4 averages" in out, err
        made[name] = commands.weights(target, "ema")
    ours, theirs = made["store"], made["disk"]
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[k], theirs[k]) for k in ours)
    last = commands.weights(tmp_path / "run" / "posthoc_ema" / "0.1" / "step_0000004", "ema")
    assert not all(np.array_equal(last[k], ours[k]) for k in last)
    card = read_card(find_checkpoint(gs / "run"))
    Snapshots(gs / "run", card, (0.05, 0.1), first=2)  # of a run that continues there
    kept = {path.name for path, _ in (gs / "run" / "posthoc_ema" / "0.1").children()}
    assert kept == {"step_0000002"}


def test_samples_are_those_of_a_disk(s3, small_run, tmp_path, monkeypatch):
    from ppflow_jax.generate import folder

    args = [f"--checkpoint={small_run}", "--num=40", "--steps=2", "--solver=euler", "--batch=16"]
    monkeypatch.setattr(folder, "SHARD", 16)
    assert commands.run("sample", *args, f"--out={tmp_path / 'x'}")[0] == 0
    written, write = [], folder.SampleFolder.write

    def killed(self, shard, *arrays):
        if written:
            raise KeyboardInterrupt
        written.append(shard)
        write(self, shard, *arrays)

    with monkeypatch.context() as patch:
        patch.setattr(folder.SampleFolder, "write", killed)
        assert commands.run("sample", *args, f"--out={s3}")[0] == 130
    assert [path.name for path in (s3 / "shards").iterdir()] == ["000000.npy"]
    code, out, err = commands.run("sample", *args, f"--out={s3}")
    assert code == 0 and "for the last 24" in out, err
    for name in ("samples.npz", "grid.png"):
        assert (s3 / name).read_bytes() == (tmp_path / "x" / name).read_bytes()
