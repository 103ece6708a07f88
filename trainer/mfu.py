"""Model FLOPs utilization (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B): what training has to
compute, a second, as a share of what the devices could. What gradient checkpointing computes again does not count."""

from __future__ import annotations

import re

import torch

# Dense peaks by the vendor's datasheets, in TFLOP/s, sums in float32: words of the device's name -> precision -> peak.
# The first row whose words are all there counts.
PEAKS: list[tuple[str, dict[str, float]]] = [
    ("B200", {"bf16": 2250, "fp16": 2250, "tf32": 1100, "fp32": 75}),
    ("H200 NVL", {"bf16": 835, "fp16": 835, "tf32": 417, "fp32": 60}),
    ("H200", {"bf16": 989, "fp16": 989, "tf32": 494, "fp32": 67}),
    ("GH200", {"bf16": 989, "fp16": 989, "tf32": 494, "fp32": 67}),
    ("H100 NVL", {"bf16": 835, "fp16": 835, "tf32": 417, "fp32": 60}),
    ("H100 PCIe", {"bf16": 756, "fp16": 756, "tf32": 378, "fp32": 51}),
    ("H100", {"bf16": 989, "fp16": 989, "tf32": 494, "fp32": 67}),
    ("A100", {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5}),
    ("A40", {"bf16": 149.7, "fp16": 149.7, "tf32": 74.8, "fp32": 37.4}),
    ("A30", {"bf16": 165, "fp16": 165, "tf32": 82, "fp32": 10.3}),
    ("A10", {"bf16": 125, "fp16": 125, "tf32": 62.5, "fp32": 31.2}),
    ("A10G", {"bf16": 70, "fp16": 70, "tf32": 35, "fp32": 31.5}),
    ("L40S", {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6}),
    ("L40", {"bf16": 181, "fp16": 181, "tf32": 90.5, "fp32": 90.5}),
    ("L4", {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3}),
    ("T4", {"fp16": 65, "fp32": 8.1}),
    ("V100 SXM2", {"fp16": 125, "fp32": 15.7}),
    ("V100 SXM3", {"fp16": 125, "fp32": 15.7}),
    ("V100 PCIE", {"fp16": 112, "fp32": 14}),
    ("RTX 5090", {"bf16": 209.5, "fp16": 209.5, "tf32": 104.8, "fp32": 104.8}),
    ("RTX 4090", {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6}),
    ("RTX 3090", {"bf16": 71, "fp16": 71, "tf32": 35.6, "fp32": 35.6}),
]
OTHERS = {"MIG", "Laptop", "Ti", "D", "Max"}  # a part of a device, or another one of nearly the same name


def peaks(device_name: str, precisions: tuple[str, str]) -> tuple[float, float] | None:
    """FLOP/s of a device in each of the precisions; None where one of them is not known."""
    words = set(re.split(r"[ -]", device_name))
    row = next((row for name, row in PEAKS if words >= set(name.split())), None)
    if row is None or words & OTHERS:
        return None
    row = {"tf32": row.get("fp32", 0.0)} | row  # older devices have none
    convolutions, products = (row.get(precision, 0.0) * 1e12 for precision in precisions)
    return (convolutions, products) if convolutions and products else None


def precisions(mixed_precision: str, dtype: str) -> tuple[str, str]:
    """Of convolutions, and of matrix products. torch computes those of float32 in tf32 where it is allowed to: by
    default convolutions alone."""
    if mixed_precision != "no":
        return mixed_precision, mixed_precision
    if dtype != "float32":
        return dtype, dtype
    allowed = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision  # type: ignore[attr-defined]
    convolutions, products = ("tf32" if name == "tf32" else "fp32" for name in allowed)
    return convolutions, products


def utilization(
    samples_per_second: float, forward_flops: tuple[float, float], peaks: tuple[float, float], processes: int = 1
) -> float:
    """forward_flops: of one sample, in convolutions and in all else; the backward pass takes twice as many.
    peaks: FLOP/s of one process's device, for each of the two."""
    ideal_seconds = 3 * sum(flops / peak for flops, peak in zip(forward_flops, peaks))
    return samples_per_second * ideal_seconds / processes
