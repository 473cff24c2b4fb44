"""The five recipes of docs/architecture.md, each tried on a copy of the code.

A recipe is applied to a copy of `runner/` and `sharding/`, at exactly the places that the page
names. The copy is then imported instead of the code, and plans, predicts and writes.
"""

import importlib
import json
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.conftest import ROOT, TOLERANCE
from tests.support.pages import inline_code

PAGE = ROOT / "docs" / "architecture.md"
MOST_LINES = 6
# Modules of the tests that import the code by name, so they must be imported again.
BOUND = ("tests.support.fakes", "tests.support.simulated_ray")
MODES = {
    "single": ("--mode", "single"),
    "data-parallel": ("--mode", "data-parallel", "--num-workers", "2"),
    "pipeline": ("--mode", "model-parallel", "--strategy", "pipeline"),
    "tensor": ("--mode", "model-parallel", "--strategy", "tensor"),
}


@dataclass
class Copy:
    """A copy of the code for a newcomer to change.

    Attributes:
        changed: the files changed so far.
    """

    folder: Path
    changed: set[str] = field(default_factory=set)

    def change(self, path: str, old: str, new: str) -> None:
        """Replace a text that occurs exactly once in a file."""
        text = (self.folder / path).read_text()
        assert text.count(old) == 1, f"adapt this test: {path} must hold once: {old}"
        (self.folder / path).write_text(text.replace(old, new))
        self.changed.add(path)

    def load(self, name: str) -> ModuleType:
        """Import a module of the copy, or a module of the tests that then uses the copy."""
        module = importlib.import_module(name)
        at = Path(importlib.import_module("runner").__file__).parent.parent
        assert at == self.folder, "the tests must run the copy"
        return module


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy that is imported instead of the code, until the test ends."""

    def is_ours(name: str) -> bool:
        return name.split(".", maxsplit=1)[0] in ("runner", "sharding") or name in BOUND

    folder = tmp_path / "copy"
    for name in ("runner", "sharding"):
        shutil.copytree(ROOT / name, folder / name)
    support = sys.modules["tests.support"]
    names = [name.removeprefix("tests.support.") for name in BOUND]
    modules = {name: module for name, module in sys.modules.items() if is_ours(name)}
    attributes = {name: vars(support)[name] for name in names if name in vars(support)}
    for name in modules:
        del sys.modules[name]
    monkeypatch.syspath_prepend(folder)
    yield Copy(folder)
    # While the modules are there that it patched.
    monkeypatch.undo()
    for name in [name for name in sys.modules if is_ours(name)]:
        del sys.modules[name]
    for name in names:
        vars(support).pop(name, None)
    sys.modules.update(modules)
    vars(support).update(attributes)


@pytest.fixture
def simulate(copy, tmp_path, monkeypatch, capsys):
    """Return the copy's command on a simulated Ray; its model is arithmetic on token ids."""

    def start(change_preset=lambda job: None):
        simulated = copy.load("tests.support.simulated_ray")
        folder = tmp_path / "run"
        (tmp_path / "job").mkdir()
        folder.mkdir()
        job = simulated.Job(tmp_path / "job")
        change_preset(job)
        return simulated.Command(job, folder, monkeypatch, capsys)

    return start


def recipe(title: str) -> list[str]:
    """Return the lines of a recipe of the page."""
    found = re.search(rf"^### {title}\n\n(.+?)\n(?=\n#|\Z)", PAGE.read_text(), re.M | re.S)
    assert found, f"{PAGE.name} has no recipe: {title}"
    return found[1].splitlines()


def files_named(title: str, folder: Path) -> set[str]:
    """Return the files of the code that a recipe names."""
    (folder / "recipe.md").write_text("\n".join(recipe(title)))
    words = (code for _, code in inline_code(folder / "recipe.md"))
    return {code for code in words if re.fullmatch(r"(runner|sharding)/[\w/]+\.py", code)}


def titles() -> list[str]:
    _, _, tasks = PAGE.read_text().partition("\n## Five first tasks\n")
    return re.findall(r"^### (.+)$", tasks, re.MULTILINE)


def test_there_are_five_recipes_of_at_most_six_lines():
    assert len(titles()) == 5
    assert {
        title: len(recipe(title)) for title in titles() if len(recipe(title)) > MOST_LINES
    } == {}


class FakeModel:
    """A Keras model whose hidden states are its token ids: float32 (rows, length, 1)."""

    input: Any = {"token_ids": None, "padding_mask": None}  # noqa: RUF012
    compute_dtype = "float32"
    non_trainable_variables: tuple[Any, ...] = ()

    def __init__(self, weight: Any) -> None:
        self.trainable_variables = (SimpleNamespace(value=weight),)

    def stateless_call(self, trainable, non_trainable, inputs, *, training):
        return inputs["token_ids"][..., None].astype("float32"), None


def add_pooling(copy: Copy) -> None:
    """Add `largest`, for decoders."""
    copy.change(
        "runner/common/poolings.py",
        "\n\nPOOLINGS: ",
        '''

def largest_over_tokens(xp: Any, hidden: Any, lengths: Any) -> Any:
    """The largest of each number over the real tokens of a row; padding changes nothing."""
    real = xp.arange(hidden.shape[1])[None, :, None] < lengths[:, None, None]
    return xp.where(real, hidden, -xp.inf).max(axis=1)


POOLINGS: ''',
    )
    copy.change(
        "runner/common/poolings.py",
        '    "last": Pooling(pool=last_token),\n',
        '    "last": Pooling(pool=last_token),\n'
        '    "largest": Pooling(pool=largest_over_tokens, of=(DECODER,)),\n',
    )


def test_a_pooling(copy, simulate, tmp_path):
    add_pooling(copy)
    assert copy.changed == files_named("Add a pooling", tmp_path)
    families = copy.load("runner.preset.families").FAMILIES
    assert "largest" in families["GemmaBackbone"].poolings
    assert "largest" not in families["BertBackbone"].poolings
    parse = copy.load("runner.config.parser").parse_arguments
    assert parse(["--pooling", "largest"]).pooling == "largest"
    # A run pads to buckets, as it does for every pooling that does not see padding.
    done = simulate()("--mode", "data-parallel", "--pooling", "largest")
    assert done.code == 0, done.err
    assert done.report["config"]["pooling"] == "largest"
    assert done.report["tokens"]["padded"] < 40 * 1024


@pytest.mark.process
def test_the_program_of_a_batch_calls_a_new_pooling(copy):
    import jax

    add_pooling(copy)

    program = copy.load("runner.model.program").Program(
        FakeModel(jax.numpy.zeros(1)), pooling="largest", output="none", way="keras"
    )
    tokens, lengths = np.array([[3, 5, 9, 9], [4, 2, 1, 9]], np.int32), np.array([2, 3], np.int32)
    pooled = program.forward([], [], [], jax.numpy.asarray(tokens), jax.numpy.asarray(lengths))
    assert np.asarray(pooled).tolist() == [[5.0], [4.0]]


# Phi 3, as KerasHub names its weights.
PHI_3_RULES = r"""_PHI_3 = (
    *_LLAMA[:2],
    Rule(r"transformer_layer_\d+/attention/(query|key|value)/kernel", (None, SPLIT_AXIS, None)),
    Rule(r"transformer_layer_\d+/attention/attention_output/kernel", (SPLIT_AXIS, None, None)),
    Rule(r"transformer_layer_\d+/feedforward_(intermediate|gate)_dense/kernel", (None, SPLIT_AXIS)),
    Rule(r"transformer_layer_\d+/feedforward_output_dense/kernel", (SPLIT_AXIS, None)),
    Rule(r"transformer_layer_\d+/(pre|post)_attention_layernorm/scale", (None,), reason=NORM),
    Rule(r"sequence_output_layernorm/scale", (None,), reason=NORM),
)
"""


def test_a_backbone_family(copy, simulate, tmp_path):
    copy.change(
        "runner/preset/families.py",
        '    "LlamaBackbone": Family(shape=gated, tokenizer="LlamaTokenizer"),\n',
        '    "LlamaBackbone": Family(shape=gated, tokenizer="LlamaTokenizer"),\n'
        '    "Phi3Backbone": Family(shape=gated, tokenizer="Phi3Tokenizer", shares_seam=False),\n',
    )
    copy.change(
        "runner/preset/families.py",
        '    "LlamaTokenizer": Tokenizer(',
        # The tokens that the vocabulary of the simulated job has.
        '    "Phi3Tokenizer": Tokenizer(SENTENCE_PIECES, "<bos>", "<eos>"),\n'
        '    "LlamaTokenizer": Tokenizer(',
    )
    rules = "# KerasHub class name -> its rules."
    copy.change("sharding/layouts.py", rules, f"{PHI_3_RULES}{rules}")
    copy.change(
        "sharding/layouts.py",
        '    "LlamaBackbone": _LLAMA,\n',
        '    "LlamaBackbone": _LLAMA,\n    "Phi3Backbone": _PHI_3,\n',
    )
    assert copy.changed == files_named("Add a backbone family", tmp_path)

    layouts = copy.load("sharding.layouts")
    weights = {"query": (32, 4, 8), "value": (32, 2, 8), "attention_output": (4, 8, 32)}
    named = [layouts.Weight(f"transformer_layer_0/attention/{name}/kernel", shape)
             for name, shape in weights.items()]  # fmt: skip
    assert len(layouts.lay_out("Phi3Backbone", named, 2)) == 3

    def change_preset(job):
        config = job.files["preset"] / "config.json"
        made = json.loads(config.read_text())
        config.write_text(json.dumps({**made, "class_name": "Phi3Backbone"}))
        tokenizer = {"class_name": "Phi3Tokenizer", "config": {}}
        (job.files["preset"] / "tokenizer.json").write_text(json.dumps(tokenizer))

    command = simulate(change_preset)
    for mode, flags in MODES.items():
        done = command(*flags, "--resume", "never")
        assert done.code == 0, (mode, done.err)
        assert done.differing(command.job.answers) == []
    main = copy.load("runner.cli").main
    assert main([*command.job.flags(tmp_path / "p.csv"), "--plan", "--device", "t4"]) == 0
    options = json.loads((tmp_path / "p.csv.plan.json").read_text())["options"]
    found = {option["strategy"] for option in options}
    assert found >= {"pipeline", "tensor"}, found


def test_a_kind_of_device(copy, simulate, tmp_path, monkeypatch):
    copy.change(
        "sharding/kinds.py",
        "KINDS: dict[str, Kind] = {kind.name: kind for kind in (CPU, GPU, TPU)}\n",
        """NPU = Kind(
    name="npu",
    platform="npu",
    extra="npu",
    resource="NPU",
    place="NPU and a CPU",
    bucket_multiple=32,
    tokens_per_batch=4096,
    auto_dtype="bfloat16",
    typical_flops_per_s=1e13,
    efficiency=(0.5, 0.3, 0.7),
    imported_bytes=1e9,
    libraries_s=10.0,
)
KINDS: dict[str, Kind] = {kind.name: kind for kind in (CPU, GPU, TPU, NPU)}
""",
    )
    copy.change(
        "runner/common/machine.py",
        "    host = memory_of_machine()\n",
        """    host = memory_of_machine()
    if npus := [*Path(os.environ["NPUS"]).glob("npu[0-9]")]:
        return Devices(kind="npu", title="NPU", count=len(npus), is_here=True,
                       memory_bytes=32e9, host_bytes=host)
""",
    )
    assert copy.changed == files_named("Add a kind of device", tmp_path)
    (tmp_path / "dev").mkdir()
    monkeypatch.setenv("NPUS", str(tmp_path / "dev"))
    for number in range(2):
        (tmp_path / "dev" / f"npu{number}").touch()
    # A run finds the devices by Ray, gives one to each worker, and makes batches by the record.
    command = simulate()
    session = copy.load("runner.executors.ray.session")
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: {"CPU": 4.0, "NPU": 2.0})
    monkeypatch.delenv("JAX_PLATFORMS")
    assert session.find_devices() == ("npu", 2)
    places = copy.load("runner.executors.ray.places")
    monkeypatch.setattr(places, "find_devices", session.find_devices)
    done = command("--mode", "data-parallel")
    assert done.code == 0, done.err
    assert done.differing(command.job.answers) == []
    assert [worker["replica"] for worker in done.report["workers"]] == [0, 1]
    assert done.report["model"]["dtype"] == "bfloat16"
    shapes = done.report["plan"]["shapes"]
    assert len(shapes) > 1
    assert all(shape["length"] % 32 == 0 for shape in shapes)
    assert max(shape["rows"] * shape["length"] for shape in shapes) <= 4096
    # A worker asks Ray for one, and tells JAX to use it.
    slot = copy.load("sharding.topology").WorkerSlot(0, "npu")
    assert copy.load("runner.executors.ray.actors")._devices(slot) == {"NPU": 1}
    process = copy.load("runner.model.process")
    monkeypatch.setattr(process, "cpu_allocator", SimpleNamespace(use_one_heap=lambda: None))
    monkeypatch.setattr(process, "os", SimpleNamespace(environ={}))
    monkeypatch.setattr(process, "sys", SimpleNamespace(modules={}))
    process.prepare_process(slot, verbose=True)
    assert process.os.environ["JAX_PLATFORMS"] == "npu"
    # The plan finds them on this machine.
    main = copy.load("runner.cli").main
    assert main([*command.job.flags(tmp_path / "p.csv"), "--plan"]) == 0
    plan = json.loads((tmp_path / "p.csv.plan.json").read_text())
    assert (plan["device"]["kind"], plan["device"]["count"]) == ("npu", 2)
    assert {option["dtype"] for option in plan["options"]} >= {"bfloat16"}


def test_an_output_format(copy, simulate, tmp_path):
    copy.change(
        "runner/data/formats.py",
        "\n\ndef csv_text(",
        '''

def tab_separated(columns: Mapping[str, Any], values: np.ndarray, names: Sequence[str]) -> bytes:
    """Return a table with tabs; an embedding is a column a number."""
    names = names or [f"{EMBEDDING}_{place}" for place in range(values.shape[1])]
    table = pd.DataFrame({**columns, **dict(zip(names, values.T, strict=True))})
    return table.to_csv(sep="\\t", index=False).encode()


def csv_text(''',
    )
    copy.change(
        "runner/data/formats.py",
        '"JSON lines": json_lines}',
        '"JSON lines": json_lines, "tab-separated": tab_separated}',
    )
    copy.change(
        "runner/config/suffixes.py",
        '    "JSON lines": (".jsonl",),\n',
        '    "JSON lines": (".jsonl",),\n    "tab-separated": (".tsv",),\n',
    )
    assert copy.changed == files_named("Add an output format", tmp_path)
    command, output = simulate(), tmp_path / "out.tsv"
    main = copy.load("runner.cli").main
    assert main([*command.job.flags(output), "--mode", "data-parallel"]) == 0
    flags = {row.name: row for row in copy.load("runner.config.flags").FLAGS}
    assert ".tsv" in flags["output"].help
    table = pd.read_csv(output, sep="\t", dtype={"id": str}, keep_default_na=False)
    assert table["id"].tolist() == command.job.ids
    assert np.abs(table.iloc[:, 1:].to_numpy() - command.job.answers).max() < TOLERANCE


@pytest.mark.parametrize("mode", MODES)
def test_an_injected_fault(copy, simulate, tmp_path, mode):
    path = "runner/model/injected_faults.py"
    copy.change(path, '("nan", "slow")', '("nan", "slow", "even")')
    copy.change(
        path,
        "        return probabilities\n",
        """            elif fault["kind"] == "even":
                probabilities = np.full_like(probabilities, 1 / probabilities.shape[1])
        return probabilities
""",
    )
    assert copy.changed == files_named("Add an injected fault", tmp_path)
    command = simulate()
    fault = {"kind": "even", "rows": [7], "once": str(tmp_path / "once")}
    done = command(*MODES[mode], faults=[fault])
    assert done.code == 0, done.err
    struck = command.job.answers.copy()
    differing = done.differing(struck)
    assert 7 in differing
    assert len(differing) < len(struck), "one batch only"
    struck[differing] = 1 / 3
    assert done.differing(struck) == []
