"""cuDNN's layer and RMS norm, which torch does not reach, as functions with gradients: a peer, by the package nvidia-cudnn-frontend.

A graph of one node is built for each pass, shape and dtype, and kept. Rows are images of N channels and one pixel, as cuDNN's norms
want them. Statistics are fp32.
"""

import functools

import torch

KINDS = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF", torch.float32: "FLOAT"}


def layer_norm(x, weight, bias, eps=1e-5):
    return Norm.apply(x, weight, bias, eps)


def rms_norm(x, weight, eps=1e-6):
    return Norm.apply(x, weight, None, eps)


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        y = torch.empty_like(x)
        statistics = torch.empty(1 if bias is None else 2, x.shape[0], device=x.device)
        run = forward_graph(*x.shape, x.dtype, eps, bias is None, x.device)
        run(x, weight, *([] if bias is None else [bias]), y, *statistics)
        ctx.save_for_backward(x, weight, statistics)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, statistics = ctx.saved_tensors
        rms = len(statistics) == 1
        outputs = [torch.empty_like(t) for t in ((x, weight) if rms else (x, weight, weight))]
        backward_graph(*x.shape, x.dtype, rms, x.device)(dy, x, weight, *statistics, *outputs)
        return *outputs, *([None] if rms else []), None


@functools.cache
def forward_graph(M, N, dtype, eps, rms, device):
    import cudnn

    graph, tensor = new_graph(M, N, device)
    inputs = [tensor("x", dtype, M, N), *(tensor(name, dtype, 1, N) for name in ("scale", "bias")[: 2 - rms])]
    epsilon = torch.full((1, 1, 1, 1), eps)
    held = graph.tensor(
        name="epsilon", dim=(1, 1, 1, 1), stride=(1, 1, 1, 1), is_pass_by_value=True, data_type=cudnn.data_type.FLOAT
    )  # fmt: skip
    options = dict(zip(("input", "scale", "bias"), inputs, strict=False), epsilon=held)
    options["norm_forward_phase"] = cudnn.norm_forward_phase.TRAINING
    y, *statistics = (graph.rmsnorm if rms else graph.layernorm)(**options)
    # cuDNN gives mean, then rstd.
    return built(
        graph, inputs, [(y, dtype), *((t, torch.float32) for t in statistics)], device, {held: epsilon}
    )


@functools.cache
def backward_graph(M, N, dtype, rms, device):
    graph, tensor = new_graph(M, N, device)
    names = ("inv_variance",) if rms else ("mean", "inv_variance")
    inputs = {
        "grad": tensor("dy", dtype, M, N),
        "input": tensor("x", dtype, M, N),
        "scale": tensor("scale", dtype, 1, N),
    }
    inputs |= {name: tensor(name, torch.float32, M, 1) for name in names}
    if rms:
        outputs = graph.rmsnorm_backward(**inputs, has_dbias=False)[:2]
    else:
        outputs = graph.layernorm_backward(**inputs)
    return built(graph, list(inputs.values()), [(t, dtype) for t in outputs], device, {})


def new_graph(M, N, device):
    """(graph, a function that makes one of its input tensors of so many rows and columns)."""
    import cudnn

    fp32 = cudnn.data_type.FLOAT
    graph = cudnn.pygraph(intermediate_data_type=fp32, compute_data_type=fp32, handle=handle(device))

    def tensor(name, dtype, rows, columns):
        kind = getattr(cudnn.data_type, KINDS[dtype])
        return graph.tensor(
            name=name, dim=(rows, columns, 1, 1), stride=(columns, 1, columns, columns), data_type=kind
        )

    return graph, tensor


def built(graph, inputs, outputs, device, constants):
    """A function of torch tensors, inputs then outputs, that runs the graph on the current stream."""
    import cudnn

    for t, dtype in outputs:
        t.set_output(True).set_data_type(getattr(cudnn.data_type, KINDS[dtype]))
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(graph.get_workspace_size(), device=device, dtype=torch.uint8)
    places = [*inputs, *(t for t, _ in outputs)]

    def run(*tensors):
        cudnn.set_stream(handle=handle(device), stream=torch.cuda.current_stream(device).cuda_stream)
        pack = dict(zip(places, (t.detach() for t in tensors), strict=True)) | constants
        graph.execute(pack, workspace, handle=handle(device))

    return run


@functools.cache
def handle(device):
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()
