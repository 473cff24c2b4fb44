"""How close to its limit does the engine come on one device, without Ray and TensorFlow?

Makes random weights on the device. For each sequence length and batch size, times the whole model,
its matrix products alone, and the model without attention (each position returns its own value);
the rest is the difference. The limit is a large square matmul in the same dtype on the same device.
Runs on any device that JAX finds, even a CPU. Call `process.prepare_process` before you import
this.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
import keras_hub
import numpy as np
from keras.src.backend.common import global_state

from benchmarks.shapes import SHAPES
from runner.common.records import Head
from runner.model import attention
from runner.model.predictor import Predictor, matmul_rate, resolve_dtype
from runner.model.quantization import quantize_layer
from runner.preset.families import model_shape
from sharding.batches import BatchShape

LENGTHS = (512, 1024, 2048)
TOKENS = {"cpu": (2048,), "gpu": (8192, 16384, 32768), "tpu": (8192, 16384, 32768)}
VOCABULARY = {"tiny": 1000}
CLASSES = 3
REPEATS = 5


def measure(shape_name: str) -> None:
    """Print a table and a JSON line for one shape on the first device."""
    device = jax.local_devices()[0]
    dtype = resolve_dtype("auto", device)
    limit = matmul_rate(dtype, device)
    config = {"vocabulary_size": VOCABULARY.get(shape_name, 256_000), **SHAPES[shape_name]}
    shape = model_shape("GemmaBackbone", config)
    print(f"{device.device_kind}, {dtype}, matmul {limit / 1e12:,.2f} TFLOP/s", flush=True)
    backbone = build(config, dtype)
    head = Head(
        np.full((config["hidden_dim"], CLASSES), 0.01, np.float32),
        np.zeros(CLASSES, np.float32),
    )
    attention.WAYS["nothing"] = pass_on_values
    rows = []
    for name in (dtype, "int8"):
        if name == "int8":
            for layer in backbone._flatten_layers(include_self=False):
                if len(list(layer._flatten_layers())) == 1:
                    quantize_layer(layer, "int8")
        whole = Predictor(backbone, head, pooling="mean")
        without = Predictor(backbone, head, pooling="mean", way="nothing")
        for note in whole.notes:
            print(note)
        for length in LENGTHS:
            for tokens in TOKENS[device.platform]:
                batch = BatchShape(max(1, tokens // length), length)
                row = {
                    "weights": name,
                    "attention": whole.way,
                    "length": length,
                    "rows": batch.rows,
                    **time_parts(whole, without, batch, config, dtype if name == dtype else None),
                }
                flops = shape.batch_flops(batch)
                row |= {"tflops": flops / row["whole_s"] / 1e12}
                row |= {"mfu": flops / row["whole_s"] / limit}
                rows.append(row)
                print(describe(row), flush=True)
    facts = {
        "benchmark": "device",
        "device": device.device_kind,
        "preset_shape": shape_name,
        "dtype": dtype,
        "matmul_tflops": limit / 1e12,
        "versions": {"jax": jax.__version__, "keras": keras.__version__},
        "measured": rows,
    }
    print(json.dumps(facts))


def build(config: dict[str, Any], dtype: str) -> keras.Model:
    """Return a backbone whose random weights are made on the device, one variable at a time."""
    with keras.StatelessScope(initialize_variables=False):
        backbone = keras_hub.models.GemmaBackbone(**config, dtype=dtype)
    global_state.set_global_attribute("uninitialized_variables", [])
    key = jax.random.key(0)
    for number, variable in enumerate(backbone.variables):
        draw = jax.random.fold_in(key, number)
        if len(variable.shape) > 1:
            values = jax.random.normal(draw, variable.shape, dtype) * 0.02
        else:
            values = jnp.zeros(variable.shape, variable.dtype)
        variable._value = jax.block_until_ready(values)
        variable._initializer = None
    return backbone


def pass_on_values(queries: jax.Array, keys: jax.Array, values: jax.Array, **_: Any) -> jax.Array:
    """Return each position's own value, in place of attention."""
    return jnp.repeat(values, queries.shape[2] // values.shape[2], axis=2)


def time_parts(
    whole: Predictor,
    without: Predictor,
    batch: BatchShape,
    config: dict[str, Any],
    dtype: str | None,
) -> dict[str, float | None]:
    """Return seconds of the whole model, its matrix products alone (None without a dtype),
    attention, and the rest."""
    tokens = np.random.default_rng(0).integers(
        4, config["vocabulary_size"], (batch.rows, batch.length), dtype=np.int32
    )
    lengths = np.full(batch.rows, batch.length, np.int32)

    def seconds(predictor: Predictor) -> float:
        predictor.compile(batch)
        return fastest(lambda: predictor.enqueue(tokens, lengths))

    whole_s, without_s = seconds(whole), seconds(without)
    matmul_s = time_matmuls(batch.tokens, config, dtype) if dtype else None
    return {
        "whole_s": whole_s,
        "attention_s": whole_s - without_s,
        "matmul_s": matmul_s,
        "rest_s": without_s - matmul_s if matmul_s else None,
    }


def time_matmuls(tokens: int, config: dict[str, Any], dtype: str) -> float:
    """Return seconds of only the projections and feed-forward products of all layers."""
    hidden, inner = config["hidden_dim"], config["intermediate_dim"] // 2
    heads = config["num_query_heads"] * config["head_dim"]
    pairs = config["num_key_value_heads"] * config["head_dim"]
    widths = ((hidden, heads + 2 * pairs), (heads, hidden), (hidden, 2 * inner), (inner, hidden))
    key = jax.random.key(0)
    arrays = [
        (jax.random.normal(key, (tokens, rows), dtype), jax.random.normal(key, shape, dtype))
        for shape in widths
        for rows in shape[:1]
    ]

    @jax.jit
    def multiply(arrays: Any) -> Any:
        return [jnp.matmul(left, right, preferred_element_type=dtype) for left, right in arrays]

    return config["num_layers"] * fastest(lambda: multiply(arrays))


def fastest(call: Callable[[], Any]) -> float:
    """Return the fewest seconds of `REPEATS` calls, after one that compiles."""
    jax.block_until_ready(call())
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        jax.block_until_ready(call())
        best = min(best, time.perf_counter() - started)
    return best


def describe(row: dict[str, Any]) -> str:
    parts = ", ".join(
        f"{name} {row[f'{name}_s'] / row['whole_s']:.0%}"
        for name in ("matmul", "attention", "rest")
        if row[f"{name}_s"] is not None
    )
    return (
        f"{row['weights']:9} {row['rows']:3} x {row['length']:4}: {row['whole_s'] * 1e3:8.1f} ms, "
        f"{row['tflops']:7.2f} TFLOP/s, MFU {row['mfu']:.2f} ({parts}; {row['attention']})"
    )
