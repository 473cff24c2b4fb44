"""A RunConfig -> the flags that make its run."""

from runner.config.flags import flag
from runner.config.run_config import RunConfig

# A time limit and what goes on from before are a person's run's alone, not a calibrating one's.
FLAGS_OF_A_LONG_RUN = (
    *("time_limit", "on_deadline", "min_sequence_length", "fallback_probabilities"),
    *("resume", "journal"),
)
FLAGS_OF_A_RUN = (
    *("mode", "strategy", "group_size", "num_workers", "dtype", "quantization"),
    *("preset", "lora_weights", "head_kernel", "head_bias", "pooling", "sequence_length"),
    *("text_format", "max_tokens_per_batch", *FLAGS_OF_A_LONG_RUN, "input", "output", "report"),
)


def command_flags(config: RunConfig, **changes: object) -> list[str]:
    """Return the flags that make a config's run, with changes: None leaves a flag out."""
    plain = RunConfig()
    flags: list[str] = []
    for name in FLAGS_OF_A_RUN:
        value = changes[name] if name in changes else getattr(config, name)
        if value is None or (name != "mode" and value == getattr(plain, name)):
            continue
        if isinstance(value, tuple):
            value = ",".join(f"{part:g}" for part in value)
        flags += [flag(name), f"{value:g}" if isinstance(value, float) else str(value)]
    return flags
