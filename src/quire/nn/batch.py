"""The one argument of a forward pass.

Legend: t tokens of this step, r requests in it, s rows that need logits, b blocks of the longest request.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from torch import Tensor

from quire.ops.attention import DeviceLengths


class GroupTable(msgspec.Struct, frozen=True, kw_only=True):
    """Where the KV of one group of layers is; fields as in `ForwardBatch`."""

    slots_t: Tensor
    block_table_rb: Tensor


class ForwardBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of several requests laid end to end; request i owns rows `query_start[i]:query_start[i + 1]`.

    Every field is written by `engine.inputs.BatchBuilder` and by nobody else.

    * `token_ids_t`, `positions_t`: int64. `token_types_t`: int64, for models that tell the parts of a prompt apart;
      None: all tokens are of type 0.
    * `slots_t`: int64, where each token's K and V go: `block_id * block_size + offset`. Block 0 is the null block: a
      token whose KV is in the cache already (the last token of a full prefix hit) writes there; nobody reads it.
    * `query_start`: r + 1 row offsets. `context_lens`: r lengths, in tokens, of what each request's last row of this
      step sees, itself included. Row j of request i is at position `context_lens[i] - query_len[i] + j`, and sees all
      up to it; in an encoder all of the context, of which every row is in the step then.
    * `block_table_rb`: int64, padded with 0. A block that nobody can see any more is 0, too.
    * `slots_t` and `block_table_rb` are of the first group of layers (`nn.kv.KVCache`); `later_groups` has the others'.
    * `lengths`: the same on the device, where kernels read it there.
    * `logits_rows_s`: int64, the rows whose hidden state goes to the head.
    """

    token_ids_t: Tensor
    positions_t: Tensor
    slots_t: Tensor
    query_start: Sequence[int]
    context_lens: Sequence[int]
    block_table_rb: Tensor
    logits_rows_s: Tensor
    token_types_t: Tensor | None = None
    later_groups: Sequence[GroupTable] = ()
    lengths: DeviceLengths | None = None
