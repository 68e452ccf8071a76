"""How the router loss of mixture-of-experts models is computed: per sequence, so that micro batches do not change it."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from dsrecipes.data.encode import IGNORE
from dsrecipes.model.task import unwrapped

_KNOWN_ARGUMENTS = ("gate_logits", "num_experts", "top_k", "attention_mask")
"""Arguments of transformers' load_balancing_loss_func, which has the same body in all families that take these (5.23)."""


@dataclass(frozen=True)
class RouterLoss:
    """How a model's router loss is computed and weighted."""

    coefficient: float
    top_k: int
    by_sequence: bool
    """False: the model has a formula of its own, which is computed over the whole micro batch."""

    def note(self) -> str:
        """Describe the loss in a line of the header."""
        scope = "micro batches and ranks (it depends on their size)"
        if self.by_sequence:
            scope = "the sequences of a step"
        return (
            f"router loss: `loss` = token loss + `router_loss`, which is {self.coefficient:g} x the mean over {scope}; "
            "evaluation reports the token loss alone"
        )

    def of_micro_batch(self, outputs: Any, tokens: torch.Tensor) -> torch.Tensor:
        """Weighted router loss, summed over the sequences of a micro batch; the caller divides by those of the step.

        Args:
            outputs: the model's output, with router_logits or aux_loss.
            tokens: (rows, length), True where a token counts; see `trained_tokens`.
        """
        layers = outputs.router_logits if self.by_sequence else None
        # Logits that do not have one row per position cannot be assigned to sequences.
        if layers and all(layer.shape[:-1].numel() == tokens.numel() for layer in layers):
            return self.coefficient * balance_by_sequence(layers, self.top_k, tokens).sum()
        return self.coefficient * outputs.aux_loss.float() * tokens.any(1).sum()


def balance_by_sequence(layers: tuple[torch.Tensor, ...], top_k: int, tokens: torch.Tensor) -> torch.Tensor:
    """Compute transformers' load_balancing_loss_func for each sequence alone (DeepSeek-V2, arXiv:2405.04434, 2.1.3).

    The loss is a product of two means over tokens. Over a micro batch it would change with the sequences that
    happen to share one.

    Args:
        layers: router logits of each layer, (rows x length, experts).
        top_k: experts of a token.
        tokens: (rows, length), True where a token counts.

    Returns:
        (rows,): the loss of each row, 0 where no token counts.
    """
    selections: torch.Tensor | float = 0.0
    probability_sums: torch.Tensor | float = 0.0
    weight = tokens.unsqueeze(-1).to(layers[0].device, torch.float32)
    for layer in layers:
        probabilities = layer.view(*tokens.shape, -1).to(weight.device).softmax(-1, dtype=torch.float32)
        selected = torch.zeros_like(probabilities).scatter_(-1, probabilities.topk(top_k, dim=-1).indices, 1.0)
        selections = selections + (selected * weight).sum(1)
        probability_sums = probability_sums + (probabilities * weight).sum(1)
    total = (weight.sum(1) * len(layers)).clamp(min=1)
    experts = layers[0].shape[-1]
    return experts * (selections / total * (probability_sums / total)).sum(-1)


def trained_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mask of (rows, length), True up to the last token that is trained on in each row.

    Padding comes after it. A row without labels, which fills a short step, has no True.
    """
    keep, shifted, labels = batch.get("logits_to_keep"), batch.get("shift_labels"), batch["labels"]
    if keep is not None and keep.dim() == 2:
        predicts = keep.bool()
    elif shifted is not None and shifted.dim() == 2:
        predicts = shifted != IGNORE
    else:
        predicts = pad(labels[:, 1:] != IGNORE, (0, 1))
    # A position that predicts a label is followed by the labelled token itself.
    is_label = pad(predicts, (1, 0))[:, :-1] | predicts
    # A cumulative sum from the right: True up to the last label.
    tokens = is_label.flip(1).cumsum(1).flip(1) > 0
    mask = batch.get("attention_mask")
    return tokens if mask is None else tokens & mask.bool()


def router_loss_of(model: nn.Module) -> RouterLoss | None:
    """The router loss that a model of transformers adds to its loss; None where its configuration has it off."""
    base = unwrapped(model)
    config = base.config.get_text_config()
    if not (getattr(config, "output_router_logits", False) or getattr(base.config, "output_router_logits", False)):
        return None

    def setting(*names: str) -> Any:
        values = (getattr(owner, name, None) for name in names for owner in (base, config))
        return next((value for value in values if value is not None), None)

    coefficient = setting("router_aux_loss_coef", "aux_loss_coef")
    function = getattr(sys.modules[type(base).__module__], "load_balancing_loss_func", None)
    if coefficient is None or function is None:
        return None
    top_k = setting("num_experts_per_tok")
    known = tuple(inspect.signature(function).parameters) == _KNOWN_ARGUMENTS and isinstance(top_k, int)
    return RouterLoss(float(coefficient), top_k if known else 0, known)


def without_router_logits(model: nn.Module) -> dict[str, bool]:
    """Arguments that turn the router loss off in generate(), where transformers gives it a mask of another length."""
    return {} if router_loss_of(model) is None else {"output_router_logits": False}
