"""Each kernel against the least time that its bytes and operations take.

Times are medians of CUDA graphs that launch once for each layer, on data of different layers in
scattered pages. The ceilings are a copy and a matrix product measured in the same run.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks import kernel_attention, kernel_fused, kernel_lora, kernel_rows
from benchmarks.kernel_cases import Device, Measurement, open_device
from benchmarks.results_file import RESULTS, write_result

PARTS = {
    "attention": kernel_attention,
    "lora": kernel_lora,
    "fused": kernel_fused,
    "rows": kernel_rows,
}
GIB = 1 << 30


def main() -> None:
    arguments = _parser().parse_args()
    device = open_device(arguments.pool_gib * GIB)
    print(
        f"copy {device.bytes_per_s / 1e12:.2f} TB/s, product {device.flops_per_s / 1e12:.0f} TF/s"
    )
    metrics: dict[str, Any] = {
        "copy_bytes_per_s": device.bytes_per_s,
        "matmul_flops_per_s": device.flops_per_s,
    }
    for part in arguments.parts:
        times = PARTS[part].measure_all(device)
        metrics[part] = {time.name: _report(time, device) for time in times}
    write_result(
        "kernels",
        benchmark="kernels",
        device=torch.cuda.get_device_name(),
        config={"pool_gib": arguments.pool_gib, "dtype": "bfloat16", "parts": arguments.parts},
        metrics=metrics,
        directory=arguments.directory,
        commit=arguments.commit,
    )


def _report(measurement: Measurement, device: Device) -> dict[str, float]:
    floor_us = measurement.floor_us(device)
    share = floor_us / measurement.us
    print(f"{measurement.name:48} {measurement.us:9.1f} us {floor_us:9.1f} us {share:6.0%}")
    return {
        "us": round(measurement.us, 2),
        "floor_us": round(floor_us, 2),
        "share": round(share, 3),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--pool-gib", type=int, default=60, help="pages lie scattered in this")
    parser.add_argument("--directory", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="where the tree came without its history")
    return parser


if __name__ == "__main__":
    main()
