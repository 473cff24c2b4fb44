"""Batches -> hidden states -> probabilities, in workers that each hold some layers of a replica.

Each stage sends hidden states to the next. Does not know Ray, nor how layers are divided.
"""

import time
from functools import partial
from typing import Any

from runner.common.records import Activations, BatchResult, ModelSpec, WorkerInfo
from runner.model.process import memory_errors
from runner.model.worker import Replica, load_head
from sharding.batches import Batch
from sharding.stages import StageLayers


class PipelineStage(Replica):
    """A pipeline stage: some of a replica's layers."""

    def load(self, spec: ModelSpec, stage: StageLayers | None = None) -> WorkerInfo:
        """Load the weights of one stage, and the head if it is the last.

        Raises:
            DataError: the files do not fit each other.
            WorkerError: JAX cannot use the device.
        """
        assert stage is not None, "this is a bug: a stage must know its layers"
        return self._load(spec, partial(_stage_predictor, spec, stage))

    def begin(self, batch: Batch) -> Activations:
        """Compute the first stage: token ids in, hidden states out.

        Raises:
            DeviceMemoryError: the device has no room for the batch; so do `carry_on` and `finish`.
        """
        started = time.perf_counter()
        with memory_errors():
            self._injected.before(batch)
            tokens, lengths = self._arrays(batch)
            hidden = self._predictor.predict(tokens, lengths)
        return Activations(hidden, lengths, (self._work_since(started, hidden.nbytes),))

    def carry_on(self, activations: Activations) -> Activations:
        """Compute a middle stage: hidden states in and out."""
        started = time.perf_counter()
        with memory_errors():
            hidden = self._predictor.predict(activations.hidden, activations.lengths)
        work = (*activations.work, self._work_since(started, hidden.nbytes))
        return Activations(hidden, activations.lengths, work)

    def finish(self, batch: Batch, activations: Activations) -> BatchResult:
        """Compute the last stage: hidden states in, probabilities out."""
        started = time.perf_counter()
        with memory_errors():
            output = self._predictor.predict(activations.hidden, activations.lengths)
        took = time.perf_counter() - started
        probabilities = self._injected.after(batch, output[: len(batch.rows)], took)
        work = (*activations.work, self._work_since(started))
        return BatchResult(batch, self._slot.replica, probabilities, work)


def _stage_predictor(spec: ModelSpec, stage: StageLayers, dtype: str) -> Any:
    from runner.model.loading import build_backbone, cut_stage, fill, locate_weights, place_whole
    from runner.model.predictor import Predictor

    backbone = build_backbone(spec.preset, dtype=dtype, quantization=spec.quantization)
    model = cut_stage(backbone, stage.start, stage.stop)
    stored = locate_weights(backbone, spec.preset, spec.lora_weights)
    fill(model, stored, place_whole, quantization=spec.quantization)
    is_last = stage.stop == len(backbone.transformer_layers)
    head = load_head(spec, backbone) if is_last else None
    output = spec.head if is_last else "hidden"
    return Predictor(model, head, pooling=spec.pooling, output=output)
