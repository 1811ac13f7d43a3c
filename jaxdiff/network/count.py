"""Counting parameters, without computing them."""

import math
from typing import Any

import jax


def parameter_count(params: Any) -> int:
    """Number of scalars in a tree of arrays or of shapes.

    A 675-million-parameter network is counted in no memory through
    ``parameter_count(jax.eval_shape(net.init, key, x, t))``.
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def parameter_table(params: Any) -> str:
    """A printable table, one parameter array a line: path, shape, dtype, count; the last line is the total."""
    rows = [("parameter", "shape", "dtype", "count")]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        rows.append((name, shape, str(leaf.dtype), f"{math.prod(leaf.shape):,}"))
    rows.append(("total", "", "", f"{parameter_count(params):,}"))
    wide = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(f"{a:<{wide[0]}}  {b:<{wide[1]}}  {c:<{wide[2]}}  {d:>{wide[3]}}" for a, b, c, d in rows)
