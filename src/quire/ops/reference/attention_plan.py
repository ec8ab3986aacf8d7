"""How a step's queries and keys are cut into tiles, so that attention of many requests becomes few large products.

Legend: r requests, b blocks of the longest request, n query tiles of a group, w keys of a key tile.

Queries: each request's tokens are cut into tiles of one of a few token counts; one token is a decode. Tiles of one
count, with contexts of about one length, form a group, and a group is worked on together.

Keys: a context is cut at positions that depend on nothing else, so the order in which a query's keys are accumulated
depends on its own position alone: promise P1. A tile whose context has ended leaves the group; tiles are sorted by
length, so those that remain are always the first ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.ops.attention import AttentionShape, PagedRequests

# Narrow tiles first: a short context then wastes little of its last tile. Wide ones later: a long one takes few steps.
# (first position, width): powers of two, as block sizes are, and no narrower than a block.
_KEY_TILE_WIDTHS = ((0, 128), (512, 256), (2048, 512))
KEY_TILE_WIDTHS = tuple(width for _, width in _KEY_TILE_WIDTHS)
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

# Keys, values and scores of the tiles that are worked on together, in float32: about what a CPU's caches hold.
_GROUP_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryTiling:
    """Tile sizes for one head shape. A decode's rows (the query heads of one KV head) are padded to `decode_rows`."""

    decode_rows: int
    token_counts: tuple[int, ...]
    """Tokens of the other tiles, largest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyTile:
    """Keys of the first `count` query tiles of a group. `hidden_ntw` is None where every query sees every key."""

    count: int
    width: int
    blocks: Tensor
    hidden_ntw: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryGroup:
    """`count` tiles of `tokens` tokens; `group_rows` rows per token and KV head, of which the first are query heads.

    `rows_in` says which rows of the step are the tiles' tokens, padding repeats a tile's last one; `rows_out` is the
    same with padding sent to the row after the last, which is dropped.
    """

    count: int
    tokens: int
    group_rows: int
    rows_in: Tensor
    rows_out: Tensor
    key_tiles: tuple[KeyTile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    shape: AttentionShape
    groups: tuple[QueryGroup, ...]


@dataclass(frozen=True, slots=True)
class _QueryTile:
    request: int
    first_row: int
    first_position: int
    tokens: int

    @property
    def last_position(self) -> int:
        return self.first_position + self.tokens - 1


def plan_attention(shape: AttentionShape, tiling: QueryTiling, requests: PagedRequests) -> AttentionPlan:
    """See `AttentionKernel.plan`."""
    by_size: dict[int, list[_QueryTile]] = {}
    for request, context in enumerate(requests.context_lens):
        row, end_row = requests.query_start[request], requests.query_start[request + 1]
        position = context - (end_row - row)
        for size, tokens in _cut(end_row - row, tiling.token_counts):
            by_size.setdefault(size, []).append(_QueryTile(request, row, position, tokens))
            row, position = row + tokens, position + tokens
    table_rb = _padded_table(requests)
    groups = []
    for size, tiles in by_size.items():
        group_rows = tiling.decode_rows if size == 1 else shape.num_heads // shape.num_kv_heads
        for members in _by_length(tiles, shape, size * group_rows, requests.block_size):
            rows_in, rows_out, positions_nt = _token_rows(members, size, requests.query_start[-1])
            groups.append(
                QueryGroup(
                    count=len(members),
                    tokens=size,
                    group_rows=group_rows,
                    rows_in=rows_in.to(table_rb.device),
                    rows_out=rows_out.to(table_rb.device),
                    key_tiles=_key_tiles(members, positions_nt, table_rb, requests.block_size),
                )
            )
    return AttentionPlan(shape=shape, groups=tuple(groups))


def _cut(query_len: int, token_counts: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(tile size, tokens in it) for one request's tokens: large tiles, and for the rest whatever pads least."""
    left = query_len
    for index, size in enumerate(token_counts):
        smaller = token_counts[index + 1] if index + 1 < len(token_counts) else 1
        # A tile that is at least half full beats several smaller ones; a single token is always a decode.
        while left >= size or (left > size // 2 and left > smaller):
            tokens = min(left, size)
            yield size, tokens
            left -= tokens
    for _ in range(left):
        yield 1, 1


def key_tiles(length: int, block_size: int) -> Iterator[tuple[int, int]]:
    """(start, width) of the tiles that cover positions 0..length-1."""
    start = 0
    while start < length:
        width = max(block_size, next(width for first, width in reversed(_KEY_TILE_WIDTHS) if start >= first))
        yield start, width
        start += width


def _padded_table(requests: PagedRequests) -> Tensor:
    """The block table widened with null blocks up to the end of the last key tile."""
    longest = max(requests.context_lens, default=0)
    end = max((start + width for start, width in key_tiles(longest, requests.block_size)), default=0)
    missing = end // requests.block_size - requests.block_table_rb.shape[1]
    return torch.nn.functional.pad(requests.block_table_rb, (0, max(0, missing)))


def _by_length(
    tiles: list[_QueryTile], shape: AttentionShape, rows: int, block_size: int
) -> Iterator[list[_QueryTile]]:
    """Tiles, longest context first, in groups whose temporary tensors stay within `_GROUP_BYTES`."""
    left = sorted(tiles, key=lambda tile: -tile.last_position)
    while left:
        width = max(width for _, width in key_tiles(left[0].last_position + 1, block_size))
        floats = shape.num_kv_heads * (2 * width * shape.head_dim + rows * (width + 2 * shape.head_dim))
        count = max(1, _GROUP_BYTES // (4 * floats))
        yield left[:count]
        left = left[count:]


def _token_rows(tiles: list[_QueryTile], size: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """`rows_in` and `rows_out` of a `QueryGroup`, and each token's position `[n, t]` (padding repeats the last)."""
    offsets_t = torch.arange(size)
    tokens_n1 = torch.tensor([tile.tokens for tile in tiles])[:, None]
    clamped_nt = torch.minimum(offsets_t, tokens_n1 - 1)
    rows_nt = torch.tensor([tile.first_row for tile in tiles])[:, None] + clamped_nt
    rows_out_nt = torch.where(offsets_t < tokens_n1, rows_nt, num_rows)
    positions_nt = torch.tensor([tile.first_position for tile in tiles])[:, None] + clamped_nt
    return rows_nt.flatten(), rows_out_nt.flatten(), positions_nt


def _key_tiles(tiles: list[_QueryTile], positions_nt: Tensor, table_rb: Tensor, block_size: int) -> tuple[KeyTile, ...]:
    table_nb = table_rb[torch.tensor([tile.request for tile in tiles], device=table_rb.device)]
    found = []
    for start, width in key_tiles(tiles[0].last_position + 1, block_size):
        count = sum(tile.last_position >= start for tile in tiles)
        sees_all = min(tile.first_position for tile in tiles[:count]) >= start + width - 1
        hidden_ntw = torch.arange(start, start + width) > positions_nt[:count, :, None]
        found.append(
            KeyTile(
                count=count,
                width=width,
                blocks=table_nb[:count, start // block_size : (start + width) // block_size].flatten(),
                hidden_ntw=None if sees_all else hidden_ntw.to(table_rb.device),
            )
        )
    return tuple(found)
