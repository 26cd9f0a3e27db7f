"""Trains a small MoE language model with its experts spread over ranks, beside the same model on one rank.

    python examples/moe_lm.py [--num-processes 4] [--ranks-per-node L] [--device auto|cpu|cuda] [--steps 150]
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import launcher
import text
from expert_parallel import DenseMoE, Dispatcher, ExpertParallelMoE, init_parameters, is_expert_parameter, make_buffer

# Both models start equal and round at the same places, and an expert gets the same rows in the same order in both. What
# differs is the order of sums over tokens in the replicated part. There float32 would do for learning, but not for
# comparing: its 1e-7 makes a token near the border between two experts go the other way in one of the two models within
# a few steps, and from then on their losses differ by 1e-3. Hence that part is float64 here. Its 1e-16 stays far below
# what a bfloat16 on the wire can show, and losses that differ at all point at the library.
TOLERANCE = 1e-6  # largest difference of the losses in any step

PROMPT = "The value of the expression is"
OUT = Path(__file__).resolve().parent / "out"


@dataclasses.dataclass
class Settings:
    """The model and its training; the batch is that of all ranks together."""

    vocab_size: int = 1024
    context: int = 64  # tokens
    hidden: int = 128
    num_heads: int = 4
    num_layers: int = 2
    ffn_hidden: int = 128
    num_experts: int = 8
    num_topk: int = 2
    batch: int = 16
    num_steps: int = 150
    learning_rate: float = 1e-2
    num_warmup_steps: int = 20
    seed: int = 7
    num_new_tokens: int = 40


# --- The model ------------------------------------------------------------------------------------------------------
class Block(nn.Module):
    """Causal attention, then a MoE layer, each on top of the sum of what came before."""

    def __init__(self, settings: Settings, moe: nn.Module) -> None:
        super().__init__()
        hidden = settings.hidden
        self.num_heads = settings.num_heads
        self.norm_attention, self.norm_moe = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.project = nn.Linear(hidden, hidden, bias=False)
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.num_heads, hidden // self.num_heads)
        attention = functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + self.project(attention.transpose(1, 2).reshape(x.shape))
        return x + self.moe(self.norm_moe(x).view(-1, hidden)).view(x.shape)


class LanguageModel(nn.Module):
    """Predicts the next token of [batch, length] tokens. `make_moe` decides whether the experts are spread."""

    def __init__(self, settings: Settings, make_moe: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.context = settings.context
        self.token = nn.Embedding(settings.vocab_size, settings.hidden)
        self.position = nn.Embedding(settings.context, settings.hidden)
        self.blocks = nn.ModuleList(Block(settings, make_moe()) for _ in range(settings.num_layers))
        self.norm = nn.RMSNorm(settings.hidden)
        self.head = nn.Linear(settings.hidden, settings.vocab_size, bias=False)
        init_parameters(self, settings.seed)
        for name, parameter in self.named_parameters():
            if not is_expert_parameter(name):
                parameter.data = parameter.data.double()  # see TOLERANCE

    def forward(self, tokens: Tensor) -> Tensor:
        x = (self.token(tokens) + self.position.weight[:tokens.shape[1]]) * self.token.embedding_dim**0.5
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@torch.no_grad()
def continue_text(model: LanguageModel, tokens: Tensor, num_new_tokens: int, seed: int) -> Tensor:
    """Adds sampled tokens to `tokens` [batch, length]; a batch of 0 takes part in the communication only."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_new_tokens):
        logits = model(tokens[:, -model.context:])[:, -1].cpu()
        new = torch.empty(0, 1, dtype=torch.int64)
        if len(tokens):
            new = torch.multinomial((logits / 0.6).softmax(dim=-1), 1, generator=generator)
        tokens = torch.cat([tokens, new.to(tokens.device)], dim=1)
    return tokens


# --- Training -------------------------------------------------------------------------------------------------------
def train_on_rank(context: launcher.Context, settings: Settings, tokens: Tensor, prompt: list[int]) -> None:
    """One rank of the expert-parallel model. Reports the loss over all ranks and, from rank 0, the continued text."""
    dispatcher = Dispatcher(make_buffer(context.group, settings.hidden))
    widths = settings.hidden, settings.ffn_hidden, settings.num_experts, settings.num_topk
    model = LanguageModel(settings, lambda: ExpertParallelMoE(dispatcher, *widths)).to(context.device)
    share = settings.batch // context.num_ranks
    mine = slice(context.rank * share, (context.rank + 1) * share)
    _train(model, settings, tokens, mine, context)
    # Only rank 0 has a sentence to go on with. The others bring no tokens, but their experts are needed.
    batch = torch.tensor([prompt], device=context.device)[:1 if context.rank == 0 else 0]
    continued = continue_text(model, batch, settings.num_new_tokens, settings.seed)
    if context.rank == 0:
        context.report(("text", continued[0].tolist()))
    dispatcher.destroy()


def train_alone(context: launcher.Context, settings: Settings, tokens: Tensor, prompt: list[int], num_ranks: int,
                ranks_per_node: int | None) -> None:
    """The same model and batches in one process, without the library; it rounds as the wire of `num_ranks` ranks."""
    widths = settings.hidden, settings.ffn_hidden, settings.num_experts, settings.num_topk
    layers: list[DenseMoE] = []

    def make_layer() -> DenseMoE:
        layers.append(DenseMoE(num_ranks, *widths, ranks_per_node))
        return layers[-1]

    model = LanguageModel(settings, make_layer).to(context.device)
    _train(model, settings, tokens, slice(None), context)
    for layer in layers:
        layer.wire.num_owners = 1  # the sentence is rank 0's
    batch = torch.tensor([prompt], device=context.device)
    continued = continue_text(model, batch, settings.num_new_tokens, settings.seed)
    context.report(("text", continued[0].tolist()))


def _train(model: LanguageModel, settings: Settings, tokens: Tensor, mine: slice, context: launcher.Context) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    for step in range(settings.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _ramp(step, settings)
        batch = _sample_batch(settings, tokens, step)[mine].to(context.device)
        logits = model(batch[:, :-1])
        # The mean over the tokens of all ranks. Of this loss, experts need no further scaling: the gradients of all
        # tokens that they served have come to them with the backward pass. Replicated parameters need the sum.
        num_tokens = settings.batch * settings.context
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum") / num_tokens
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        total = loss.detach()
        if context.group is not None:
            total = _sum_over_ranks(model, total)
        optimizer.step()
        if context.rank == 0:
            context.report(("loss", total.item()))


def _ramp(step: int, settings: Settings) -> float:
    """Up over the first steps, then down to nearly nothing."""
    return min((step + 1) / settings.num_warmup_steps, 1 - step / settings.num_steps)


def _sample_batch(settings: Settings, tokens: Tensor, step: int) -> Tensor:
    """[batch, context + 1], the same on every rank."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    starts = torch.randint(len(tokens) - settings.context, (settings.batch, ), generator=generator)
    return tokens[starts.unsqueeze(1) + torch.arange(settings.context + 1)]


def _sum_over_ranks(model: nn.Module, loss: Tensor) -> Tensor:
    """One all-reduce for the loss and the gradients of the replicated parameters. Returns the loss."""
    grads = [p.grad for name, p in model.named_parameters() if not is_expert_parameter(name)]
    flat = torch.cat([loss.reshape(1), *(grad.flatten() for grad in grads)])
    dist.all_reduce(flat)
    for grad, summed in zip(grads, flat[1:].split([grad.numel() for grad in grads])):
        grad.copy_(summed.view(grad.shape))
    return flat[0]


# --- What the parent does ---------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Result:
    """Losses per step and continued text, of the ranks and of the one rank."""

    losses: list[float] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    options = launcher.parse_options(__doc__, argv, default_steps=Settings.num_steps)
    settings, num_ranks = Settings(num_steps=options.steps), options.num_processes
    if settings.num_experts % num_ranks or settings.batch % num_ranks:
        raise SystemExit(f"--num-processes must divide {settings.num_experts} experts and a batch of {settings.batch}")
    device = launcher.resolve_device(options.device)
    launcher.print_header("A MoE language model trained over ranks, beside the same model on one rank")
    corpus = text.load_text()
    tokenizer = text.train_tokenizer(corpus, settings.vocab_size)
    settings.vocab_size = len(tokenizer.pieces)
    tokens = tokenizer.encode(corpus)
    print(
        f"Text: pydoc_data.topics of Python {platform.python_version()} (its language reference), "
        f"{len(corpus.encode())} bytes, {len(tokens)} tokens of {settings.vocab_size}\n"
        f"{launcher.describe_ranks(options)} on {device}; {settings.num_layers} layers, hidden {settings.hidden}, "
        f"{settings.num_experts} experts each, top-{settings.num_topk}; "
        f"{settings.batch} x {settings.context} tokens a step",
        flush=True)
    start = time.perf_counter()
    spread, alone = _train_both(settings, torch.tensor(tokens), tokenizer.encode(PROMPT), options, device)
    seconds = time.perf_counter() - start
    report = _summarize(spread, alone, settings, tokenizer, seconds)
    report.update(num_ranks=num_ranks, device=device, text_bytes=len(corpus.encode()))
    _save(report)
    return 0 if report["passed"] else 1


def _train_both(settings: Settings, tokens: Tensor, prompt: list[int], options: argparse.Namespace,
                device: str) -> tuple[Result, Result]:
    num_ranks, per_node = options.num_processes, options.ranks_per_node
    workers = launcher.make_workers(train_on_rank, num_ranks, (settings, tokens, prompt))
    workers.append(launcher.Worker("one rank", train_alone, (settings, tokens, prompt, num_ranks, per_node)))
    spread, alone = Result(), Result()
    interval = max(1, settings.num_steps // 10)
    print(f'\n{"step":>6}{f"{num_ranks} ranks":>12}{"one rank":>12}{"difference":>13}')
    with contextlib.closing(launcher.Progress(settings.num_steps, "step")) as progress:
        for name, (kind, value) in launcher.run(workers, device, per_node):
            result = alone if name == "one rank" else spread
            if kind == "text":
                result.tokens = value
                continue
            result.losses.append(value)
            step = len(result.losses)
            if min(len(spread.losses), len(alone.losses)) < step:
                continue  # the other has not come so far
            progress.advance()
            if step == 1 or step % interval == 0:
                a, b = spread.losses[step - 1], alone.losses[step - 1]
                progress.print(f"{step:6}{a:12.5f}{b:12.5f}{abs(a - b):13.1e}")
    return spread, alone


def _summarize(spread: Result, alone: Result, settings: Settings, tokenizer: text.Tokenizer,
               seconds: float) -> dict[str, Any]:
    differences = [abs(a - b) for a, b in zip(spread.losses, alone.losses, strict=True)]
    passed = all(difference <= TOLERANCE for difference in differences)  # false for NaN
    texts = [tokenizer.decode(result.tokens) for result in (spread, alone)]
    print(
        f"\n{settings.num_steps} steps of both in {seconds:.0f} s. The losses differ by {max(differences):.1e} at most")
    print(f"{'PASS' if passed else 'FAIL'}: the losses are {'equal' if passed else 'NOT equal'} within the tolerance, "
          f"{TOLERANCE:.0e}")
    print("\nThe ranks continue a sentence (rank 0 brings the tokens, all bring their experts):")
    print(f"  {texts[0]!r}")
    print("The model on one rank goes on with the same words." if texts[0] ==
          texts[1] else f"The model on one rank:\n  {texts[1]!r}")
    return {
        "passed": passed,
        "tolerance": TOLERANCE,
        "largest_difference": max(differences),
        "seconds": seconds,
        "losses_ranks": spread.losses,
        "losses_one_rank": alone.losses,
        "text_ranks": texts[0],
        "text_one_rank": texts[1],
        "settings": dataclasses.asdict(settings),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _save(report: dict[str, Any]) -> None:
    OUT.mkdir(exist_ok=True)
    files = [OUT / "moe_lm.json"]
    files[0].write_text(json.dumps(report, indent=1))
    try:
        _plot(report, OUT / "moe_lm.png")
        files.append(OUT / "moe_lm.png")
    except ImportError:
        print("No plot: matplotlib is not installed")
    print("Saved:", ", ".join(str(path) for path in files))


def _plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    ranks, one = report["losses_ranks"], report["losses_one_rank"]
    steps = range(1, len(ranks) + 1)
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=[2, 1])
    top.plot(steps, one, color="0.7", linewidth=5, label="one rank, without the library")
    top.plot(steps, ranks, color="tab:blue", linewidth=1.2, label=f'{report["num_ranks"]} ranks, expert-parallel')
    top.set(ylabel="loss", title=f'MoE language model on {report["text_bytes"]} bytes of Python documentation')
    top.legend()
    bottom.semilogy(steps, [max(abs(a - b), 1e-17) for a, b in zip(ranks, one)], color="tab:red", linewidth=1)
    bottom.axhline(report["tolerance"], color="0.5", linestyle="--", linewidth=1)
    bottom.set(xlabel="step", ylabel="|difference|")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    launcher.exit_with(main)
