"""The gradient of a large batch whose images go through the network in parts (GradCache)."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel


@dataclass
class MicroBatches:
    """Computes the gradient of the whole batch's loss with few images in the network at once.

    A first pass, without a graph, gives the embeddings z, and the loss its gradient at z. A second
    pass, with a graph, takes that gradient through the network, part by part (Gao et al. 2021,
    arXiv 2101.06983). BatchNorm's batch is a part.

    Args:
        embed: model.Embeddings, perhaps under DistributedDataParallel.
        size: images m that go through the network at once, with all their views if these are
            joint.
        autocast: what runtime.autocast() gives.
    """

    embed: torch.nn.Module
    size: int
    autocast: Any

    def backward(self, views, loss_of, scaler):
        """Add the gradient of the loss to the parameters' and return the loss.

        Args:
            views: V tensors (b, 3, h, w).
            loss_of: function of a list of V embeddings (b, D).
            scaler: torch.amp.GradScaler.
        """
        parts = self._parts(views)
        z = self._embeddings(parts, len(views))
        loss = loss_of(z)
        scaler.scale(loss).backward()
        gradients = self._parts([x.grad for x in z])
        with self.autocast:  # entered anew: the casts of the first pass have no graph
            for i, (part, gradient) in enumerate(zip(parts, gradients), start=1):
                with self._reduced(last=i == len(parts)):
                    torch.autograd.backward(self.embed(*part), gradient)
        return loss.detach()

    def _parts(self, views):
        """V x (b, ...) -> what goes through the network at once: tuples of one or V (m, ...)."""
        embed = getattr(self.embed, 'module', self.embed)  # under DistributedDataParallel
        split = [x.split(self.size) for x in views]
        parts = []
        for own in zip(*split):  # V x (m, ...)
            if embed.joint:
                parts.append(own)
            else:
                parts.extend((x,) for x in own)
        return parts

    @torch.no_grad()
    def _embeddings(self, parts, V):
        """V x (b, D) that take a gradient. Only the second pass moves BatchNorm's statistics."""
        buffers = list(self.embed.buffers())
        before = [x.clone() for x in buffers]
        z = []
        with self.autocast:
            for part in parts:
                z.extend(self.embed(*part))
        for x, old in zip(buffers, before):
            x.copy_(old)
        return [torch.cat(z[v::V]).requires_grad_() for v in range(V)]  # b/m x (m, D) -> (b, D)

    def _reduced(self, last):
        """DistributedDataParallel sums gradients over ranks once, after the last part."""
        if last or not isinstance(self.embed, DistributedDataParallel):
            return nullcontext()
        return self.embed.no_sync()


def set_momentum(net, parts):
    """Let the parts of a batch move BatchNorm's running statistics as far as one batch does."""
    for module in net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1 - (1 - module.momentum) ** (1 / parts)


def kept_bytes(build, size, dtype, n=8):
    """Bytes that the network keeps of one view for the backward pass, counted without memory.

    Args:
        build: function that returns the network.
        size: side of a view in pixels.
        dtype: numbers in which the network computes.
        n: views in the forward pass that is counted.
    """
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        kept[id(storage)] = storage
        return x

    with torch.device('meta'):
        net = build().to(dtype)
        x = torch.empty(n, 3, size, size, dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        net(x)
    for p in net.parameters():
        kept.pop(id(p.untyped_storage()), None)
    return sum(storage.nbytes() for storage in kept.values()) / n
