"""The ways to run -> the best one, why, and its command. Does not know how a plan is shown."""

from typing import Any

from runner.common.units import duration
from runner.config.command import command_flags
from runner.config.task import CONTEST
from runner.planner.records import Option, PlanInput
from runner.planner.ways import pipeline_over

# Ways that take at most this many times as long as the fastest, plus these seconds, count as
# equally fast; the simplest of them is recommended.
AS_FAST, AS_FAST_S = 1.05, 30.0
# A less precise way is mentioned if it takes less than this share of the time.
MUCH_FASTER = 0.8
MOST_MEMBERS = 64


def recommend(job: PlanInput, options: list[Option]) -> tuple[Option | None, str]:
    """Return the recommended way, None if nothing fits, and the reasons in a few sentences.

    It has the requested dtype and quantization, or another quantization if nothing else fits. Among
    these ways, it is the simplest that is about as fast as the fastest.
    """
    fitting = [option for option in options if option.fits]
    wanted = job.preset.quantization or job.config.quantization
    for quantization in (wanted, *(name for name in job.quantizations if name != wanted)):
        form = (job.dtype, quantization)
        there = [option for option in fitting if option.way[2:] == form]
        times = [option.total_s for option in there if option.total_s is not None]
        limit_s = min(times, default=0.0) * AS_FAST + AS_FAST_S
        for option in there:
            if option.total_s is None or option.total_s <= limit_s:
                return option, " ".join(_reasons(job, option, wanted, options))
    return None, _what_would_fit(job)


def asked_option(job: PlanInput, options: list[Option]) -> Option:
    """Return the requested way, which may not fit."""
    return next(option for option in options if option.way == job.asked)


def _reasons(job: PlanInput, best: Option, wanted: str, options: list[Option]) -> list[str]:
    """Return sentences on why `best` is recommended, and on what is faster but less precise."""
    said = []
    if best.quantization != wanted:
        form = (job.dtype, wanted)
        without = next(option for option in options if option.way[2:] == form)
        said.append(
            f"Nothing fits with {'float' if wanted == 'none' else wanted} weights "
            f"({_label(without)} {without.why_not}); {best.quantization} does, and the report says "
            "how much it changes the answers."
        )
    alike = [option for option in options if option.way[2:] == best.way[2:]]
    replica = next(option for option in alike if option.mode == "data-parallel")
    if best.mode == "data-parallel":
        said.append("One device holds a replica, so workers need not communicate.")
    elif best.mode == "model-parallel" and not replica.fits:
        said.append(
            f"A {best.dtype} replica does not fit one device ({replica.why_not}); "
            f"{best.group_size} hold it together."
        )
    timed = [(o.total_s, o) for o in options if o.fits and o.total_s]
    others = [(s, o) for s, o in timed if o.way[2:] == best.way[2:] and o is not best]
    if others and best.total_s:
        seconds, other = min(others, key=lambda one: one[0])
        said.append(
            f"{_label(other).capitalize()} should take {seconds / best.total_s:.2f} times as long"
            f"{'.' if seconds > best.total_s else ', about the same, and is less simple.'}"
        )
    rounding = [(s, o) for s, o in timed if o.way[2:] != best.way[2:]]
    if rounding and best.total_s:
        seconds, other = min(rounding, key=lambda one: one[0])
        if seconds < MUCH_FASTER * best.total_s:
            forms = " and ".join(name for name in other.way[2:] if name != "none")
            said.append(
                f"{_label(other).capitalize()} in {forms} should take {duration(seconds)}, but "
                "its answers are less precise."
            )
    limit = job.config.time_limit
    if limit is not None and best.range_s is not None:
        fast, slow = best.range_s
        within = "is" if slow <= limit else "may be" if fast <= limit else "is not"
        said.append(f"That {within} within the time limit of {duration(limit)}.")
    if best.total_s is None:
        said.append("How long it takes is not known: --calibrate measures it.")
    return said


def _what_would_fit(job: PlanInput) -> str:
    """Return a sentence on how many devices would be enough."""
    if job.devices.is_host:
        return "Nothing fits the memory of this machine."
    quantization = job.preset.quantization or job.config.quantization
    for members in range(2, min(MOST_MEMBERS, job.preset.shape.num_layers) + 1):
        if not pipeline_over(job, members, job.dtype, quantization).fits:
            continue
        return (
            f"Nothing fits {job.devices.count} x {job.devices.title}. A pipeline over {members} of "
            f"them would hold {job.dtype} weights: --mode model-parallel "
            f"--group-size {members}."
        )
    return f"Nothing fits, not even {MOST_MEMBERS} x {job.devices.title} together."


def command_of(job: PlanInput, best: Option) -> list[str]:
    """Return the flags of the recommended run."""
    config = job.config
    is_group = best.mode == "model-parallel"
    keeps_count = config.num_workers is not None and best.mode != "single"
    changes: dict[str, Any] = {
        "plan": None,
        "mode": best.mode,
        "strategy": best.strategy if best.strategy == "tensor" else None,
        "group_size": best.group_size if is_group and best.group_size != 2 else None,
        "num_workers": best.workers if keeps_count else None,
        "dtype": best.dtype if best.dtype != job.devices.native_dtype else "auto",
        "quantization": "none" if job.preset.quantization else best.quantization,
    }
    has_head = config.task.head != "none"
    if config.preset is not None and config.head_kernel is None and has_head:
        changes |= {"head_kernel": "FILE.npy", "head_bias": "FILE.npy"}
    own_task = [] if config.task == CONTEST else ["--config", "FILE.toml"]
    return [*own_task, *command_flags(config, **changes)]


def _label(option: Option) -> str:
    return option.strategy or option.mode
