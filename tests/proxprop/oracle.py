"""The twin: directions from a dense float64 design matrix and dense solves; shares no code with the library.

A is read off the plain layer's forward pass, which the library leaves to torch.
"""

import copy

import torch


def design_matrix(layer, inputs):
    """A, column by column: the plain layer's output at each unit vector of its trained parameters.

    Returns:
        A of shape ``[outputs, parameters]``, and the shapes of the trained parameters by name.
    """
    layer = copy.deepcopy(layer).double()
    inputs = [i.detach().double() if i.is_floating_point() else i for i in inputs]
    values = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    trained = [name for name, p in layer.named_parameters() if p.requires_grad]
    columns = []
    with torch.no_grad():  # where a ProxProp layer is its base class
        for name in trained:
            entries = values[name].view(-1)
            for index in range(entries.numel()):
                entries[index] = 1
                columns.append(torch.func.functional_call(layer, values, tuple(inputs)).flatten())
                entries[index] = 0
    return torch.stack(columns, dim=1), {name: values[name].shape for name in trained}


def split(vector, shapes):
    """A stacked vector as a dictionary of parameters."""
    parts = vector.split([shape.numel() for shape in shapes.values()])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def exact(layer, inputs, gradient, tau):
    """(AᵀA + I/τ)⁻¹ AᵀG by a dense solve."""
    a, shapes = design_matrix(layer, inputs)
    system = a.T @ a + torch.eye(a.shape[1], dtype=a.dtype) / tau
    return split(torch.linalg.solve(system, a.T @ gradient.double().flatten()), shapes)


def output_of_column(layer, a, shape):
    """The index of the output unit or channel that each column of A belongs to: where its entries are not zero.

    Any for a column of zeros. ``shape`` is that of the output.
    """
    axis = len(shape) - 1 - len(getattr(layer, "kernel_size", ()))
    entries = a.T.reshape(-1, *shape).movedim(1 + axis, 1)
    return entries.abs().reshape(*entries.shape[:2], -1).sum(2).argmax(1)


def conjugate_gradients(layer, inputs, gradient, tau, iterations, published=False, one_step_length=False):
    """Conjugate gradients on the dense system, column by column, in plain loops.

    ``published`` follows the rules of the authors' published code, all or those named: damped denominators
    ("damping"), an unconjugated second direction ("conjugacy"), an early stop ("stop"). ``one_step_length`` treats all
    parameters as one column.
    """
    rules = ("damping", "conjugacy", "stop") if published is True else published or ()
    a, shapes = design_matrix(layer, inputs)
    system = a.T @ a + torch.eye(a.shape[1], dtype=a.dtype) / tau
    rhs = a.T @ gradient.double().flatten()
    if one_step_length:
        columns = [torch.arange(len(rhs))]
    else:
        owner = output_of_column(layer, a, gradient.shape)
        columns = [torch.nonzero(owner == index).flatten() for index in range(int(owner.max()) + 1)]
    epsilon = 1e-6 if "damping" in rules else 0.0

    x = {i: torch.zeros(len(c), dtype=a.dtype) for i, c in enumerate(columns)}
    r = {i: rhs[c].clone() for i, c in enumerate(columns)}
    p = {i: rhs[c].clone() for i, c in enumerate(columns)}
    start = sum(float(v @ v) for v in r.values()) / len(columns)
    for step in range(iterations):
        old, new = {}, {}
        for i, c in enumerate(columns):
            old[i] = float(r[i] @ r[i])
            if old[i] == 0.0:
                new[i] = 0.0
                continue
            product = system[c][:, c] @ p[i]
            alpha = old[i] / (float(p[i] @ product) + epsilon)
            x[i] = x[i] + alpha * p[i]
            r[i] = r[i] - alpha * product
            new[i] = float(r[i] @ r[i])
        if "stop" in rules and step < iterations - 1 and max(new.values()) < 1e-2**2 * start:
            break
        for i in x:
            if old[i] > 0.0:
                previous = r[i] if "conjugacy" in rules and step == 0 else p[i]
                p[i] = r[i] + new[i] / (old[i] + epsilon) * previous
    result = torch.zeros_like(rhs)
    for i, c in enumerate(columns):
        result[c] = x[i]
    return split(result, shapes)


def relative_error(actual, expected):
    """‖actual − expected‖ / ‖expected‖ over all parameters together, both dictionaries."""
    assert actual.keys() == expected.keys()
    error = sum((actual[k].double() - expected[k].double()).square().sum() for k in expected)
    size = sum(expected[k].double().square().sum() for k in expected)
    return float((error / size).sqrt())
