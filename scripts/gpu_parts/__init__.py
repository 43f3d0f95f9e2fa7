"""The parts of `gpu_check` in the order of their worth: what each asks of the product, made of its own functions.

A part answers for one case with a row of numbers. Not here: how parts are asked, and what becomes of one that fails
(`gpu_check`).
"""

from __future__ import annotations

from gpu_parts.agreement import OBJECTIVES, parity, reference, zero
from gpu_parts.device import machine, nccl, transfer
from gpu_parts.questions import Part
from gpu_parts.runs import loop, resume
from gpu_parts.speeds import COMPILED, MODELS, compiled, photometric, profile, speed

__all__ = ["PARTS"]

PARTS = {
    "machine": Part(machine, ("here",), 60),
    "reference": Part(reference, tuple(OBJECTIVES), 90, on_cpu=True),
    "parity": Part(parity, tuple(OBJECTIVES), 90),
    "loop": Part(loop, ("mae", "dino"), 120),
    "resume": Part(resume, ("mae",), 120),
    "speed": Part(speed, tuple(MODELS), 120),
    "compiled": Part(compiled, COMPILED, 120, needs_cuda=True),
    "zero": Part(zero, ("1", "2", "3"), 45),
    "nccl": Part(nccl, ("fp32", "bf16"), 30, needs_cuda=True),
    "transfer": Part(transfer, ("pinned", "pageable"), 30, needs_cuda=True),
    "photometric": Part(photometric, ("dino",), 30),
    "profile": Part(profile, ("slowest",), 45),
}
