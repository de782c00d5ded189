"""A radix tree of token ids: which of many sequences has the most in common with another one.

Edges are arrays, so a lookup compares thousands of tokens at a time, and the tree takes as many
nodes as there are sequences, not tokens. Nothing recurses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Value = TypeVar("Value")


def as_tokens(tokens: Sequence[int]) -> Tokens:
    """Token ids as an array [N]; what stands for an image may be negative."""
    return np.asarray(tokens, np.int64).reshape(-1)


class Node(Generic[Value]):
    """The end of a sequence, or where several part.

    Attributes:
        edge: tokens behind those of its parent.
        parent: None for the root, and once it was removed.
        children: by their first token.
        depth: tokens from the root to its end.
        value: of the sequence that ends here; None if none does.
        whole: whether the value serves its whole sequence only, and no shorter beginning of it.
        open: values in it and below that serve the beginnings of their sequences, too.
    """

    __slots__ = ("children", "depth", "edge", "open", "parent", "value", "whole")

    def __init__(self, edge: Tokens, parent: Node[Value] | None) -> None:
        self.edge = edge
        self.parent = parent
        self.children: dict[int, Node[Value]] = {}
        self.depth: int = len(edge) + (parent.depth if parent else 0)
        self.value: Value | None = None
        self.whole = True
        self.open = 0

    def upward(self) -> Iterator[Node[Value]]:
        """This node and those above it, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


class Tree(Generic[Value]):
    """Sequences of tokens, none of them empty, with a value each."""

    def __init__(self) -> None:
        self._root: Node[Value] = Node(as_tokens([]), None)

    def __bool__(self) -> bool:
        return bool(self._root.children)

    def put(self, tokens: Tokens, value: Value, whole: bool) -> tuple[Node[Value], Value | None]:
        """Give a sequence a value; its node, and the value that it had.

        Args:
            whole: whether the value serves the whole sequence only.

        Raises:
            ValueError: the sequence is empty.
        """
        node = self._node(tokens)
        before = node.value
        _set(node, value, whole)
        return node, before

    def take(self, node: Node[Value]) -> None:
        """Take the value of a node away, and the node if nothing needs it."""
        _set(node, None, True)
        parent = node.parent
        if not node.children and parent is not None:
            del parent.children[int(node.edge[0])]
            node.parent, node = None, parent
        if node.parent is not None and node.value is None and len(node.children) == 1:
            _join(node)

    def nearest(self, tokens: Tokens, most: int) -> tuple[Value, int] | None:
        """The value that serves the longest beginning of a sequence, and how long that is.

        Args:
            most: tokens of it that may be served.
        """
        node, matched = self._walk(tokens)
        for above in node.upward():
            depth = min(above.depth, matched)
            if above.value is not None and above.depth <= min(matched, most):
                return above.value, above.depth
            if above.open and min(depth, most) > 0:
                return _any_open(above), min(depth, most)
        return None

    def _node(self, tokens: Tokens) -> Node[Value]:
        """The node where a sequence ends, made if there is none."""
        if not len(tokens):
            raise ValueError("an empty sequence has no place among the prompts.")
        node, matched = self._walk(tokens)
        if matched < node.depth:
            node = _split(node, matched)
        if matched < len(tokens):
            child = Node(tokens[matched:].copy(), node)
            node.children[int(tokens[matched])] = child
            node = child
        return node

    def _walk(self, tokens: Tokens) -> tuple[Node[Value], int]:
        """The last node that has tokens in common with a sequence, and how many the sequence has in
        common with those up to its end."""
        node, matched = self._root, 0
        while matched < len(tokens):
            child = node.children.get(int(tokens[matched]))
            if child is None:
                break
            length = _common(child.edge, tokens[matched:])
            node, matched = child, matched + length
            if length < len(child.edge):
                break
        return node, matched


def _set(node: Node[Value], value: Value | None, whole: bool) -> None:
    change = int(not whole) - int(not node.whole)
    node.value, node.whole = value, whole
    for above in node.upward() if change else ():
        above.open += change


def _common(one: Tokens, other: Tokens) -> int:
    """Tokens that two sequences have in common from their start."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length


def _split(node: Node[Value], depth: int) -> Node[Value]:
    """Cut the edge of a node; the new node in front of it, which ends at `depth`."""
    parent = node.parent
    assert parent is not None
    at = depth - parent.depth
    front: Node[Value] = Node(node.edge[:at].copy(), parent)
    parent.children[int(front.edge[0])] = front
    node.edge, node.parent = node.edge[at:].copy(), front
    front.children[int(node.edge[0])] = node
    front.open = node.open
    return front


def _join(node: Node[Value]) -> None:
    """Make one edge of a node that nothing needs and its only child."""
    (child,) = node.children.values()
    parent = node.parent
    assert parent is not None
    child.edge, child.parent = np.concatenate([node.edge, child.edge]), parent
    parent.children[int(child.edge[0])] = child
    node.parent = None


def _any_open(node: Node[Value]) -> Value:
    """A value at or below a node that serves the beginnings of its sequence."""
    while below := [child for child in node.children.values() if child.open]:
        node = below[0]
    assert node.value is not None
    return node.value
