"""From candidates as tokens to a batch: rows in which what candidates share stands once.

    candidates of an example: prefix + remainders  ->  row: prefix, remainder 1, remainder 2, ...  ->  padded tensors

A remainder sees the prefix and itself, and its positions go on from the prefix, as if the others were not there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

Ids = tuple[int, ...]
STATIC = 32  # tokens: the shortest of the lengths that static batches have; each is twice the one before
PADDING = -1  # the segment of what is no token; 0 is the prefix, i the i-th remainder


@dataclass(frozen=True)
class Candidate:
    """One candidate of one example, as tokens."""

    path: Ids  # what a forward reads: prompt + candidate without its last token, from which nothing is predicted
    target: Ids  # what the last tokens of the path predict
    example: int
    number: int  # within its example

    def behind(self, skip: int) -> "Candidate":
        """The same without the first tokens of the path."""
        return replace(self, path=self.path[skip:]) if skip else self


@dataclass(frozen=True)
class Row:
    """The paths of candidates of one example: their common prefix, and what remains of each. One path has no rest."""

    prefix: Ids
    remainders: tuple[Ids, ...] = ()

    @cached_property
    def ids(self) -> Ids:
        """All tokens."""
        return sum(self.remainders, self.prefix)

    @property
    def segments(self) -> list[int]:
        """Of each token: 0 in the prefix, i in the i-th remainder."""
        return [i for i, part in enumerate((self.prefix, *self.remainders)) for _ in part]

    @property
    def positions(self) -> list[int]:
        """Of each token, how many tokens of its path stand before it."""
        start = len(self.prefix)
        return [*range(start), *(start + i for part in self.remainders for i in range(len(part)))]

    def columns(self, path: Ids) -> list[int]:
        """Where the tokens of a path stand, counted from the end of the row: -1 is the last."""
        shared = min(len(path), len(self.prefix))
        rest = path[shared:]
        before = self.remainders[: self.remainders.index(rest)] if rest else ()
        start = shared + sum(map(len, before))
        return [i - len(self.ids) for i in (*range(shared), *range(start, start + len(rest)))]


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows padded on the left, and where in them each candidate is predicted."""

    input_ids: Tensor  # (rows, length) int64
    segments: Tensor  # (rows, length) int64: PADDING, 0 for a prefix, i for the i-th remainder
    position_ids: Tensor  # (rows, length) int64
    places: tuple[Tensor, Tensor]  # (places,) twice: the row, and the column from the end, of all that predict
    predictors: Tensor  # (candidates, longest) int64, padded on the left: the place that predicts each target
    targets: Tensor  # (candidates, longest) int64, padded on the left
    counts: Tensor  # (candidates,) tokens of each candidate
    cell: tuple[Tensor, Tensor]  # (candidates,) twice: example, and candidate within it
    labels: Tensor  # (examples,) the right candidate
    plain: "Batch | None" = None  # the same candidates in rows without remainders, where this batch has some

    @property
    def attention_mask(self) -> Tensor:
        """(rows, length) int64: 1 for a token, 0 for padding."""
        return (self.segments != PADDING).long()

    @property
    def tokens(self) -> int:
        """Tokens that a forward computes, padding left out."""
        return int(self.attention_mask.sum())

    @property
    def last(self) -> int:
        """At how many columns, from the end, something is predicted."""
        return -int(self.places[1].min())

    def visible(self) -> Tensor:
        """(rows, length, length) bool: whether a token, second index, sees another, third index; all see themselves."""
        seen, seeing = self.segments[:, None, :], self.segments[:, :, None]
        return ((seen == 0) | (seen == seeing)).tril()


def collate(
    candidates: Sequence[Candidate], labels: Sequence[int], *, max_length: int, pad: int, static: bool = False
) -> Batch:
    """The batch of some examples; rows are packed where that leaves less to compute, padding included.

    Args:
        candidates: At least one an example, in order.
        labels: The right candidate of each example.
        max_length: Tokens that a packed row may have.
        pad: The token of the padding.
        static: Pad to a length of 32, 64, 128, ... tokens.
    """
    packed, plain = (_collate(candidates, labels, limit, pad, static) for limit in (max_length, 0))
    return replace(packed, plain=plain) if packed.input_ids.numel() < plain.input_ids.numel() else plain


def arrange(paths: Sequence[Ids], limit: int) -> dict[Ids, Row]:
    """The row of each path of one example.

    Args:
        paths: At least one; equal ones count once.
        limit: Tokens that a row may have where it holds more than one remainder; 0: one path a row, except that a
            path with which another begins needs no row of its own.
    """
    shared = common(paths)
    prefix = paths[0][:shared]
    groups: list[list[Ids]] = [[]]
    for rest in dict.fromkeys(path[shared:] for path in paths if len(path) > shared):
        if groups[-1] and shared + sum(map(len, groups[-1])) + len(rest) > limit:
            groups.append([])
        groups[-1].append(rest)
    found: dict[Ids, Row] = {}
    for group in groups:
        row = Row(prefix, tuple(group)) if len(group) > 1 else Row(sum(group, prefix))
        found.setdefault(prefix, row)
        found |= {prefix + rest: row for rest in group}
    return found


def common(paths: Sequence[Ids]) -> int:
    """How many tokens all paths begin with."""
    columns = zip(*paths, strict=False)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, paths)))


def _collate(candidates: Sequence[Candidate], labels: Sequence[int], limit: int, pad: int, static: bool) -> Batch:
    by_example: dict[int, list[Ids]] = {}
    for one in candidates:
        by_example.setdefault(one.example, []).append(one.path)
    arranged = {example: arrange(paths, limit) for example, paths in by_example.items()}
    rows: dict[Row, int] = {}
    places: dict[tuple[int, int], int] = {}
    predictors: list[list[int]] = []
    for one in candidates:
        row = arranged[one.example][one.path]
        number = rows.setdefault(row, len(rows))
        columns = row.columns(one.path)[-len(one.target) :]
        predictors.append([places.setdefault((number, column), len(places)) for column in columns])
    row_of, column_of = zip(*places, strict=True)
    longest = max(len(row.ids) for row in rows)
    width = STATIC << max(0, math.ceil(math.log2(longest / STATIC))) if static else longest
    return Batch(
        input_ids=left_padded([row.ids for row in rows], pad, width),
        segments=left_padded([row.segments for row in rows], PADDING, width),
        position_ids=left_padded([row.positions for row in rows], 0, width),
        places=(torch.tensor(row_of), torch.tensor(column_of)),
        predictors=left_padded(predictors, 0),
        targets=left_padded([one.target for one in candidates], 0),
        counts=torch.tensor([len(one.target) for one in candidates]),
        cell=(torch.tensor([one.example for one in candidates]), torch.tensor([one.number for one in candidates])),
        labels=torch.tensor(labels),
    )


def left_padded(rows: Sequence[Sequence[int]], pad: int, width: int = 0) -> Tensor:
    """(rows, longest or width) int64."""
    width = max(width, *map(len, rows))
    return torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
