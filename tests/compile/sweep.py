"""Cross-compile every kernel and tile of one method for one GPU family.

``python -m tests.compile.sweep sm_90 bf16 --only reduction``

Prints a JSON line per kernel. A process of its own, because Triton's interpreter mode, which the
other tests of kernels run in, is settled when Triton is imported.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from peft_kernels.adapter import activations
from peft_kernels.core import adapter_tiles, lora_tiles, prefix_tiles, projections_tiles, tiles
from tests.compile import (
    adapter_sources,
    lora_sources,
    prefix_sources,
    projections_sources,
    reduction_sources,
)
from tests.compile.cross import Report, compile_for

METHODS = (
    "lora", "projections", "adapter", "adapter-complete", "prefix", "prefix-complete",
)  # fmt: skip
# Direction and dropout (0 none, 1 on x, 2 on the result) of the launches of each shape class.
_LAUNCHES = {
    "decode": (("forward", 0), ("forward", 1), ("backward", 0)),
    "small": (("forward", 0), ("forward", 1), ("backward", 0), ("backward", 2)),
    "large": (("forward", 0), ("forward", 1)),
    "dropped": (("forward", 1),),
    "backward": (("backward", 0),),
    "masked": (("backward", 2),),
    "unaligned": (("forward", 0), ("forward", 1), ("backward", 0), ("backward", 2)),
}
# Dropout, splits, scale (1 a number, 2 learned, 3 by channel) and groups of adapter gradients.
_ADAPTER_REDUCTIONS = (
    (False, 8, 1, False),
    (True, 8, 3, False),
    (True, 1, 2, False),
    (True, 1, 1, True),
)
# What adds to the registers of an adapter's launch.
_ADAPTERS: tuple[dict[str, Any], ...] = (
    {},
    {"dropout": True, "scale": 3, "activation": "mish"},
    {"dropout": True, "groups": 8, "activation": "gelu_tanh"},
)
_RAGGED_ADAPTERS: tuple[dict[str, Any], ...] = (
    {"dropout": True, "scale": 2, "ragged": True},
    {"activation": "mish", "ragged": True},
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel with everything that is settled before it is compiled."""

    name: str
    kernel: str
    source: tuple[dict[str, str], dict[str, Any], frozenset[str]]
    num_warps: int
    num_stages: int
    pipelined: bool = True
    products: bool = True
    registers: int = 0
    measured: bool = False  # the tile was the fastest on a GPU
    overlapping: bool = True  # its products must not wait for each other


def _products(family: str, dtype: str) -> Iterator[Case]:
    for each, kind, shape_class, tile in lora_tiles.lora_cases():
        if (each, kind) != (family, dtype):
            continue
        kernel = f"_lora_{tile.variant}_kernel"
        rank = 64 if shape_class.endswith("+") else 16
        for direction, dropout in _LAUNCHES[shape_class.removesuffix("+")]:
            name = f"{shape_class} {direction} dropout{dropout} r{rank} {tile}"
            ragged = shape_class.startswith("unaligned")
            # Under torch.compile the scale is a tensor.
            if tile.variant == "ticket_tma":
                source = lora_sources.tma_product(dtype, tile, rank, direction, dropout)
            else:
                source = lora_sources.product(
                    dtype, tile, rank, direction, dropout, ragged=ragged, scale_is_pointer=ragged
                )
            yield Case(name, kernel, source, tile.num_warps, tile.num_stages, not ragged)
            if tile.variant == "ticket_tma" and rank == 16:
                source = lora_sources.tma_product(dtype, tile, 8, direction, dropout)
                name = name.replace("r16", "r8")
                yield Case(name, kernel, source, tile.num_warps, tile.num_stages)
            if tile.block_k > 64:
                # Alignment promises no more than a multiple of 64.
                source = lora_sources.product(dtype, tile, rank, direction, dropout, even_k=False)
                name += " masked in K"
                yield Case(name, kernel, source, tile.num_warps, tile.num_stages)


def _projections(family: str, dtype: str) -> Iterator[Case]:
    for shape_class, direction, rank, tile in projections_tiles.projections_cases(family, dtype):
        ragged = shape_class.startswith("unaligned")
        source = projections_sources.source(dtype, tile, rank, direction, ragged=ragged)
        name = f"{shape_class} {direction} r{rank} {tile}"
        kernel = projections_sources.KERNELS[direction]
        yield Case(name, kernel, source, tile.num_warps, tile.num_stages, not ragged)


def _low_ranks(dtype: str) -> Iterator[Case]:
    tile = lora_tiles.LOW_RANK_TILE_32BIT if dtype == "fp32" else lora_tiles.LOW_RANK_TILE
    for rank in (16, 64):
        for dropout in (0, 1):
            source = lora_sources.low_rank(dtype, tile, rank, dropout)
            name = f"low_rank dropout{dropout} r{rank}"
            yield Case(name, "_low_rank_kernel", source, tile.num_warps, tile.num_stages)
        # Under torch.compile the scale is a tensor.
        source = lora_sources.low_rank(dtype, tile, rank, 0, scale_is_pointer=True)
        name = f"low_rank scale in a tensor r{rank}"
        yield Case(name, "_low_rank_kernel", source, tile.num_warps, tile.num_stages)
        source = lora_sources.masked_update(dtype, tile, rank)
        name = f"masked_update r{rank}"
        # No loop to pipeline at this rank: y is read and written once.
        yield Case(name, "_masked_update_kernel", source, tile.num_warps, tile.num_stages, False)
        if dtype == "fp32":
            # PyTorch's default precision, in which products are exact and off the tensor cores.
            exact = lora_tiles.LOW_RANK_TILE_EXACT
            source = lora_sources.low_rank(dtype, exact, rank, 1, precision="ieee")
            yield Case(
                f"low_rank exact r{rank}", "_low_rank_kernel", source, exact.num_warps,
                exact.num_stages, products=False,
            )  # fmt: skip
            source = lora_sources.masked_update(dtype, exact, rank, "ieee")
            yield Case(
                f"masked_update exact r{rank}", "_masked_update_kernel", source, exact.num_warps,
                exact.num_stages, False, products=False,
            )  # fmt: skip


def _reductions(family: str, dtype: str) -> Iterator[Case]:
    wide = dtype == "fp32"
    table = tiles.REDUCTION_TILES_32BIT if wide else tiles.family_reduction_tiles(family)
    for tile in dict.fromkeys(table.values()):
        for dropout in (False, True):
            for splits in (1, 8):
                source = reduction_sources.lora(dtype, tile, dropout, splits)
                name = f"reduction dropout{int(dropout)} r{tile.block_r} splits{splits}"
                yield Case(name, "_token_reduction_kernel", source, tile.num_warps, tile.num_stages)
        source = reduction_sources.lora(dtype, tile, True, 8, unaligned=True)
        name = f"reduction unaligned r{tile.block_r}"
        yield Case(name, "_token_reduction_kernel", source, tile.num_warps, tile.num_stages, False)
        if tile.block_r == 16:
            # Triton takes a size of 1 for a constant.
            types, constants, divisible = source
            source = types, constants | {"C0": 1, "C1": 1}, divisible
            name = "reduction one column"
            yield Case(
                name, "_token_reduction_kernel", source, tile.num_warps, tile.num_stages, False
            )
    for tile in dict.fromkeys(tiles.REDUCTION_TILES_EXACT.values()) if dtype == "fp32" else ():
        for splits in (1, 8):
            source = reduction_sources.lora(dtype, tile, True, splits, "ieee")
            name = f"reduction exact r{tile.block_r} splits{splits}"
            yield Case(
                name, "_token_reduction_kernel", source, tile.num_warps, tile.num_stages,
                products=False,
            )  # fmt: skip


def _adapter_reductions(family: str, dtype: str) -> Iterator[Case]:
    table = adapter_tiles.reduction_tiles(family, "fp32" if dtype == "fp32" else "16bit")
    for tile in dict.fromkeys(table.values()):
        for dropout, splits, scale, grouped in _ADAPTER_REDUCTIONS:
            source = reduction_sources.adapter(dtype, tile, dropout, splits, scale, grouped)
            name = f"adapter reduction dropout{int(dropout)} r{tile.block_r} splits{splits} "
            name += f"scale{scale}" + " grouped" * grouped
            # A group may have no rows.
            yield Case(
                name, "_token_reduction_kernel", source, tile.num_warps, tile.num_stages,
                overlapping=not grouped,
            )  # fmt: skip
    # Loads that no alignment promises anything about cannot be asynchronous copies.
    tile = adapter_tiles.unaligned_reduction_tile(family)
    for dropout, splits, scale, grouped in _ADAPTER_REDUCTIONS:
        source = reduction_sources.adapter(
            dtype, tile, dropout, splits, scale, grouped, unaligned=True
        )
        name = f"adapter reduction unaligned dropout{int(dropout)} splits{splits} scale{scale}"
        name += " grouped" * grouped
        yield Case(
            name, "_token_reduction_kernel", source, tile.num_warps, tile.num_stages, False,
            overlapping=not grouped,
        )  # fmt: skip


def _adapters(family: str, dtype: str, complete: bool) -> Iterator[Case]:
    """Yield every tile, ``complete`` in every form, else in one, another from family to family."""
    width = "fp32" if dtype == "fp32" else "16bit"
    turn = tiles.FAMILIES.index(family) + (dtype == "fp32")
    held = adapter_tiles.adapter_cases(family, width)
    for number, (shape_class, direction, block, tile) in enumerate(held):
        forms = list(_ADAPTERS if shape_class != "ragged" else _RAGGED_ADAPTERS)
        if not complete:
            forms = [forms[(number + turn) % len(forms)]]
        if (family, dtype, shape_class, block) == ("sm_90", "bf16", "many", 64):
            forms += [{"activation": activation} for activation in activations.NAMES]
        for options in forms:
            source = adapter_sources.adapter(dtype, tile, block, direction, **options)
            what = " ".join(f"{name}={value}" for name, value in options.items())
            name = f"adapter {shape_class} {direction} r{block} {tile} {what}".rstrip()
            kernel = f"_adapter_{direction}_kernel"
            # Rows that start anywhere cannot be copied asynchronously.
            pipelined = "ragged" not in options
            yield Case(name, kernel, source, tile.num_warps, tile.num_stages, pipelined)
    source = adapter_sources.keep_mask()
    yield Case("adapter keep mask", "_keep_mask_kernel", source, 4, 3, False, False)


def _prefixes(family: str, dtype: str, complete: bool) -> Iterator[Case]:
    for name, (launch, source), tile in prefix_sources.cases(family, dtype, complete=complete):
        kernel = prefix_sources.KERNELS[launch]
        is_plain = prefix_sources.is_plain(source)
        registers = tile.registers if is_plain else 0
        yield Case(
            name, kernel, source, tile.num_warps, tile.num_stages, registers=registers,
            measured=tile.tma, overlapping=not source[1]["DROPOUT"] or is_plain,
        )  # fmt: skip
    source = prefix_sources.gate_gradient(prefix_tiles.GATE_BLOCK)
    yield Case("prefix gate gradient", "_gate_gradient_kernel", source, 4, 3, False, False)


def cases(family: str, dtype: str, method: str) -> list[Case]:
    """Return the cases of a family, of "bf16", "fp16" or "fp32", and of one of ``METHODS``.

    These are all there are, but for "prefix" and "adapter", of which "-complete" has them.
    """
    if method.startswith("prefix"):
        return list(_prefixes(family, dtype, method == "prefix-complete"))
    if method == "projections":
        return list(_projections(family, dtype))
    if method.startswith("adapter"):
        complete = method == "adapter-complete"
        return [*_adapter_reductions(family, dtype), *_adapters(family, dtype, complete)]
    return [*_products(family, dtype), *_low_ranks(dtype), *_reductions(family, dtype)]


def compile_case(case: Case, family: str) -> Report:
    """Cross-compile one case."""
    from peft_kernels.adapter import kernels as adapter_kernels
    from peft_kernels.core import reduction_kernels
    from peft_kernels.lora import kernels as lora_kernels
    from peft_kernels.lora import projections_kernels, tma_kernels
    from peft_kernels.prefix import kernels as prefix_kernels
    from peft_kernels.prefix import key_gradient_kernels, query_gradient_kernels

    homes = (
        lora_kernels, tma_kernels, projections_kernels, adapter_kernels, reduction_kernels,
        prefix_kernels, query_gradient_kernels, key_gradient_kernels,
    )  # fmt: skip
    kernel = next(getattr(home, case.kernel) for home in homes if hasattr(home, case.kernel))
    types, constants, divisible = case.source
    types = {name: kind for name, kind in types.items() if name in kernel.arg_names}
    constants = constants | {"WGMMA": family == "sm_90"}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return compile_for(
        kernel, family, types, constants, divisible, case.num_warps, case.num_stages,
        case.registers,
    )  # fmt: skip


def main(argv: list[str]) -> int:
    """Compile and print; the tests read the lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=tiles.FAMILIES)
    parser.add_argument("dtypes", nargs="*", default=["bf16", "fp32"])
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--only", default="", help="part of a case's name")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    for dtype in options.dtypes:
        for case in cases(options.family, dtype, options.method):
            if options.only not in case.name:
                continue
            report = compile_case(case, options.family)
            line = {"case": f"{options.family} {dtype} {case.name}"}
            line["problems"] = report.problems(
                options.family, pipelined=case.pipelined, products=case.products,
                measured=case.measured, overlapping=case.overlapping,
            )  # fmt: skip
            print(json.dumps(line | dataclasses.asdict(report)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
