"""Ray itself: started for one run alone, and asked what devices it found.

Does not know what runs on it.
"""

import logging
import os
import secrets

import ray
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from runner.errors import ConfigError


def start_ray(num_cpus: int, *, verbose: bool) -> None:
    """Start Ray on this machine for this run alone.

    Its servers listen on every interface, so a token that only this run's processes know keeps
    others out. Must run in the main thread: the kernel ends Ray's processes with the thread that
    started them.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Both were read when ray was imported.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray starts its workers at the lowest priority but one; ours are the work itself.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=verbose,
        logging_level=logging.INFO if verbose else logging.CRITICAL,
        configure_logging=verbose,
    )


def find_devices() -> tuple[str, int]:
    """Return the kind of device to use and how many there are, without starting JAX here.

    JAX_PLATFORMS decides the kind where it is set, as it does for JAX itself.

    Raises:
        ConfigError: JAX_PLATFORMS names a kind that is not known here.
    """
    resources = ray.cluster_resources()
    found = {"gpu": int(resources.get("GPU", 0)), "tpu": int(resources.get("TPU", 0))}
    wanted = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    kind = {"cuda": "gpu"}.get(wanted, wanted)
    if not kind:
        kind = next((name for name, count in found.items() if count), "cpu")
    if kind not in ("cpu", *found):
        raise ConfigError(
            f"Devices are cpu, cuda or tpu. Received: JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}"
        )
    return kind, found.get(kind, 0)
