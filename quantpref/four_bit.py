"""bitsandbytes' 4-bit arithmetic on this device, against float64."""

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit

from quantpref.models import compute_dtype, device


def four_bit_error() -> tuple[float, float]:
    """Worst error of bitsandbytes' nf4 round trip on this device, and what double quantisation allows.

    Against the definition in float64 (QLoRA, arXiv 2305.14314, section 3): blocks of 64 weights divided by
    their largest, each replaced by the nearest of 16 values. In units of the block's largest weight; the
    8-bit storage of those scales costs up to about 2 %.
    """
    weights = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    packed, state = quantize_4bit(weights.to(device()), quant_type="nf4", compress_statistics=True)
    found = dequantize_4bit(packed, state).cpu().double().reshape(-1, 64)
    blocks = weights.double().reshape(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    values = get_4bit_type("nf4", device="cpu").double()
    nearest = values[(blocks / scale).unsqueeze(-1).sub(values).abs().argmin(-1)]
    return float(((found - nearest * scale) / scale).abs().max()), 0.02


def four_bit_product_error() -> tuple[float, float]:
    """Worst error of the 4-bit matrix product that training runs, and what the compute dtype allows.

    Against the de-quantised weights' product in float64, in units of its largest value; 8 rows as in a batch, where
    bitsandbytes de-quantises and multiplies, and 1 row, for which it has a kernel of its own.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(256, 256, generator=generator).to(device(), compute_dtype())
    packed, state = quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
    exact = dequantize_4bit(packed, state).double()
    worst = 0.0
    for rows in (8, 1):
        inputs = torch.randn(rows, 256, generator=generator).to(device(), compute_dtype())
        expected = inputs.double() @ exact.T
        found = matmul_4bit(inputs, packed.t(), quant_state=state).double()
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return worst, 1e-5 if compute_dtype() == torch.float32 else 1e-2
