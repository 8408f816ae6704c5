"""Rows that hold what candidates share once: every path is still read as if it stood alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zotuner.batch import PADDING, Batch, Candidate, Ids, Row, arrange, binned, collate, cost

PROMPT = (7, 8, 9)
PATHS = ((*PROMPT, 1, 2), (*PROMPT, 3), PROMPT)  # two remainders, and a path that is the prefix itself

tokens = st.integers(1, 3)  # few kinds, so that paths share beginnings
some_paths = st.lists(st.lists(tokens, min_size=1, max_size=8).map(tuple), min_size=1, max_size=6)


def candidates_of(*examples: tuple[Ids, ...]) -> list[Candidate]:
    """A candidate a path; the target of each is its last token or two."""
    return [Candidate(path, path[-2:], e, c) for e, paths in enumerate(examples) for c, path in enumerate(paths)]


def batch_of(*examples: tuple[Ids, ...], max_length: int = 100) -> Batch:
    return collate(candidates_of(*examples), [0] * len(examples), max_length=max_length, pad=0)


@given(paths=some_paths, limit=st.integers(0, 30))
def test_a_row_holds_each_of_its_paths_where_it_says(paths: list[Ids], limit: int) -> None:
    for path, row in ((path, arrange(paths, limit)[path]) for path in paths):
        columns = row.columns(path)
        assert tuple(row.ids[i] for i in columns) == path
        assert [row.positions[i] for i in columns] == list(range(len(path)))
        assert len(row.ids) == len(row.segments) == len(row.positions)


@given(paths=some_paths, limit=st.integers(0, 30))
def test_rows_keep_the_limit_and_hold_one_path_where_they_cannot(paths: list[Ids], limit: int) -> None:
    for row in arrange(paths, limit).values():
        assert len(row.remainders) != 1
        if row.remainders:
            assert len(row.ids) <= limit
        else:
            assert row.ids in paths


@given(paths=some_paths)
def test_packing_never_takes_more_tokens(paths: list[Ids]) -> None:
    packed, plain = (set(arrange(paths, limit).values()) for limit in (100, 0))
    assert sum(len(row.ids) for row in packed) <= sum(len(row.ids) for row in plain)


@given(examples=st.lists(some_paths.map(tuple), min_size=1, max_size=4), max_length=st.integers(1, 30))
def test_in_a_batch_each_path_sees_itself_and_nothing_else(examples: list[tuple[Ids, ...]], max_length: int) -> None:
    batch = batch_of(*examples, max_length=max_length)
    visible = batch.visible()
    for n, candidate in enumerate(candidates_of(*examples)):
        count = len(candidate.target)
        places = batch.predictors[n, -count:]
        row = int(batch.places[0][places[-1]])
        seen = visible[row, batch.places[1][places[-1]]]
        assert tuple(batch.input_ids[row][seen].tolist()) == candidate.path
        assert batch.position_ids[row][seen].tolist() == list(range(len(candidate.path)))
        assert batch.targets[n, -count:].tolist() == list(candidate.target)
        assert int(batch.counts[n]) == count


@given(examples=st.lists(some_paths.map(tuple), min_size=1, max_size=4))
def test_a_batch_is_packed_only_where_that_leaves_less_to_compute(examples: list[tuple[Ids, ...]]) -> None:
    batch = batch_of(*examples)
    if batch.plain is None:
        assert int(batch.segments.max()) == 0
    else:
        assert int(batch.segments.max()) >= 1
        assert int(batch.plain.segments.max()) == 0
        assert batch.input_ids.numel() < batch.plain.input_ids.numel()


@given(lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=20))
def test_rows_behind_each_other_cost_no_more_than_padding(lengths: list[int]) -> None:
    bins = binned(lengths)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    width = max(sum(lengths[i] for i in members) for members in bins)
    assert cost(len(bins), width) <= cost(len(lengths), max(lengths))


def test_short_rows_make_one_and_long_ones_stay_alone() -> None:
    assert len(binned([30, 10, 12, 9, 11, 8])) == 1
    assert len(binned([1000, 990, 980])) == 3
    assert sorted(map(len, binned([1000, 400, 300, 250]))) == [1, 3]


def test_only_columns_that_predict_are_told() -> None:
    """In a row of several examples these are not the last ones."""
    batch = batch_of(((1, 2, 3),), ((4, 5, 6, 7, 8),))
    assert batch.input_ids.tolist() == [[4, 5, 6, 7, 8, 1, 2, 3]]
    assert batch.columns.tolist() == [-5, -4, -2, -1]


def test_remainders_follow_the_prefix_in_order() -> None:
    row = Row(PROMPT, ((1, 2), (3,)))
    assert set(arrange(PATHS, 6).values()) == {row}
    assert row.ids == (7, 8, 9, 1, 2, 3)
    assert row.segments == [0, 0, 0, 1, 1, 2]
    assert row.positions == [0, 1, 2, 3, 4, 3]
    assert [row.columns(path) for path in PATHS] == [[-6, -5, -4, -3, -2], [-6, -5, -4, -1], [-6, -5, -4]]


def test_a_limit_opens_another_row_with_the_same_prefix() -> None:
    assert set(arrange(PATHS, 5).values()) == {Row((7, 8, 9, 1, 2)), Row((7, 8, 9, 3))}
    paths = tuple((*PROMPT, i) for i in range(4))
    rows = list(dict.fromkeys(arrange(paths, 5).values()))
    assert rows == [Row(PROMPT, ((0,), (1,))), Row(PROMPT, ((2,), (3,)))]


def test_a_remainder_does_not_see_another() -> None:
    visible = batch_of(((5, 1, 2), (5, 3))).visible()
    assert visible[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]


def test_an_example_does_not_see_the_one_before_it_in_its_row() -> None:
    batch = batch_of(((5, 1, 2), (5, 3)), ((4,),))
    assert batch.input_ids.tolist() == [[5, 1, 2, 3, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 1, 0]]
    assert batch.visible()[0, -1].tolist() == [False, False, False, False, True]


def test_padding_is_not_seen_and_all_see_themselves() -> None:
    batch = batch_of(((5, 1, 2), (5, 3)), ((4,),)).plain
    assert batch is not None
    assert batch.segments.tolist() == [[0, 0, 0], [PADDING, 0, 0], [PADDING, PADDING, 0]]
    assert batch.visible()[2, -1].tolist() == [False, False, True]
    assert bool(batch.visible().diagonal(dim1=1, dim2=2).all())


def test_equal_paths_of_different_examples_are_computed_once() -> None:
    batch = batch_of(PATHS, PATHS)
    assert batch.input_ids.shape[0] == 1
    assert batch.tokens == 6
    assert batch.plain is not None
    assert batch.plain.input_ids.shape[0] == 2
    assert batch.cell[0].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("field", ["targets", "counts", "labels"])
def test_packed_or_plain_a_batch_asks_for_the_same(field: str) -> None:
    batch = batch_of(PATHS, (PROMPT,))
    assert batch.plain is not None
    assert torch.equal(getattr(batch, field), getattr(batch.plain, field))


def test_tokens_are_those_of_the_rows_without_padding() -> None:
    batch = batch_of(PATHS, (PROMPT,))
    assert batch.tokens == 6 + 3
    assert batch.plain is not None
    assert batch.plain.tokens == 5 + 4 + 3


@pytest.mark.parametrize(("longest", "length"), [(1, 32), (32, 32), (33, 64), (65, 128), (200, 256)])
def test_static_batches_have_one_of_a_few_lengths(longest: int, length: int) -> None:
    candidates = candidates_of((tuple(range(longest)),), ((1,),))
    batch = collate(candidates, [0, 0], max_length=1000, pad=0, static=True)
    free = collate(candidates, [0, 0], max_length=1000, pad=0)
    assert batch.input_ids.shape[1] == length
    assert batch.tokens == free.tokens
    plain = free.plain or free
    assert torch.equal(batch.places[1], plain.places[1])  # counted from the end, where nothing has moved
