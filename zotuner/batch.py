"""From candidates as tokens to a batch: rows without what need not be computed.

    candidates of an example: prefix + remainders  ->  row: prefix, remainder 1, remainder 2, ...
    rows of all examples  ->  several behind each other, where that takes less than padding  ->  padded tensors

A remainder sees the prefix and itself, and its positions go on from the prefix, as if the others were not there; one
example does not see another.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

Ids = tuple[int, ...]
STATIC = 32  # tokens: the shortest of the lengths that static batches have; each is twice the one before
PADDING = -1  # the segment of what is no token
REACH = 2048  # tokens: in a row of so many, attention takes about as long as the products (SmolLM2-135M, 2 cores)


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
    segments: Tensor  # (rows, length) int64: PADDING, or a number for each prefix and each remainder of a row
    prefixes: Tensor  # (rows, length) int64: the segment of the prefix before each token, or its own
    position_ids: Tensor  # (rows, length) int64
    places: tuple[Tensor, Tensor]  # (places,) twice: the row, and the column from the end, of all that predict
    predictors: Tensor  # (candidates, longest) int64, padded on the left: the place that predicts each target
    targets: Tensor  # (candidates, longest) int64, padded on the left
    counts: Tensor  # (candidates,) tokens of each candidate
    cell: tuple[Tensor, Tensor]  # (candidates,) twice: example, and candidate within it
    labels: Tensor  # (examples,) the right candidate
    plain: "Batch | None" = None  # the same candidates, a path a row, where this batch has fewer rows

    @property
    def attention_mask(self) -> Tensor:
        """(rows, length) int64: 1 for a token, 0 for padding."""
        return (self.segments != PADDING).long()

    @property
    def tokens(self) -> int:
        """Tokens that a forward computes, padding left out."""
        return int(self.attention_mask.sum())

    @property
    def path_length(self) -> int:
        """Tokens of the longest path."""
        return int(self.position_ids.max()) + 1

    @cached_property
    def columns(self) -> Tensor:
        """(columns,) int64, from the end, ascending: where some row predicts something."""
        columns: Tensor = self.places[1].unique(sorted=True)
        return columns

    def visible(self) -> Tensor:
        """(rows, length, length) bool: whether a token, second index, sees another, third index; all see themselves."""
        seen = self.segments[:, None, :]
        return ((seen == self.segments[:, :, None]) | (seen == self.prefixes[:, :, None])).tril()


def collate(
    candidates: Sequence[Candidate], labels: Sequence[int], *, max_length: int, pad: int, static: bool = False
) -> Batch:
    """The batch of some examples; rows are packed where that leaves less to compute, padding and attention included.

    Args:
        candidates: At least one an example, in order.
        labels: The right candidate of each example.
        max_length: Tokens that a row of one example may have.
        pad: The token of the padding.
        static: Pad to a length of 32, 64, 128, ... tokens; a row an example.
    """
    packed, plain = (_collate(candidates, labels, limit, pad, static) for limit in (max_length, 0))
    return replace(packed, plain=plain) if cost(*packed.input_ids.shape) < cost(*plain.input_ids.shape) else plain


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


def binned(lengths: Sequence[int]) -> list[list[int]]:
    """Which rows stand behind each other: numbers of rows by the row that they make together.

    First fit, the longest first, into rows of the length that costs least: the longest that there is, 2 times, 4 times,
    ..., all of them.
    """
    longest, total = max(lengths), sum(lengths)
    sizes = [longest << i for i in range((total // longest).bit_length())] + [total]
    return min((_filled(lengths, size) for size in sizes), key=lambda bins: cost(len(bins), _widest(lengths, bins)))


def _filled(lengths: Sequence[int], size: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = next((i for i, free in enumerate(room) if lengths[number] <= free), len(bins))
        if at == len(bins):
            bins.append([])
            room.append(size)
        bins[at].append(number)
        room[at] -= lengths[number]
    return bins


def _widest(lengths: Sequence[int], bins: Sequence[Sequence[int]]) -> int:
    return max(sum(lengths[i] for i in members) for members in bins)


def cost(rows: int, width: int) -> float:
    """What a forward takes, in tokens of a short row."""
    return rows * width * (1 + width / REACH)


def _collate(candidates: Sequence[Candidate], labels: Sequence[int], limit: int, pad: int, static: bool) -> Batch:
    by_example: dict[int, list[Ids]] = {}
    for one in candidates:
        by_example.setdefault(one.example, []).append(one.path)
    arranged = {example: arrange(paths, limit) for example, paths in by_example.items()}
    rows = list(dict.fromkeys(arranged[one.example][one.path] for one in candidates))
    bins = binned([len(row.ids) for row in rows]) if limit and not static else [[i] for i in range(len(rows))]
    place_of, joined = _joined([[rows[i] for i in members] for members in bins])
    places: dict[tuple[int, int], int] = {}
    predictors: list[list[int]] = []
    for one in candidates:
        row = arranged[one.example][one.path]
        number, shift = place_of[row]
        columns = row.columns(one.path)[-len(one.target) :]
        predictors.append([places.setdefault((number, column - shift), len(places)) for column in columns])
    row_of, column_of = zip(*places, strict=True)
    longest = max(len(row) for row in joined["input_ids"])
    width = STATIC << max(0, math.ceil(math.log2(longest / STATIC))) if static else longest
    return Batch(
        input_ids=left_padded(joined["input_ids"], pad, width),
        segments=left_padded(joined["segments"], PADDING, width),
        prefixes=left_padded(joined["prefixes"], PADDING, width),
        position_ids=left_padded(joined["position_ids"], 0, width),
        places=(torch.tensor(row_of), torch.tensor(column_of)),
        predictors=left_padded(predictors, 0),
        targets=left_padded([one.target for one in candidates], 0),
        counts=torch.tensor([len(one.target) for one in candidates]),
        cell=(torch.tensor([one.example for one in candidates]), torch.tensor([one.number for one in candidates])),
        labels=torch.tensor(labels),
    )


def _joined(bins: Sequence[Sequence[Row]]) -> tuple[dict[Row, tuple[int, int]], dict[str, list[list[int]]]]:
    """Rows behind each other: of each, where it stands (the row made, tokens behind it), and the rows made."""
    made: dict[str, list[list[int]]] = {name: [] for name in ("input_ids", "segments", "prefixes", "position_ids")}
    place_of: dict[Row, tuple[int, int]] = {}
    for number, members in enumerate(bins):
        for rows in made.values():
            rows.append([])
        first, behind = 0, sum(len(row.ids) for row in members)
        for row in members:
            behind -= len(row.ids)
            place_of[row] = number, behind
            made["input_ids"][-1] += row.ids
            made["segments"][-1] += [first + segment for segment in row.segments]
            made["prefixes"][-1] += [first] * len(row.ids)
            made["position_ids"][-1] += row.positions
            first += 1 + len(row.remainders)
    return place_of, made


def left_padded(rows: Sequence[Sequence[int]], pad: int, width: int = 0) -> Tensor:
    """(rows, longest or width) int64."""
    width = max(width, *map(len, rows))
    return torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
