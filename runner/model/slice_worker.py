"""Batches -> probabilities, in a worker that holds a slice of each large weight.

All members of its group compute each batch together. Does not know Ray, nor how weights are split.
"""

import socket
import time

from runner.common.records import ModelSpec, WorkerInfo
from runner.model.process import join_group, peak_rss_bytes, start_jax
from runner.model.worker import Replica, load_head


class TensorMember(Replica):
    """A member of a tensor-parallel group, with a slice of each large weight."""

    def reserve_address(self, host: str) -> str:
        """Return host:port, with a free port of this machine, where the group can meet."""
        with socket.socket() as server:
            server.bind((host, 0))
            return f"{host}:{server.getsockname()[1]}"

    def load(
        self, spec: ModelSpec, address: str = "", group_size: int = 0, family: str = ""
    ) -> WorkerInfo:
        """Join the group and load this member's slices.

        Args:
            address: host:port where the group meets. family: the backbone's class name.

        Raises:
            ConfigError: a weight cannot be split over the group.
            DataError: the files do not fit each other.
            WorkerError: JAX cannot use the device.
        """
        started = time.perf_counter()
        join_group(address, group_size, self._slot.member)
        device = start_jax(self._slot.kind, spec.compilation_cache)
        import keras

        from runner.model.loading import build_backbone, fill, locate_weights
        from runner.model.predictor import Predictor, resolve_dtype
        from runner.model.tensor_parallel import audit, lay_out_backbone, place_slices
        from sharding.mesh import distribute

        before = peak_rss_bytes()
        dtype = resolve_dtype(spec.dtype, device, is_int8=spec.is_int8)
        keras.utils.set_random_seed(0)
        backbone = build_backbone(spec.preset, dtype=dtype)
        layouts = lay_out_backbone(backbone, family, group_size)
        distribution, replicated = distribute(layouts, group_size)
        stored = locate_weights(backbone, spec.preset, spec.lora_weights)
        fill(backbone, stored, place_slices(distribution))
        notes = audit(backbone, layouts)
        self._predictor = Predictor(
            backbone,
            load_head(spec, backbone),
            pooling=spec.pooling,
            output=spec.head,
            replicated=replicated,
        )
        return self._introduce(device, dtype, started, before, notes)
