"""Objectives compared on sequences: 20 kinds of Markov chain, in 5 groups of 4, told apart without labels.

    python misc/sequences.py

Two views of a sequence are two windows of it with a fifth of their symbols replaced. Some minutes on a CPU.
"""

import argparse
import sys
from pathlib import Path

import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from hardneg.losses import contrastive_loss

SYMBOLS, LENGTH, WINDOW = 8, 128, 48
OBJECTIVES = {'standard': dict(tau_plus=0, beta=0), 'debiased': dict(tau_plus=0.05, beta=0), 'untrained': dict(steps=0),
              'hard, β = 1': dict(tau_plus=0.05, beta=1), 'hard, β = 2': dict(tau_plus=0.05, beta=2),
              'standard, t = 0.1': dict(tau_plus=0, beta=0, temperature=0.1),
              'hard, β = 1, t = 0.1': dict(tau_plus=0.05, beta=1, temperature=0.1)}


def sequences(transitions, n):
    """n one-hot sequences, each of a random kind (n,) of those whose transitions are (kinds, SYMBOLS, SYMBOLS)."""
    kind, x = torch.randint(len(transitions), (n,)), [torch.randint(SYMBOLS, (n,))]
    while len(x) < LENGTH:
        x.append(torch.multinomial(transitions[kind, x[-1]], 1)[:, 0])
    return nn.functional.one_hot(torch.stack(x, 1), SYMBOLS).mT.float(), kind  # (n, SYMBOLS, LENGTH)


def view(x):
    """A random window of each sequence, with noise: (n, SYMBOLS, LENGTH) -> (n, SYMBOLS, WINDOW)."""
    place = torch.randint(LENGTH - WINDOW + 1, (len(x), 1, 1)) + torch.arange(WINDOW)
    noise = nn.functional.one_hot(torch.randint(SYMBOLS, (len(x), WINDOW)), SYMBOLS).mT.float()
    return torch.where(torch.rand(len(x), 1, WINDOW) < 0.2, noise, x.gather(2, place.expand(-1, SYMBOLS, -1)))


def accuracy(seed, steps=400, width=64, **objective):
    """kNN accuracy (percent) on 1,000 sequences of f's features, trained on 4,000 others with the objective."""
    torch.manual_seed(seed)
    group, own = (torch.randn(5, n, SYMBOLS, SYMBOLS) for n in (1, 4))
    transitions = (group + 0.5 * own).flatten(0, 1).softmax(-1)  # (20, SYMBOLS, SYMBOLS)
    (x, kind), (x_new, kind_new) = (sequences(transitions, n) for n in (4000, 1000))
    f = nn.Sequential(nn.Conv1d(SYMBOLS, width, 3), nn.ReLU(), nn.Conv1d(width, width, 3), nn.ReLU())
    g = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 32))
    optimizer = torch.optim.Adam([*f.parameters(), *g.parameters()], 3e-3)
    for _ in range(steps):
        batch = x[torch.randint(len(x), (128,))]
        z1, z2 = (nn.functional.normalize(g(f(view(batch)).mean(2)), dim=1) for _ in range(2))
        optimizer.zero_grad()
        contrastive_loss(z1, z2, **objective).backward()
        optimizer.step()
    with torch.no_grad():
        return 100 * KNeighborsClassifier(20, metric='cosine').fit(f(x).mean(2), kind).score(f(x_new).mean(2), kind_new)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--seeds', default=5, type=int, help='runs of each objective')
    seeds, found = parser.parse_args().seeds, {}
    for name, objective in OBJECTIVES.items():
        found[name] = a = torch.tensor([accuracy(seed, **objective) for seed in range(seeds)])
        gain = a - found['standard']
        print(f'{name}: kNN {a.mean():.1f} ± {a.std():.1f} %, to standard {gain.mean():+.1f} ± {gain.std():.1f}')
