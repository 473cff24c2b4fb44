"""Durations, FLOPs, bytes and counts -> short text for users."""


def duration(seconds: float) -> str:
    """Return seconds in a suitable unit: 2.5 s, 40 s, 2.5 min, 3.1 h."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.1f} min" if seconds < 600 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 100 * 3600 else f"{seconds / 3600:,.0f} h"


def seconds_text(seconds: float) -> str:
    """Return whole seconds, or with one decimal below ten: 8.5 s, 1,234 s."""
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:,.0f} s"


def clock(seconds: float) -> str:
    """Return seconds as on a clock: 73 -> 1:13, 3700 -> 1:01:40, below zero -> 0:00."""
    minutes, second = divmod(round(max(0.0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def stopwatch(seconds: float) -> str:
    """Return seconds as on a stopwatch: 7.25 -> 7.2 s, 73 -> 1:13, 3700 -> 1:01:40."""
    if seconds < 60:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    return clock(seconds)


def tenths(seconds: float) -> str:
    """Return seconds with one decimal: 123.4 s."""
    return f"{seconds:.1f} s"


def flops_text(count: float) -> str:
    """Return FLOPs with three digits: 262 PFLOP."""
    units = {"E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6}
    unit = next((unit for unit, size in units.items() if count >= size), "M")
    return f"{count / units[unit]:.3g} {unit}FLOP"


def parameters_text(count: float) -> str:
    """Return a number of weights: 9.24 B, 4.5 M."""
    return f"{count / 1e9:.3g} B" if count >= 1e8 else f"{count / 1e6:.2g} M"


def gb(count: float) -> str:
    """Return bytes in GB, or in MB below 95 MB: 18.5 GB, 42 MB."""
    return f"{count / 1e9:.1f} GB" if count >= 0.95e8 else f"{count / 1e6:.0f} MB"


def mb(count: float) -> str:
    """Return bytes in whole MB: 18,480 MB."""
    return f"{count / 1e6:,.0f} MB"


def kb(count: float) -> str:
    """Return bytes in kB with four digits: 18.43 kB."""
    return f"{count / 1e3:,.4g} kB"
