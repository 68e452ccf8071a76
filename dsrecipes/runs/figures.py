"""Which figures does a run log, and where is each of them shown?

The one list that the progress bar, the footer and the report read. Adding an entry here shows a new key of log.jsonl in all
of them; TensorBoard gets every number that is logged.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One key of log.jsonl: its names, its unit, and its places. An empty text means that it is not shown there."""

    en: str
    zh: str
    unit: str = ""
    bar: str = ""
    """Format in the progress bar, such as `lr {:.1e}`."""
    footer: str = ""
    """Name in the line that ends a run."""
    chart: str = ""
    """Chart of the report; figures with the same chart are lines of it."""
    line: str = ""
    """Which line of the chart it is: train or validation."""
    in_result: bool = False
    """Whether the first table of the report has its last value."""
    final: str = ""
    """Key of metrics.json for that table, where it is not the same."""

    def label(self, lang: str) -> str:
        """The name with its unit, in `en` or `zh-TW`."""
        return with_unit(self.en if lang == "en" else self.zh, self.unit, lang)


def with_unit(name: str, unit: str, lang: str) -> str:
    """`Loss (nats)`, with the parentheses of the language."""
    if not unit:
        return name
    return f"{name} ({unit})" if lang == "en" else f"{name}（{unit}）"


FIGURES = {
    "loss": Figure(
        en="Training loss",
        zh="訓練損失",
        unit="nats",
        bar="loss {:.3f}",
        chart="loss",
        line="train",
        in_result=True,
        final="train_loss",
    ),
    "eval_loss": Figure(
        en="Validation loss",
        zh="驗證損失",
        unit="nats",
        bar="eval {:.3f}",
        footer="validation loss",
        chart="loss",
        line="validation",
        in_result=True,
    ),
    "eval_perplexity": Figure(en="Validation perplexity", zh="驗證困惑度", footer="perplexity", in_result=True),
    "eval_accuracy": Figure(
        en="Validation accuracy", zh="驗證準確率", footer="accuracy", chart="accuracy", line="validation", in_result=True
    ),
    "eval_macro_f1": Figure(en="Validation macro-F1", zh="驗證 macro-F1", footer="macro-F1", in_result=True),
    "eval_pearson": Figure(
        en="Validation Pearson correlation", zh="驗證 Pearson 相關係數", footer="Pearson", in_result=True
    ),
    "test_loss": Figure(en="Test loss", zh="測試損失", unit="nats", footer="test loss"),
    "test_accuracy": Figure(en="Test accuracy", zh="測試準確率", footer="test accuracy", in_result=True),
    "test_macro_f1": Figure(en="Test macro-F1", zh="測試 macro-F1", footer="test macro-F1"),
    "test_pearson": Figure(en="Test Pearson correlation", zh="測試 Pearson 相關係數", footer="test Pearson"),
    "learning_rate": Figure(en="Learning rate", zh="學習率", bar="lr {:.1e}", chart="learning_rate"),
    "grad_norm": Figure(en="Gradient norm", zh="梯度範數", bar="norm {:.2f}", chart="grad_norm"),
    "tokens_per_second": Figure(
        en="Tokens per second", zh="每秒詞元數", bar="{:,.0f} tok/s", chart="tokens_per_second", in_result=True
    ),
    "samples_per_second": Figure(en="Rows per second", zh="每秒列數", bar="{:.3g} rows/s"),
    "peak_memory_gb": Figure(
        en="Peak memory", zh="記憶體峰值", unit="GB", bar="{:.1f} GB", chart="peak_memory_gb", in_result=True
    ),
}
"""Key of log.jsonl or metrics.json -> where it is shown, in the order of the bar and of the tables."""
_CHART_NAMES = {"loss": ("Loss", "損失")}
"""Names of charts with more than one figure; any other chart is called like its figure."""


def chart_titles(lang: str) -> dict[str, str]:
    """Chart -> its title, in the order of the report."""
    titles: dict[str, str] = {}
    for figure in FIGURES.values():
        if figure.chart and figure.chart not in titles:
            en, zh = _CHART_NAMES.get(figure.chart, (figure.en, figure.zh))
            titles[figure.chart] = with_unit(en if lang == "en" else zh, figure.unit, lang)
    return titles
