"""One forward and backward of a module, for tests that hold ours beside torch's."""

import torch


def outputs_and_gradients(module, args, kwargs):
    """What `module` returns, None left out, and the gradients of its parameters and the floating args for a fixed dy.

    The module's dtype is the computation's. An argument passed twice stays one tensor: modules look at `query is key`.
    """
    dtype = next((p.dtype for p in module.parameters()), None)

    def cast(t):
        return t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t

    leaves = {id(t): cast(t).detach().clone().requires_grad_() for t in args}
    outputs = module(*(leaves[id(t)] for t in args), **{name: cast(t) for name, t in kwargs.items()})
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o is not None]
    generator = torch.Generator("cpu").manual_seed(0)
    dy = [torch.randn(o.shape, generator=generator, dtype=torch.float64, device="cpu").to(o) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [*leaves.values(), *module.parameters()], dy)]
