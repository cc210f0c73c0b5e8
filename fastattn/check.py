"""Is an implementation right? The one comparison rule of the tests and of `fastattn check`.

error(ours) <= 2 x error(torch's own op in the same dtype) + one unit in the last place of the largest value, errors taken
against the float64 reference, in the maximum norm and in the root mean square, for every output and every gradient.
"""

import functools

import torch


def compare(name, ours, baseline, exact):
    """A sentence if `ours` breaks the rule, else None. All three are tensors of one shape; exact is float64."""
    if ours.shape != exact.shape:
        return f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    special = ~exact.isfinite()
    got, want = ours.detach().double(), exact.detach().double()
    if not torch.equal(got[special].nan_to_num(7.0), want[special].nan_to_num(7.0)):
        return f"{name}: infinities or NaN differ from the reference"
    got, want, base = (t.masked_fill(special, 0.0) for t in (got, want, baseline.detach().double()))
    if not got.isfinite().all():
        return f"{name}: {int((~got.isfinite()).sum())} values of {got.numel()} are not finite"
    if got.numel() == 0:
        return None
    base = base.nan_to_num(0.0, 0.0, 0.0)
    ulp = torch.finfo(ours.dtype).eps * want.abs().max()
    for norm, size in (("max", lambda t: t.abs().max()), ("rms", lambda t: t.square().mean().sqrt())):
        error, allowed = size(got - want), 2 * size(base - want) + ulp
        if error > allowed:
            return f"{name}: {norm} error {error:.3e} is above {allowed:.3e} (2 x torch's own in {ours.dtype} + ulp)"
    return None


def run(function, inputs, grad_outputs, options):
    """Outputs and gradients of function(*inputs, **options); grads for floating inputs that ask for one, None elsewhere."""
    outputs = function(*inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    if not wanted:
        return outputs, ()
    pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=False) if g is not None]
    grads = torch.autograd.grad(
        [o for o, _ in pairs], wanted, [g.to(o.dtype) for o, g in pairs], allow_unused=True
    )
    return outputs, grads


def check(
    ours,
    reference,
    inputs,
    *,
    baseline=None,
    grad_outputs=None,
    options=None,
    reference_options=None,
    seed=0,
):
    """Every broken rule, as sentences, of ours(*inputs, **options) and its gradients; [] when all is right.

    inputs: tensors (those with requires_grad get a gradient checked) and other values. The reference runs on float64
    copies; `baseline` (default: the reference itself) runs on the inputs in their own dtype. grad_outputs: one a output,
    None for an output whose gradient is not propagated; random by default.
    """
    options = options or {}
    reference_options = options if reference_options is None else reference_options

    def copies(dtype=None):
        for t in inputs:
            if isinstance(t, torch.Tensor):
                floating = t.is_floating_point()
                c = t.detach().to(dtype) if dtype and floating else t.detach()
                yield c.requires_grad_() if t.requires_grad else c
            else:
                yield t

    exact_inputs, base_inputs, our_inputs = list(copies(torch.float64)), list(copies()), list(copies())
    double = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in reference_options.items()
    }
    exact_out = reference(*exact_inputs, **double)
    exact_out = exact_out if isinstance(exact_out, tuple) else (exact_out,)
    if grad_outputs is None:
        generator = torch.Generator("cpu").manual_seed(seed)
        draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64, device="cpu")
        grad_outputs = [draw(o.shape) for o in exact_out]
        dtype = next(t.dtype for t in inputs if isinstance(t, torch.Tensor) and t.is_floating_point())
        grad_outputs = [g.to(dtype).to(o.device) for g, o in zip(grad_outputs, exact_out, strict=True)]
    exact = run(lambda *a: exact_out, exact_inputs, grad_outputs, {})
    base = run(baseline or reference, base_inputs, grad_outputs, reference_options)
    got = run(ours, our_inputs, grad_outputs, options)
    names = [f"output {i}" for i in range(len(got[0]))] + [f"gradient {i}" for i in range(len(got[1]))]
    rows = zip(names, [*got[0], *got[1]], [*base[0], *base[1]], [*exact[0], *exact[1]], strict=False)
    # a missing gradient stands for zero; an input nobody's gradient reaches is not compared
    rows = [
        (name, *(torch.zeros_like(exact) if t is None else t for t in pair), exact)
        for name, *pair, exact in rows
        if exact is not None
    ]
    return [sentence for row in rows if (sentence := compare(*row))]
