"""What a step of training makes smaller: one divergence for everything that is taught.

Each target is a distribution over the next token of which only k outcomes are named: y_1 .. y_k, and the tail
y_tail = 1 - sum y_k that lies on "none of these". The model's x is compared over the same k + 1 outcomes:

    KL(y || x) = sum_k y_k ln(y_k / x_k)  +  y_tail ln(y_tail / x_tail),      x_tail = 1 - sum_k x_k

(by the log-sum inequality the least that KL over all V outcomes can be, whatever the tail's shape). The tail is never
filled up with zeros, which would teach that nothing but the named tokens may come, and never renormalised away.

- label: y = 1 on the token; the divergence is the cross-entropy -ln x_label.
- cloud: y = the LLM's likeliest tokens and their probabilities.
- kept: y = the bare model's own likeliest tokens, so KL(base || adapted), against forgetting.

x_tail is computed as the sum of what is not named, not as a difference, which would be noise once x_tail < 1e-7.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NOTHING = -1e30  # logit of an outcome that is not there; finite, for the gradient's sake


def sparse_kl(logits: Tensor, ids: Tensor, p: Tensor) -> Tensor:
    """KL(y || x) of each row, in nats: (n,).

    `logits` (n, V) float32; `ids` (n, k): tokens that y names, -1 fills up a row that names fewer; `p` (n, k) float32:
    their probabilities, 0 where filled up. What p leaves of 1 is y's tail.
    """
    there = ids >= 0
    named = logits.gather(1, ids.clamp(min=0)).masked_fill(~there, _NOTHING)
    rest = logits.scatter(1, _spread(ids), _NOTHING).logsumexp(1)
    whole = torch.logaddexp(named.logsumexp(1), rest)
    tail = (1.0 - p.sum(1)).clamp(min=0.0)
    entropy = torch.xlogy(p, p).sum(1) + torch.xlogy(tail, tail)
    cross = (p * (named - whole[:, None]).masked_fill(~there, 0.0)).sum(1) + tail * (rest - whole)
    return entropy - cross


def likeliest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each row and their probabilities among all: (n, k) each."""
    top = logits.topk(min(k, logits.shape[1] - 1), dim=1)
    return top.indices, (top.values - logits.logsumexp(1, keepdim=True)).exp()


def _spread(ids: Tensor) -> Tensor:
    """Fills rows up with their own first token, which is named already."""
    return torch.where(ids >= 0, ids, ids[:, :1])
