"""The chart panels of a report: what each says in words, and its picture for when there is no JavaScript."""

import base64
from dataclasses import asdict, replace
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_joy.report import heat, text
from megatron_joy.report.charts import ChartSpec, Line, Reference, static_svg
from megatron_joy.report.histories import LoadHistory
from megatron_joy.report.payload import STEP_PHASES
from megatron_joy.report.png import palette_png
from megatron_joy.report.runlog import RunLog
from megatron_joy.report.summary import RunSummary, first_moe_layer

_SPIKY = 12.0
"""A gradient norm whose largest value is so many times its median is drawn on a log scale at first."""
_TOO_SPREAD = 25
_FOLDED_LAYERS = 12
_WORST_LAYERS = 8
LOSS_CAPTION = (
    "How wrong the model is about the next token, in nats; lower is better. <b>Train</b> is the batch being learned "
    "from, <b>validation</b> is text the model never trains on, <b>MTP</b> is the extra layer's guess at the token "
    "after next, always a harder task. <b>Good:</b> a steep fall, then a long gentle one, with validation close to "
    "train. A validation curve that turns up while train falls means memorising; a jump at a dashed vertical line "
    "would mean that a restart did not resume exactly."
)
LR_CAPTION = (
    "Size of the optimizer's steps. <b>Good:</b> exactly the planned shape (warm-up, plateau, decay) and no trace of "
    "restarts."
)
GRADIENT_CAPTION = (
    "Length of the whole gradient before clipping. <b>Good:</b> high at first, then flat. Lone spikes are normal when "
    "the loss recovers; steady growth comes before trouble."
)
THROUGHPUT_CAPTION = (
    "Tokens trained per second by all processes together. <b>Good:</b> flat. Short dips are checkpoints or "
    "validations; a step down that stays is a slow machine."
)
ACCEPTANCE_CAPTION = (
    "Share of the model's passes, writing on from validation texts, in which the MTP layer's first draft, its first "
    "two, all three were what the model itself would have written. One plus their sum is the tokens that a pass gives "
    "in speculative decoding. <b>Good:</b> steady; a young model that repeats itself is easy to guess, and a sudden "
    "fall is a broken MTP layer."
)
MFU_CAPTION = (
    "Share of the devices' peak (dense bf16) that the model's own products took. <b>Good:</b> flat, and near what the "
    "plan assumed. What sinks it stands in the chart of a step's time."
)
PHASES_CAPTION = (
    "Seconds of a step on the first rank. <b>Data</b> is waiting for samples, <b>communication</b> is pipeline sends, "
    "reduction of gradients, gathering of weights and waiting for slower ranks; what ranks exchange inside a layer is "
    "part of forward and backward. <b>Good:</b> forward and backward are nearly all of it, data is nothing."
)
BALANCE_CAPTION = (
    "Load of a layer's busiest expert over the fair share. Every process waits for its busiest expert, so this is "
    "wasted time. <b>Good:</b> falls towards 1× early and stays there."
)
COMPOSITION_CAPTION = (
    "Share of the samples that came from each source. <b>Good:</b> flat bands with the recipe's weights; they change "
    "only where the recipe says so."
)
OVERVIEW_CAPTION = (
    "Each row is a layer, each cell an expert, averaged over {span}. The router should spread tokens evenly: pale is "
    "the fair share, blue gets too few tokens, red too many, black (almost) none. <b>Good:</b> pale all over. A black "
    "cell is an expert that learns nothing: parameters paid for and not used."
)
HISTORY_CAPTION = (
    "The same load over the run: experts from top to bottom, steps from left to right, the colours of the map above. "
    "<b>Good:</b> coloured noise at the left edge that soon fades to pale as the router's biases do their work. "
    "A stripe that stays coloured is an expert the balancing does not reach."
)


def chart_specs(run: RunLog, summary: RunSummary) -> list[ChartSpec]:
    """The line charts of this run, without those that it has no numbers for."""
    lines = (
        Line("loss", "train", "c1"),
        Line("mtp_loss", "MTP (train)", "c3"),
        Line("validation_loss", "validation", "c2", points=True),
        Line("validation_mtp_loss", "MTP (validation)", "c4", points=True),
    )
    entropy = summary.unigram_entropy
    references = (Reference(entropy, f"unigram entropy {entropy:.2f}"),) if entropy else ()
    gradients = run.metrics["grad_norm"]
    gradients = gradients[np.isfinite(gradients) & (gradients > 0)]
    spiky = len(gradients) > 0 and float(gradients.max()) > _SPIKY * float(np.median(gradients))
    drafts = tuple(Line(f"mtp_acceptance_{n}", text.plural(n, "draft"), f"c{n}", points=True) for n in (1, 2, 3))
    specs = [
        ChartSpec("loss", "Loss", LOSS_CAPTION, "loss", lines, references, wide=True),
        ChartSpec("lr", "Learning rate", LR_CAPTION, "general", (Line("lr", "learning rate", "c1"),), zero=True),
        ChartSpec(
            "grad_norm",
            "Gradient norm",
            GRADIENT_CAPTION,
            "general",
            (Line("grad_norm", "gradient norm", "c1"),),
            _clip_reference(run.recipe),
            zero=True,
            log=spiky,
        ),
        ChartSpec(
            "throughput",
            "Throughput",
            THROUGHPUT_CAPTION,
            "count",
            (Line("tokens_per_second", "tokens per second", "c1"),),
            zero=True,
        ),
        ChartSpec("acceptance", "MTP drafts accepted", ACCEPTANCE_CAPTION, "general", drafts, zero=True),
        ChartSpec("mfu", "MFU", MFU_CAPTION, "general", (Line("mfu", "MFU", "c1"),), zero=True),
        ChartSpec(
            "phases",
            "Time of a step",
            PHASES_CAPTION,
            "general",
            tuple(Line(f"{phase}_seconds", phase, f"c{i + 1}") for i, phase in enumerate(STEP_PHASES)),
            zero=True,
        ),
    ]
    return [spec for spec in specs if any(np.isfinite(run.metrics[line.key]).any() for line in spec.lines)]


def _clip_reference(recipe: dict[str, Any]) -> tuple[Reference, ...]:
    table = recipe.get("optimizer")
    clip = table.get("clip_grad", 1.0) if isinstance(table, dict) else None
    if not isinstance(clip, (int, float)) or clip <= 0:
        return ()
    return (Reference(float(clip), f"clipped to {clip:g}"),)


def balance_spec(payload: dict[str, Any]) -> ChartSpec:
    """The chart of the busiest experts: a line a layer, or median, range and worst of many layers."""
    names = [name for name in payload["series"] if name.startswith("imbalance_")]
    if "imbalance_worst" in names:
        lines = [
            Line("imbalance_median", "median layer (band: all layers)", "c1"),
            Line("imbalance_worst", "worst layer", "c2"),
        ]
    else:
        layers = payload["load"]["layers"]
        lines = [Line(name, f"layer {layers[i]}", f"c{i + 1}") for i, name in enumerate(names)]
    even = (Reference(1.0, "even load 1×"),)
    return ChartSpec("balance", "Busiest expert", BALANCE_CAPTION, "ratio", lines, even, wide=True)


def spec_json(spec: ChartSpec) -> dict[str, Any]:
    """A chart as the page's script takes it."""
    return {key: value for key, value in asdict(spec).items() if key not in ("title", "caption")}


def chart_panel(spec: ChartSpec, payload: dict[str, Any]) -> str:
    """A panel with title, legend, static picture and caption."""
    data = [_points(payload, line.key) for line in spec.lines]
    present = [(line, points) for line, points in zip(spec.lines, data, strict=True) if len(points[0])]
    drawn = replace(spec, lines=[line for line, _ in present])
    width, height = (1120, 340) if spec.wide else (560, 240)
    last_step = max([1, *(attempt["end"] for attempt in payload["attempts"])])
    picture = static_svg(drawn, [points for _, points in present], (0, last_step), width=width, height=height)
    legend = "".join(
        f'<span class="legend-item"><i class="swatch {line.colour}{" dotted" if line.points else ""}"></i>'
        f"{escape(line.label)}</span>"
        for line in drawn.lines
    )
    return panel(spec.id, spec.title, spec.caption, picture, legend=legend, wide=spec.wide)


def _points(payload: dict[str, Any], key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    series = payload["series"].get(key)
    if series is None:
        return np.zeros(0), np.zeros(0)
    steps = np.array(payload["axes"][series["axis"]]["step"], np.float64)
    return steps, np.array([np.nan if v is None else v for v in series["mean"]], np.float64)


def panel(id: str, title: str, caption: str, picture: str = "", *, legend: str = "", wide: bool = False) -> str:
    """A panel; `caption` and `picture` are HTML, `title` is text."""
    return (
        f'<section class="panel{" wide" if wide else ""}" id="{id}"><header><h2>{escape(title)}</h2>'
        f'<div class="legend">{legend}</div><div class="panel-tools"></div></header>'
        f'<div class="plot" id="{id}-plot" data-title="{escape(title)}">{picture}</div>'
        f'<p class="caption">{caption}</p></section>'
    )


def timeline_panel(run: RunLog) -> str:
    """Attempts, checkpoints and events on the common axis; drawn by the page's script, in words without it."""
    attempts = text.plural(len(run.attempts), "attempt")
    caption = (
        f"{attempts} at this run. Solid bars are steps that count; pale ends are steps lost in a kill and run again "
        "from the checkpoint before (◆). Marks at the end of a bar: ✓ finished, ■ stopped on request, ✕ killed, "
        "! failed, ▸ still running. <b>Good:</b> short pale ends, and a ◆ shortly before every ✕."
    )
    script_off = '<p class="script-off">The tables below list attempts, checkpoints and events.</p>'
    return panel("timeline", "Timeline", caption, script_off, wide=True)


def composition_panel(payload: dict[str, Any], recipe: dict[str, Any]) -> str:
    """The data composition, its legend giving each source's share of the whole run."""
    sources = payload["sources"]
    total = sum(sources["samples"]) or 1.0
    legend = "".join(
        f'<span class="legend-item"><i class="swatch c{i + 1}"></i>{escape(name)} <b>{samples / total:.1%}</b></span>'
        for i, (name, samples) in enumerate(zip(sources["names"], sources["samples"], strict=True))
    )
    script_off = '<p class="script-off">The shares of the whole run stand in the legend.</p>'
    return panel("composition", "Data composition", COMPOSITION_CAPTION, script_off, legend=legend)


def overview_panel(run: RunLog, load: LoadHistory) -> str:
    """The map of now, layers by experts, with the colour scale and the names of the dead and the overloaded."""
    first = first_moe_layer(run.recipe)
    layers, experts = load.tail_ratio.shape
    span = f"steps {load.tail_first_step:,} to {int(load.edges[-1]) - 1:,}"
    labels = [f"layer {first}", f"layer {first + layers - 1}"] if layers > 1 else [f"layer {first}"]
    overview = _figure(
        heat.encode(load.tail_ratio),
        f"Expert load of each layer over {span}",
        labels,
        ["expert 0", f"expert {experts - 1}"],
        height=min(360, max(96, layers * 24 if layers <= 12 else layers * 8)),
    )
    return (
        '<section class="panel wide" id="experts"><header><h2>Expert load now</h2>'
        f'{_scale()}</header>{overview}<p class="caption">{OVERVIEW_CAPTION.format(span=span)}</p>'
        f"{_named(load, first)}</section>"
    )


def history_panel(run: RunLog, load: LoadHistory) -> str:
    """A map over the run for each layer, experts by steps; of many layers the worst, the others folded."""
    first, layers, experts = first_moe_layer(run.recipe), *load.tail_ratio.shape
    titles = _layer_titles(load, first)
    pictures = heat.encode(load.ratio.transpose(1, 2, 0))  # [L, E, B]

    def grid(chosen: list[int]) -> str:
        figures = (
            _figure(
                pictures[layer],
                f"Expert load of layer {first + layer} over the run",
                ["expert 0", f"{experts - 1}"],
                [f"step {int(load.edges[0]):,}", f"{int(load.edges[-1]) - 1:,}"],
                height=min(200, max(112, experts * 14)),
                layer=layer,
                title=titles[layer],
            )
            for layer in chosen
        )
        return f'<div class="heat-grid{" many" if layers > 4 else ""}">{"".join(figures)}</div>'

    shown, folded = _by_concern(load) if layers > _FOLDED_LAYERS else (list(range(layers)), [])
    title = f"Expert load over the run: the {len(shown)} worst layers" if folded else "Expert load over the run"
    rest = f"<details><summary>The other {len(folded)} layers</summary>{grid(folded)}</details>" if folded else ""
    return (
        f'<section class="panel wide" id="experts-history"><header><h2>{title}</h2></header>{grid(shown)}'
        f'<p class="caption">{HISTORY_CAPTION}</p>{rest}</section>'
    )


def _by_concern(load: LoadHistory) -> tuple[list[int], list[int]]:
    """The layers with the most dead experts, then with the busiest ones; and the others. Both in the model's order."""
    layers = len(load.tail_imbalance)
    dead = [sum(i == layer for i, _ in load.dead) for layer in range(layers)]
    ranked = sorted(range(layers), key=lambda layer: (-dead[layer], -load.tail_imbalance[layer]))
    return sorted(ranked[:_WORST_LAYERS]), sorted(ranked[_WORST_LAYERS:])


def _figure(
    codes: NDArray[np.uint8],
    name: str,
    rows: list[str],
    columns: list[str],
    *,
    height: int,
    layer: int | None = None,
    title: str = "",
) -> str:
    encoded = base64.b64encode(palette_png(codes, heat.palette())).decode()
    data = "" if layer is None else f' data-layer="{layer}"'
    caption = f"<figcaption>{title}</figcaption>" if title else ""
    return (
        f'<figure class="heat"{data}>{caption}<div class="heat-body">'
        f'<div class="heat-y">{"".join(f"<span>{escape(label)}</span>" for label in rows)}</div>'
        f'<div class="heat-frame"><img alt="{escape(name)}" height="{height}" '
        f'src="data:image/png;base64,{encoded}"></div></div>'
        f'<div class="heat-x">{"".join(f"<span>{escape(label)}</span>" for label in columns)}</div></figure>'
    )


def _scale() -> str:
    bar = base64.b64encode(palette_png(np.arange(1, 256, dtype=np.uint8)[None, :], heat.palette())).decode()
    return (
        '<div class="scale"><span class="scale-dead"><i></i>dead</span><div class="scale-bar">'
        f'<img alt="Colour scale from a quarter of the fair share to four times" src="data:image/png;base64,{bar}">'
        "<div><span>¼×</span><span>½×</span><span>1×</span><span>2×</span><span>4×</span></div></div></div>"
    )


def _layer_titles(load: LoadHistory, first: int) -> list[str]:
    titles = []
    for layer, worst in enumerate(load.tail_imbalance):
        dead = sum(i == layer for i, _ in load.dead)
        note = f" · {dead} dead" if dead else ""
        titles.append(f"<b>Layer {first + layer}</b><span>busiest {worst:.2f}×{note}</span>")
    return titles


def _named(load: LoadHistory, first: int) -> str:
    """Dead and overloaded experts by name, at most _TOO_SPREAD of each kind."""
    parts = []
    for kind, found in (("Dead", load.dead), ("Overloaded (over 2×)", load.overloaded)):
        names = [f"layer {first + i} expert {e} ({load.tail_ratio[i, e]:.3g}×)" for i, e in found[:_TOO_SPREAD]]
        more = f" and {len(found) - _TOO_SPREAD} more" if len(found) > _TOO_SPREAD else ""
        parts.append(f"<dt>{kind}</dt><dd>{', '.join(names) + more if names else 'none'}</dd>")
    return f'<dl class="named">{"".join(parts)}</dl>'
