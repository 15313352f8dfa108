"""Compiling for a GPU that is not there: XLA's GPU compiler needs a description of the card, and neither driver nor card.

Needs jax's plugin for CUDA: pip install -e ".[cuda]".
"""

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from models.bounds.roofline import CHIPS


@dataclass(frozen=True)
class Gpu:
    """What the compiler must know of a card beyond `roofline.Chip`."""

    chip: str
    capability: tuple[int, int]  # of CUDA
    cores: int  # multiprocessors
    lanes: int  # float32 units of a multiprocessor
    shared_memory: int  # KiB of a multiprocessor; a block may have 1 KiB less
    threads: int  # of a multiprocessor
    l2: int  # MiB
    clock: float  # GHz


# NVIDIA's architecture whitepapers and the CUDA programming guide's table of compute capabilities.
GPUS = {
    "t4": Gpu("T4", (7, 5), 40, 64, 65, 1024, 4, 1.59),
    "l4": Gpu("L4", (8, 9), 58, 128, 100, 1536, 48, 2.04),
    "rtx4090": Gpu("RTX 4090", (8, 9), 128, 128, 100, 1536, 72, 2.52),
    "a100": Gpu("A100", (8, 0), 108, 64, 164, 2048, 40, 1.41),
    "h100": Gpu("H100", (9, 0), 132, 128, 228, 2048, 50, 1.98),
}


def described_gpus(name: str, count: int) -> list[Any]:
    """`count` devices to compile for, of a kind in GPUS.

    Raises RuntimeError where jax has no plugin for CUDA. Autotuning measures on the card, so it is off here, and all products
    are cuBLAS's: Triton's untuned ones do not compile at every size. A real card may choose others, with other memory.
    """
    gpu = GPUS[name]
    chip = CHIPS[gpu.chip]
    major, minor = gpu.capability
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise RuntimeError("jax has no plugin for CUDA")
    versions = 'runtime_version: "12.8.0" driver_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"'
    description = f"""
        gpu_device_info {{
            threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: {48 << 10}
            shared_memory_per_core: {gpu.shared_memory << 10} threads_per_core_limit: {gpu.threads} core_count: {gpu.cores}
            fpus_per_core: {gpu.lanes} block_dim_limit_x: {2**31 - 1} block_dim_limit_y: 65535 block_dim_limit_z: 65535
            memory_bandwidth: {chip.bandwidth:.0f} l2_cache_size: {gpu.l2 << 20} clock_rate_ghz: {gpu.clock}
            device_memory_size: {chip.memory:.0f} shared_memory_per_block_optin: {gpu.shared_memory - 1 << 10}
            cuda_compute_capability {{ major: {major} minor: {minor} }} registers_per_core_limit: 65536
            registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64 {versions}
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "NVIDIA {chip.name}"
    """
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # it asks a driver
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    jax.config.update("jax_platforms", "cpu")
    return list(topologies.get_topology_desc("", "cuda", target_config=description, topology=f"1x1x{count}").devices)
