"""A submission in which every answer is wrong; docstrings say what the check must answer.

The first word is the theorem, or "-" if none is broken; the rest is in the hint.
"""

import math

import torch
from scipy.special import stdtrit

J = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
SHIFT = torch.tensor([7.0, 5.0], dtype=torch.float64)


def rotation(point, angle):
    """eq-level-functions Solve J p = q"""
    c, s = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    return turn @ (J @ point - SHIFT)


def largest_gradient(hessian, value):
    """thm-newton The factor 2 is missing"""
    return (value * torch.linalg.eigvalsh(hessian)[-1]).sqrt()


def stationary(gradient, hessian):
    """thm-newton any eigenvalue will do"""
    return torch.allclose(hessian @ gradient, gradient)


def level_set_step(gradient, ascent, eta, drift):
    """thm-linearised The part of Hg along g is still in the step"""
    return eta * ascent - drift / (gradient @ gradient) * gradient


def rank(matrix):
    """thm-rank A cumulated sum that reaches"""
    energy = torch.linalg.svdvals(matrix).square()
    k = 0
    while k < len(energy) and energy[: k + 1].sum() < energy.sum():
        k += 1
    return k + 1


def energy_rank(values, tau):
    """thm-rank a share of the largest"""
    return int((values > (1 - tau) * values[0]).sum())


def basis(rows, tau):
    """thm-layerwise wrong side"""
    left, values, _ = torch.linalg.svd(rows, full_matrices=False)
    energy = values.square().cumsum(0)
    kept = int((energy < tau * energy[-1]).sum()) + 1
    return left[:, : min(kept, int((values > 1e-12).sum()))]


def rows(inputs):
    """- inputs.clone()"""
    inputs *= 2
    flat = (inputs / 2).reshape(-1, inputs.shape[-1])
    return torch.cat([flat, torch.ones_like(flat[:, :1])], dim=1)


def weight_gradient(delta, rows):
    """thm-span add to the sum, do not overwrite it"""
    for d, x in zip(delta, rows, strict=True):
        gradient = torch.outer(d, x)
    return gradient


def projection(gradient, basis):
    """thm-invariance k is one short"""
    kept = basis[:, :-1]
    return gradient - gradient @ kept @ kept.T


def survivor(delta, tangents, basis):
    """thm-survivor the sum of the products"""
    outside = tangents - tangents @ basis @ basis.T
    return torch.outer(delta.sum(0), outside.sum(0))


def teleport_gradient(weights, loss):
    """thm-survivor create_graph=True"""
    leaves = [w.clone().requires_grad_() for w in weights]
    gradient = torch.autograd.grad(loss(leaves), leaves)
    half = sum(g.square().sum() for g in gradient) / 2
    assert not half.requires_grad
    return [torch.zeros_like(w) for w in weights]


def objective_gradient(weights, loss):
    leaves = [w.clone().requires_grad_() for w in weights]
    gradient = torch.autograd.grad(loss(leaves), leaves, create_graph=True)
    half = sum(g.square().sum() for g in gradient) / 2
    return torch.autograd.grad(half, leaves, materialize_grads=True)


def teleport_step(weights, loss, bases, eta):
    """thm-layerwise It lies in the span of the inputs, so nothing moves"""
    leaves = [w.clone().requires_grad_() for w in weights]
    gradient = torch.autograd.grad(loss(leaves), leaves)
    return [w + eta * (g - g @ b @ b.T) for w, g, b in zip(weights, gradient, bases, strict=True)]


def cap(weights, loss, bases, eta, steps, cap):
    """thm-invariance a start above the cap must not move"""
    for _ in range(steps):
        ascent = objective_gradient(weights, loss)
        pairs = zip(weights, ascent, bases, strict=True)
        weights = [w + eta * (a - a @ b @ b.T) for w, a, b in pairs]
        leaves = [w.clone().requires_grad_() for w in weights]
        gradient = torch.autograd.grad(loss(leaves), leaves)
        if math.sqrt(sum(float(g.square().sum()) for g in gradient)) > cap:
            break
    return weights


def conv_rows(images, size, stride, padding):
    """thm-span The stride is not used"""
    patches = torch.nn.functional.unfold(images, size, padding=padding)
    rows = patches.mT.flatten(0, 1)
    return torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)


def grouped_projection(gradient, bases):
    """thm-layerwise wastes null space"""
    joined = torch.cat(list(bases), dim=1)
    left, values, _ = torch.linalg.svd(joined, full_matrices=False)
    basis = left[:, values > 1e-10]
    return gradient - gradient @ basis @ basis.T


def attention_rows(queries, context):
    """thm-span The mean over the tokens loses rows"""

    def rows(tokens):
        means = tokens.mean(1)
        return torch.cat([means, torch.ones_like(means[:, :1])], dim=1)

    return rows(queries), rows(context), rows(context)


def layernorm_direction(gamma, beta):
    """thm-layernorm The bias entry is missing"""
    return torch.cat([1 / gamma, torch.zeros_like(gamma[:1])])


def causal_tokens(tokens, read):
    """thm-invariance sees those *before* it"""
    return torch.arange(tokens) >= read


def polynomial_degree(moved):
    """thm-polynomial Only layers that move count"""
    return 2 * (len(moved) - 1)


def growth_step(coefficients, growth):
    """thm-polynomial the other root"""
    constant, slope, bend = coefficients
    missing = (growth**2 - 1) * constant
    return (-slope - (slope**2 + 4 * bend * missing).sqrt()) / (2 * bend)


def adam_direction(gradient, second_moment, eps):
    """thm-geometry ε is added outside the root"""
    return gradient / (second_moment + eps).sqrt()


def drift_bound(move, rows, tau):
    """thm-drift the bound is true but looser"""
    return move.norm() * math.sqrt(1 - tau) * rows.norm()


def held_out_drift(move, rows):
    """thm-batch the drift of the mean input"""
    return (move @ rows.mean(0)).square().sum()


def one_basis(rows, tau):
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    energy = values.square().cumsum(0)
    return vectors.T[:, : int((energy < tau * energy[-1]).sum()) + 1]


def total_move(gradients, rows, tau):
    """thm-drift You projected *onto* the span"""
    bases = [one_basis(inputs, tau) for inputs in rows]
    return sum(g @ b @ b.T for g, b in zip(gradients, bases, strict=True))


def span(rows):
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    return vectors.T[:, values > 1e-10]


def merged_basis(batches):
    """thm-batch The rows were centred"""
    rows = torch.cat(batches)
    return span(rows - rows.mean(0))


def group_action(first, second, rows, element):
    """thm-group-action to first order only"""
    z = rows @ first.T
    wanted = torch.where(z > 0, z, z / 2) @ element.T
    change = torch.where(wanted > 0, wanted, 2 * wanted) - z
    opposite = 2 * torch.eye(len(element), dtype=element.dtype) - element
    undone = torch.cat([second[:, :-1] @ opposite, second[:, -1:]], dim=1)
    return first + (torch.linalg.pinv(rows) @ change).T, undone


def change_of_basis(first, second, factors):
    """thm-change-of-basis not changed back"""
    return factors[:, None] * first, second


def balanced(first, second):
    """thm-change-of-basis also in the norm"""
    factors = (second[:, :-1].norm(dim=0) / first[:, :-1].norm(dim=1)).sqrt()
    undone = torch.cat([second[:, :-1] / factors, second[:, -1:]], dim=1)
    return factors[:, None] * first, undone


def tied_projection(gradient, basis, hidden_basis):
    """thm-invariance takes what lies in both spans away twice"""
    return gradient - gradient @ basis @ basis.T - hidden_basis @ hidden_basis.T @ gradient


def layer_projection(gradient, inputs, tau):
    """thm-rank One bug is left, the bias"""
    parts = []
    for block, own in zip(gradient.unflatten(0, (len(inputs), -1)), inputs, strict=True):
        _, values, vectors = torch.linalg.svd(own, full_matrices=False)
        energy = values.square().cumsum(0) / values.square().sum()
        k = int((energy < tau).sum()) + 1
        if tau == 1:
            k = int((values > 1e-9 * values[0]).sum())
        basis = vectors[:k].T
        weights = block[:, :-1] - block[:, :-1] @ basis @ basis.T
        parts.append(torch.cat([weights, block[:, -1:]], dim=1))
    return torch.cat(parts)


def qk_move(query, key, element):
    """eq-att-head Transposing is not inverting"""
    return element @ query, element.T @ key


def path_degree(blocks):
    """thm-polynomial not the shortest"""
    return 2 + 2 * sum(min(block) for block in blocks)


def log_loss(losses, baseline):
    """eq-exp-resolved the end of the run only"""
    return math.log(float(losses[-1] / baseline[-1]))


def half_width(gaps):
    """eq-exp-resolved the interval for a further seed"""
    return float(stdtrit(len(gaps) - 1, 0.975) * gaps.std())


def tally(gaps):
    """eq-exp-resolved ask whether the seeds resolve it"""
    means = gaps.mean(dim=1)
    gone = ~gaps.isfinite().all(dim=1)
    groups = means < 0, (means > 0) & ~gone, gone, means == 0
    return [int(group.sum()) for group in groups]


def holm(p_values):
    """eq-true-holm Nothing is corrected"""
    return p_values <= 0.05


def kept_weights(start, weights, basis):
    """eq-keep-displacement keeps all and learns nothing"""
    return start.clone()


def free_directions(tasks):
    """thm-keep the directions that are taken"""
    return [int(torch.linalg.matrix_rank(torch.cat(tasks[: i + 1]))) for i in range(len(tasks))]


def leak(change, basis):
    """thm-keep That is what leaks, not its share"""
    return float((change @ basis).norm())


def recall_at(before, after, index, k):
    """eq-real-recall divide by k"""
    old, new = ((q @ index.T).topk(k).indices.tolist() for q in (before, after))
    return sum(len(set(a) & set(b)) for a, b in zip(old, new, strict=True)) / len(old)
