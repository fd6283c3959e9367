"""Make tests/golden.json: losses by the formulas of HCL's and DCL's released code.

    python tests/golden.py

The formulas are written anew in numpy, as sums over pairs, from what those programs compute for a
batch of B images in two views, N = 2B - 2 negatives an anchor, similarities s = cosine / t:

- SimCLR: the sum Ng of exp(s) over the negatives;
- DCL: Ng = (sum of exp(s) - tau_plus N exp(s_positive)) / (1 - tau_plus), at least N exp(-1 / t);
- HCL: the sum in DCL's Ng becomes sum of w exp(s) / mean of w, with w = exp(beta s);
- the loss: the mean of -log(exp(s_positive) / (exp(s_positive) + Ng)) over the 2B anchors.

Nothing of this project is imported. Embeddings come from sines, so that no generator of random
numbers decides them.
"""

import json
from pathlib import Path

import numpy as np

CASES = [
    dict(B=4, D=3, temperature=0.5, tau_plus=0.0, beta=0.0),
    dict(B=16, D=8, temperature=0.5, tau_plus=0.0, beta=0.0),
    dict(B=16, D=8, temperature=0.5, tau_plus=0.1, beta=0.0),
    dict(B=16, D=8, temperature=0.5, tau_plus=0.1, beta=0.5),
    dict(B=16, D=8, temperature=0.5, tau_plus=0.1, beta=1.0),
    dict(B=16, D=8, temperature=0.5, tau_plus=0.1, beta=2.0),
    dict(B=33, D=5, temperature=0.1, tau_plus=0.05, beta=1.0),
    dict(B=8, D=4, temperature=0.2, tau_plus=0.6, beta=1.0),  # the least Ng is active
]


def embeddings(B, D):
    """Two views (B, D) of unit length, in float64."""
    n = np.arange(B * D, dtype=np.float64).reshape(B, D)
    views = [np.sin(1.7 * n + 0.3), np.sin(1.7 * n + 0.3) + 0.4 * np.cos(2.9 * n)]
    return [z / np.sqrt((z * z).sum(1, keepdims=True)) for z in views]


def loss(B, D, temperature, tau_plus, beta):
    z = np.concatenate(embeddings(B, D))  # 2 x (B, D) -> (2B, D)
    N = 2 * B - 2
    total = 0.0
    for i in range(2 * B):
        s = z @ z[i] / temperature  # (2B,)
        positive = np.exp(s[(i + B) % (2 * B)])
        others = np.array([j for j in range(2 * B) if j % B != i % B])
        w = np.exp(beta * s[others])
        reweighted = (w * np.exp(s[others])).sum() / w.mean()
        Ng = (reweighted - tau_plus * N * positive) / (1 - tau_plus)
        if tau_plus > 0:
            Ng = max(Ng, N * np.exp(-1 / temperature))
        total -= np.log(positive / (positive + Ng))
    return total / (2 * B)


if __name__ == '__main__':
    rows = [dict(case, loss=float(loss(**case))) for case in CASES]
    Path(__file__).with_name('golden.json').write_text(json.dumps(rows, indent=1) + '\n')
