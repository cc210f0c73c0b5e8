"""What training the models shares: AdamW with its decay groups, and the share of a GPU's peak that a speed amounts to."""

import torch

# Dense bf16 tensor-core peaks in TFLOP/s with fp32 sums, by a part of the GPU's name, the more special first. From the
# makers' data sheets.
PEAK_TFLOPS = (
    ("B200", 2250.0),
    ("GH200", 989.5),
    ("H200", 989.5),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.5),
    ("H100", 989.5),
    ("A100", 312.0),
    ("A30", 165.0),
    ("A40", 149.7),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)


def configure_optimizer(model, lr, *, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8):
    """torch.optim.AdamW in which matrices and tables decay and biases and norms do not; fused where the device has it.

    Parameters that do not require grad are left out. The groups come in this order: decaying, not decaying.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cuda", "cpu") and p.is_floating_point() for p in parameters)
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)


def peak_flops(device):
    """FLOP/s that a device can do in bf16, None for one that is not in the table: no guess."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAK_TFLOPS if part in name), None)


def mfu(flops_per_token, tokens_per_second, device, devices=1):
    """Model FLOPs utilisation: the model's own operations, recomputed ones not counted, over what all devices could do.

    None for a device that is not in the table.
    """
    peak = peak_flops(device)
    return None if peak is None else flops_per_token * tokens_per_second / (peak * devices)
