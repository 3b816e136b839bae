"""k folds of an archive: every group of slides in one fold, every class spread over all of them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from ats_stream.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ats_stream.io.archive import Archive, ArchiveRow


def assign_folds(rows: Sequence[ArchiveRow], num_folds: int, *, seed: int = 0) -> list[int]:
    """The fold of each row, 0 to ``num_folds - 1``; rows of one group are in one fold.

    Groups, the largest first and those of one size in an order drawn from the seed, go one by one to the fold
    that has the fewest slides of the group's classes so far, then the fewest slides: greedy stratification.
    A row without a group is a group of its own. Raises InputError for fewer than 2 folds or more folds than
    groups.
    """
    members: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        members.setdefault(f"group {row.group}" if row.group else f"row {number}", []).append(number)
    if not 2 <= num_folds <= len(members):
        raise InputError(f"folds must be 2 to {len(members)}, the number of groups, got {num_folds}")
    groups = list(members.values())
    random.Random(seed).shuffle(groups)  # noqa: S311  # an order, not a secret
    groups.sort(key=len, reverse=True)
    counts = [Counter[str]() for _ in range(num_folds)]
    fold_of = [0] * len(rows)
    for group in groups:
        labels = Counter(rows[n].label for n in group)

        def crowd(fold: int, labels: Counter[str] = labels) -> tuple[int, int, int]:
            same = sum(counts[fold][label] * count for label, count in labels.items())
            return same, counts[fold].total(), fold

        chosen = min(range(num_folds), key=crowd)
        counts[chosen].update(labels)
        for number in group:
            fold_of[number] = chosen
    return fold_of


def fold_archive(
    archive: Archive, num_folds: int, fold: int, *, train_split: str, val_split: str, seed: int = 0
) -> Archive:
    """The archive with one fold of its training rows as the validation split.

    Rows of ``train_split`` and ``val_split`` are put together and cut into folds; those of other splits stay.
    Raises InputError for a fold that is not there, ArchiveError when there is nothing to cut.
    """
    if not 0 <= fold < num_folds:
        raise InputError(f"fold must be 0 to {num_folds - 1}, got {fold}")
    # the whole of both splits is used: a fixed validation split has no part in cross-validation
    numbers = [n for n, row in enumerate(archive.rows) if row.split in (train_split, val_split)]
    fold_of = dict(
        zip(numbers, assign_folds([archive.rows[n] for n in numbers], num_folds, seed=seed), strict=True)
    )
    rows = tuple(
        replace(row, split=val_split if fold_of[n] == fold else train_split) if n in fold_of else row
        for n, row in enumerate(archive.rows)
    )
    return replace(archive, rows=rows)
