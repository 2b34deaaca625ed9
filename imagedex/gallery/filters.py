"""Which pictures may be found, as an expression over the catalog's columns: `folder == 'beach' and width >= 1000`.

The expression is Python's, read by its own parser and never evaluated: names are columns, and what is not listed here is
refused. It becomes a pyarrow expression, so that it costs a pass over the columns it names and nothing else.
"""

import ast
import difflib
import functools
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imagedex.errors import UserError
from imagedex.gallery import catalog

EXAMPLE = "folder == 'beach' and width >= 1000"
_COMPARE: dict[type, Callable] = {
    ast.Eq: pc.equal, ast.NotEq: pc.not_equal, ast.Lt: pc.less, ast.LtE: pc.less_equal, ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}  # fmt: skip
_MIRROR = {ast.Lt: ast.Gt, ast.Gt: ast.Lt, ast.LtE: ast.GtE, ast.GtE: ast.LtE}
_TEXT = {
    "startswith": pc.starts_with,
    "endswith": pc.ends_with,
    "contains": pc.match_substring,
    "matches": pc.match_substring_regex,
}


def allowed(table: pa.Table, where: str) -> np.ndarray:
    """(N,) booleans: the rows of the table for which the expression holds; where a value is missing, it does not.

    Args: where, of comparisons (`==`, `<`, ...), `in` (a list, or text within one text or several), `and`, `or`, `not`,
    and `column.startswith('x')`, `.endswith`, `.contains`, `.matches` (a regular expression). Dates are written '2024-01-31'.

    Raises:
        UserError: no such expression, an unknown column, or a comparison of unlike things.
    """
    try:
        tree = ast.parse(where.strip(), mode="eval").body
        mask = _Reader(table).mask(tree)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise UserError(f"--where {where!r}: {' '.join(str(error).split())[:200]}") from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"--where {where[:200]!r} is no filter; an example is: {EXAMPLE}") from error
    return catalog.mask_of(mask)


class _Reader:
    """Syntax tree -> arrays over one table."""

    def __init__(self, table: pa.Table):
        self.table = table

    def mask(self, node: ast.expr) -> pa.Array:
        """(N,) booleans, null where a value is missing."""
        if isinstance(node, ast.BoolOp):
            join = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene
            return functools.reduce(join, map(self.mask, node.values))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return pc.invert(self.mask(node.operand))
        if isinstance(node, ast.Compare):
            values = [node.left, *node.comparators]
            parts = [self.compare(*triple) for triple in zip(values, node.ops, values[1:], strict=False)]
            return functools.reduce(pc.and_kleene, parts)  # 10 < width < 20
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and len(node.args) == 1:
            column, name = self.column(node.func.value), node.func.attr
            if name not in _TEXT or node.keywords:
                raise UserError(f"--where: {name} is not known; there are {', '.join(_TEXT)}")
            return self.any_of(column, lambda texts: _TEXT[name](texts, self.constant(node.args[0])))
        if isinstance(node, ast.Name):
            return self.column(node).cast(pa.bool_())
        return self._refuse(node)

    def compare(self, left: ast.expr, sign: ast.cmpop, right: ast.expr) -> pa.Array:
        if isinstance(sign, ast.In | ast.NotIn):
            found = self.member(left, right)
            return pc.invert(found) if isinstance(sign, ast.NotIn) else found
        if type(sign) not in _COMPARE:
            return self._refuse(sign)
        if not isinstance(left, ast.Name):  # 1000 < width
            left, right, sign = right, left, _MIRROR.get(type(sign), type(sign))()
        column = self.column(left)
        other = self.column(right) if isinstance(right, ast.Name) else self.like(column, self.constant(right))
        return _COMPARE[type(sign)](column, other)

    def member(self, left: ast.expr, right: ast.expr) -> pa.Array:
        """`folder in ['a', 'b']`, `'dog' in captions` (a text or a list of texts)."""
        if isinstance(left, ast.Name):
            column = self.column(left)
            values = self.constant(right)
            if not isinstance(values, list | tuple):
                return self._refuse(right)
            return pc.is_in(
                column, value_set=pa.array([self.like(column, value).as_py() for value in values], column.type)
            )
        text = self.constant(left)
        if not isinstance(text, str):
            return self._refuse(left)
        return self.any_of(self.column(right), lambda texts: pc.match_substring(texts, text))

    @staticmethod
    def any_of(column: pa.Array, ask: Callable) -> pa.Array:
        """What is asked of a text; of a list of texts, whether it holds of one of them."""
        if not pa.types.is_list(column.type) and not pa.types.is_large_list(column.type):
            return ask(column)
        column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        held = np.zeros(len(column), bool)
        held[pc.list_parent_indices(column).filter(ask(pc.list_flatten(column)).fill_null(False)).to_numpy()] = True
        return pa.array(held)

    def column(self, node: ast.expr) -> pa.Array:
        if not isinstance(node, ast.Name):
            return self._refuse(node)
        if node.id not in self.table.column_names:
            close = difflib.get_close_matches(node.id, self.table.column_names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(self.table.column_names)}"
            raise UserError(f"--where: no column is called {node.id}; {hint}")
        return self.table[node.id].combine_chunks()

    @staticmethod
    def like(column: pa.Array, value) -> pa.Scalar:
        """A constant of the column's kind: '2024-01-31' beside dates is a date."""
        if pa.types.is_timestamp(column.type) and isinstance(value, str):
            return pa.scalar(value).cast(column.type)
        if isinstance(value, int | float) and pa.types.is_integer(column.type):
            return pa.scalar(value)  # which may be no number that the column could hold
        return pa.scalar(value, column.type) if not isinstance(value, bool) else pa.scalar(value)

    def constant(self, node: ast.expr):
        try:
            return ast.literal_eval(node)
        except ValueError:
            return self._refuse(node)

    @staticmethod
    def _refuse(node: ast.AST):
        shown = ast.unparse(node) if isinstance(node, ast.expr) else type(node).__name__
        raise UserError(f"--where: {shown[:80]!r} is no part of a filter; an example is: {EXAMPLE}")
