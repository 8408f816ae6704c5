"""Rows that hold what candidates share once: every path is still read as if it stood alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zotuner.batch import PADDING, Batch, Candidate, Ids, Row, arrange, collate

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
        assert int(batch.segments.max()) >= 2
        assert int(batch.plain.segments.max()) == 0
        assert batch.input_ids.numel() < batch.plain.input_ids.numel()


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
    batch = batch_of(((5, 1, 2), (5, 3)), ((4,),))
    assert batch.segments.tolist() == [[0, 1, 1, 2], [PADDING, PADDING, PADDING, 0]]
    assert batch.visible()[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    assert batch.visible()[1, -1].tolist() == [False, False, False, True]
    assert bool(batch.visible().diagonal(dim1=1, dim2=2).all())


def test_equal_paths_of_different_examples_are_computed_once() -> None:
    batch = batch_of(PATHS, PATHS)
    assert batch.input_ids.shape[0] == 1
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
    assert torch.equal(batch.places[1], free.places[1])  # counted from the end, where nothing has moved
