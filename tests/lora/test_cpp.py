"""The C++ CPU backend: numerics in float32 and bfloat16, edges, layouts, repeatability, its ops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from peft_kernels import explain, lora_linear
from peft_kernels.core import extension, rng
from tests.lora.problems import check, fused, problem, results

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])

# Above and below the sizes up to which C++ makes the base product too.
SHAPES = [
    pytest.param(1, 1, 1, 1, id="one-of-everything"),
    pytest.param(1, 7, 5, 1, id="one-token"),
    pytest.param(2, 64, 64, 8, id="small-product"),
    pytest.param(60, 5, 9, 3, id="small-many-tokens"),
    pytest.param(1, 70, 150, 20, id="small-wide"),
    pytest.param(5, 4, 6, 512, id="small-rank-512"),
    pytest.param(64, 96, 128, 16, id="aligned"),
    pytest.param(33, 50, 41, 3, id="ragged"),
    pytest.param(97, 131, 150, 17, id="ragged-gemm"),
    pytest.param(130, 260, 300, 33, id="several-blocks"),
    pytest.param(600, 40, 36, 5, id="several-chunks"),
    pytest.param(20, 40, 24, 70, id="rank-above-both-sizes"),
    pytest.param(40, 70, 60, 512, id="rank-512"),
]


@pytest.fixture(autouse=True)
def built() -> None:
    """Fail, not skip, without the extension: ``make test`` builds it."""
    assert extension.why_not() is None


@DTYPES
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("tokens", "out_features", "in_features", "rank"), SHAPES)
def test_as_accurate_as_eager(
    tokens: int,
    out_features: int,
    in_features: int,
    rank: int,
    dropout_p: float,
    dtype: torch.dtype,
) -> None:
    given = problem(tokens, out_features, in_features, rank, dtype=dtype, dropout_p=dropout_p)
    check(given, "cpp", dtype)


@pytest.fixture
def portable() -> Iterator[None]:
    """Turn off what is written for one CPU family, as on a CPU that lacks it."""
    assert not extension.load().use_native(False)
    yield
    extension.load().use_native(True)


@DTYPES
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("tokens", "out_features", "in_features", "rank"), SHAPES)
def test_portable_path_as_accurate_as_eager(
    tokens: int,
    out_features: int,
    in_features: int,
    rank: int,
    dropout_p: float,
    dtype: torch.dtype,
    portable: None,
) -> None:
    given = problem(tokens, out_features, in_features, rank, dtype=dtype, dropout_p=dropout_p)
    check(given, "cpp", dtype)


def test_both_paths_draw_the_same_mask(portable: None) -> None:
    given = problem(150, 90, 77, 4, dropout_p=0.3)
    found = []
    for native in (False, True):
        extension.load().use_native(native)
        inputs = given.inputs()
        found.append(results(fused(given, inputs, "cpp"), inputs, given.dy))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.skipif(
    "avx512_bf16" not in (extension.build_info() or {}).get("cpu", ""),
    reason="this CPU has no AVX512-BF16",
)
def test_the_two_bfloat16_paths_are_two(portable: None) -> None:
    given = problem(150, 90, 77, 4, dtype=torch.bfloat16, scale=0.7)
    assert extension.load().build_info()["cpu"] == "avx512"
    before = fused(given, given.inputs(), "cpp")
    assert extension.load().use_native(True)
    assert extension.load().build_info()["cpu"] == "avx512_bf16"
    after = fused(given, given.inputs(), "cpp")
    torch.testing.assert_close(before, after)


def test_it_is_what_runs_by_default() -> None:
    given = problem(4, 8, 8, 2)
    assert explain(lora_linear, given.x, given.weight, given.lora_a, given.lora_b).backend == "cpp"


def test_float32_adapters_beside_bfloat16_get_float32_gradients() -> None:
    given = problem(
        200, 90, 70, 4, dtype=torch.bfloat16, adapter_dtype=torch.float32, dropout_p=0.2
    )
    inputs = given.inputs()
    found = results(fused(given, inputs, "cpp"), inputs, given.dy)
    assert {found[name].dtype for name in ("da", "db", "dbias")} == {torch.float32}
    assert found["y"].dtype == found["dx"].dtype == torch.bfloat16
    assert not torch.equal(found["da"], found["da"].bfloat16().float())


@pytest.mark.parametrize(("tokens", "size"), [(75, 3), (75, 19), (75, 150), (60, 3), (7, 19)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_mask_equals_the_specification_bit_for_bit(tokens: int, size: int, p: float) -> None:
    """A = identity and scale = 1 - p make s the dropped x itself."""
    x = torch.randn(tokens, size).abs() + 1
    eye, zeros = torch.eye(size), torch.zeros(size, size)
    seed = torch.tensor([-(2**61) + 12345])
    given = problem(tokens, size, size, size, dropout_p=p, bias=False)
    given = replace(given, x=x, weight=zeros, lora_a=eye, lora_b=eye, scale=1.0 - p, seed=seed)
    expected = rng.dropout_mask(seed, tokens, size, p)
    assert torch.equal(fused(given, given.inputs(), "cpp") != 0, expected)
    inputs = given.inputs()
    dy = torch.randn(tokens, size).abs() + 1
    (dx,) = torch.autograd.grad(fused(given, inputs, "cpp"), [inputs[0]], dy)
    assert torch.equal(dx != 0, expected)


@DTYPES
@pytest.mark.parametrize("tokens", [1, 33, 600])
def test_every_output_element_is_written(
    tokens: int, dtype: torch.dtype, poisoned_allocations: None
) -> None:
    check(problem(tokens, 150, 141, 3, dtype=dtype, dropout_p=0.3), "cpp", dtype)


@pytest.mark.parametrize("needed", ["x", "lora_a", "lora_b", "bias"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("tokens", [5, 70])
def test_one_gradient_alone_is_what_it_is_among_all(
    needed: str, dropout_p: float, tokens: int
) -> None:
    given = problem(tokens, 50, 41, 3, dropout_p=dropout_p)
    inputs = given.inputs()
    expected = results(fused(given, inputs, "cpp"), inputs, given.dy)
    index = ["x", "weight", "lora_a", "lora_b", "bias"].index(needed)
    alone = [t.detach().requires_grad_(i == index) for i, t in enumerate(inputs)]
    (gradient,) = torch.autograd.grad(fused(given, alone, "cpp"), [alone[index]], given.dy)
    assert torch.equal(gradient, list(expected.values())[index + 1])


@pytest.fixture
def thread_count() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@DTYPES
def test_low_rank_gradients_do_not_depend_on_the_number_of_threads(
    dtype: torch.dtype, thread_count: None
) -> None:
    """dA, dB and dbias are sums over all tokens, made here; the rest is the GEMM library's."""
    given = problem(700, 120, 90, 20, dtype=dtype, dropout_p=0.1)
    found = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        inputs = given.inputs()
        found.append(results(fused(given, inputs, "cpp"), inputs, given.dy))
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in ("da", "db", "dbias"))
    # With the same number of threads, everything.
    assert all(torch.equal(found[1][name], found[3][name]) for name in found[1])


@DTYPES
@pytest.mark.parametrize("layout", ["row slices", "expanded rows", "column-major weight"])
def test_strides_change_no_value(layout: str, dtype: torch.dtype) -> None:
    given = problem(90, 70, 64, 4, dtype=dtype, dropout_p=0.1)
    x, weight, dy = given.x, given.weight, given.dy
    if layout == "row slices":
        x = torch.cat([torch.full_like(x, float("nan")), x], 1)[:, 64:]
        dy = torch.cat([dy, torch.full_like(dy, float("nan"))], 1)[:, :70]
        assert x.stride() == (128, 1) and dy.stride() == (140, 1)
    elif layout == "expanded rows":
        x, dy = x[:1].expand(90, 64), dy[:1].expand(90, 70)
    else:
        weight = weight.t().contiguous().t()
    found = check(replace(given, x=x, weight=weight, dy=dy), "cpp", dtype)
    inputs = replace(given, x=x.contiguous(), dy=dy.contiguous()).inputs()
    packed = results(fused(given, inputs, "cpp"), inputs, dy)
    assert all(torch.equal(found[name], packed[name]) for name in ("da", "db"))


def test_infinities_and_nans_reach_the_output() -> None:
    """A row with a NaN or an infinity spoils itself and no other."""
    for value in (float("nan"), float("inf")):
        given = problem(5, 80, 96, 4, dtype=torch.bfloat16)
        x = given.x.clone()
        x[2, 17] = value
        y = fused(replace(given, x=x), replace(given, x=x).inputs(), "cpp")
        assert not y[2].isfinite().any()
        assert y[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("native", [True, False], ids=["native", "portable"])
@pytest.mark.parametrize("rank", [1, 3, 4, 17])
@DTYPES
def test_an_infinity_stays_one(dtype: torch.dtype, rank: int, native: bool) -> None:
    """Zeros that pad the factors must not meet it: of that row they would make NaN."""
    extension.load().use_native(native)
    try:
        ones = [torch.ones(s, dtype=dtype) for s in ((40, 64), (64, 64), (rank, 64), (64, rank))]
        x, dy = ones[0].clone().requires_grad_(), torch.ones(40, 64, dtype=dtype)
        with torch.no_grad():
            x[3, 5] = dy[4, 6] = float("inf")
        y = lora_linear(x, *ones[1:], backend="cpp")
        (dx,) = torch.autograd.grad(y, x, dy)
    finally:
        extension.load().use_native(True)
    for found, row in ((y, 3), (dx, 4)):
        assert (found[row] == float("inf")).all()
        assert found.isfinite().sum() == found.numel() - 64


@DTYPES
def test_registered_ops_give_what_the_backend_gives(dtype: torch.dtype) -> None:
    """``torch.ops.peft_kernels.cpu_lora_*``, for callers without Python."""
    extension.load()
    given = problem(90, 50, 41, 3, dtype=dtype, dropout_p=0.3)
    x, weight, lora_a, lora_b, bias = (t.detach() for t in given.inputs())
    ops = torch.ops.peft_kernels
    factor = given.scale / (1 - given.dropout_p)
    threshold = rng.drop_threshold(given.dropout_p)
    y, s = torch.empty(90, 50, dtype=dtype), torch.empty(90, 3, dtype=dtype)
    ops.cpu_lora_forward(x, weight, lora_a, lora_b, bias, given.seed, factor, threshold, y, s)
    inputs = given.inputs()
    expected = results(fused(given, inputs, "cpp"), inputs, given.dy)
    assert torch.equal(y, expected["y"])
    dx, da = torch.empty_like(x), torch.empty_like(lora_a)
    db, dbias = torch.empty_like(lora_b), torch.empty_like(bias)
    ops.cpu_lora_backward(
        given.dy, x, s, weight, lora_a, lora_b, given.seed, factor, threshold, dx, da, db, dbias
    )
    assert torch.equal(dx, expected["dx"])
    assert torch.equal(da, expected["da"]) and torch.equal(db, expected["db"])
    assert torch.equal(dbias, expected["dbias"])


def test_registered_ops_of_no_rows_give_zero_gradients() -> None:
    extension.load()
    x, dy, s = torch.empty(0, 6), torch.empty(0, 4), torch.empty(0, 2)
    weight, lora_a, lora_b = torch.randn(4, 6), torch.randn(2, 6), torch.randn(4, 2)
    da, db, dbias = torch.full((2, 6), 7.0), torch.full((4, 2), 7.0), torch.full((4,), 7.0)
    torch.ops.peft_kernels.cpu_lora_backward(
        dy, x, s, weight, lora_a, lora_b, None, 1.0, 0, torch.empty(0, 6), da, db, dbias
    )
    assert not da.any() and not db.any() and not dbias.any()
