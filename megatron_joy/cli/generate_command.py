"""`joy generate`: writes text with a checkpoint or a Hugging Face folder."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_joy.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from megatron_joy.infer.decoder import Decoder
    from megatron_joy.infer.generate import Limits
    from megatron_joy.infer.sampling import Sampling
    from megatron_joy.infer.speculative import Acceptance
    from megatron_joy.infer.weights import Weights


# One token at a time through narrow matrices, threads wait for each other longer than they work.
SMALL_WIDTH = 1024


@dataclass
class _Texts:
    """What was written so far, prompt by prompt; `echo` prints it as it comes (one prompt only)."""

    prompts: Sequence[str]
    streams: list[Any]
    texts: list[str]
    counts: list[int]
    echo: bool

    def add(self, row: Sequence[int | None]) -> None:
        """One token of each prompt."""
        for i, token in enumerate(row):
            if token is not None:
                self.counts[i] += 1
                self._write(i, self.streams[i].add(token))

    def finish(self) -> None:
        """What was held back."""
        for i, stream in enumerate(self.streams):
            self._write(i, stream.finish())

    def _write(self, i: int, text: str) -> None:
        self.texts[i] += text
        if self.echo:
            print(text, end="", flush=True)


def command(
    model: Annotated[Path, typer.Argument(metavar="CKPT|HFDIR", help="A run, a checkpoint, or a Hugging Face folder.")],
    prompt: Annotated[list[str], typer.Option(metavar="TEXT", help="Where to go on from; may be given several times.")],
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up this share.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same text.")] = 0,
    speculative: Annotated[bool, typer.Option("--speculative", help="Draft with the MTP layer, greedily.")] = False,
    drafts: Annotated[int, typer.Option(help="Tokens to draft at a time, 1 to 3.")] = 1,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16; fp32 on a CPU, else as stored.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(metavar="DIR", help="The tokenizer's folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON value.")] = False,
) -> None:
    """Write on from a prompt; the text comes as it is written and ends at the end of a document.

    With --speculative the text is that of plain greedy decoding, and the mean number of tokens that one pass of the
    model gave is said at the end. Example: joy generate runs/joyai_tiny --prompt 'def main(' --max-new-tokens 64
    """
    from megatron_joy.infer.generate import Limits, TextStream
    from megatron_joy.infer.sampling import Sampling
    from megatron_joy.infer.speculative import Acceptance
    from megatron_joy.infer.weights import open_weights

    sampling = Sampling(temperature, top_k, top_p, seed)
    _check_speculative(speculative, sampling.greedy, prompt)
    with open_weights(model, tokenizer) as weights:
        for note in weights.notes:
            print(f"note: {note}", file=sys.stderr)
        decoder = _decoder(weights, precision)
        encoder = _tokenizer(weights)
        limits = Limits(max_new_tokens, weights.stop)
    streams = [TextStream(encoder, encoder.encode(text, add_special_tokens=False).ids) for text in prompt]
    texts = _Texts(prompt, streams, [""] * len(prompt), [0] * len(prompt), echo=not as_json and len(prompt) == 1)
    if texts.echo:
        print(prompt[0], end="", flush=True)
    acceptance = Acceptance() if speculative else None
    started = time.perf_counter()
    for row in _rows(decoder, [stream.prompt for stream in streams], sampling, limits, acceptance, drafts):
        texts.add(row)
    texts.finish()
    _report(texts, time.perf_counter() - started, acceptance, as_json)


def _check_speculative(speculative: bool, greedy: bool, prompts: Sequence[str]) -> None:
    if speculative and not greedy:
        raise UserError("--speculative: drafts are checked greedily; leave out --temperature or set it to 0")
    if speculative and len(prompts) > 1:
        raise UserError(f"--speculative: takes one prompt at a time, {len(prompts)} were given")


def _decoder(weights: "Weights", precision: str | None) -> "Decoder":
    import torch

    from megatron_joy.infer.weights import DTYPES, build_decoder

    if precision is not None and precision not in DTYPES:
        raise UserError(f"--precision {precision}: expected {' or '.join(DTYPES)}")
    on_gpu = torch.cuda.is_available()
    if weights.model.hidden_size < SMALL_WIDTH:
        torch.set_num_threads(1)
    # bf16 is several times slower than fp32 on most CPUs.
    return build_decoder(weights, precision or (None if on_gpu else "fp32"), torch.device("cuda" if on_gpu else "cpu"))


def _tokenizer(weights: "Weights") -> "Tokenizer":
    if weights.tokenizer is None:
        raise UserError(f"{weights.where}: has no tokenizer; name its folder with --tokenizer")
    return weights.tokenizer.load()


def _rows(
    decoder: "Decoder",
    prompts: list[list[int]],
    sampling: "Sampling",
    limits: "Limits",
    acceptance: "Acceptance | None",
    drafts: int,
) -> Iterator[Sequence[int | None]]:
    from megatron_joy.infer.generate import generate
    from megatron_joy.infer.speculative import generate_speculatively

    if acceptance is None:
        yield from generate(decoder, prompts, sampling, limits)
        return
    for token in generate_speculatively(decoder, prompts[0], limits, drafts, acceptance):
        yield [token]


def _report(texts: _Texts, seconds: float, acceptance: "Acceptance | None", as_json: bool) -> None:
    rate = sum(texts.counts) / seconds if seconds > 0 else 0.0
    if as_json:
        rows = zip(texts.prompts, texts.texts, texts.counts, strict=True)
        content: dict[str, Any] = {
            "texts": [{"prompt": prompt, "text": text, "tokens": count} for prompt, text, count in rows],
            "tokens_per_second": rate,
            "acceptance_length": acceptance.length if acceptance else None,
        }
        print(json.dumps(content, indent=2, ensure_ascii=False))
        return
    if texts.echo:
        print()
    else:
        print("\n\n".join(prompt + text for prompt, text in zip(texts.prompts, texts.texts, strict=True)))
    drafted = f", {acceptance.length:.2f} tokens a pass" if acceptance else ""
    print(f"{sum(texts.counts)} tokens, {rate:.1f} a second{drafted}", file=sys.stderr)
