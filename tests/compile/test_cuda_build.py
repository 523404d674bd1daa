"""What PEFT_KERNELS_BUILD builds, and the library that nvcc makes under any torch."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cuda_build
import pytest
import torch
from cuda_build import CannotBuild

import peft_kernels
from peft_kernels.core import cuda_library

ROOT = Path(__file__).parents[2]
Nvcc = Callable[..., str]


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nvcc:
    """Return a function that makes a toolkit whose nvcc only says what it is, for CUDA_HOME."""

    def make(version: str = "12.4", codes: str = "70 75 80 86 89 90") -> str:
        path = tmp_path / "toolkit" / "bin" / "nvcc"
        path.parent.mkdir(parents=True, exist_ok=True)
        listed = " ".join(f"sm_{code}" for code in codes.split())
        path.write_text(
            f"""#!/bin/sh
case $1 in
  --version) echo "Cuda compilation tools, release {version}, V{version}.1" ;;
  --list-gpu-code) printf '%s\\n' {listed} ;;
  *) exit 1 ;;
esac
"""
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CUDA_HOME", str(path.parents[1]))
        return str(path)

    return make


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PEFT_KERNELS_CUDA_ARCHS", "PEFT_KERNELS_BUILD", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_nvcc_is_looked_for_where_cuda_home_points_alone(
    nvcc: Nvcc, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = nvcc("12.9")
    assert cuda_build.find_nvcc() == path and cuda_build.cuda_version(path) == "12.9"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(CannotBuild, match=f"nvcc not found in CUDA_HOME={tmp_path}: install"):
        cuda_build.find_nvcc()


def test_nvcc_is_found_on_the_path(nvcc: Nvcc, monkeypatch: pytest.MonkeyPatch) -> None:
    path = nvcc()
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(Path(path).parent))
    assert cuda_build.find_nvcc() == path


def test_without_a_gpu_all_architectures_that_nvcc_knows(
    nvcc: Nvcc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_build.architectures(nvcc()) == ["75", "80", "86", "89", "90a"]
    newest = nvcc("13.0", "75 80 86 87 88 89 90 100 110 103 120 121")
    assert cuda_build.architectures(newest) == list(cuda_build.ARCHITECTURES)


def test_with_gpus_those_that_are_visible(nvcc: Nvcc, monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = [(9, 0), (8, 0), (9, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    assert cuda_build.architectures(nvcc()) == ["80", "90a"]


@pytest.mark.parametrize("written", ["80;90a", "8.0, 9.0a", "sm_80 90A", "80;80;90a;"])
def test_architectures_that_are_asked_for(
    nvcc: Nvcc, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    monkeypatch.setenv("PEFT_KERNELS_CUDA_ARCHS", written)
    assert cuda_build.architectures(nvcc()) == ["80", "90a"]
    flags = cuda_build.kernel_flags(["80", "90a"])
    assert "-gencode=arch=compute_80,code=sm_80" in flags
    assert "-gencode=arch=compute_80,code=sm_90a" in flags


def test_kernels_tell_apart_what_shares_no_ptx_alone() -> None:
    """Else an architecture would get the code of an older one."""
    files = [*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/cuda/*.h")]
    told = re.findall(r"__CUDA_ARCH\w+(?: *[<>=!]+ *(\d+))?", "".join(f.read_text() for f in files))
    assert set(told) - {""} == {"800"}


@pytest.mark.parametrize("written", ["120", "ampere", "80;8", "80+PTX"])
def test_an_architecture_that_nvcc_does_not_know_is_named(
    nvcc: Nvcc, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    monkeypatch.setenv("PEFT_KERNELS_CUDA_ARCHS", written)
    name = written.lower().removeprefix("80;")
    with pytest.raises(
        CannotBuild, match=rf"names '{re.escape(name)}'; nvcc 12\.4 compiles for 70, 75"
    ):
        cuda_build.architectures(nvcc())


def setup(choice: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py as far as it decides what to build."""
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=os.environ | {"PEFT_KERNELS_BUILD": choice} | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_each_choice_says_what_it_builds(nvcc: Nvcc, tmp_path: Path) -> None:
    nvcc()
    assert "a pure-Python wheel" in setup("none").stderr
    assert (
        "compiling the CPU kernels; no CUDA kernels: PEFT_KERNELS_BUILD=cpu" in setup("cpu").stderr
    )
    assert "compiling the CPU kernels and the CUDA kernels" in setup("cuda").stderr
    auto = setup("auto").stderr
    if torch.version.cuda:
        assert "compiling the CPU kernels and the CUDA kernels" in auto
    else:
        assert "no CUDA kernels: this torch has no CUDA (PEFT_KERNELS_BUILD=cuda" in auto
    assert setup("").stderr == auto  # a variable that is set to nothing, as CI likes to
    nothing = setup("auto", CUDA_HOME=str(tmp_path))
    assert nothing.returncode == 0 and "compiling the CPU kernels; no CUDA" in nothing.stderr


@pytest.mark.parametrize(
    ("choice", "variables", "said"),
    [
        ("cuda", {"CUDA_HOME": "/nowhere"}, "nvcc not found in CUDA_HOME=/nowhere: install"),
        ("cuda", {"PEFT_KERNELS_CUDA_ARCHS": "35"}, "PEFT_KERNELS_CUDA_ARCHS names '35'"),
        ("gpu", {}, "PEFT_KERNELS_BUILD must be one of auto, none, cpu, cuda, got 'gpu'"),
    ],
)
def test_what_cannot_be_built_is_an_error_that_says_what_to_change(
    nvcc: Nvcc, choice: str, variables: dict[str, str], said: str
) -> None:
    nvcc()
    done = setup(choice, **variables)
    assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("compiler", ["absent", "of another age"])
def test_without_a_compiler_auto_goes_on_and_cpu_says_what_is_missing(
    compiler: str, tmp_path: Path
) -> None:
    path, said = tmp_path / "c++", f"the C++ compiler {tmp_path / 'c++'} "
    if compiler == "of another age":
        path.write_text("#!/bin/sh\necho unrecognized option >&2\nexit 1\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    auto = setup("auto", CXX=str(path))
    assert auto.returncode == 0 and said in auto.stderr and "a pure-Python wheel" in auto.stderr
    asked = setup("cpu", CXX=str(path))
    assert asked.returncode != 0 and f"PEFT_KERNELS_BUILD=cpu: {said}" in asked.stderr
    assert "Traceback" not in asked.stderr


def has_nvcc() -> bool:
    try:
        cuda_build.find_nvcc()
    except CannotBuild:
        return False
    return True


@pytest.fixture(scope="module")
def library() -> Path:
    """Build the real library for one architecture; a second run compiles what has changed."""
    folder = ROOT / "build" / "cuda_library"
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, (folder / ".lock").open("w") as lock:
        patch.setenv("PEFT_KERNELS_CUDA_ARCHS", "80")
        fcntl.flock(lock, fcntl.LOCK_EX)  # the tests may be spread over processes
        cuda_build.build(folder / "_C_cuda.so", folder / "objects", peft_kernels.__version__)
    return folder / "_C_cuda.so"


@pytest.mark.timeout(900)
@pytest.mark.xdist_group("cuda_library")
@pytest.mark.skipif(not has_nvcc(), reason="nvcc not found: not run")
class TestTheLibrary:
    def test_says_what_it_is(self, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda_library, "PATH", library)
        cuda_library.forget()
        info = cuda_library.build_info()
        cuda_library.forget()
        assert info is not None
        assert info["version"] == peft_kernels.__version__
        assert info["torch"] == torch.__version__
        assert info["cuda"] == cuda_build.cuda_version(cuda_build.find_nvcc())
        assert info["cuda_archs"] == ["80"]
        assert info["compiler"].startswith("g++ ")

    def test_a_second_build_compiles_nothing(
        self, library: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PEFT_KERNELS_CUDA_ARCHS", "80")
        cuda_build.build(library, library.parent / "objects", peft_kernels.__version__)
        assert "no work to do" in capfd.readouterr().out

    def test_needs_the_stable_abi_and_no_cuda_runtime(self, library: Path) -> None:
        """What it takes from torch stands in the stable ABI's C functions, and cudart in itself."""
        listed = subprocess.run(
            ["nm", "-D", "--undefined-only", str(library)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        names = {line.split()[-1].partition("@")[0] for line in listed.splitlines()}
        of_torch = {name for name in names if "torch" in name}
        assert "aoti_torch_get_current_cuda_stream" in of_torch
        assert all(name.startswith(("aoti_torch_", "torch_")) for name in of_torch), of_torch
        demangled = subprocess.run(
            ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
        ).stdout
        assert not re.findall(r"^(?:c10|at|caffe2)::.*$|^cuda[A-Z].*$", demangled, re.MULTILINE)

    @pytest.mark.skipif(torch.version.cuda is not None, reason="a torch with CUDA loads it")
    def test_a_cuda_build_imports_cleanly_under_a_torch_without_cuda(
        self, library: Path, tmp_path: Path
    ) -> None:
        package = tmp_path / "peft_kernels"
        shutil.copytree(
            ROOT / "peft_kernels",
            package,
            ignore=shutil.ignore_patterns("__pycache__", "_C_cuda.so"),
        )
        shutil.copy(library, package / "_C_cuda.so")
        code = """
import torch
import peft_kernels
from peft_kernels import _C, prompt_embedding
from peft_kernels.core import cuda_library, extension
assert peft_kernels.__file__.startswith(FOLDER), peft_kernels.__file__
info = extension.build_info()
assert info["cuda_archs"] == ["80"] and info["cuda"], info
ids, table, prompt = torch.tensor([[3, 1]]), torch.randn(5, 8), torch.randn(2, 8)
found = prompt_embedding(ids, table, prompt, backend="cpp").embeddings[0]
assert torch.equal(found, torch.cat([prompt, table[[3, 1]]]))
gpu = torch.device("cuda", 0)
assert "has no CUDA: install a CUDA build" in cuda_library.why_not(gpu, torch.float32)
# Even where it is loaded, against better knowledge, the process lives on with a reason.
torch.version.cuda, torch.cuda.is_available = "13.0", lambda: True
torch.cuda.get_device_capability = lambda index: (8, 0)
cuda_library.forget()
reason = cuda_library.why_not(gpu, torch.float32)
assert "does not load" in reason and "undefined symbol: aoti_torch_" in reason, reason
"""
        done = subprocess.run(
            [sys.executable, "-c", code.replace("FOLDER", repr(str(tmp_path)))],
            cwd=tmp_path,
            env=os.environ | {"LD_BIND_NOW": "1", "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
