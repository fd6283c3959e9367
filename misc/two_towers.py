"""Two encoders of two modalities, trained with CLIP's loss and with its hard-negative form, compared by retrieval.

    python misc/two_towers.py

The modalities are the upper and the lower halves of scikit-learn's digits (8 x 8 pixels), each with an encoder of its
own. Retrieval @1: how often the other half of a test image is the nearest of all the test halves, in both directions,
as mean and standard deviation over seeds. It shows that the call works and learns, on 450 images of ten digits. CLIP's
own loss retrieves best here, where halves of one digit are often alike; of images and texts this says nothing.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from hardneg.losses import contrastive_loss

OBJECTIVES = {'CLIP': dict(beta=0, tau_plus=0), 'hard, beta 0.5': dict(beta=0.5, tau_plus=0),
              'hard, beta 1': dict(beta=1, tau_plus=0), 'hard, beta 1, tau_plus 0.01': dict(beta=1, tau_plus=0.01)}


def halves(seed):
    """Training and test pairs: two of (upper, lower), each (n, 32) in [0, 1]."""
    images = torch.from_numpy(load_digits().data).float() / 16  # (1797, 64), rows of pixels from the top
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return [images[part].chunk(2, 1) for part in (order[450:], order[:450])]


def retrieval(seed, steps, batch=256, **objective):
    """Train two encoders and the temperature -> retrieval @1 on the test pairs, in [0, 1]."""
    torch.manual_seed(seed)
    train, test = halves(seed)
    upper, lower = (nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 64)) for _ in range(2))
    log_t = nn.Parameter(torch.tensor(0.1).log())
    optimizer = torch.optim.Adam([*upper.parameters(), *lower.parameters(), log_t], 1e-3)
    for _ in range(steps):
        index = torch.randint(len(train[0]), (batch,))
        z1, z2 = upper(train[0][index]), lower(train[1][index])
        loss = contrastive_loss(z1, z2, intra_view=False, temperature=log_t.exp().clamp(min=0.01), **objective)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        s = F.normalize(upper(test[0]), dim=1) @ F.normalize(lower(test[1]), dim=1).T
    return torch.stack([s.argmax(d) == torch.arange(len(s)) for d in (0, 1)]).double().mean().item()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--seeds', default=5, type=int, help='runs of each objective')
    parser.add_argument('--steps', default=1000, type=int, help='training steps')
    args = parser.parse_args()
    for name, objective in OBJECTIVES.items():
        found = torch.tensor([retrieval(seed, args.steps, **objective) for seed in range(args.seeds)])
        print(f'{name}: retrieval @1 {100 * found.mean():.1f} +- {100 * found.std(correction=0):.1f} %', flush=True)
