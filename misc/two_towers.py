"""Two encoders of two modalities: CLIP's loss against its hard-negative form, by retrieval.

    python misc/two_towers.py

The modalities are the upper and the lower halves of scikit-learn's digits (8 x 8 pixels). Retrieval
@1 says how often the other half of a test image is the nearest of all test halves, in both
directions, as mean and standard deviation over seeds. The script takes minutes on a CPU. It shows
that the call works and learns, on 450 images of ten digits. CLIP's own loss retrieves best here,
where halves of one digit are often alike. Images and texts may differ.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from hardneg import flags
from hardneg.losses import contrastive_loss

OBJECTIVES = {
    'CLIP': dict(beta=0, tau_plus=0),
    'hard, beta 0.5': dict(beta=0.5, tau_plus=0),
    'hard, beta 1': dict(beta=1, tau_plus=0),
    'hard, beta 1, tau_plus 0.01': dict(beta=1, tau_plus=0.01),
}


def halves(seed):
    """Training and test pairs: two of (upper, lower), each (n, 32) in [0, 1]."""
    images = torch.from_numpy(load_digits().data).float() / 16  # (1797, 64), rows of pixels
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[450:]].chunk(2, 1), images[order[:450]].chunk(2, 1)


def retrieval(seed, steps, **objective):
    """Train two encoders and the temperature; return retrieval @1 on the test pairs, in [0, 1]."""
    torch.manual_seed(seed)
    train, test = halves(seed)
    encoders = [nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 64)) for _ in range(2)]
    upper, lower = encoders
    log_t = nn.Parameter(torch.tensor(0.1).log())
    optimizer = torch.optim.Adam([*upper.parameters(), *lower.parameters(), log_t], 1e-3)
    for _ in range(steps):
        index = torch.randint(len(train[0]), (256,))
        z1, z2 = upper(train[0][index]), lower(train[1][index])  # (B, 64) each
        t = log_t.exp().clamp(min=0.01)
        loss = contrastive_loss(z1, z2, intra_view=False, temperature=t, **objective)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        z1, z2 = F.normalize(upper(test[0]), dim=1), F.normalize(lower(test[1]), dim=1)
    s = z1 @ z2.T  # (450, 450)
    own = torch.arange(len(s))
    right = torch.stack([s.argmax(0) == own, s.argmax(1) == own])
    return right.double().mean().item()


if __name__ == '__main__':
    parser = flags.Parser(description=__doc__.partition('\n')[0])
    flags.add_seeds(parser)
    parser.add_argument(
        '--steps', type=flags.count, default=1000, help='training steps (%(default)s)'
    )
    args = parser.parse_args()
    for name, objective in OBJECTIVES.items():
        found = torch.tensor(
            [100 * retrieval(seed, args.steps, **objective) for seed in range(args.seeds)]
        )
        print(f'{name}: retrieval @1 {found.mean():.1f} ± {found.std():.1f} %')
