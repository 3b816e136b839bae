"""The errors of ats-stream, and the exit code that each stands for on the command line.

Every error a caller can act on derives from :class:`AtsStreamError` and from the builtin that a caller
would expect (``ValueError``, ``FileNotFoundError``, ``OSError``), so both spellings of ``except`` work. All
of them survive pickling, because they travel between Ray processes.
"""

from __future__ import annotations

from concurrent.futures import CancelledError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_RESUMABLE = 75
"""Stopped by SIGTERM with everything saved: the same command goes on (75 is EX_TEMPFAIL of sysexits.h)."""
EXIT_INTERRUPTED = 130


class AtsStreamError(Exception):
    """Base of all errors raised on purpose here; one line tells what came and what was expected."""

    exit_code: int = EXIT_FAILED


class InputError(AtsStreamError, ValueError):
    """What the caller gave cannot be used."""

    exit_code = EXIT_USAGE


class MissingFileError(AtsStreamError, FileNotFoundError):
    """A file or folder that the caller named does not exist."""

    exit_code = EXIT_USAGE


class TargetExistsError(AtsStreamError, FileExistsError):
    """An output would overwrite something that exists."""

    exit_code = EXIT_USAGE


class SlideError(InputError):
    """One slide or pyramid cannot be read: names the slide and the reason.

    >>> str(SlideError("a.svs", "truncated at byte 512"))
    'a.svs: truncated at byte 512'
    """

    def __init__(self, slide: str, reason: str) -> None:
        super().__init__(slide, reason)
        self.slide = slide
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.slide}: {self.reason}"


class BadImagesError(InputError):
    """More images cannot be read than may be left out.

    >>> print(BadImagesError(["a.svs: torn", "b.svs: empty"], 30, 0.05))
    2 of 30 images cannot be read, more than 0.05 of them may: a.svs: torn; b.svs: empty
    """

    NUM_SHOWN = 5

    def __init__(self, images: list[str], num_images: int, max_share: float) -> None:
        super().__init__(images, num_images, max_share)
        self.images = images
        """Names and reasons."""
        self.num_images = num_images
        self.max_share = max_share

    def __str__(self) -> str:
        more = len(self.images) - self.NUM_SHOWN
        return (
            f"{len(self.images)} of {self.num_images} images cannot be read, more than "
            f"{self.max_share:g} of them may: {'; '.join(self.images[: self.NUM_SHOWN])}"
            + (f"; and {more} more" if more > 0 else "")
        )


class ArchiveError(InputError):
    """An archive table misses a column, a value or a file."""


class CheckpointError(InputError):
    """A checkpoint is absent, broken, or belongs to another configuration."""


class StorageError(AtsStreamError, OSError):
    """Reading or writing failed: disk full, permission, connection."""


class ReadCancelledError(AtsStreamError, CancelledError):
    """The caller stopped a read before it was done."""


class ClusterError(AtsStreamError, RuntimeError):
    """The Ray cluster cannot run what was asked (too few CPUs, no GPU, a worker that keeps dying)."""


class PreemptedError(AtsStreamError, RuntimeError):
    """Training was asked to stop, and has saved all it did: the same command goes on from there.

    >>> str(PreemptedError("runs/a", 12, 40))
    'runs/a: stopped by SIGTERM after step 12 of 40; the same command goes on from there'
    """

    exit_code = EXIT_RESUMABLE

    def __init__(self, run_dir: str, step: int, num_steps: int) -> None:
        super().__init__(run_dir, step, num_steps)
        self.run_dir = run_dir
        self.step = step
        self.num_steps = num_steps

    def __str__(self) -> str:
        reached = f"after step {self.step} of {self.num_steps}"
        return f"{self.run_dir}: stopped by SIGTERM {reached}; the same command goes on from there"
