"""Compile kernels ahead for sm_90, then launch them; print what each did, as JSON.

Run as a module without TRITON_INTERPRET, whose kernels cannot be compiled.
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from triton import knobs

from lorry.kernels.compilation import compile_ahead
from lorry.kernels.launch_settings import lora_setting
from tests.support.shipped_settings import adapt, rows_of_8b
from tests.support.sm90 import compiling


def launch() -> None:
    rows_of_8b()
    for group in range(2):
        adapt(torch.bfloat16, lora_setting(torch.bfloat16, 16), 16, group)


def compiled_during(run: Callable[[], object]) -> list[str]:
    """Names of the kernels that `run` compiles."""
    names: list[str] = []

    def note(*, fn, **_) -> None:
        names.append(fn.name)

    with knobs.runtime.scope():
        knobs.runtime.jit_post_compile_hook = note
        run()
    return names


def launch_ahead() -> None:
    with ThreadPoolExecutor() as threads:
        for compiled in compile_ahead(launch, threads):
            compiled.result()


def main() -> None:
    with compiling() as kernels:
        ahead = compiled_during(launch_ahead)
        launched_ahead = len(kernels)
        later = compiled_during(launch)
    print(
        json.dumps(
            {
                "ahead": ahead,
                "launched_ahead": launched_ahead,
                "launched": sorted({kernel.name for kernel in kernels}),
                "later": later,
            }
        )
    )


if __name__ == "__main__":
    main()
