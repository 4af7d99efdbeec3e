"""Splits keep the proportions of the classes, and subsets balance them."""

import pytest
import torch

from qat_tricks.data import check_labels
from qat_tricks.data.splits import balanced_subset, stratified_split
from qat_tricks.errors import QatTricksError


def test_stratified_split_is_a_partition_that_keeps_proportions():
    labels = torch.tensor([0] * 100 + [1] * 20 + [2])
    parts = stratified_split(labels, (0.6, 0.15, 0.25), seed=0)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(121))
    assert [torch.bincount(labels[part], minlength=3).tolist() for part in parts] == [
        [60, 12, 1],
        [15, 3, 0],
        [25, 5, 0],
    ]
    again, other = (stratified_split(labels, (0.6, 0.15, 0.25), seed=seed) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not torch.equal(parts[0], other[0])


def test_impossible_splits_are_refused():
    with pytest.raises(QatTricksError, match="sum 1"):
        stratified_split(torch.zeros(10).long(), (0.9, 0.3), seed=0)
    with pytest.raises(QatTricksError, match="too few"):
        stratified_split(torch.arange(3), (0.8, 0.2), seed=0)


def test_balanced_subset_takes_classes_in_turn():
    labels = torch.tensor([0] * 90 + [1] * 8 + [2] * 2)
    chosen = balanced_subset(labels, 12, seed=0)
    assert torch.bincount(labels[chosen]).tolist() == [5, 5, 2]
    assert len(set(chosen.tolist())) == 12
    assert torch.equal(balanced_subset(labels, 5, seed=0), chosen[:5])
    assert sorted(balanced_subset(labels, 1000, seed=0).tolist()) == list(range(100))


def test_labels_out_of_range_are_named():
    check_labels(torch.tensor([0, 9]), 10, "here")
    with pytest.raises(QatTricksError, match="here: labels run from 0 to 10, 10 classes"):
        check_labels(torch.tensor([0, 10]), 10, "here")
