"""Keras' own `Model.predict`: compiled, one batch size, every row padded to the full length.

Options: batch_size.
"""

import numpy as np

from benchmarks.rivals.keras_model import Classifier
from benchmarks.rivals.protocol import Job, Round, serve


def load(job: Job) -> Round:
    model, size = Classifier(job).as_model(), job.options["batch_size"]
    inputs = {"token_ids": job.tokens, "padding_mask": job.mask}
    # Compiles for the full batch and for the last one.
    model.predict({name: array[:size] for name, array in inputs.items()}, size, verbose=0)
    if rest := len(job.tokens) % size:
        model.predict({name: array[:rest] for name, array in inputs.items()}, size, verbose=0)

    def predict() -> tuple[np.ndarray, None]:
        return model.predict(inputs, batch_size=size, verbose=0), None

    return predict


if __name__ == "__main__":
    serve(load)
