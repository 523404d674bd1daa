"""The CUDA library: what is refused before it is loaded, in words that say what to change.

The GPUs, and a torch with CUDA, are pretended; the library is a file with the text that a build
puts into it, where it is not one that the machine's own compiler made.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import peft_kernels
from peft_kernels import environment
from peft_kernels.adapter.dispatch import ADAPTER, ADAPTER_GROUPED, AdapterSpec
from peft_kernels.core import backend as backends
from peft_kernels.core import cuda_library, extension, triton_runtime
from peft_kernels.core.backend import BackendUnavailable
from peft_kernels.lora.dispatch import LORA_LINEAR, LoRASpec
from peft_kernels.prefix.dispatch import PREFIX_ATTENTION, PrefixSpec
from peft_kernels.prompt.dispatch import PROMPT_EMBEDDING, PromptSpec

GPU = torch.device("cuda", 0)
REINSTALL = "PEFT_KERNELS_BUILD=cuda pip install --no-build-isolation --force-reinstall --no-deps"
IN_TREE = "PEFT_KERNELS_BUILD=cuda python setup.py build_ext --inplace"
Build = Callable[..., Path]


def text(version: str = peft_kernels.__version__, archs: str = "80 90a", cuda: str = "13.0") -> str:
    return (
        f"<peft_kernels CUDA library|version={version}|torch=2.13.0|cuda={cuda}"
        f"|cuda_archs={archs}|compiler=g++ 12.2.0>"
    )


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Let the library be a file of this test, which is not there yet."""
    library = tmp_path / "_C_cuda.so"
    monkeypatch.setattr(cuda_library, "PATH", library)
    cuda_library.forget()
    yield library
    monkeypatch.undo()
    cuda_library.forget()


@pytest.fixture
def built(path: Path) -> Build:
    """Return a function that writes a file with a build's text between other bytes."""

    def write(**fields: str) -> Path:
        path.write_bytes(b"\x7fELF\0\0<|>" + text(**fields).encode() + b"\0<peft_kernels\0")
        cuda_library.forget()
        return path

    return write


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Return a function that makes torch one with CUDA, which sees a GPU of that capability."""

    def pretend(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (major, minor))
        cuda_library.forget()

    return pretend


def why_not(device: torch.device = GPU, dtype: torch.dtype = torch.float16) -> str:
    reason = cuda_library.why_not(device, dtype)
    assert reason is not None
    return reason


def test_not_built_says_how_to_build() -> None:
    assert "not built" in why_not() and "nvcc" in why_not()
    assert REINSTALL in why_not() and IN_TREE in why_not()


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"<peft_kernels CUDA library>"])
def test_a_file_that_says_nothing_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert "damaged or no library of peft_kernels" in why_not() and REINSTALL in why_not()


def test_another_version_is_refused_with_the_reinstall_line(built: Build, gpu: Any) -> None:
    built(version="0.0.9")
    gpu(8, 0)
    assert f"of version 0.0.9, the package of {peft_kernels.__version__}" in why_not()
    assert REINSTALL in why_not() and IN_TREE in why_not()
    with pytest.raises(ImportError, match=r"of version 0\.0\.9"):
        cuda_library.call("prompt_gradient")


def test_a_torch_without_cuda_is_told(built: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    built()
    assert why_not() == (f"torch {torch.__version__} has no CUDA: install a CUDA build of torch")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    cuda_library.forget()
    assert "serves NVIDIA GPUs, and this torch is built for AMD's" in why_not()


def test_a_missing_driver_is_told(built: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    built()
    assert "no NVIDIA GPU" in why_not() and "nvidia-smi" in why_not()


@pytest.mark.parametrize(
    ("capability", "text"),
    [
        ((7, 5), "this GPU is sm_75, older than what the CUDA library was built for"),
        ((9, 0), "this GPU is sm_90, not among what the CUDA library was built for"),
        ((12, 0), "this GPU is sm_120, not among what the CUDA library was built for"),
    ],
)
def test_a_gpu_it_was_not_built_for_is_named_with_the_rebuild_line(
    built: Build, gpu: Any, capability: tuple[int, int], text: str
) -> None:
    built(archs="80 86")
    gpu(*capability)
    number = {(9, 0): "90a"}.get(capability, f"{capability[0]}{capability[1]}")
    assert f"{text} (sm_80, sm_86): PEFT_KERNELS_CUDA_ARCHS='80;86;{number}' {REINSTALL}" in (
        why_not()
    )


def test_a_gpu_that_no_build_serves_is_told_so(built: Build, gpu: Any) -> None:
    built()
    gpu(7, 0)
    assert why_not() == "needs compute capability 7.5 (Turing) or later, this GPU is sm_70"


@pytest.mark.parametrize(
    ("arch", "served", "refused"),
    [
        ("80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("86", [(8, 6), (8, 9)], [(8, 0), (7, 5)]),
        ("90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("100", [(10, 0), (10, 3)], [(12, 0), (9, 0)]),
        ("100f", [(10, 0), (10, 3)], [(11, 0)]),
        ("120", [(12, 0), (12, 1)], [(10, 0)]),
    ],
)
def test_code_runs_on_its_own_generation_from_its_own_number_on(
    arch: str, served: list[tuple[int, int]], refused: list[tuple[int, int]]
) -> None:
    assert all(cuda_library.serves(arch, each) for each in served)
    assert not any(cuda_library.serves(arch, each) for each in refused)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_a_dtype_it_does_not_serve_is_named(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    assert why_not(dtype=dtype) == f"serves float32, float16 and bfloat16: cast {name} to one"


def test_cpu_tensors_are_sent_to_a_gpu() -> None:
    assert why_not(torch.device("cpu")) == "serves NVIDIA GPUs: move the tensors to one"


def test_a_library_that_does_not_load_says_what_the_loader_says(built: Build, gpu: Any) -> None:
    built()
    gpu(9, 0)
    assert "does not load" in why_not() and "_C_cuda.so" in why_not() and REINSTALL in why_not()
    with pytest.raises(ImportError, match="does not load"):
        cuda_library.call("prompt_gradient")


def compiled(path: Path, cuda: str, driver: int) -> None:
    """Make a library that loads, of a build with ``cuda`` under a driver that knows ``driver``."""
    code = path.with_suffix(".cpp")
    code.write_text(
        f"""
        extern "C" const char build[] = "{text(cuda=cuda)}";
        extern "C" int peft_kernels_cuda_driver() {{ return {driver}; }}
        """
    )
    subprocess.run(["g++", "-shared", "-fPIC", str(code), "-o", str(path)], check=True)
    cuda_library.forget()


@pytest.mark.parametrize(("driver", "fits"), [(13000, True), (14010, True), (12080, False)])
def test_a_driver_older_than_the_toolkit_is_told(
    path: Path, gpu: Any, driver: int, fits: bool
) -> None:
    compiled(path, "13.1", driver)
    gpu(9, 0)
    reason = cuda_library.why_not(GPU, torch.bfloat16)
    if fits:
        assert reason is None
        return
    assert reason is not None
    assert "was built with CUDA 13.1, the NVIDIA driver knows CUDA 12.8: update" in reason


def test_no_driver_found_by_the_library_is_told(path: Path, gpu: Any) -> None:
    compiled(path, "13.0", 0)
    gpu(9, 0)
    assert "finds no NVIDIA driver" in why_not()


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (2, torch.OutOfMemoryError, "prompt_forward: out of memory"),
        (9, RuntimeError, "prompt_forward: invalid configuration argument"),
    ],
)
def test_a_status_becomes_an_error_with_the_kernels_name_and_cudas_text(
    monkeypatch: pytest.MonkeyPatch, status: int, error: type[Exception], said: str
) -> None:
    class Library:
        @staticmethod
        def peft_kernels_cuda_error() -> bytes:
            return said.encode()

    given: list[Any] = []
    statuses = iter([status, 0])

    def op(*args: Any) -> int:
        given.append(args)
        return next(statuses)

    monkeypatch.setattr(cuda_library, "_library", lambda: Library)
    monkeypatch.setattr(cuda_library, "_op", lambda name: op)
    with pytest.raises(error, match=said) as raised:
        cuda_library.call("prompt_forward", 1, 2)
    assert type(raised.value) is error
    cuda_library.call("prompt_forward", 3)  # the next one works
    assert given == [(1, 2), (3,)]


def test_what_it_was_built_with_joins_the_extensions(built: Build) -> None:
    info = extension.build_info()
    assert info is not None and info["cuda"] is None and info["cuda_archs"] == []
    built(archs="75 100")
    info = extension.build_info()
    assert info is not None and info["cuda"] == "13.0" and info["cuda_archs"] == ["75", "100"]
    assert set(info) == {"version", "torch", "cuda", "cuda_archs", "compiler", "cpu"}
    built(version="0.0.9")
    info = extension.build_info()
    assert info is not None and info["cuda"] is None


def test_env_shows_the_library_and_why_it_does_not_load(built: Build) -> None:
    built(version="0.0.9", archs="86")
    shown = environment.report()["cuda library"]
    assert shown["version"] == "0.0.9" and shown["cuda_archs"] == ["86"]
    assert shown["loads"].startswith("no: ") and REINSTALL in shown["loads"]


SPECS: dict[backends.Op, Any] = {
    ADAPTER: AdapterSpec(GPU, torch.float16, 4, 8, 2, False),
    ADAPTER_GROUPED: AdapterSpec(GPU, torch.float16, 4, 8, 2, False),
    LORA_LINEAR: LoRASpec(GPU, torch.float16, 4, 8, 8, 2, False),
    PREFIX_ATTENTION: PrefixSpec(
        GPU, torch.float16, 1, 2, 2, 4, 4, 3, 64, *(True, True, False, False, False, False, False)
    ),
    PROMPT_EMBEDDING: PromptSpec(GPU, torch.float16),
}
SERVED = [op for op in SPECS if op.find("cuda")]
EACH_OP = pytest.mark.parametrize("op", SERVED, ids=[op.name for op in SERVED])


def test_a_method_that_has_launchers_for_it_has_the_backend() -> None:
    package = Path(peft_kernels.__file__).parent
    for op in SPECS:
        method = op.name.split("_")[0]
        assert (op.find("cuda") is not None) == (package / method / "cuda.py").exists(), op.name


@EACH_OP
def test_it_runs_where_triton_does_not(op: backends.Op, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: dict[str, str | None] = {"triton": "Triton is not installed", "cuda": None}
    monkeypatch.setattr(triton_runtime, "why_not", lambda device, dtype: reasons["triton"])
    monkeypatch.setattr(triton_runtime, "capability", lambda index: (9, 0))
    monkeypatch.setattr(triton_runtime, "multiprocessors", lambda index: 132)
    monkeypatch.setattr(cuda_library, "why_not", lambda device, dtype: reasons["cuda"])
    backends.forget_choices()
    assert backends.select(op, SPECS[op]).name == "cuda"
    told = backends.explain_spec(op, SPECS[op])
    assert told.backend == "cuda" and told.reasons["triton"] == "Triton is not installed"

    reasons["triton"] = None
    backends.forget_choices()
    assert backends.select(op, SPECS[op]).name == "triton"
    assert backends.explain_spec(op, SPECS[op]).reasons["cuda"] == "triton comes first"
    assert backends.select(op, SPECS[op], "cuda").name == "cuda"

    reasons["cuda"] = "the CUDA library is not built"
    backends.forget_choices()
    assert "not built" in backends.explain_spec(op, SPECS[op]).reasons["cuda"]
    with pytest.raises(BackendUnavailable, match="cuda: the CUDA library is not built"):
        backends.select(op, SPECS[op], "cuda")
