"""The order in which examples are learned, and examples of parts of responses."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, pearsonr

from oirl.tuning.examples import Example, batches_of, suboutput_examples

QUICK = settings(max_examples=100, deadline=None, derandomize=True)
LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=40)
SIZES = st.tuples(st.integers(1, 4), st.integers(1, 4))  # micro-batch, and how many make a batch


def flat(batches: list[list[int]]) -> list[int]:
    return [i for batch in batches for i in batch]


def padding(lengths: np.ndarray, batches: list[list[int]]) -> int:
    return sum(int((lengths[batch].max() - lengths[batch]).sum()) for batch in batches)


# batches ----------------------------------------------------------------------------------------------------


@given(LENGTHS, SIZES, st.integers(1, 4), st.integers(0, 99))
@QUICK
def test_all_epochs_together_take_each_position_once_an_epoch(
    lengths: list[int], sizes: tuple[int, int], epochs: int, seed: int
) -> None:
    micro, times = sizes
    found = flat(batches_of(lengths, micro * times, micro, epochs, seed))
    assert Counter(found) == {i: epochs for i in range(len(lengths))}


@given(LENGTHS, SIZES, st.integers(1, 4), st.integers(0, 99))
@QUICK
def test_only_micro_batches_of_the_last_update_are_short(
    lengths: list[int], sizes: tuple[int, int], epochs: int, seed: int
) -> None:
    micro, times = sizes
    found = batches_of(lengths, micro * times, micro, epochs, seed)
    whole = len(lengths) * epochs // (micro * times) * times
    assert len(found) == math.ceil(len(lengths) * epochs / micro)
    assert {len(batch) for batch in found[:whole]} <= {micro}
    last = [len(batch) for batch in found[whole:]] or [1]
    assert 1 <= min(last) <= max(last) <= min(micro, min(last) + 1)


@given(LENGTHS, SIZES, st.integers(1, 3), st.integers(0, 99), st.sampled_from([2, 3]))
@QUICK
def test_devices_share_each_update(
    lengths: list[int], sizes: tuple[int, int], epochs: int, seed: int, devices: int
) -> None:
    micro, times = sizes
    batch = micro * times * devices
    one = batches_of(lengths, batch, micro, epochs, seed)
    many = batches_of(lengths, batch, micro, epochs, seed, devices)
    assert len(many) % devices == 0
    updates = len(lengths) * epochs // batch
    for update in range(updates):
        here = slice(update * times * devices, (update + 1) * times * devices)
        assert sorted(flat(one[here])) == sorted(flat(many[here]))
    rest, shared = flat(one[updates * times * devices :]), flat(many[updates * times * devices :])
    assert set(shared) == set(rest)
    assert len(shared) == len(rest) or len(shared) < len(rest) + devices  # no device is without a row


@given(st.lists(st.integers(1, 30), min_size=8, max_size=40), st.sampled_from([1, 2, 4]), st.integers(0, 99))
@QUICK
def test_each_epoch_is_over_before_the_next_but_for_a_part_of_a_batch(
    lengths: list[int], micro: int, seed: int
) -> None:
    batch, epochs, n = 4, 3, len(lengths)
    found = flat(batches_of(lengths, batch, micro, epochs, seed))
    for done in range(1, epochs):
        count = Counter(found[: done * n // batch * batch])
        assert {count[i] for i in range(n)} <= {done - 1, done}


@given(LENGTHS, SIZES, st.integers(0, 99))
@QUICK
def test_the_first_epochs_are_the_same_whatever_comes_after(
    lengths: list[int], sizes: tuple[int, int], seed: int
) -> None:
    micro, times = sizes
    lengths *= micro * times  # whole batches: nothing is left for the next epoch
    once = batches_of(lengths, micro * times, micro, 1, seed)
    assert batches_of(lengths, micro * times, micro, 2, seed)[: len(once)] == once


def test_what_is_left_of_an_epoch_goes_first_in_the_next() -> None:
    n, batch = 405, 8  # 50 batches and 5 positions; batches are grouped by 50
    found = flat(batches_of([1] * n, batch, batch, 2, seed=3))
    left = set(range(n)) - set(found[:400])
    assert len(left) == 5
    assert left <= set(found[400:800])
    assert not left <= set(found[800:])


def test_the_seed_decides_the_order() -> None:
    lengths = list(range(1, 41))
    one, again, other = (batches_of(lengths, 8, 4, 2, seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_epochs_differ_in_their_order() -> None:
    found = batches_of([5] * 24, 8, 4, 2, seed=0)
    assert sorted(flat(found[:6])) == sorted(flat(found[6:]))
    assert {frozenset(batch) for batch in found[:6]} != {frozenset(batch) for batch in found[6:]}


def test_each_of_equally_long_positions_may_come_first() -> None:
    first = [batches_of([7] * 6, 2, 2, 1, seed)[0][0] for seed in range(1200)]
    assert chisquare(np.bincount(first, minlength=6)).pvalue > 1e-3


def test_like_lengths_stand_together() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 500, 800)
    found = batches_of(lengths.tolist(), 32, 8, 1, seed=0)
    shuffled = rng.permutation(800).reshape(-1, 8).tolist()
    assert padding(lengths, found) < 0.1 * padding(lengths, shuffled)


def test_the_order_of_micro_batches_does_not_follow_their_length() -> None:
    lengths = np.arange(1, 801)
    means = [lengths[batch].mean() for batch in batches_of(lengths.tolist(), 32, 8, 1, seed=1)]
    assert abs(pearsonr(np.arange(len(means)), means).statistic) < 0.3


def test_examples_meet_others_in_each_epoch() -> None:
    """Of thousands of examples like lengths are sought in a random part, or else the same would always meet."""
    found = batches_of(list(range(1, 2001)), 4, 4, 2, seed=0)
    once, again = ({frozenset(batch) for batch in part} for part in (found[:500], found[500:]))
    assert len(once) == len(again) == 500
    assert len(once & again) < 50


# examples ---------------------------------------------------------------------------------------------------


def test_the_length_of_an_example_is_all_that_the_model_reads() -> None:
    assert len(Example([1, 2, 3], [4, 5], given=1, others=([1, 2, 3, 4, 5, 6],))) == 5


def test_sub_outputs_differ_in_what_is_given_only() -> None:
    example = Example([1, 2], [3, 4, 5, 6], others=([7, 8, 9],))
    found = suboutput_examples(example, 200, np.random.default_rng(0))
    assert len(found) == 200
    assert {part.given for part in found} == {1, 2, 3}
    assert all(replace(part, given=0) == example for part in found)


def test_a_response_of_one_token_has_no_sub_outputs() -> None:
    assert suboutput_examples(Example([1, 2], [3]), 4, np.random.default_rng(0)) == []
