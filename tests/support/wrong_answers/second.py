"""A submission in which every answer is wrong; docstrings say what the check must answer.

The first word is the theorem, or "-" if none is broken; the rest is in the hint.
"""

import math

import numpy as np
import torch
from scipy.special import stdtrit

J = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
SHIFT = torch.tensor([7.0, 5.0], dtype=torch.float64)


def rotation(point, angle):
    """eq-level-functions You turned the other way"""
    c, s = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[c, s], [-s, c]], dtype=torch.float64)
    return torch.linalg.solve(J, turn @ (J @ point - SHIFT) + SHIFT)


def largest_gradient(hessian, value):
    """thm-newton take the root"""
    return 2 * value * torch.linalg.eigvalsh(hessian)[-1]


def stationary(gradient, hessian):
    """thm-newton Just the other way round"""
    image = hessian @ gradient
    across = image * (gradient @ gradient) - gradient * (gradient @ image)
    return bool(across.norm() > 1e-9)


def level_set_step(gradient, ascent, eta, drift):
    """thm-linearised the drift is subtracted"""
    square = gradient @ gradient
    return eta * (ascent - (gradient @ ascent) / square * gradient) + drift / square * gradient


def rank(matrix):
    """thm-rank take eps of its dtype"""
    values = torch.linalg.svdvals(matrix)
    return int((values > matrix.shape[1] ** 0.5 * 2.0**-52 * values.norm()).sum())


def energy_rank(values, tau):
    """thm-rank k is one short"""
    energy = values.square().cumsum(0)
    return int((energy < tau * energy[-1]).sum())


def basis(rows, tau):
    """thm-rank τ is not used"""
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    return vectors.T[:, values > 1e-12]


def rows(inputs):
    """thm-span the 1 comes last"""
    flat = inputs.reshape(-1, inputs.shape[-1])
    return torch.cat([torch.ones_like(flat[:, :1]), flat], dim=1)


def weight_gradient(delta, rows):
    """thm-span mean over the samples"""
    return torch.einsum("no,ni->noi", delta, rows).mean(0)


def projection(gradient, basis):
    """thm-invariance The sides are transposed"""
    return gradient - basis @ (basis.T @ gradient)


def survivor(delta, tangents, basis):
    """thm-invariance the part outside survives"""
    return delta.T @ (tangents @ basis @ basis.T)


def teleport_gradient(weights, loss):
    """thm-survivor The factor ½ is missing"""
    leaves = [w.clone().requires_grad_() for w in weights]
    gradient = torch.autograd.grad(loss(leaves), leaves, create_graph=True)
    square = sum(g.square().sum() for g in gradient)
    return torch.autograd.grad(square, leaves, materialize_grads=True)


def objective_gradient(weights, loss):
    leaves = [w.clone().requires_grad_() for w in weights]
    gradient = torch.autograd.grad(loss(leaves), leaves, create_graph=True)
    half = sum(g.square().sum() for g in gradient) / 2
    return torch.autograd.grad(half, leaves, materialize_grads=True)


def teleport_step(weights, loss, bases, eta):
    """thm-invariance not projected, so the loss moves"""
    ascent = objective_gradient(weights, loss)
    return [w + eta * a for w, a in zip(weights, ascent, strict=True)]


def cap(weights, loss, bases, eta, steps, cap):
    """thm-invariance you compare it with its square"""
    for _ in range(steps):
        leaves = [w.clone().requires_grad_() for w in weights]
        gradient = torch.autograd.grad(loss(leaves), leaves)
        if sum(g.square().sum() for g in gradient) > cap:
            break
        ascent = objective_gradient(weights, loss)
        pairs = zip(weights, ascent, bases, strict=True)
        weights = [w + eta * (a - a @ b @ b.T) for w, a, b in pairs]
    return weights


def conv_rows(images, size, stride, padding):
    """thm-span swap its last two axes"""
    patches = torch.nn.functional.unfold(images, size, stride=stride, padding=padding)
    rows = patches.reshape(-1, patches.shape[1])
    return torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)


def grouped_projection(gradient, bases):
    """thm-invariance not every groups-th one"""
    result = gradient.clone()
    for row in range(len(gradient)):
        basis = bases[row % len(bases)]
        result[row] -= gradient[row] @ basis @ basis.T
    return result


def attention_rows(queries, context):
    """thm-span The bias column is forgotten"""
    return queries.flatten(0, 1), context.flatten(0, 1), context.flatten(0, 1)


def layernorm_direction(gamma, beta):
    """thm-layernorm wrong sign"""
    return torch.cat([1 / gamma, (beta / gamma).sum()[None]])


def causal_tokens(tokens, read):
    """thm-invariance The position that is read alone"""
    counts = torch.zeros(tokens, dtype=torch.bool)
    counts[read] = True
    return counts


def polynomial_degree(moved):
    """thm-polynomial T is a *square*"""
    return sum(moved[1:])


def growth_step(coefficients, growth):
    """thm-polynomial c2 is left out"""
    return (growth**2 - 1) * coefficients[0] / coefficients[1]


def adam_direction(gradient, second_moment, eps):
    """thm-geometry The root of v is missing"""
    return gradient / (second_moment + eps)


def drift_bound(move, rows, tau):
    """thm-drift not the share that is kept"""
    return torch.linalg.matrix_norm(move, 2) * math.sqrt(tau) * rows.norm()


def held_out_drift(move, rows):
    """thm-batch do not subtract the mean"""
    covariance = torch.from_numpy(np.atleast_2d(np.cov(rows.numpy().T, bias=True)))
    return (move @ covariance @ move.T).trace()


def one_basis(rows, tau):
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    energy = values.square().cumsum(0)
    return vectors.T[:, : int((energy < tau * energy[-1]).sum()) + 1]


def total_move(gradients, rows, tau):
    """thm-drift Only the last step is there"""
    for gradient, inputs in zip(gradients, rows, strict=True):
        basis = one_basis(inputs, tau)
        move = gradient - gradient @ basis @ basis.T
    return move


def span(rows):
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    return vectors.T[:, values > 1e-10]


def merged_basis(batches):
    """thm-layerwise side by side are not orthonormal"""
    return torch.cat([span(rows) for rows in batches], dim=1)


def inverse_of(element):
    return torch.block_diag(torch.linalg.inv(element), torch.ones(1, 1, dtype=element.dtype))


def group_action(first, second, rows, element):
    """thm-group-action the layer forgets everything"""
    z = rows @ first.T
    wanted = torch.where(z > 0, z, z / 2) @ element.T
    undone = torch.where(wanted > 0, wanted, 2 * wanted)
    return (torch.linalg.pinv(rows) @ undone).T, second @ inverse_of(element)


def change_of_basis(first, second, factors):
    """thm-change-of-basis Outgoing weights are *divided*"""
    grown = torch.cat([second[:, :-1] * factors, second[:, -1:]], dim=1)
    return factors[:, None] * first, grown


def balanced(first, second):
    """thm-change-of-basis upside down"""
    factors = (first.norm(dim=1) / second[:, :-1].norm(dim=0)).sqrt()
    undone = torch.cat([second[:, :-1] / factors, second[:, -1:]], dim=1)
    return factors[:, None] * first, undone


def tied_projection(gradient, basis, hidden_basis):
    """thm-invariance Only the use as Wᵀ s is respected"""
    return gradient - hidden_basis @ (hidden_basis.T @ gradient)


def layer_projection(gradient, inputs, tau):
    """thm-rank One bug is left, τ"""
    parts = []
    for block, own in zip(gradient.unflatten(0, (len(inputs), -1)), inputs, strict=True):
        rows = torch.cat([own, torch.ones_like(own[:, :1])], dim=1)
        _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
        k = int((values.cumsum(0) / values.sum() < tau).sum()) + 1
        if tau == 1:
            k = int((values > 1e-9 * values[0]).sum())
        parts.append(block - block @ vectors[:k].T @ vectors[:k])
    return torch.cat(parts)


def qk_move(query, key, element):
    """eq-att-head Only the queries are moved"""
    return element @ query, key.clone()


def path_degree(blocks):
    """thm-polynomial The error passes the head, too"""
    return 2 * sum(max(block) for block in blocks)


def log_loss(losses, baseline):
    """eq-exp-resolved The logarithms are missing"""
    return float((losses - baseline).mean())


def half_width(gaps):
    """eq-exp-resolved n - 1 below, not n"""
    return float(stdtrit(len(gaps) - 1, 0.975) * gaps.std(correction=0)) / len(gaps) ** 0.5


def tally(gaps):
    """eq-exp-resolved slipped into the unresolved"""
    width = float(stdtrit(2, 0.975)) * gaps.std(dim=1) / 3**0.5
    clear = gaps.mean(dim=1)[gaps.mean(dim=1).abs() > width]
    lower, higher = int((clear < 0).sum()), int((clear > 0).sum())
    return [lower, higher, 0, len(gaps) - lower - higher]


def holm(p_values):
    """eq-true-holm The first that fails ends it"""
    ordered, places = p_values.sort()
    small = ordered * torch.arange(len(p_values), 0, -1) <= 0.05
    return torch.zeros_like(small).scatter(0, places, small)


def kept_weights(start, weights, basis):
    """thm-keep You kept the part of the change that has to go"""
    return start + (weights - start) @ basis @ basis.T


def free_directions(tasks):
    """thm-keep Earlier tasks are to be kept, too"""
    return [rows.shape[1] - int(torch.linalg.matrix_rank(rows)) for rows in tasks]


def leak(change, basis):
    """thm-keep where a change may be"""
    return float((change - change @ basis @ basis.T).norm() / change.norm())


def recall_at(before, after, index, k):
    """eq-real-recall have the *largest* inner products"""
    old, new = ((q @ index.T).topk(k, largest=False).indices.tolist() for q in (before, after))
    found = [len(set(a) & set(b)) / k for a, b in zip(old, new, strict=True)]
    return sum(found) / len(found)
