"""Against Hugging Face peft on a small Llama: same weights, same logits, losses and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_kernels import PromptEmbedding, PromptOutput

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

VIRTUAL = 5
LENGTHS = (9, 4, 6)  # of the texts in a batch


@pytest.fixture(scope="module")
def models():  # type: ignore[no-untyped-def]
    """Return (base model, peft's prompt-tuning model around a copy, our layer), one prompt."""
    import copy

    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config).eval()
    tuned = peft.get_peft_model(
        copy.deepcopy(base),
        peft.PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, prompt_tuning_init="RANDOM"
        ),
    ).eval()
    values = tuned.prompt_encoder["default"].embedding.weight
    layer = PromptEmbedding(
        base.get_input_embeddings(), num_virtual_tokens=VIRTUAL, init=values.detach()
    )
    return base.requires_grad_(False), tuned, layer


def batch(side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, mask and labels of texts padded on one side."""
    generator = torch.Generator().manual_seed(2)
    longest = max(LENGTHS)
    ids, mask = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        place = slice(longest - length, None) if side == "left" else slice(length)
        ids[row, place] = torch.randint(1, 50, (length,), generator=generator)
        mask[row, place] = 1
    return ids, mask, ids.masked_fill(mask == 0, -100)


def run(base, output: PromptOutput, **options):  # type: ignore[no-untyped-def]
    """Return the model's output for ours."""
    return base(
        inputs_embeds=output.embeddings,
        attention_mask=output.attention_mask,
        labels=output.labels,
        **options,
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_at_the_start_it_is_pefts_prompt_tuning(models, side: str) -> None:  # type: ignore[no-untyped-def]
    base, tuned, layer = models
    ids, mask, labels = batch(side)
    layer.position = "start"
    output = layer(ids, mask, labels)
    # peft drops position ids: the model counts padding too.
    found = run(base, output)
    expected = tuned(input_ids=ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=0)
    assert torch.equal(found.loss, expected.loss)

    parameter = tuned.prompt_encoder["default"].embedding.weight
    (theirs,) = torch.autograd.grad(expected.loss, [parameter])
    (ours,) = torch.autograd.grad(found.loss, [layer.prompt])
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_right_padding_gives_the_same_logits_with_our_position_ids_too(models) -> None:  # type: ignore[no-untyped-def]
    base, tuned, layer = models
    ids, mask, _ = batch("right")
    layer.position = "start"
    output = layer(ids, mask)
    found = run(base, output, position_ids=output.position_ids).logits
    expected = tuned(input_ids=ids, attention_mask=mask).logits
    kept = output.attention_mask != 0
    torch.testing.assert_close(found[kept], expected[kept], rtol=1e-5, atol=1e-5)


def test_after_left_padding_a_row_is_what_it_is_alone_which_pefts_is_not(models) -> None:  # type: ignore[no-untyped-def]
    base, tuned, layer = models
    ids, mask, _ = batch("left")
    layer.position = "after_padding"
    output = layer(ids, mask)
    logits = run(base, output, position_ids=output.position_ids).logits
    theirs = tuned(input_ids=ids, attention_mask=mask).logits
    for row, length in enumerate(LENGTHS):
        alone = ids[row : row + 1, -length:]
        expected = tuned(input_ids=alone, attention_mask=torch.ones_like(alone)).logits[0]
        torch.testing.assert_close(
            logits[row, -(length + VIRTUAL) :], expected, rtol=1e-5, atol=1e-5
        )
        if length < max(LENGTHS):
            assert (theirs[row, -length:] - expected[-length:]).abs().max() > 0.01


def test_position_ids_are_those_of_transformers_generate(models) -> None:  # type: ignore[no-untyped-def]
    base, _, layer = models
    ids, mask, _ = batch("left")
    layer.position = "after_padding"
    output = layer(ids, mask)
    generated = base._prepare_position_ids_for_generation(
        output.embeddings, {"attention_mask": output.attention_mask}
    )
    kept = output.attention_mask != 0
    assert torch.equal(output.position_ids[kept], generated[kept])


def test_generate_continues_as_it_does_for_the_row_alone(models) -> None:  # type: ignore[no-untyped-def]
    base, _, layer = models
    ids, mask, _ = batch("left")
    layer.position = "after_padding"

    def continued(ids: Tensor, mask: Tensor) -> Tensor:
        output = layer(ids, mask)
        return base.generate(
            inputs_embeds=output.embeddings, attention_mask=output.attention_mask,
            max_new_tokens=6, do_sample=False, pad_token_id=0,
        )  # fmt: skip

    together = continued(ids, mask)
    for row, length in enumerate(LENGTHS):
        alone = ids[row : row + 1, -length:]
        assert torch.equal(together[row], continued(alone, torch.ones_like(alone))[0])


def test_the_projection_is_pefts_prompt_encoder() -> None:
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, token_dim=32, encoder_hidden_size=20,
        num_transformer_submodules=1, encoder_reparameterization_type="MLP",
    )  # fmt: skip
    theirs = peft.tuners.PromptEncoder(config)
    ours = PromptEmbedding(
        torch.nn.Embedding(50, 32), num_virtual_tokens=VIRTUAL,
        init=theirs.embedding.weight.detach(), prompt_projection=True, projection_hidden=20,
    )  # fmt: skip
    assert ours.projection is not None
    ours.projection.load_state_dict(theirs.mlp_head.state_dict())
    expected = theirs(torch.arange(VIRTUAL)[None])[0]
    torch.testing.assert_close(ours.virtual_tokens(), expected, rtol=1e-6, atol=1e-7)
    ours.fold()
    torch.testing.assert_close(ours.prompt.detach(), expected.detach(), rtol=1e-6, atol=1e-7)
