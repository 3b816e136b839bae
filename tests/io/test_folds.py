"""Folds: a partition that never cuts a group, spreads classes, and depends on the seed alone."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ats_stream.errors import InputError
from ats_stream.io.archive import Archive, ArchiveRow
from ats_stream.io.folds import assign_folds, fold_archive


def row(number, label="a", group="", split="train"):
    return ArchiveRow(slide=f"{number}.zarr", label=label, split=split, line=number + 2, group=group)


rows_of_groups = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["", "p1", "p2", "p3", "p4"])), min_size=6, max_size=40
).map(lambda pairs: [row(n, label, group) for n, (label, group) in enumerate(pairs)])


@settings(deadline=None)
@given(rows_of_groups, st.integers(2, 4), st.integers(0, 9))
def test_no_group_is_cut_and_no_row_is_lost(rows, num_folds, seed):
    num_groups = len({r.group or r.slide for r in rows})
    if num_groups < num_folds:
        with pytest.raises(InputError, match="folds must be 2 to"):
            assign_folds(rows, num_folds, seed=seed)
        return
    folds = assign_folds(rows, num_folds, seed=seed)
    assert folds == assign_folds(rows, num_folds, seed=seed)
    assert set(folds) <= set(range(num_folds))
    for name in {r.group for r in rows if r.group}:
        assert len({f for f, r in zip(folds, rows, strict=True) if r.group == name}) == 1


@given(st.integers(2, 5), st.lists(st.sampled_from("abc"), min_size=5, max_size=60), st.integers(0, 9))
def test_without_groups_folds_of_each_class_differ_by_one_at_most(num_folds, labels, seed):
    folds = assign_folds([row(n, label) for n, label in enumerate(labels)], num_folds, seed=seed)
    for label in set(labels):
        counts = Counter(f for f, other in zip(folds, labels, strict=True) if other == label)
        sizes = [counts[f] for f in range(num_folds)]
        assert max(sizes) - min(sizes) <= 1


def test_another_seed_makes_other_folds():
    rows = [row(n) for n in range(20)]
    assert assign_folds(rows, 4, seed=0) != assign_folds(rows, 4, seed=1)


def test_each_training_row_is_validated_on_once():
    rows = tuple(row(n, split=("train", "val", "test")[n % 3]) for n in range(12))
    archive = Archive(path="t.csv", rows=rows, classes=("a",))
    seen = []
    for fold in range(4):
        cut = fold_archive(archive, 4, fold, train_split="train", val_split="val")
        assert [r.split == "test" for r in cut] == [r.split == "test" for r in rows]
        seen += [r.slide for r in cut if r.split == "val"]
    assert sorted(seen) == sorted(r.slide for r in rows if r.split != "test")
    with pytest.raises(InputError, match="fold must be 0 to 3, got 4"):
        fold_archive(archive, 4, 4, train_split="train", val_split="val")
