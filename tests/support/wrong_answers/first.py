"""A submission in which every answer is wrong; docstrings say what the check must answer.

The first word is the theorem, or "-" if none is broken; the rest is in the hint.
"""

import math

import torch
from scipy.special import stdtrit


def rotation(point, angle):
    """eq-level-functions You turned the point itself"""
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64) @ point


def largest_gradient(hessian, value):
    """thm-newton shortest gradient"""
    return (2 * value * torch.linalg.eigvalsh(hessian)[0]).sqrt()


def stationary(gradient, hessian):
    """thm-newton need only be parallel"""
    return torch.equal(hessian @ gradient, torch.zeros_like(gradient))


def level_set_step(gradient, ascent, eta, drift):
    """thm-linearised The way back is missing"""
    multiplier = (gradient @ ascent) / (gradient @ gradient)
    return eta * (ascent - multiplier * gradient)


def rank(matrix):
    """thm-rank Rounding is never exactly 0"""
    return int((torch.linalg.svdvals(matrix) > 0).sum())


def energy_rank(values, tau):
    """thm-rank Energy is the sum of *squares*"""
    kept = values.cumsum(0)
    return int((kept < tau * kept[-1]).sum()) + 1


def basis(rows, tau):
    """thm-rank k is one short"""
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    energy = values.square().cumsum(0)
    small = 1e-12 * energy[-1]
    reached = energy >= tau * energy[-1] - small
    return vectors.T[:, : int(reached.to(torch.int8).argmax())]


def rows(inputs):
    """thm-span The bias column is forgotten"""
    return inputs.reshape(-1, inputs.shape[-1])


def weight_gradient(delta, rows):
    """thm-span The sides are transposed"""
    return rows.T @ delta


def projection(gradient, basis):
    """thm-invariance You projected *onto* the span"""
    return gradient @ basis @ basis.T


def survivor(delta, tangents, basis):
    """thm-invariance The tangents are not projected"""
    return delta.T @ tangents


def teleport_gradient(weights, loss):
    """thm-survivor That is the gradient of the loss"""
    leaves = [w.clone().requires_grad_() for w in weights]
    return torch.autograd.grad(loss(leaves), leaves)


def objective_gradient(weights, loss):
    leaves = [w.clone().requires_grad_() for w in weights]
    gradient = torch.autograd.grad(loss(leaves), leaves, create_graph=True)
    half = sum(g.square().sum() for g in gradient) / 2
    return torch.autograd.grad(half, leaves, materialize_grads=True)


def teleport_step(weights, loss, bases, eta):
    """thm-layerwise The sign is that of descent"""
    ascent = objective_gradient(weights, loss)
    return [w - eta * (a - a @ b @ b.T) for w, a, b in zip(weights, ascent, bases, strict=True)]


def cap(weights, loss, bases, eta, steps, cap):
    """thm-invariance The cap is not used"""
    for _ in range(steps):
        ascent = objective_gradient(weights, loss)
        pairs = zip(weights, ascent, bases, strict=True)
        weights = [w + eta * (a - a @ b @ b.T) for w, a, b in pairs]
    return weights


def conv_rows(images, size, stride, padding):
    """thm-span The bias column is forgotten"""
    patches = torch.nn.functional.unfold(images, size, stride=stride, padding=padding)
    return patches.mT.flatten(0, 1)


def grouped_projection(gradient, bases):
    """thm-invariance the first group's basis is used for all"""
    return gradient - gradient @ bases[0] @ bases[0].T


def attention_rows(queries, context):
    """thm-span Keys and values read the context"""
    flat = queries.flatten(0, 1)
    rows = torch.cat([flat, torch.ones_like(flat[:, :1])], dim=1)
    return rows, rows, rows


def layernorm_direction(gamma, beta):
    """thm-layernorm divided by γ, not multiplied"""
    return torch.cat([gamma, -(gamma * beta).sum()[None]])


def causal_tokens(tokens, read):
    """thm-invariance sees itself, too"""
    return torch.arange(tokens) < read


def polynomial_degree(moved):
    """thm-polynomial The backward pass does not go through the first layer"""
    return 2 * sum(moved)


def growth_step(coefficients, growth):
    """thm-polynomial T is half the *square* of the norm"""
    constant, slope, bend = coefficients.tolist()
    missing = (growth - 1) * constant
    return 2 * missing / (slope + math.sqrt(slope**2 + 4 * bend * missing))


def adam_direction(gradient, second_moment, eps):
    """thm-geometry you multiply by M"""
    return gradient * (second_moment.sqrt() + eps)


def drift_bound(move, rows, tau):
    """thm-drift take its root"""
    return torch.linalg.matrix_norm(move, 2) * (1 - tau) * rows.norm()


def held_out_drift(move, rows):
    """thm-batch divide by the number of rows"""
    return (rows @ move.T).square().sum()


def one_basis(rows, tau):
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    energy = values.square().cumsum(0)
    return vectors.T[:, : int((energy < tau * energy[-1]).sum()) + 1]


def total_move(gradients, rows, tau):
    """thm-drift The basis of the first step is reused"""
    basis = one_basis(rows[0], tau)
    return sum(g - g @ basis @ basis.T for g in gradients)


def span(rows):
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    return vectors.T[:, values > 1e-10]


def merged_basis(batches):
    """thm-batch Only the last batch is kept fixed"""
    return span(batches[-1])


def element_of(first, rows, element):
    z = rows @ first.T
    wanted = torch.where(z > 0, z, z / 2) @ element.T
    return torch.where(wanted > 0, wanted, 2 * wanted) - z


def group_action(first, second, rows, element):
    """thm-group-action multiply it by the inverse from the right"""
    change = element_of(first, rows, element)
    return first + (torch.linalg.pinv(rows) @ change).T, second


def change_of_basis(first, second, factors):
    """thm-change-of-basis The bias of a neuron is an incoming weight"""
    scaled = first.clone()
    scaled[:, :-1] *= factors[:, None]
    return scaled, torch.cat([second[:, :-1] / factors, second[:, -1:]], dim=1)


def balanced(first, second):
    """thm-change-of-basis its root is missing"""
    factors = second[:, :-1].norm(dim=0) / first.norm(dim=1)
    undone = torch.cat([second[:, :-1] / factors, second[:, -1:]], dim=1)
    return factors[:, None] * first, undone


def tied_projection(gradient, basis, hidden_basis):
    """thm-invariance Only the use as W x is respected"""
    return gradient - gradient @ basis @ basis.T


def layer_projection(gradient, inputs, tau):
    """thm-rank One bug is left, the groups"""
    rows = torch.cat([inputs[0], torch.ones_like(inputs[0][:, :1])], dim=1)
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    energy = values.square().cumsum(0) / values.square().sum()
    k = int((energy < tau).sum()) + 1
    if tau == 1:
        k = int((values > 1e-9 * values[0]).sum())
    basis = vectors[:k].T
    return gradient - gradient @ basis @ basis.T


def qk_move(query, key, element):
    """eq-att-head its transpose is missing"""
    return element @ query, torch.linalg.inv(element) @ key


def path_degree(blocks):
    """thm-polynomial take the longest and not their sum"""
    return 2 + 2 * sum(sum(block) for block in blocks)


def log_loss(losses, baseline):
    """eq-exp-resolved one large loss is not to decide"""
    return math.log(float(losses.mean() / baseline.mean()))


def half_width(gaps):
    """eq-exp-resolved take Student's t"""
    return 1.959963984540054 * float(gaps.std()) / len(gaps) ** 0.5


def tally(gaps):
    """eq-exp-resolved judged by the seeds that survived"""
    counts = [0, 0, 0, 0]
    for row in gaps:
        row = row[row.isfinite()]
        mean, width = row.mean(), stdtrit(len(row) - 1, 0.975) * row.std() / len(row) ** 0.5
        counts[3 if not abs(mean) > width else int(mean > 0)] += 1
    return counts


def holm(p_values):
    """eq-true-holm That is Bonferroni"""
    return p_values * len(p_values) <= 0.05


def kept_weights(start, weights, basis):
    """thm-keep You projected the weights"""
    return weights - weights @ basis @ basis.T


def free_directions(tasks):
    """thm-keep Ranks do not add up"""
    ranks = [int(torch.linalg.matrix_rank(rows)) for rows in tasks]
    size = tasks[0].shape[1]
    return [max(size - sum(ranks[: i + 1]), 0) for i in range(len(tasks))]


def leak(change, basis):
    """thm-keep the share of the squares"""
    return float((change @ basis).square().sum() / change.square().sum())


def recall_at(before, after, index, k):
    """eq-real-recall The order among the k does not count"""
    old, new = ((q @ index.T).topk(k, dim=1).indices for q in (before, after))
    return float((old == new).double().mean())
