"""Ray Data: `map_batches` over an actor pool, a compiled Keras model in each actor.

One actor per core. Every row is padded to the full length, since `map_batches` counts rows, not
tokens. Each actor compiles before its first batch. Ray Data starts its actors with every run of a
dataset, so a round's steady state lasts from the first batch to the last, by the actors' own
clocks. Options: batch_size, actors.
"""

import time

import numpy as np
import ray

from benchmarks.rivals.protocol import Job, Round, serve


class Predict:
    """An actor of the pool."""

    def __init__(self, values: dict, size: int) -> None:
        from benchmarks.rivals.keras_model import Classifier

        self._model = Classifier(Job(values)).as_model()
        length = values["length"]
        self._model.predict_on_batch(
            {"token_ids": np.ones((size, length), "int32"), "padding_mask": np.ones((size, length))}
        )
        self._size = size

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        started, rows = time.time(), len(batch["row"])
        # One shape, so one compile.
        inputs = {
            name: np.pad(batch[name], ((0, self._size - rows), (0, 0)))
            for name in ("token_ids", "padding_mask")
        }
        probabilities = self._model.predict_on_batch(inputs)[:rows]
        clock = np.tile([started, time.time()], (rows, 1))
        return {"row": batch["row"], "probabilities": probabilities, "clock": clock}


def load(job: Job) -> Round:
    size, actors = job.options["batch_size"], job.options["actors"]
    values = job.options["job"] | {"options": {}}

    def predict() -> tuple[np.ndarray, float]:
        ray.init("local", num_cpus=actors, include_dashboard=False, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = len(job.tokens)
        columns = {"row": np.arange(rows), "token_ids": job.tokens, "padding_mask": job.mask}
        table = ray.data.from_items(
            [{name: column[row] for name, column in columns.items()} for row in range(rows)]
        )
        results = table.map_batches(
            Predict,
            fn_constructor_args=(values, size),
            batch_size=size,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=1,
        ).take_all()
        ray.shutdown()
        answers = np.stack([r["probabilities"] for r in sorted(results, key=lambda r: r["row"])])
        clocks = np.stack([r["clock"] for r in results])
        return answers, float(clocks[:, 1].max() - clocks[:, 0].min())

    return predict


if __name__ == "__main__":
    serve(load)
