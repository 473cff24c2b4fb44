"""Batches -> probabilities, in a worker that holds a slice of each large weight.

All members of its group compute each batch together. Does not know Ray, nor how weights are split.
"""

import socket
from functools import partial
from typing import Any

from runner.common.records import ModelSpec, WorkerInfo
from runner.model.process import join_group
from runner.model.worker import Replica, load_head


class TensorMember(Replica):
    """A member of a tensor-parallel group, with a slice of each large weight."""

    def reserve_address(self, host: str) -> str:
        """Return host:port, with a free port of this machine, as the group's address."""
        with socket.socket() as server:
            server.bind((host, 0))
            return f"{host}:{server.getsockname()[1]}"

    def load(
        self, spec: ModelSpec, address: str = "", group_size: int = 0, family: str = ""
    ) -> WorkerInfo:
        """Join the group and load this member's slices.

        Args:
            address: the group's host:port. family: the backbone's class name.

        Raises:
            ConfigError: a weight cannot be split over the group.
            DataError: the files do not fit each other.
            WorkerError: JAX cannot use the device.
        """
        join = partial(join_group, address, group_size, self._slot.member)
        return self._load(spec, partial(_sliced_predictor, spec, family, group_size), join)


def _sliced_predictor(spec: ModelSpec, family: str, group_size: int, dtype: str) -> Any:
    import keras

    from runner.model.loading import build_backbone, fill, locate_weights
    from runner.model.predictor import Predictor
    from runner.model.tensor_parallel import audit, lay_out_backbone, place_slices
    from sharding.mesh import distribute

    keras.utils.set_random_seed(0)  # Keras compares the members' random states
    backbone = build_backbone(spec.preset, dtype=dtype)
    layouts = lay_out_backbone(backbone, family, group_size)
    distribution, replicated = distribute(layouts, group_size)
    stored = locate_weights(backbone, spec.preset, spec.lora_weights)
    fill(backbone, stored, place_slices(distribution))
    reasons = audit(backbone, layouts)
    predictor = Predictor(
        backbone,
        load_head(spec, backbone),
        pooling=spec.pooling,
        output=spec.head,
        replicated=replicated,
    )
    predictor.notes = reasons + predictor.notes
    return predictor
