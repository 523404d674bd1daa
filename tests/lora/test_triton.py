"""Every Triton variant in the interpreter: numerics, edges, launches, repeatability."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peft_kernels.core import lora_tiles, rng, triton_runtime
from tests.lora.problems import check, fused, problem, results

pytestmark = [
    pytest.mark.skipif(
        not triton_runtime.interpreted() or triton_runtime.import_problem() is not None,
        reason="needs TRITON_INTERPRET=1 (a machine without a GPU) and Triton",
    ),
    pytest.mark.timeout(120),  # A wait on a flag that nobody sets would hang.
]

ALLOCATIONS = {"aten.empty", "aten.empty_like", "aten.new_empty"}
VIEWS = {"aten.t", "aten.view", "aten.transpose", "aten.detach"}


class Operations(TorchDispatchMode):
    """Records the name of every torch operation that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(str(function.overloadpacket))
        return function(*args, **(kwargs or {}))


SHAPES = [
    pytest.param(1, 1, 1, 1, id="one-of-everything"),
    pytest.param(1, 7, 5, 1, id="one-token"),
    pytest.param(64, 96, 64, 16, id="aligned"),
    pytest.param(33, 50, 41, 3, id="ragged"),
    pytest.param(70, 104, 72, 5, id="ragged-in-rows-of-16-bytes"),
    pytest.param(70, 36, 100, 33, id="two-rank-blocks"),
    pytest.param(20, 40, 24, 70, id="rank-above-both-sizes"),
]


@pytest.fixture(params=lora_tiles.VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    with lora_tiles.forced_variant(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("tokens", "out_features", "in_features", "rank"), SHAPES)
def test_as_accurate_as_eager(
    variant: str,
    tokens: int,
    out_features: int,
    in_features: int,
    rank: int,
    dropout_p: float,
    dtype: torch.dtype,
) -> None:
    given = problem(tokens, out_features, in_features, rank, dtype=dtype, dropout_p=dropout_p)
    check(given, "triton", dtype)


def test_rank_512(variant: str) -> None:
    check(problem(5, 24, 20, 512), "triton", torch.float32)


def test_float32_adapters_beside_float16_get_float32_gradients(variant: str) -> None:
    given = problem(33, 20, 24, 4, dtype=torch.float16, adapter_dtype=torch.float32, dropout_p=0.2)
    inputs = given.inputs()
    found = results(fused(given, inputs, "triton"), inputs, given.dy)
    assert {found[name].dtype for name in ("da", "db", "dbias")} == {torch.float32}
    assert found["y"].dtype == found["dx"].dtype == torch.float16
    # Summed and returned in float32: more than float16 could hold.
    assert not torch.equal(found["da"], found["da"].half().float())


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_mask_equals_the_specification_bit_for_bit(variant: str, p: float) -> None:
    """A = identity and scale = 1 - p make s the dropped x itself."""
    size, tokens = 19, 35
    x = torch.randn(tokens, size).abs() + 1
    eye, zeros = torch.eye(size), torch.zeros(size, size)
    seed = torch.tensor([-(2**61) + 12345])
    given = problem(tokens, size, size, size, dropout_p=p, bias=False)
    given = replace(given, x=x, weight=zeros, lora_a=eye, lora_b=eye, scale=1.0 - p, seed=seed)
    kept = fused(given, given.inputs(), "triton") != 0
    assert torch.equal(kept, rng.dropout_mask(seed, tokens, size, p))
    # Backward: dx = mask * dy with the same constants.
    inputs = given.inputs()
    dy = torch.randn(tokens, size).abs() + 1
    (dx,) = torch.autograd.grad(fused(given, inputs, "triton"), [inputs[0]], dy)
    assert torch.equal(dx != 0, rng.dropout_mask(seed, tokens, size, p))


def test_every_output_element_is_written(variant: str, poisoned_allocations: None) -> None:
    check(problem(33, 50, 41, 3, dropout_p=0.3), "triton", torch.float32)


def test_nothing_outside_an_output_is_written(variant: str) -> None:
    """The launchers get views in the middle of a guarded buffer."""
    from peft_kernels.lora import launch

    given = problem(33, 50, 41, 3, dropout_p=0.3)
    x, weight, lora_a, lora_b, bias = (t.detach() for t in given.inputs())
    rest = (given.seed, given.scale, given.dropout_p)

    def guarded(*size: int) -> tuple[torch.Tensor, torch.Tensor]:
        count = torch.Size(size).numel()
        buffer = torch.full((count + 512,), 77.0)
        return buffer, buffer[256 : 256 + count].view(size)

    y, s = guarded(33, 50), guarded(33, 3)
    launch.lora_forward(x, weight, lora_a, lora_b, bias, *rest, y[1], s[1])
    outputs = [guarded(33, 41), guarded(3, 41), guarded(50, 3), guarded(50)]
    launch.lora_backward(
        given.dy, x, s[1], weight, lora_a, lora_b, *rest, *(view for _, view in outputs), None
    )
    for buffer, _ in (y, s, *outputs):
        assert (buffer[:256] == 77.0).all() and (buffer[-256:] == 77.0).all()


def test_runs_repeat_bit_for_bit(variant: str) -> None:
    given = problem(130, 40, 36, 5, dropout_p=0.2)
    first, second = (
        results(fused(given, inputs, "triton"), inputs, given.dy)
        for inputs in (given.inputs(), given.inputs())
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_x_is_not_needed_where_neither_a_nor_the_weight_is_trained(variant: str) -> None:
    given = problem((3, 11), 50, 48, 3, dtype=torch.float16, dropout_p=0.3)
    found = []
    for frozen in (False, True):
        inputs = given.inputs()
        for tensor in inputs[1:3]:
            tensor.requires_grad_(not frozen)
        y = fused(given, inputs, "triton")
        found.append(torch.autograd.grad(y, [inputs[0], *inputs[3:]], given.dy))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["ticket", "ticket_tma", "recompute"])
def test_one_launch_forward_and_two_backward(
    kind: str, dropout_p: float, launches: list[str]
) -> None:
    given = problem(40, 24, 20, 4, dropout_p=dropout_p)
    # The base weight is frozen, as in fine-tuning.
    inputs = given.inputs()
    inputs[1].requires_grad_(False)
    with lora_tiles.forced_variant(kind):
        with Operations() as forward:
            y = fused(given, inputs, "triton")
        assert len(launches) == 1
        launches.clear()
        with Operations() as backward:
            y.backward(given.dy)
    assert len(launches) == 2
    assert launches[1] == "_token_reduction_kernel"
    # A library GEMM or an element-wise pass would be a launch as well.
    assert forward.names | backward.names <= ALLOCATIONS | {"aten.zeros", *VIEWS}


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_tma_takes_what_descriptors_may_name(dropout_p: float, launches: list[str]) -> None:
    """Rows of 16 bytes, one stride of 1; the weight row-major in either direction."""
    with lora_tiles.forced_variant("ticket_tma"):
        for given, expected in (
            (problem(33, 40, 24, 4, dropout_p=dropout_p), "_lora_ticket_tma_kernel"),
            # Ranks that are multiples of 8 and of 16 take a path of their own each.
            (problem(33, 40, 24, 24, dropout_p=dropout_p), "_lora_ticket_tma_kernel"),
            (problem(33, 40, 24, 16, dropout_p=dropout_p), "_lora_ticket_tma_kernel"),
            (problem(33, 42, 26, 4, dropout_p=dropout_p), "_lora_ticket_kernel"),
        ):
            for weight in (given.weight, given.weight.t().contiguous().t()):
                launches.clear()
                run = replace(given, weight=weight)
                check(run, "triton", torch.float32)
                assert launches == [expected, expected, "_token_reduction_kernel"]


def test_tma_and_pointers_give_the_same_result() -> None:
    """Without a bias, which the two add in different places."""
    found = []
    for kind in ("ticket", "ticket_tma"):
        given = problem(70, 40, 72, 20, dropout_p=0.3, bias=False)
        with lora_tiles.forced_variant(kind):
            inputs = given.inputs()
            found.append(results(fused(given, inputs, "triton"), inputs, given.dy))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["ticket", "ticket_tma"])
def test_counters_are_zero_again_after_every_launch(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One buffer over many launches, as on a GPU stream: a stale flag or ticket would show."""
    cases = [problem(130, 52, 44, 40, dropout_p=0.3, seed=seed) for seed in range(3)]

    def run_all() -> list[dict[str, torch.Tensor]]:
        every = [(given, given.inputs()) for given in cases]
        with lora_tiles.forced_variant(kind):
            return [
                results(fused(given, inputs, "triton"), inputs, given.dy) for given, inputs in every
            ]

    expected = run_all()
    buffer = torch.zeros(4096, dtype=torch.int32)
    monkeypatch.setattr(triton_runtime, "counters", lambda device, size: buffer)
    found = run_all()
    assert buffer.count_nonzero() == 0
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["ticket", "ticket_tma"])
@pytest.mark.parametrize("programs", [1, 2, 7, 64])
def test_any_number_of_programs_gives_the_same_result(
    programs: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_kernels.lora import launch

    given = problem(70, 52, 44, 3)
    with lora_tiles.forced_variant(kind):
        inputs = given.inputs()
        expected = results(fused(given, inputs, "triton"), inputs, given.dy)
        monkeypatch.setattr(launch, "_resident_programs", lambda device: programs)
        inputs = given.inputs()
        found = results(fused(given, inputs, "triton"), inputs, given.dy)
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("layout", ["row slices", "expanded rows", "column-major weight"])
def test_strides_change_no_bit(variant: str, layout: str) -> None:
    given = problem(40, 30, 24, 4, dropout_p=0.1)
    x, weight, dy = given.x, given.weight, given.dy
    if layout == "row slices":
        x = torch.cat([torch.zeros_like(x), x, torch.zeros_like(x)], 1)[:, 24:48]
        dy = torch.cat([dy, torch.zeros_like(dy)], 1)[:, :30]
        assert x.stride() == (72, 1) and dy.stride() == (60, 1)
    elif layout == "expanded rows":
        x, dy = x[:1].expand(40, 24), dy[:1].expand(40, 30)
    else:
        weight = weight.t().contiguous().t()
    strided = replace(given, x=x, weight=weight, dy=dy)
    packed = replace(given, x=x.contiguous(), weight=weight.contiguous(), dy=dy.contiguous())
    found, expected = (
        results(fused(each, inputs, "triton"), inputs, each.dy)
        for each in (strided, packed)
        for inputs in [each.inputs()]
    )
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_scale_as_a_tensor_gives_what_a_float_gives(variant: str) -> None:
    from peft_kernels.lora import launch

    given = problem(20, 24, 20, 4)
    x, weight, lora_a, lora_b, bias = (t.detach() for t in given.inputs())
    found = []
    for scale in (given.scale, torch.tensor(given.scale)):
        y, s = torch.empty(20, 24), torch.empty(20, 4)
        launch.lora_forward(x, weight, lora_a, lora_b, bias, None, scale, 0.0, y, s)
        found.append((y, s))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
