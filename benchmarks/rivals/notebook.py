"""The contest notebook's loop: eager calls, batch by batch, every row padded to the full length.

Its outputs are also the reference for all others. Options: batch_size.
"""

import numpy as np

from benchmarks.rivals.keras_model import Classifier
from benchmarks.rivals.protocol import Job, Round, serve


def load(job: Job) -> Round:
    model, size = Classifier(job), job.options["batch_size"]

    def predict() -> tuple[np.ndarray, None]:
        answers = []
        for start in range(0, len(job.tokens), size):
            rows = slice(start, start + size)
            inputs = {"token_ids": job.tokens[rows], "padding_mask": job.mask[rows]}
            answers.append(np.asarray(model(inputs)))
        return np.concatenate(answers), None

    return predict


if __name__ == "__main__":
    serve(load)
