"""Slow and obvious: one step of DoGE with `torch.autograd.grad` per domain. Shares no code with the package."""

import torch
import torch.nn.functional as F


def domain_loss(model, rows, kind):
    """Mean loss of a domain over all its labels, from the model's logits."""
    ids = torch.tensor(rows["input_ids"])
    labels = torch.tensor(rows["labels"])
    if kind == "classifier":
        return F.cross_entropy(model(input_ids=ids).logits, labels)
    if kind == "seq2seq":
        shifted = torch.zeros_like(labels)
        shifted[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == -100, 0)
        logits = model(input_ids=ids, decoder_input_ids=shifted).logits
    else:
        logits = model(input_ids=ids).logits
    if kind == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    keep = labels != -100
    return F.cross_entropy(logits[keep], labels[keep])


def flat_gradient(model, loss):
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, grads, strict=True)]
    )


def reference_step(
    model, domains, targets=None, *, learning_rate, mu, kind="causal", official=False, max_norm=None, weights=None
):
    """Returns scores, new weights, losses and the gradient that should step the model."""
    losses = [domain_loss(model, rows, kind) for rows in domains.values()]
    grads = torch.stack([flat_gradient(model, loss) for loss in losses])
    if targets is None:
        target_grads = grads
    else:
        target_grads = torch.stack([flat_gradient(model, domain_loss(model, rows, kind)) for rows in targets.values()])
    if official:
        grads = torch.stack([g * min(1.0, max_norm / (float(g.norm()) + 1e-6)) for g in grads])
        target_grads = torch.stack([g * min(1.0, max_norm / (float(g.norm()) + 1e-6)) for g in target_grads])
    scores = torch.stack([sum(torch.dot(g, t) for t in target_grads) for g in grads])
    if official:
        scores = (scores / (grads.norm(dim=1).mean() + 1e-6)).clamp(0, 5)
    old = torch.full((len(domains),), 1 / len(domains), dtype=torch.float64) if weights is None else weights
    unnormalised = old * torch.exp(learning_rate * scores / mu)
    new = unnormalised / unnormalised.sum()
    gradient = sum(w * g for w, g in zip(new, grads, strict=True))
    return scores, new, torch.stack(losses).detach(), gradient
