"""The types that blocks are of, and where in a model they lie, by their names."""

import re
from collections.abc import Sequence


def layer_of(name: str) -> int | None:
    """The number of the layer that a block lies in; None where it lies in none.

    >>> layer_of("model.layers.7.mlp.up_proj.weight"), layer_of("model.norm.weight")
    (7, None)
    """
    found = re.search(r"(?<=\.)\d+(?=\.|$)", name)
    return None if found is None else int(found[0])


def block_types(names: Sequence[str]) -> dict[str, list[int]]:
    """Which blocks are of one type: their names differ in the numbers alone, those of elements of a `ModuleList`.

    Returns:
        From a type's label to the numbers of its blocks, ordered by layer; types in the order of their first block.
        A label is what follows the layer's number, or the whole name, `*` for a number, where that is no label of
        its own.

    >>> block_types(["emb.weight", "h.0.q.weight", "h.0.k.weight", "h.1.q.weight", "h.1.k.weight"])
    {'emb.weight': [0], 'q.weight': [1, 3], 'k.weight': [2, 4]}
    """
    groups: dict[tuple[str, ...], list[tuple[tuple[int, ...], int]]] = {}
    for index, name in enumerate(names):
        parts = name.split(".")
        layer = tuple(int(part) for part in parts if part.isdecimal())
        groups.setdefault(tuple("*" if part.isdecimal() else part for part in parts), []).append((layer, index))
    whole = {key: ".".join(key) for key in groups}
    label = {key: ".".join(key[key.index("*") + 1 :]) if "*" in key[:-1] else whole[key] for key in groups}
    taken = list(label.values())
    return {
        label[key] if taken.count(label[key]) == 1 else whole[key]: [index for _, index in sorted(members)]
        for key, members in groups.items()
    }


def alike(names: Sequence[str], bands: int | None) -> tuple[list[int], list[int]]:
    """Groups the blocks that are of one type and lie in the same part of the model's depth.

    Args:
        names: Of blocks.
        bands: Equal parts that the layers are cut into; None: every block is for itself.

    Returns:
        The number of the first block of each group, in order, and of each block the number of its group.

    >>> alike(["emb.weight", "h.0.q.weight", "h.0.k.weight", "h.1.q.weight", "h.1.k.weight"], 1)
    ([0, 1, 2], [0, 1, 2, 1, 2])
    """
    firsts = _first_alike(names, bands)
    groups = sorted(set(firsts))
    return groups, [groups.index(first) for first in firsts]


def _first_alike(names: Sequence[str], bands: int | None) -> list[int]:
    """Of each block, the number of the first block of its group, by layer."""
    if bands is None:
        return list(range(len(names)))
    layers = [layer_of(name) or 0 for name in names]
    depth = max(layers, default=0) + 1
    found = list(range(len(names)))
    for members in block_types(names).values():
        first: dict[int, int] = {}
        for index in members:
            found[index] = first.setdefault(layers[index] * bands // depth, index)
    return found
