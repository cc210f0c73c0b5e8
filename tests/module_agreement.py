"""The comparison rule for modules: ours against torch's of the same parameters, outputs and every gradient."""

import torch

from fastattn import check


def disagreements(ours, stock, args, kwargs=None, **options):
    """Sentences on ours(*args, **kwargs) and its gradients with respect to the parameters and the floating args.

    `stock` in float64 is the specification and in its own dtype the baseline. An argument passed twice (query is key) stays
    one tensor, because modules look at that.
    """
    kwargs = kwargs or {}
    names = [name for name, _ in stock.named_parameters()]
    distinct = list({id(t): t for t in args}.values())
    places = [next(i for i, t in enumerate(distinct) if t is arg) for arg in args]

    def run(module):
        def function(*tensors):
            parameters = dict(zip(names, tensors[len(distinct) :], strict=True))
            dtype = tensors[0].dtype
            given = {
                k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
                for k, v in kwargs.items()
            }
            outputs = torch.func.functional_call(module, parameters, tuple(tensors[i] for i in places), given)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            return tuple(o for o in outputs if o is not None)

        return function

    inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in (*distinct, *stock.parameters())]
    return check.check(run(ours), run(stock), inputs, **options)
