"""How do sequences become this rank's micro batches?"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from dsrecipes.data.sampler import StepLoader, StepSampler, StreamSampler
from dsrecipes.data.sequences import PADDING_ROW, Sequences
from dsrecipes.data.stream import Stream
from dsrecipes.data.weights import WEIGHTS
from dsrecipes.errors import UserError


def make_loader(
    data: Sequences | Stream,
    micro: int,
    args: TrainingArguments,
    collate: Callable[[list], Any],
    *,
    accumulation: int | None = None,
    shuffle: bool = False,
) -> DataLoader:
    """Make a loader of this rank's micro batches, in step order.

    Args:
        data: sequences of a split.
        micro: sequences of a micro batch.
        args: ranks, seeds and the loader's options.
        collate: turns sequences into tensors.
        accumulation: micro batches of a step; None: those of `args`.
        shuffle: whether epochs have random orders.
    """
    if accumulation is None:
        accumulation = args.gradient_accumulation_steps
    # once before the first step; in a stream each step checks its own batch, since not every window has weights
    if data.sample.weighted:
        check_weights(data, collate([data.sample[PADDING_ROW]]))
    # on a CPU, torch warns that pinning has no effect
    pins = args.dataloader_pin_memory and args.device.type == "cuda"
    if isinstance(data, Stream):
        shape = (accumulation, args.world_size, micro)
        sampler = StreamSampler(args.max_steps, shape, args.process_index)
        # no worker processes: each would read and tokenize everything once more; the stream's thread reads ahead
        return StepLoader(data, batch_sampler=sampler, collate_fn=collate, pin_memory=pins)
    return StepLoader(
        data,
        batch_sampler=StepSampler(
            data.lengths,
            micro,
            accumulation=accumulation,
            rank=args.process_index,
            world=args.world_size,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            shuffle=shuffle,
            data=data,
        ),
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=pins,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
    )


def check_weights(data: Sequences | Stream, batch: dict[str, torch.Tensor]) -> None:
    """Refuse a recipe's own collator that drops the weights of the rows (UserError)."""
    if data.sample.weighted and WEIGHTS not in batch:
        raise UserError(
            "DSR372",
            "the rows have weights, which the recipe's collator leaves out: have it return `weights`, of the shape of its "
            "labels (see dsrecipes.data.collate)",
        )


def sequences_of_step(trainer: Trainer, step: int) -> list[list[int]]:
    """This rank's sequences of a step (from 1) by micro batch; of the loader's current epoch."""
    loader: Any = trainer.callback_handler.train_dataloader
    sampler, accumulation = loader.batch_sampler, trainer.args.gradient_accumulation_steps
    # each epoch has the same number of batches, so that the step alone says where in its epoch it is
    first = (step - 1) * accumulation % len(sampler)
    return list(islice(sampler, first, first + accumulation))
