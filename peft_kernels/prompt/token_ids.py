"""Token ids that no row of the embedding table answers to."""

from __future__ import annotations

import torch
from torch import Tensor


def check(input_ids: Tensor, vocabulary: int) -> None:
    """Raise IndexError naming the first id outside the vocabulary; CPU tensors only."""
    if input_ids.numel() == 0:
        return
    least, most = torch.aminmax(input_ids)
    if int(least) >= 0 and int(most) < vocabulary:
        return
    row, token = ((input_ids < 0) | (input_ids >= vocabulary)).nonzero()[0].tolist()
    raise IndexError(
        f"input_ids must lie in 0..{vocabulary - 1}, the rows of embedding_weight, got "
        f"{int(input_ids[row, token])} at [{row}, {token}]. Resize the embedding for added tokens; "
        f"-100 belongs into labels, padding takes the tokenizer's pad id"
    )
