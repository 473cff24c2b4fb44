"""The classifier as Keras users write it: backbone with LoRA enabled, pooling layer, Dense head."""

from typing import Any

import keras
import keras_hub

from benchmarks.rivals.protocol import Job


class Classifier:
    """backbone: takes token_ids and padding_mask. average, head: Keras layers."""

    def __init__(self, job: Job) -> None:
        self.backbone = keras_hub.models.Backbone.from_preset(job.preset, dtype="float32")
        self.backbone.load_lora_weights(job.lora_weights)
        self.average = keras.layers.GlobalAveragePooling1D()
        kernel, bias = job.head
        self.head = keras.layers.Dense(kernel.shape[1], activation="softmax")
        self.head.build((None, kernel.shape[0]))
        self.head.set_weights([kernel, bias])
        self._masked = job.pooling == "mean"

    def __call__(self, inputs: dict[str, Any]) -> Any:
        hidden = self.backbone(inputs)
        mask = inputs["padding_mask"] if self._masked else None
        return self.head(self.average(hidden, mask=mask))

    def as_model(self) -> keras.Model:
        """Return it as one functional model."""
        inputs = self.backbone.input
        return keras.Model(inputs, self(inputs))
