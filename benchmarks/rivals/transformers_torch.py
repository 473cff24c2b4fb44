"""Hugging Face transformers on PyTorch, as the contest's best public notebooks run it.

`Gemma2Model` with the same weights (LoRA merged), rows sorted by length, batches under a token
budget padded to their own longest row, inference mode, all cores. Attention is `eager`, the one
implementation that applies Gemma 2's soft cap without a compiler. Options: dtype, tokens.
"""

import math
from typing import Any

import h5py
import numpy as np
import torch
from transformers import Gemma2Config, Gemma2Model

from benchmarks.rivals.protocol import Job, Round, serve


def load(job: Job) -> Round:
    dtype = getattr(torch, job.options["dtype"])
    model = convert(job).to(dtype).eval()
    kernel, bias = (torch.from_numpy(array) for array in job.head)
    batches = make_batches(job, job.options["tokens"])

    @torch.inference_mode()
    def predict() -> tuple[np.ndarray, None]:
        answers = np.empty((len(job.tokens), len(bias)), np.float32)
        for rows, length in batches:
            tokens = torch.from_numpy(job.tokens[rows, :length]).long()
            mask = torch.from_numpy(job.mask[rows, :length])
            hidden = model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
            weights = mask[..., None] if job.pooling == "mean" else torch.ones_like(mask)[..., None]
            pooled = (hidden.float() * weights).sum(1) / weights.sum(1)
            answers[rows] = torch.softmax(pooled @ kernel + bias, dim=-1).numpy()
        return answers, None

    predict()
    return predict


def make_batches(job: Job, tokens: int) -> list[tuple[np.ndarray, int]]:
    """Return (rows, padded length) of each batch, the longest rows first."""
    order = np.argsort(-job.lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        length = int(job.lengths[order[start]]) if job.pooling == "mean" else job.length
        rows = order[start : start + max(1, tokens // length)]
        batches.append((rows, length))
        start += len(rows)
    return batches


def convert(job: Job) -> Gemma2Model:
    """Return a transformers model with the preset's weights, LoRA merged, in float32."""
    import json
    from pathlib import Path

    config = json.loads(Path(job.preset, "config.json").read_text())["config"]
    heads, head_dim = config["num_query_heads"], config["head_dim"]
    scalar = config["hidden_dim"] // heads if config["query_head_dim_normalize"] is False else None
    hidden = config["hidden_dim"]
    model = Gemma2Model(
        Gemma2Config(
            vocab_size=config["vocabulary_size"],
            hidden_size=hidden,
            intermediate_size=config["intermediate_dim"] // 2,
            num_hidden_layers=config["num_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config["num_key_value_heads"],
            head_dim=head_dim,
            rms_norm_eps=config["layer_norm_epsilon"],
            query_pre_attn_scalar=scalar or head_dim,
            sliding_window=config["sliding_window_size"],
            attn_logit_softcapping=config["attention_logit_soft_cap"],
            use_cache=False,
            attn_implementation="eager",
        )
    )
    state: dict[str, Any] = {}
    lora = h5py.File(job.lora_weights)["lora"]
    factors = iter(
        lora[name]["vars"] for name in sorted(lora.keys() - {"vars"}, key=int)
    )  # in the order of layers: query and value of each, as they come in the backbone
    with h5py.File(Path(job.preset, "model.weights.h5")) as file:
        layers = file["layers"]
        state["embed_tokens.weight"] = layers["reversible_embedding/vars/0"][()]
        state["norm.weight"] = layers["rms_normalization/vars/0"][()]
        for number in range(config["num_layers"]):
            block = layers["gemma_decoder_block" + (f"_{number}" if number else "")]
            kernels = {
                name: block[f"attention/{name}_dense/vars/0"][()]
                for name in ("query", "key", "value", "output")
            }
            for _ in range(2):
                part = next(factors)
                update = part["lora_kernel_a"][()] @ part["lora_kernel_b"][()]
                name = "query" if update.shape == kernels["query"].shape else "value"
                kernels[name] = kernels[name] + update
            prefix = f"layers.{number}."
            for name, short in (("query", "q"), ("key", "k"), ("value", "v")):
                flat = kernels[name].transpose(0, 2, 1).reshape(-1, hidden)
                state[f"{prefix}self_attn.{short}_proj.weight"] = flat
            state[f"{prefix}self_attn.o_proj.weight"] = kernels["output"].reshape(-1, hidden).T
            for theirs, ours in {
                "mlp.gate_proj.weight": "gating_ffw",
                "mlp.up_proj.weight": "gating_ffw_2",
                "mlp.down_proj.weight": "ffw_linear",
            }.items():
                state[prefix + theirs] = block[f"{ours}/vars/0"][()].T
            for theirs, ours in {
                "input_layernorm": "pre_attention_norm",
                "post_attention_layernorm": "post_attention_norm",
                "pre_feedforward_layernorm": "pre_ffw_norm",
                "post_feedforward_layernorm": "post_ffw_norm",
            }.items():
                state[f"{prefix}{theirs}.weight"] = block[f"{ours}/vars/0"][()]
    tensors = {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in state.items()}
    model.load_state_dict(tensors)
    assert math.isfinite(model.norm.weight.sum())
    return model


if __name__ == "__main__":
    serve(load)
