"""LoRA adapters in peft's format: what is refused, by name, and leaves model and folder alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_kernels import load_adapter, save_adapter
from tests.models.peft_models import (
    SETTINGS,
    TENSORS,
    VOCABULARY,
    built,
    llama,
    lora_config,
    put_lora,
)


def _saved(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    model = llama()
    put_lora(model, ["q_proj", "v_proj"])
    save_adapter(model, folder)
    return json.loads((folder / SETTINGS).read_text()), load_file(folder / TENSORS)


def _refused(folder: Path, match: str, model: nn.Module | None = None) -> None:
    """Check that loading raises with all of ``match`` in the message, and changes nothing."""
    model = llama() if model is None else model
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        load_adapter(model, folder)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.requires_grad for n, p in model.named_parameters() if "self_attn.k_proj" in n)


def test_tensors_that_do_not_fit_are_all_listed(tmp_path: Path) -> None:
    _, tensors = _saved(tmp_path)
    stem = "base_model.model.model.layers.0.self_attn"
    tensors.pop(f"{stem}.q_proj.lora_B.weight")
    tensors[f"{stem}.k_proj.lora_A.weight"] = torch.zeros(4, 32)
    tensors[f"{stem}.v_proj.lora_A.weight"] = torch.zeros(4, 33)
    tensors[f"{stem}.v_proj.lora_B.weight"] = torch.zeros(16, 4, dtype=torch.int64)
    save_file(tensors, tmp_path / TENSORS)
    _refused(
        tmp_path,
        r"(?s)misshapen: \S+0.self_attn.v_proj.lora_A.weight \[4, 33\], expected \[4, 32\].*"
        r"missing: \S+0.self_attn.q_proj.lora_B.weight \[32, 4\].*"
        r"not floating-point: \S+v_proj.lora_B.weight is torch.int64.*"
        r"surplus: \S+k_proj.lora_A.weight \[4, 32\]",
    )


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    _saved(tmp_path)
    (tmp_path / TENSORS).unlink()
    _refused(tmp_path, "holds no adapter_model.safetensors")
    torch.save({}, tmp_path / "adapter_model.bin")
    _refused(tmp_path, r"pickle, adapter_model.bin.*safe_serialization=True")


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    _saved(tmp_path)
    data = (tmp_path / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(data[: len(data) // 2])
    _refused(tmp_path, "is not a whole safetensors file")
    (tmp_path / SETTINGS).write_text("{")
    _refused(tmp_path, "is not JSON")
    (tmp_path / SETTINGS).write_text("[]")
    _refused(tmp_path, "must hold a JSON object")
    (tmp_path / SETTINGS).unlink()
    _refused(tmp_path, "holds no adapter_config.json")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"peft_type": "WARP"}, "peft_type='WARP'"),
    "no method": ({"peft_type": None}, "peft_type=None"),
    "dora": ({"use_dora": True}, "use_dora=True"),
    "biases": ({"bias": "lora_only"}, "bias='lora_only'"),
    "several": ({"lora_bias": True, "modules_to_save": ["x"]}, "lora_bias=True, modules_to_save"),
    "changed base": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "unheard of": ({"use_warp": 3}, "use_warp=3"),
    "rank of text": ({"r": "4"}, "r must be int, got '4'"),
    "rank of nothing": ({"r": 0}, "r=0"),
    "rank of a pattern": ({"rank_pattern": {"q_proj": True}}, "q_proj must be int, got True"),
    "other rank": ({"r": 5}, "misshapen"),
    "dropout": ({"lora_dropout": 1.5}, "lora_dropout=1.5"),
    "no target": ({"target_modules": ["w_proj"]}, "names no module"),
    "an embedding": ({"target_modules": ["embed_tokens"]}, "a torch.nn.modules.sparse.Embedding"),
    "more targets": ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, "missing.*k_proj"),
}


@pytest.mark.parametrize("changes,match", REFUSED.values(), ids=list(REFUSED))
def test_settings_that_no_layer_computes_are_refused_by_name(
    changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    settings, _ = _saved(tmp_path)
    (tmp_path / SETTINGS).write_text(json.dumps(settings | changes))
    _refused(tmp_path, f"(?s){match}")


def test_dora_of_peft_is_refused(tmp_path: Path) -> None:
    built(LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)).save_pretrained(tmp_path)
    _refused(tmp_path, "use_dora=True.*accelerate")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_head_that_cannot_hold_what_the_adapter_brings_is_refused(tmp_path: Path) -> None:
    built(lora_config(target_modules=["q_proj"])).save_pretrained(
        tmp_path, save_embedding_layers=True
    )
    for head, match in (
        (torch.zeros(VOCABULARY, 32, device="meta"), "lm_head.weight is on the meta device"),
        (torch.zeros(VOCABULARY, 32, dtype=torch.int8), "lm_head.weight, which is torch.int8"),
    ):
        model = llama()
        model.lm_head.weight = nn.Parameter(head, requires_grad=False)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(ValueError, match=match):
            load_adapter(model, tmp_path)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(t.is_meta or torch.equal(t, after[name]) for name, t in before.items())


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_merged_head_that_came_with_the_adapter_is_not_saved(tmp_path: Path) -> None:
    built(lora_config(target_modules=["lm_head"])).save_pretrained(tmp_path)
    model = llama()
    load_adapter(model, tmp_path)
    model.lm_head.merge()
    with pytest.raises(ValueError, match="'lm_head' is merged.*unmerge it before saving"):
        save_adapter(model, tmp_path / "again")
    model.lm_head.unmerge()
    assert save_adapter(model, tmp_path / "again") == ["lm_head"]


def test_layers_that_the_model_has_must_be_those_of_the_folder(tmp_path: Path) -> None:
    _saved(tmp_path)
    model = llama()
    put_lora(model, ["q_proj", "v_proj", "o_proj"])
    with pytest.raises(ValueError, match="has not: model.layers.0.self_attn.o_proj, model.layers"):
        load_adapter(model, tmp_path)
    model = llama()
    put_lora(model, ["q_proj", "v_proj"], r=2)
    with pytest.raises(ValueError, match="q_proj' has rank 2, the adapter in .* 4"):
        load_adapter(model, tmp_path)
    model = llama()
    put_lora(model, ["q_proj", "v_proj"])
    model.model.layers[1].self_attn.v_proj.merge()
    with pytest.raises(ValueError, match="1.self_attn.v_proj' is merged"):
        load_adapter(model, tmp_path)


def test_what_the_format_cannot_say_is_refused(tmp_path: Path) -> None:
    model = llama()
    put_lora(model, "q_proj")
    model.model.layers[0].self_attn.q_proj.lora_dropout = 0.5
    with pytest.raises(ValueError, match=r"0\.5 in 'model.layers.0.self_attn.q_proj'"):
        save_adapter(model, tmp_path)
    model = llama()
    put_lora(model, "q_proj")
    model.model.layers[1].self_attn.q_proj = model.model.layers[0].self_attn.q_proj
    with pytest.raises(ValueError, match="are one LoRALinear"):
        save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="no layers of peft_kernels"):
        save_adapter(llama(), tmp_path)
    model = llama()
    put_lora(model, "q_proj")
    for task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
        with pytest.raises(ValueError, match=f"task_type='{task}', and only.*FEATURE_EXTRACTION"):
            save_adapter(model, tmp_path, task_type=task)
    assert not list(tmp_path.iterdir())


def test_meta_and_no_module(tmp_path: Path) -> None:
    _saved(tmp_path)
    with pytest.raises(ValueError, match="meta device"):
        load_adapter(llama().to("meta"), tmp_path)
    with pytest.raises(TypeError, match="model must be"):
        load_adapter("model", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be"):
        save_adapter(None, tmp_path)  # type: ignore[arg-type]
