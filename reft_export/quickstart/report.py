"""The quickstart's report: one HTML file with its plots inside, nothing to fetch."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from reft_export.console import size, worst_rows
from reft_export.evaluation.quantization_report import trimmed
from runtimes.version import VERSION

BASE, STEERED, LIMIT, GRID = "#8a93a3", "#0b7285", "#d9480f", "#e5e8ec"

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1c2430; max-width: 62rem; margin: 2.5rem auto; padding: 0 1.25rem }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.4rem }
p.lead { color: #566070; margin-top: 0 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1.5rem }
figure { margin: 0 } figcaption { color: #566070; font-size: .9rem } svg { width: 100%; height: auto }
table { border-collapse: collapse; font-size: .88rem; width: 100% }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #e5e8ec }
th { color: #566070; font-weight: 600 } .fail { color: #d9480f; font-weight: 700 }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin: .4rem 0 1.4rem }
.pair div { padding: .7rem .9rem; border-left: 3px solid } .pair b { display: block; font-size: .8rem }
.pair .b { border-color: #8a93a3; background: #f6f7f9 } .pair .s { border-color: #0b7285; background: #eef7f8 }
"""


COMPARED = (
    "Static int8 fixes the ranges of activations: measured on the base alone, or with the edits on. A refit re-trains the adapter for a "
    "few steps on the int4 weights. Agreement: the share of fp32's steered answers that the bundle would say, token by token."
)
GATED = "(Steered - base) in the quantized bundle against float32 eager PyTorch; what keeps too little of it makes no bundle."


def write_report(path: Path, story: Any) -> None:
    """Writes ``story`` (quickstart.story.Story) to ``path``."""
    plots = (
        (_loss, "Training loss of the adapter; the base is frozen."),
        (_parity, "Largest logit error of every rung, relative to the largest logit, beside its budget. Left is better."),
        (_delta, "Delta parity: how much of (steered - base) in float32 eager PyTorch is left on the device. 1 is all of it."),
        (_success, f"Held-out prompts whose answer {story.says}."),
        (_sizes, "Size of the graph and its weights, and time per decoded token."),
    )
    figures = "".join(f"<figure>{_svg(draw, story)}<figcaption>{text}</figcaption></figure>" for draw, text in plots)
    pairs = "".join(
        f'<p><b>{html.escape(prompt)}</b></p><div class="pair"><div class="b"><b>base</b>{html.escape(base)}</div>'
        f'<div class="s"><b>steered</b>{html.escape(steered)}</div></div>'
        for prompt, base, steered in story.answers
    )
    rungs = worst_rows(story.parity)
    variants = [
        (
            v.name,
            size(v.size),
            f"{v.base_rate:.0%}",
            f"{v.steered_rate:.0%}",
            f"{v.delta_cosine:.5f}",
            f"{v.delta_norm:.4f}",
            f"{v.ttft_ms:.2f}",
            f"{v.decode_ms:.3f}",
            f"{v.decode_ratio:.3f}",
        )
        for v in story.variants
    ]
    refused = "".join(f"<p><b>No {name} bundle</b>: its gate refused it. {html.escape(why)}</p>" for name, why in story.refused.items())
    header = ("bundle", "graph", "base", "steered", "delta cosine", "delta norm", "TTFT ms", "decode ms", "steered / base")
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>reft-export quickstart</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>
<h1>reft-export quickstart</h1>
<p class="lead">Trained, exported, folded, quantized, run and proven in {story.seconds:.0f} s by reft-export {VERSION}.</p>
<h2>The same prompt, the same {story.answered_by} bundle, with and without the adapter</h2>{pairs}
<h2>Figures</h2><div class="plots">{figures}</div>
<h2>Variants</h2>{_table(header, variants)}
<p class="lead">Times are the fastest of five runs of one row, 64 prompt tokens and 24 steps, on the machine that wrote this page;
steered / base is the median over pairs of runs.</p>
<h2>What quantization left of the steering</h2>{_table(*trimmed(story.quantization))}
<p class="lead">{COMPARED if story.quantization.refits else GATED}</p>{refused}
<h2>Parity, rung by rung</h2>{_table(story.ladder.HEADER, rungs)}
</body></html>
"""
    path.write_text(page, encoding="utf-8")


def _svg(draw: Callable[[Any, Any], None], story: Any) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif", "svg.hashsalt": "reft-export"}):
        figure = Figure(figsize=(5.2, 3.1), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes, story)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = "".join(text.getvalue().partition("<svg")[1:])
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)


def _loss(axes: Any, story: Any) -> None:
    axes.plot([r.step for r in story.history], [r.loss for r in story.history], color=STEERED)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.grid(color=GRID)


def _parity(axes: Any, story: Any) -> None:
    groups: dict[str, tuple[float, float]] = {}
    for rung in story.parity.rungs:
        name = rung.name.partition(": ")[0]
        error, limit = rung.figures.max_relative, rung.budget.logits
        groups[name] = (max(error, groups.get(name, (0.0, 0.0))[0]), limit)
    names = list(groups)
    axes.barh(names, [max(groups[n][0], 1e-9) for n in names], color=STEERED, height=0.6)
    axes.scatter([groups[n][1] for n in names], names, color=LIMIT, marker="|", s=120, label="budget")
    axes.set_xscale("log")
    axes.tick_params(axis="y", labelsize=6.5)
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 0.98))


def _delta(axes: Any, story: Any) -> None:
    names = [v.name for v in story.variants]
    bars = axes.bar(names, [v.delta_cosine for v in story.variants], color=STEERED, width=0.5)
    axes.bar_label(bars, fmt="%.4f")
    low = min(v.delta_cosine for v in story.variants)
    axes.set(ylabel="cosine", ylim=(max(0.0, min(0.9, low) - 0.05), 1.02))


def _success(axes: Any, story: Any) -> None:
    places = range(len(story.variants))
    for shift, color, label, rates in (
        (-0.18, BASE, "base", [v.base_rate for v in story.variants]),
        (0.18, STEERED, "steered", [v.steered_rate for v in story.variants]),
    ):
        bars = axes.bar([p + shift for p in places], [100 * r for r in rates], width=0.34, color=color, label=label)
        axes.bar_label(bars, fmt="%.0f %%")
    axes.set_xticks(list(places), [v.name for v in story.variants])
    axes.set(ylabel="% of prompts", ylim=(0, 118))
    axes.legend(frameon=False, ncols=2, loc="upper left")


def _sizes(axes: Any, story: Any) -> None:
    names = [v.name for v in story.variants]
    bars = axes.bar(names, [v.size / 1e6 for v in story.variants], color=BASE, width=0.5)
    axes.bar_label(bars, [f"{v.size / 1e6:.1f} MB\n{v.decode_ms:.2f} ms/token" for v in story.variants])
    axes.set(ylabel="MB", ylim=(0, 1.35 * max(v.size for v in story.variants) / 1e6))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join(
        "<tr>" + "".join(f"<td{' class=fail' if c == 'FAIL' else ''}>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
