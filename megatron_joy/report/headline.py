"""The top of a report: the run's name and state, its key figures, and what to know before looking at any curve."""

from html import escape

from megatron_joy.report import text
from megatron_joy.report.runlog import RunLog
from megatron_joy.report.summary import RECENT_ROWS, RunSummary

STATES = {
    "finished": "Finished",
    "stopped": "Stopped on request",
    "failed": "Failed",
    "killed": "Killed",
    "running": "Running",
    None: "Not started",
}
_NAMED_EXPERTS = 4
_SPELT_OUT = 100_000


def badge(summary: RunSummary) -> str:
    """The run's state in two words."""
    return f'<span class="badge {summary.status or "none"}">{STATES[summary.status]}</span>'


def meta_line(summary: RunSummary) -> str:
    """One line: what was trained, on how many processes, when."""
    parts = []
    if summary.parameters:
        counts = summary.parameters
        mtp = f", and {text.count(counts.mtp)} in the MTP layer" if counts.mtp else ""
        parts.append(
            f"{text.count(counts.total)} parameters, of which each token uses {text.count(counts.active)}{mtp}"
        )
    if summary.world_size:
        layout = f" ({escape(summary.layout)})" if summary.layout and summary.world_size > 1 else ""
        parts.append(text.plural(summary.world_size, "process", "processes") + layout)
    if summary.started:
        parts.append(f"started {text.moment(summary.started)}")
    return " · ".join(parts)


def _card(label: str, value: str, note: str, extra: str = "") -> str:
    return f'<div class="card"><h3>{label}</h3><p class="figure">{value}</p>{extra}<p class="note">{note}</p></div>'


def _with_unit(value: str, unit: str) -> str:
    return value if value == text.MISSING else f"{value} <small>{unit}</small>"


def cards(summary: RunSummary) -> str:
    """The key figures."""
    s = summary
    step = f"at step {s.best_validation_step:,}" if s.best_validation_step is not None else "no validation yet"
    now = (
        f", now {text.loss(s.validation_loss)}"
        if s.validation_loss is not None and s.validation_step != s.best_validation_step
        else ""
    )
    planned = f'<progress max="{s.steps_planned}" value="{s.steps_done}"></progress>' if s.steps_planned else ""
    share = f"{s.steps_done / s.steps_planned:.0%} of {s.steps_planned:,} planned" if s.steps_planned else "done"
    down = (s.elapsed_seconds or 0) - (s.active_seconds or 0)
    parts = [
        _card("Best validation loss", text.loss(s.best_validation_loss), step + now),
        _card("Train loss", text.loss(s.train_loss), "last step, nats per token"),
        _card("MTP loss", text.loss(s.mtp_loss), "last step, token after next"),
        _card("Steps", text.whole(s.steps_done), share, planned),
        _card("Tokens seen", text.count(s.tokens), _tokens_note(s)),
        _card(
            "Throughput",
            _with_unit(text.count(s.tokens_per_second), "tokens/s"),
            f"median of the last {RECENT_ROWS} steps{_mfu_note(s)}",
        ),
        *_memory_card(s),
        _card(
            "Time training",
            text.duration(s.active_seconds),
            f"and {text.duration(down)} between attempts" if down >= 1 and s.restarts else "first start to last step",
        ),
        _card("Restarts", text.whole(s.restarts), _restart_note(s)),
    ]
    return "".join(parts)


def _mfu_note(summary: RunSummary) -> str:
    return "" if summary.mfu is None else f", MFU {summary.mfu:.1%}"


def _memory_card(summary: RunSummary) -> list[str]:
    """Bytes on the rank that has most; nothing for a run that says nothing of memory."""
    if not summary.memory:
        return []
    kinds = ", ".join(f"{kind} {text.size(size)}" for kind, size in summary.memory.items() if kind != "peak")
    return [_card("Memory of a rank", text.size(summary.memory.get("peak")), f"at most; {kinds}")]


def _tokens_note(summary: RunSummary) -> str:
    if not summary.tokens or not summary.steps_done:
        return "none yet"
    each = summary.tokens / summary.steps_done
    return f"{text.whole(each) if each < _SPELT_OUT else text.count(each)} a step"


def _restart_note(summary: RunSummary) -> str:
    if not summary.restarts:
        return "ran in one piece" if summary.status != "killed" else "the only attempt was killed"
    return f"{text.plural(summary.kills, 'kill')}, {text.plural(summary.lost_steps, 'step')} run again"


def findings(run: RunLog, summary: RunSummary) -> str:
    """What a reader should know, as a list: good, bad and neutral, each in a sentence."""
    found = [
        _state(summary, run),
        *_learning(summary),
        *_drafting(summary),
        *_health(summary),
        *(("info", escape(notice) + ".") for notice in run.notices),
    ]
    items = "".join(f'<li class="{level}">{sentence}</li>' for level, sentence in found)
    return f'<ul class="findings">{items}</ul>'


def _state(s: RunSummary, run: RunLog) -> tuple[str, str]:
    of = f" of {s.steps_planned:,} planned" if s.steps_planned and s.steps_planned != s.steps_done else ""
    done = f"all {s.steps_done:,} planned steps" if s.steps_planned == s.steps_done else f"{s.steps_done:,}{of} steps"
    word = escape(run.attempts[-1].message) if run.attempts else ""
    whole = [c.step for c in run.checkpoints if c.committed]
    saved = f" The newest whole checkpoint is of step {max(whole):,}." if whole else " No whole checkpoint is on disk."
    said = f" Its last word: “{word}”." if word else ""
    return {
        "finished": ("good", f"The run <b>finished</b> after {done}."),
        "stopped": ("info", f"The run was <b>stopped on request</b> after {done} and can be resumed.{saved}{said}"),
        "failed": ("bad", f"The run <b>failed</b> after {done}.{saved}{said}"),
        "killed": (
            "bad",
            f"The run <b>ended without a word</b> after {done}: it was killed, or its machine was lost.{saved}",
        ),
        "running": ("info", f"The run is <b>still running</b>, {done} done."),
        None: ("info", "The run has <b>not started</b>: there are neither steps nor events yet."),
    }[s.status]


def _learning(s: RunSummary) -> list[tuple[str, str]]:
    if s.unigram_entropy is None or s.best_validation_loss is None:
        return []
    gap = s.unigram_entropy - s.best_validation_loss
    entropy = (
        f"the unigram entropy of the text ({s.unigram_entropy:.2f}), "
        "the loss of knowing only how often each token occurs"
    )
    if gap > 0:
        return [("good", f"Validation loss is <b>{gap:.2f} nats below</b> {entropy}.")]
    return [("warn", f"Validation loss is still <b>{-gap:.2f} nats above</b> {entropy}.")]


def _drafting(s: RunSummary) -> list[tuple[str, str]]:
    """What MTP's drafts are worth, and whether its layer knows less than the model's training should have taught it."""
    found = []
    if s.mtp_acceptance_length is not None:
        found.append(("info", f"With MTP's drafts a pass gives <b>{s.mtp_acceptance_length:.2f} tokens</b>."))
    entropy, main, mtp = s.unigram_entropy, s.validation_loss, s.validation_mtp_loss
    if entropy is not None and main is not None and mtp is not None and main < entropy < mtp:
        sentence = (
            f"The MTP layer's validation loss ({mtp:.2f}) is <b>above the unigram entropy</b> ({entropy:.2f}), the "
            "model's is below: the layer is young, or broken."
        )
        found.append(("warn", sentence))
    return found


def _health(s: RunSummary) -> list[tuple[str, str]]:
    found = []
    if s.restarts:
        found.append(("info", _restarts(s)))
    if s.nonfinite_steps:
        steps = text.plural(s.nonfinite_steps, "step")
        found.append(("bad", f"The loss was <b>not a number</b> in {steps} (red ✕ in the chart)."))
    if s.dead_experts:
        found.append(("bad", f"<b>{text.plural(len(s.dead_experts), 'dead expert')}</b>: {_names(s.dead_experts)}."))
    if s.overloaded_experts:
        many = text.plural(len(s.overloaded_experts), "overloaded expert")
        found.append(("warn", f"<b>{many}</b> (over twice the fair share): {_names(s.overloaded_experts)}."))
    return found


def _restarts(s: RunSummary) -> str:
    killed = s.kills - (s.status == "killed")
    times = {1: "once", 2: "twice"}.get(s.restarts, f"{s.restarts:,} times")
    why = "" if not killed else f", after {text.plural(killed, 'kill')}"
    again = f"{text.plural(s.lost_steps, 'step')} had to be run again; the curves show only what counts."
    return f"It was <b>resumed {times}</b>{why}. " + (again if s.lost_steps else "No step was lost.")


def _names(experts: list[tuple[int, int]]) -> str:
    named = [f"layer {layer} expert {expert}" for layer, expert in experts[:_NAMED_EXPERTS]]
    rest = len(experts) - _NAMED_EXPERTS
    return ", ".join(named) + (f" and {rest} more" if rest > 0 else "")
