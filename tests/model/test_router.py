"""The router loss of mixture-of-experts models, by sequence."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dsrecipes.model.router import balance_by_sequence, router_loss_of, trained_tokens, without_router_logits
from dsrecipes.model.task import is_causal_lm

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "shared_expert_intermediate_size": 16,
    "output_router_logits": True,
}  # fmt: skip


def model_of(family, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL | changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {}), ("qwen2_moe", {}), ("qwen3_moe", {"decoder_sparse_step": 2}), ("olmoe", {}),
        ("gpt_oss", {"rope_parameters": None}), ("jetmoe", {"kv_channels": 8}), ("granitemoe", {}), ("phimoe", {}),
    ],
)  # fmt: skip
def test_each_sequence_has_the_loss_that_transformers_gives_it_alone(family, changes):
    model = model_of(family, **changes)
    router = router_loss_of(model)
    assert is_causal_lm(model) and router.by_sequence and router.top_k == 2
    ids = torch.randint(1, 60, (3, 10))
    with torch.no_grad():
        whole = model(input_ids=ids, labels=ids, use_cache=False)
        alone = [model(input_ids=row[None], labels=row[None], use_cache=False) for row in ids]
        short = model(input_ids=ids[:1, :6], use_cache=False).aux_loss
    everything = torch.ones(3, 10, dtype=torch.bool)
    losses = balance_by_sequence(whole.router_logits, 2, everything)
    assert losses.tolist() == pytest.approx([float(each.aux_loss) for each in alone], abs=1e-5)
    tokens = model.loss_function(logits=whole.logits, labels=ids, vocab_size=64)
    assert float(whole.loss) == pytest.approx(float(tokens + router.coefficient * whole.aux_loss), abs=1e-5)
    padded = everything.clone()
    padded[0, 6:] = padded[2] = False
    losses = balance_by_sequence(whole.router_logits, 2, padded)
    assert losses.tolist() == pytest.approx([float(short), float(alone[1].aux_loss), 0.0], abs=1e-5)
    summed = router.of_micro_batch(whole, padded)
    assert float(summed) == pytest.approx(router.coefficient * float(losses.sum()), abs=1e-6)


def test_a_formula_of_a_models_own_is_taken_whole_and_said():
    model = model_of("doge", is_moe=True)
    router = router_loss_of(model)
    assert not router.by_sequence and "depends on their size" in router.note()
    ids = torch.randint(1, 60, (2, 8))
    with torch.no_grad():
        outputs = model(input_ids=ids, use_cache=False)
    summed = router.of_micro_batch(outputs, torch.ones(2, 8, dtype=torch.bool))
    assert float(summed) == pytest.approx(2 * router.coefficient * float(outputs.aux_loss))


def test_a_model_whose_configuration_asks_for_none():
    model = model_of("mixtral", output_router_logits=False)
    assert router_loss_of(model) is None and without_router_logits(model) == {}


def test_tokens_up_to_the_last_trained_one_count_whatever_the_labels_are_given_as():
    labels = torch.tensor([[-100, 5, 6, -100, -100], [-100] * 5, [-100, -100, -100, 7, 8]])
    shifted = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], 1)
    wanted = [[1, 1, 1, 0, 0], [0] * 5, [1] * 5]
    for batch in (
        {"labels": labels},
        {"labels": shifted, "shift_labels": shifted},
        {"labels": shifted[shifted != -100], "shift_labels": shifted[shifted != -100], "logits_to_keep": shifted != -100},
    ):
        assert trained_tokens(batch).int().tolist() == wanted
    mask = torch.tensor([[1] * 5, [1] * 5, [0, 1, 1, 1, 1]])
    assert trained_tokens({"labels": labels, "attention_mask": mask}).int().tolist()[2] == [0, 1, 1, 1, 1]
