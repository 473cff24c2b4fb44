"""Runs on a Ray cluster that is there already: placement, files, nodes that come and go.

Nodes are raylets on this machine (`tests/support/nodes.py`), each with a cache folder of its own.
"""

import json
import os
import socket
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.common.errors import ConfigError, DataError, WorkerError
from runner.common.records import ModelSpec
from runner.config.run_config import RunConfig
from runner.executors.ray import session, shipping
from runner.executors.ray.keepers import Facts, Keepers, versions_here
from runner.executors.ray.shipping import Receiver, at, parcels, pieces
from sharding.topology import Node, place_on_nodes
from tests.conftest import LENGTH, TOLERANCE, Started, environment
from tests.support.nodes import Cluster

# ---- placement


def layout(slots):
    """Nodes of each group: [('a', 'a'), ('a', 'b')]."""
    groups = {}
    for slot in slots:
        groups.setdefault(slot.replica, []).append(slot.node)
    return [tuple(nodes) for _, nodes in sorted(groups.items())]


def gpus(*counts):
    return [Node(name, cpus=16, devices=count) for name, count in zip("abcd", counts, strict=False)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Whole groups first, on the emptiest node; what is left over lies across nodes.
        ({"nodes": gpus(4, 2), "group_size": 2}, [("a", "a"), ("a", "a"), ("b", "b")]),
        ({"nodes": gpus(3, 1), "group_size": 2}, [("a", "a"), ("a", "b")]),
        ({"nodes": gpus(3, 1), "group_size": 2, "prefers_one_node": True}, [("a", "a")]),
        ({"nodes": gpus(1, 1), "group_size": 2, "prefers_one_node": True}, [("a", "b")]),
        ({"nodes": gpus(1, 1, 1), "group_size": 2}, [("a", "b")]),
        ({"nodes": gpus(1, 1), "group_size": 3}, []),
        ({"nodes": gpus(2, 1), "group_size": 1}, [("a",), ("a",), ("b",)]),
        ({"nodes": gpus(2, 2), "num_workers": 2}, [("a",), ("b",)]),
        ({"nodes": gpus(2, 2), "num_workers": 9}, [("a",), ("b",), ("a",), ("b",)]),
        # A GPU without a CPU beside it holds no worker.
        ({"nodes": [Node("a", cpus=1, devices=8)]}, [("a",)]),
        ({"nodes": []}, []),
    ],
)
def test_places_on_nodes(options, expected):
    slots = place_on_nodes(**{"kind": "gpu", "num_workers": None} | options)
    assert layout(slots) == expected
    assert {slot.cpus for slot in slots} <= {1}


def test_cpus_are_dealt_out_on_each_node():
    nodes = [Node("a", cpus=16, cores=tuple(range(16))), Node("b", cpus=5), Node("c", cpus=1)]
    slots = place_on_nodes(kind="cpu", nodes=nodes, num_workers=None)
    assert Counter(slot.node for slot in slots) == {"a": 2, "b": 2, "c": 1}
    mine = [slot for slot in slots if slot.node == "a"]
    assert [slot.cores for slot in mine] == [tuple(range(8)), tuple(range(8, 16))]
    assert [slot.cpus for slot in mine] == [8, 8]
    assert [(slot.cores, slot.cpus) for slot in slots if slot.node == "b"] == [((), 2)] * 2
    assert [slot.replica for slot in slots] == list(range(5))
    one = place_on_nodes(kind="cpu", nodes=nodes, num_workers=1, first_replica=7)
    assert (one[0].node, one[0].cpus, one[0].replica) == ("a", 16, 7)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=5),
    st.one_of(st.none(), st.integers(0, 20)),
    st.integers(1, 4),
    st.sampled_from(["cpu", "gpu"]),
    st.booleans(),
)
def test_no_node_holds_more_than_it_has(free, num_workers, group_size, kind, prefers_one_node):
    nodes = [Node(str(number), cpus, devices) for number, (cpus, devices) in enumerate(free)]
    slots = place_on_nodes(
        kind=kind, nodes=nodes, num_workers=num_workers, group_size=group_size,
        prefers_one_node=prefers_one_node,
    )  # fmt: skip
    held = Counter(slot.node for slot in slots)
    for node in nodes:
        assert held[node.id] <= node.places(kind)
        assert sum(slot.cpus for slot in slots if slot.node == node.id) <= node.cpus
    assert [(slot.replica, slot.member) for slot in slots] == [
        (number // group_size, number % group_size) for number in range(len(slots))
    ]
    assert num_workers is None or len(slots) <= num_workers


# ---- files


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """A preset of nothing but bytes, and a head."""
    preset = tmp_path / "driver" / "preset"
    (preset / "assets").mkdir(parents=True)
    files = {"config.json": b"{}", "assets/v.spm": b"", "model.weights.h5": os.urandom(5000)}
    for name, content in files.items():
        (preset / name).write_bytes(content)
    (preset / "task.weights.h5").write_bytes(b"of no use")
    kernel, bias = tmp_path / "driver" / "kernel.npy", tmp_path / "driver" / "bias.npy"
    kernel.write_bytes(b"kernel")
    bias.write_bytes(b"bias")
    monkeypatch.setattr(shipping, "PIECE_BYTES", 2048)
    monkeypatch.setattr(shipping, "read_preset", lambda path: FakePreset(path, files))
    return ModelSpec(str(preset), None, str(kernel), str(bias), 3, "mean", "float32", None, "/c")


class FakePreset:
    classifier = None

    def __init__(self, path, names):
        self.path = path
        self.small_files = tuple(path / name for name in names if "weights" not in name)
        self.weight_files = (path / "model.weights.h5",)


def send(spec, receiver, *, even_here=True):
    """Bring all files over; return the spec there and the fields that had to be sent."""
    paths, sent = {}, []
    for parcel in parcels(spec):
        found = receiver.find(parcel, even_here=even_here)
        if found is None:
            sent.append(parcel.field)
            receiver.begin(parcel)
            for piece in pieces(parcel):
                receiver.write(parcel.digest, piece)
            found = receiver.finish(parcel)
        paths[parcel.field] = found
    return at(spec, paths, "/there"), sent


def test_files_arrive_once_and_are_found_again(spec, tmp_path):
    folder = tmp_path / "node"
    there, sent = send(spec, Receiver(folder))
    assert sent == ["preset", "head_kernel", "head_bias"]
    assert there.compilation_cache == "/there"
    assert there.lora_weights is None
    preset = Path(there.preset)
    found = {str(path.relative_to(preset)) for path in preset.rglob("*") if path.is_file()}
    assert found == {"config.json", "assets/v.spm", "model.weights.h5"}
    for name in found:
        assert (preset / name).read_bytes() == (Path(spec.preset) / name).read_bytes()
    assert Path(there.head_kernel).read_bytes() == b"kernel"
    assert folder.stat().st_mode & 0o77 == 0
    again, sent = send(spec, Receiver(folder))
    assert (again, sent) == (there, [])
    # Other weights of the same size are other weights; what lies there is left to other runs.
    (Path(spec.preset) / "model.weights.h5").write_bytes(os.urandom(5000))
    other, sent = send(spec, Receiver(folder))
    assert sent == ["preset"]
    assert other.preset != there.preset
    assert preset.is_dir()
    # Damaged on the node: sent again.
    (Path(other.preset) / "config.json").write_bytes(b"[]")
    assert send(spec, Receiver(folder)) == (other, ["preset"])
    assert not list(folder.glob(".part-*"))


def test_a_shared_file_system_is_used(spec, tmp_path):
    there, sent = send(spec, Receiver(tmp_path / "node"), even_here=False)
    assert sent == []
    assert there == replace(spec, compilation_cache="/there")
    assert not (tmp_path / "node").exists()


def test_damage_on_the_way_is_seen(spec, tmp_path):
    receiver = Receiver(tmp_path / "node")
    parcel = parcels(spec)[0]
    receiver.begin(parcel)
    first, *others = pieces(parcel)
    with pytest.raises(WorkerError, match="damaged on its way"):
        receiver.write(parcel.digest, replace(first, checksum=first.checksum ^ 1))
    for piece in others:  # one is missing: as if the file had been another when it was announced
        receiver.write(parcel.digest, piece)
    with pytest.raises(WorkerError, match="changed while it was sent"):
        receiver.finish(parcel)
    assert receiver.find(parcel, even_here=True) is None
    assert list((tmp_path / "node").iterdir()) == []


def test_files_of_no_use_are_swept(spec, tmp_path):
    folder = tmp_path / "node"
    there, _ = send(spec, Receiver(folder))
    part = folder / ".part-old"
    part.mkdir()
    long_ago = time.time() - 2 * 86400
    os.utime(part, (long_ago, long_ago))
    kept = Path(there.head_bias).parent
    os.utime(kept, (long_ago - 14 * 86400,) * 2)
    Path(spec.head_kernel).write_bytes(b"another")
    # It is gone when its turn comes to be looked for, and comes again.
    assert send(spec, Receiver(folder))[1] == ["head_kernel", "head_bias"]
    assert not part.exists()


def test_no_file_is_written_elsewhere(spec, monkeypatch):
    outside = FakePreset(Path(spec.preset), ["../outside.json"])
    (Path(spec.preset).parent / "outside.json").write_text("{}")
    monkeypatch.setattr(shipping, "read_preset", lambda path: outside)
    with pytest.raises(DataError, match=r"its own files .* Received: \.\./outside\.json"):
        parcels(spec)


# ---- the address


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"mode": "single"}, "--mode single --address h:1"),
        ({"plan": True}, "--plan --address h:1"),
    ],
)
def test_what_an_address_does_not_go_with(flags, said):
    with pytest.raises(ConfigError, match=said):
        RunConfig(address="h:1", **flags)


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:", ":6379", "head:99999"])
def test_addresses_that_are_none(address):
    with pytest.raises(ConfigError, match=r"HOST:PORT .* Received: --address "):
        session.join_ray(address, verbose=False)


def test_nobody_at_the_address(cli, models, test_set, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = cli(*models["gemma2"].flags(), "--input", str(test_set), "--address", address,
                   "--output", str(tmp_path / "s.csv"))  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "error: No Ray cluster answers at this address: "
    )
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


# ---- runs

TOKEN = "0123456789abcdef" * 4
AUTH = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
MODES = {
    "data-parallel": ["--mode", "data-parallel"],
    "pipeline": ["--mode", "model-parallel", "--strategy", "pipeline"],
    "tensor": ["--mode", "model-parallel", "--strategy", "tensor"],
}


@pytest.fixture
def nodes(tmp_path, cache):
    """Two nodes with a CPU each; the second has a cache folder of its own."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as short:
        made = Cluster(Path(short), environment(cache, **AUTH))
        made.add("n0")
        made.add("n1", XDG_CACHE_HOME=str(tmp_path / "n1"))
        yield made
        made.close()


def job(model, test_set):
    return [*model.flags(), "--input", str(test_set), "--pooling", "mean",
            "--sequence-length", str(LENGTH), "--max-tokens-per-batch", "384"]  # fmt: skip


def of_node(report, name):
    return [worker for worker in report["workers"] if worker["node"] == name]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["data-parallel", "pipeline", "tensor"])
def test_two_nodes_give_the_answers_of_one_process(
    nodes, predict, models, reference, test_set, tmp_path, mode
):
    answer = predict(*MODES[mode], *job(models["gemma2"], test_set), "--address", nodes.address,
                     **AUTH, ARENA_RUNNER_SHIP="always")  # fmt: skip
    expected = reference(models["gemma2"])["raw mean"]
    assert np.abs(answer.probabilities - expected).max() < TOLERANCE
    # A group of two has a member on each.
    assert [worker["node"] for worker in answer.report["workers"]] == ["n0", "n1"]
    assert answer.report["faults"]["worker_deaths"] == 0
    sent = [line for line in answer.stderr.splitlines() if line.startswith("sending preset")]
    # n0 shares this machine's cache, and may have them from the test before.
    assert [line.rpartition(" ")[2] for line in sent] == ["n1"]
    preset = next((tmp_path / "n1" / "arena-runner" / "files").glob("*/config.json")).parent
    original = (models["gemma2"].preset / "model.weights.h5").read_bytes()
    assert (preset / "model.weights.h5").read_bytes() == original


@pytest.fixture
def long_job(models, arena_rows, tmp_path):
    """A run that takes two minutes on one device: 905 rows, of some 180,000 tokens in all.

    So it lasts until a node that comes has workers, which start cold.
    """
    slow = json.dumps([{"kind": "slow", "tokens_per_s": 1500}])
    flags = [*models["arena"].flags(), "--input", str(arena_rows), "--pooling", "mean",
             "--sequence-length", "256"]  # fmt: skip
    return flags, AUTH | {"ARENA_RUNNER_FAULTS": slow}


@pytest.fixture
def begin(cache, warm, tmp_path, nodes, long_job):
    """Start that run on the cluster, and return it once rows have come from two workers."""
    runs = []

    def start(*flags):
        files, env = long_job
        run = Started(cache, warm, *files, "--address", nodes.address, *flags,
                      "--output", tmp_path / "s.csv", **env)  # fmt: skip
        runs.append(run)
        # Both have batches, and then some more come: so both have answered.
        run.wait_for_workers(".predict", count=2)
        run.wait_for_batches(tmp_path / "s.csv", count=6)
        return run

    yield start
    for run in runs:
        for process in run.family():
            process.kill()
        run.process.communicate()


@pytest.fixture
def ends_well(predict, long_job, tmp_path):
    """Wait for a run's end; return its report, its answers compared with an undisturbed run's."""

    def check(run):
        code, _, err = run.finish()
        assert code == 0, err
        report = json.loads((tmp_path / "s.csv.report.json").read_text())
        table = pd.read_csv(tmp_path / "s.csv", dtype={"id": str})
        calm = predict("--mode", "single", *long_job[0])
        assert table["id"].tolist() == calm.ids
        assert np.abs(table.iloc[:, 1:].to_numpy() - calm.probabilities).max() < TOLERANCE
        assert report["rows"]["predicted"] == len(calm.ids) - report["rows"]["resumed"]
        return report, err

    return check


@pytest.mark.slow
def test_a_node_is_lost(nodes, begin, ends_well):
    run = begin()
    nodes.kill("n1")
    report, err = ends_well(run)
    assert report["faults"]["worker_deaths"] >= 1
    assert all(worker["rows"] > 0 for worker in report["workers"])
    assert [worker["node"] for worker in report["workers"]] == ["n0", "n1"]
    assert "gone with its node (n1)" in err


@pytest.mark.slow
def test_a_node_joins(nodes, begin, ends_well, tmp_path):
    run = begin()
    nodes.add("n2", cpus=2, XDG_CACHE_HOME=str(tmp_path / "n2"))
    report, err = ends_well(run)
    assert "node n2 joins with 2 workers" in err
    assert [worker["node"] for worker in report["workers"]] == ["n0", "n1", "n2", "n2"]
    assert sum(worker["rows"] for worker in of_node(report, "n2")) > 0


@pytest.mark.slow
def test_a_lost_node_is_made_up_for_and_no_more(nodes, begin, ends_well, tmp_path):
    run = begin("--num-workers", "2")
    nodes.add("n2", XDG_CACHE_HOME=str(tmp_path / "n2"))
    time.sleep(5)
    nodes.kill("n1")
    report, _ = ends_well(run)
    assert [worker["node"] for worker in report["workers"]] == ["n0", "n1", "n2"]
    assert of_node(report, "n2")[0]["rows"] > 0


@pytest.mark.slow
def test_the_cluster_is_left_as_it_was(nodes, begin, tmp_path):
    """Interrupted, a run takes its actors with it; the next one finds all CPUs free and goes on."""
    run = begin()
    run.process.terminate()
    code, _, err = run.finish()
    assert code == 130, err
    again = begin("--resume", "require")
    assert len(again.workers()) == 2
    again.process.kill()
    end = time.monotonic() + 30
    while again.workers():
        assert time.monotonic() < end, "Ray ends the actors of a driver that is gone"
        time.sleep(0.2)


@pytest.mark.slow
def test_who_has_no_token_stays_out(nodes, cli, models, test_set, tmp_path):
    flags = [*job(models["gemma2"], test_set), "--output", str(tmp_path / "s.csv")]
    done = cli(*flags, "--address", nodes.address, **AUTH | {"RAY_AUTH_TOKEN": "0" * 64})
    assert done.returncode == 2, done.stderr
    assert "requires a token" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "s.csv").exists()
    many = cli(*flags, "--address", nodes.address, "--num-workers", "3", **AUTH)
    assert many.returncode == 2, many.stderr
    assert "2 are free on the 2 nodes" in many.stderr


# ---- versions


@pytest.mark.slow
def test_another_ray_is_refused(cli, cache, models, test_set, tmp_path):
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as short:
        other = Cluster(Path(short), environment(cache, **AUTH, TEST_RAY_VERSION="2.59.0"))
        other.add("n0")
        done = cli(*job(models["gemma2"], test_set), "--address", other.address,
                   "--output", str(tmp_path / "s.csv"), **AUTH)  # fmt: skip
        other.close()
    assert done.returncode == 2, done.stderr
    assert "must have the same Ray and Python" in done.stderr
    assert "Ray: 2.59.0" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_versions_are_refused():
    said = session._why_not_joined(
        "h:1",
        RuntimeError(
            "Version mismatch: The cluster was started with:\n    Ray: 2.59.0\n    Python"
        ),
    )
    assert "must have the same Ray and Python" in said
    assert said.endswith("started with: Ray: 2.59.0 Python")
    notes = []
    keepers = Keepers(str, notes.append, threading.Event())
    keepers.facts = {
        "a": Facts(versions_here() | {"jax": "0.9.0"}, (0,), None, None, "/cache"),
        "b": Facts(versions_here(), (0,), None, None, "/cache"),
    }
    with pytest.raises(ConfigError, match=r"same answers. Expected: .* Received: .* jax 0\.9\.0"):
        keepers.check_versions(["a", "b"], is_first=True)
    keepers.check_versions(["a", "b"], is_first=False)
    assert keepers.refused == {"a"}
    assert len(notes) == 1
