"""Models of other kinds on real ranks: mixtures of experts, models with a part for images, adapters, odd tokenizers."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.models import Small
from support.rank_pool import Ranks
from support.tiny import SHARED, instructions, needs_shared, tiny_gemma3, tiny_moe, write_rows

from dsrecipes.errors import UserError
from dsrecipes.evaluation.evaluate import evaluate
from dsrecipes.inference.chat import chat
from dsrecipes.inference.finished import open_run
from dsrecipes.inference.generate import generate
from dsrecipes.publish.verify import verify

pytestmark = pytest.mark.ranks
CASES = SHARED / "cases" / "models"


def logged(run: dict[str, Any], key: str) -> list[float]:
    """A figure of log.jsonl, in the order it was written."""
    return [line[key] for line in run["log"] if key in line]


def values(small: Small, model: str | Path, output: Path, **changed: Any) -> dict[str, Any]:
    """A run of eight rows a step on short instructions."""
    rows = write_rows(output.with_suffix(".jsonl"), instructions(27))
    given = {
        "model_name_or_path": str(model), "dataset": rows, "validation_split": 0.2, "max_length": 250, "lora_r": 0,
        "prompt_style": "alpaca", "packing": False, "eval_strategy": "no", "save_strategy": "no", "max_steps": 4,
        "global_batch_size": 8, "max_grad_norm": 1.0, "adam_epsilon": 1e-4, "output_dir": str(output),
    }  # fmt: skip
    return small.values("alpaca", **given | changed)


# ---- mixtures of experts ----

LAYOUTS = [(1, 8, 1, "none"), (1, 2, 4, "zero2"), (2, 4, 1, "zero2"), (2, 1, 4, "none")]
"""(ranks, micro, accumulation, engine): eight sequences a step."""


@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe", "lora", pytest.param("cases", marks=needs_shared)])
def test_the_router_loss_does_not_depend_on_how_a_step_is_divided(
    one_rank: Ranks, two_ranks: Ranks, small: Small, tmp_path: Path, model: str
) -> None:
    folder = CASES / "mixtral_aux" if model == "cases" else tiny_moe("olmoe" if model == "lora" else model)
    layouts = LAYOUTS if model == "mixtral" else [LAYOUTS[0], (2, 2, 2, "zero3" if model == "lora" else "zero2")]
    changed = {"lora_r": 4, "packing": True} if model == "lora" else {}

    def run(world: int, micro: int, accumulation: int, engine: str) -> dict[str, Any]:
        output = tmp_path / f"{world}-{micro}-{engine}"
        case = values(small, folder, output, per_device_train_batch_size=micro, deepspeed=engine, **changed)
        return {1: one_rank, 2: two_ranks}[world].run("evaluate", **case, batch_sizes=[1, 3, 8])[0]

    whole = run(*layouts[0])
    assert any("router loss: `loss` = token loss + `router_loss`" in note for note in whole["notes"])
    router = logged(whole, "router_loss")
    assert len(router) == 4 and min(router) > 0.19  # 0.1 x the experts of a token, which is what an even use comes to
    held_out = whole["losses"][8]
    assert list(whole["losses"].values()) == pytest.approx([held_out] * 3, abs=1e-5)
    assert logged(whole, "loss")[0] - router[0] == pytest.approx(math.log(600), abs=0.2), "the token loss of random weights"
    for layout in layouts[1:]:
        divided = run(*layout)
        for key in ("loss", "router_loss"):
            assert logged(divided, key) == pytest.approx(logged(whole, key), abs=1e-5), (layout, key)
        assert logged(divided, "grad_norm") == pytest.approx(logged(whole, "grad_norm"), rel=1e-4), layout
        assert divided["losses"][3] == pytest.approx(held_out, abs=1e-5), layout
    if model == "mixtral":
        answers = generate(whole["path"], [{"instruction": "Count."}, {"instruction": "Count to three."}], max_new_tokens=2)
        assert len(answers) == 2
        assert evaluate(whole["path"])["figures"]["loss"] == pytest.approx(held_out, abs=1e-5)
        assert json.loads(Path(whole["path"], "model", "config.json").read_text())["output_router_logits"] is True


# ---- parts for images ----


@pytest.mark.parametrize(("engine", "lora_r"), [("zero2", 0), ("zero3", 0), ("zero3", 4)])
def test_text_trains_the_part_of_a_model_that_it_reaches(
    one_rank: Ranks, two_ranks: Ranks, small: Small, tmp_path: Path, engine: str, lora_r: int
) -> None:
    changed = {"deepspeed": engine, "lora_r": lora_r, "per_device_train_batch_size": 2}
    run = two_ranks.run("train", **values(small, tiny_gemma3(), tmp_path / "run", **changed))[0]
    note = next(note for note in run["notes"] if "rows of text never reach model.vision_tower" in note)
    assert "model.multi_modal_projector" in note and "parameters are frozen" in note
    assert verify(run["path"])["largest_difference"] < 1e-4
    saved = load_file(next(Path(run["path"], "model").glob("*.safetensors")))
    if lora_r:
        assert not [name for name in saved if "vision" in name or "projector" in name]
        return
    before = load_file(Path(tiny_gemma3(), "model.safetensors"))
    moved = {name for name, tensor in saved.items() if not tensor.equal(before[name])}
    assert saved.keys() == before.keys() and moved
    assert {"vision_tower" in name or "multi_modal_projector" in name for name in moved} == {False}
    plain = {"deepspeed": "none", "per_device_train_batch_size": 8, "verify_model": False}
    whole = one_rank.run("train", **values(small, tiny_gemma3(), tmp_path / "whole", **plain))[0]
    assert logged(run, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-5)


# ---- adapters ----


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_training_continues_from_a_runs_adapter(
    two_ranks: Ranks, small: Small, tmp_path: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small.recipes["alpaca"][1]["model_name_or_path"]
    lora = {"deepspeed": engine, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": "q_proj,v_proj"}
    first = two_ranks.run("train", **values(small, model, tmp_path / "first", learning_rate=0.01, **lora))[0]
    adapter = Path(first["path"], "model")
    still = values(small, adapter, tmp_path / "still", deepspeed=engine, learning_rate=0.0, lora_r=4)
    second = two_ranks.run("train", **still)[0]
    assert second["metrics"]["eval_loss"] == pytest.approx(first["metrics"]["eval_loss"], abs=1e-5)
    assert any(f"training continues from the adapter {adapter}" in note for note in second["notes"])
    before, after = (load_file(Path(run["path"], "model", "adapter_model.safetensors")) for run in (first, second))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    further = values(small, adapter, tmp_path / "further", deepspeed=engine, learning_rate=0.01, lora_r=4)
    third = two_ranks.run("train", **further)[0]
    assert third["metrics"]["eval_loss"] < first["metrics"]["eval_loss"]
    assert verify(third["path"])["largest_difference"] < 1e-2
    base = evaluate(third["path"], base=True)["figures"]["loss"]
    assert base == pytest.approx(first["metrics"]["eval_loss"], abs=1e-5), "before this run there was the first adapter"
    with pytest.raises(UserError, match=rf"is inside a run folder; give the run folder itself, {first['path']}"):
        open_run(str(adapter))


# ---- more tokens than the embedding has rows ----


@needs_shared
def test_a_padding_token_beyond_the_embedding_is_replaced(one_rank: Ranks, small: Small, tmp_path: Path) -> None:
    case = values(small, CASES / "tok_pad", tmp_path / "run", per_device_train_batch_size=4)
    run = one_rank.run("train", **case)[0]
    assert any("padding token '[PAD]' (id 512) has no row in the embedding (512 rows)" in note for note in run["notes"])
    assert all(math.isfinite(loss) for loss in logged(run, "loss"))
    assert len(chat(run["path"], ["Count to 3."], max_new_tokens=3)) == 2
    beyond = r"token '\[PAD\]' has id 512, but the model's embedding has 512 rows"
    with pytest.raises(UserError, match=beyond):
        chat(run["path"], ["Count [PAD]."], max_new_tokens=3)
    rows = write_rows(tmp_path / "pad.jsonl", [{"instruction": "Count [PAD].", "output": "1 2"}])
    for measure in (lambda: evaluate(run["path"], dataset=rows), lambda: generate(run["path"], rows, max_new_tokens=3)):
        with pytest.raises(UserError, match=beyond):
            measure()


@needs_shared
def test_other_tokens_beyond_the_embedding_are_refused_before_weights_are_loaded(
    one_rank: Ranks, small: Small, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(CASES / "tok_notresized", folder)
    folder.chmod(0o755)
    (folder / "model.safetensors").unlink()
    case = values(small, folder, tmp_path / "run", prompt_style="chat")
    with pytest.raises(
        UserError, match=r"token '<\|im_start\|>' has id 512, .* 512 rows .* train rows hold it \(.*line 1\)"
    ):
        one_rank.run("train", **case)
    settings = folder / "tokenizer_config.json"
    settings.chmod(0o644)
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token": "<|im_end|>"}))
    with pytest.raises(UserError, match=r"token '<\|im_end\|>' has id 513, .* it is the end token \(eos_token\)"):
        one_rank.run("train", **values(small, folder, tmp_path / "other"))
