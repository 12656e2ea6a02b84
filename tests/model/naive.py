"""JoyAI's definition written out in plain torch, one document and one expert at a time: the oracle of these tests.

Takes weights by Megatron-core's names and shares no code with the product. Letters: n tokens of a document, h hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_joy.recipe.schema import ModelSection

Weights = dict[str, Tensor]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm by its formula."""
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary position of x [n, heads, d]: pairs of neighbours turn by position * theta^(-2i/d)."""
    n, _, d = x.shape
    speeds = theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angles = torch.arange(n, dtype=torch.float64)[:, None] * speeds
    turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], d // 2, 2))
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2)


def attention(x: Tensor, w: Weights, m: ModelSection) -> Tensor:
    """MLA of one document, x [n, h], by equations 1 to 11 of arXiv 2405.04434."""
    n, heads = x.shape[0], m.num_attention_heads
    q = norm(x @ w["linear_q_down_proj.weight"].T, w["q_layernorm.weight"], m.rms_norm_eps)
    q = (q @ w["linear_q_up_proj.weight"].T).view(n, heads, -1)
    latent, k_rope = (x @ w["linear_kv_down_proj.weight"].T).split([m.kv_lora_rank, m.qk_rope_head_dim], dim=-1)
    kv = norm(latent, w["kv_layernorm.weight"], m.rms_norm_eps) @ w["linear_kv_up_proj.weight"].T
    k_nope, v = kv.view(n, heads, -1).split([m.qk_nope_head_dim, m.v_head_dim], dim=-1)
    q_nope, q_rope = q.split([m.qk_nope_head_dim, m.qk_rope_head_dim], dim=-1)
    q = torch.cat([q_nope, rotate(q_rope, m.rope_theta)], dim=-1)
    k = torch.cat([k_nope, rotate(k_rope[:, None], m.rope_theta).expand(-1, heads, -1)], dim=-1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * (m.qk_nope_head_dim + m.qk_rope_head_dim) ** -0.5
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v).reshape(n, -1) @ w["linear_proj.weight"].T


def swiglu(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    """fc1 [2f, h] has gate rows, then up rows; fc2 [h, f]."""
    gate, up = (x @ fc1.T).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up) @ fc2.T


def route(x: Tensor, weight: Tensor, bias: Tensor, m: ModelSection) -> tuple[Tensor, Tensor]:
    """x [n, h] -> (chosen experts [n, k], their weights [n, k]); arXiv 2412.19437, equations 13 to 16."""
    scores = torch.sigmoid(x.float() @ weight.float().T)
    chosen = torch.argsort(scores + bias, dim=-1, descending=True)[:, : m.num_experts_per_tok]
    picked = torch.gather(scores, 1, chosen)
    return chosen, picked / (picked.sum(-1, keepdim=True) + 1e-20) * m.routed_scaling_factor


def moe(x: Tensor, w: Weights, m: ModelSection) -> tuple[Tensor, Tensor]:
    """x [n, h] -> ([n, h], tokens of each expert [experts])."""
    chosen, weights = route(x, w["router.weight"], w["router.expert_bias"], m)
    rows = []
    for token, experts, scales in zip(x, chosen, weights, strict=True):
        routed = [
            scale * swiglu(token, w["experts.linear_fc1"][expert], w["experts.linear_fc2"][expert])
            for expert, scale in zip(experts, scales, strict=True)
        ]
        rows.append(torch.stack(routed).sum(0))
    shared = swiglu(x, w["shared_experts.linear_fc1.weight"], w["shared_experts.linear_fc2.weight"])
    return torch.stack(rows) + shared, torch.bincount(chosen.flatten(), minlength=m.n_routed_experts)


def under(w: Weights, prefix: str) -> Weights:
    """The weights whose names begin so, without the beginning."""
    return {name.removeprefix(prefix): weight for name, weight in w.items() if name.startswith(prefix)}


@dataclass
class Document:
    """What the model says of one document."""

    hidden: Tensor  # [n, h] after the final norm
    logits: Tensor  # [n, vocabulary]
    counts: Tensor  # [moe layers, experts]


def read(tokens: Tensor, w: Weights, m: ModelSection) -> Document:
    """The main model on one document, tokens int64 [n]."""
    x = w["embedding.word_embeddings.weight"][tokens]
    counts = []
    for i in range(m.num_hidden_layers):
        a, f = under(w, f"decoder.layers.{2 * i}."), under(w, f"decoder.layers.{2 * i + 1}.")
        x = x + attention(norm(x, a["input_layernorm.weight"], m.rms_norm_eps), under(a, "self_attention."), m)
        y = norm(x, f["pre_mlp_layernorm.weight"], m.rms_norm_eps)
        if i < m.first_k_dense_replace:
            x = x + swiglu(y, f["mlp.linear_fc1.weight"], f["mlp.linear_fc2.weight"])
        else:
            out, load = moe(y, under(f, "mlp."), m)
            x = x + out
            counts.append(load)
    hidden = norm(x, w["decoder.final_norm.weight"], m.rms_norm_eps)
    return Document(hidden, hidden @ w["output_layer.weight"].T, torch.stack(counts))


def predict_after_next(hidden: Tensor, following: Tensor, w: Weights, m: ModelSection) -> Tensor:
    """The MTP layer: main hidden states of tokens t [n, h], tokens t+1 [n] -> logits of tokens t+2 [n, vocabulary]."""
    layer = under(w, "mtp.layers.0.")
    embedded = norm(w["embedding.word_embeddings.weight"][following], layer["enorm.weight"], m.rms_norm_eps)
    main = norm(hidden, layer["hnorm.weight"], m.rms_norm_eps)
    x = torch.cat([embedded, main], dim=-1) @ layer["eh_proj.weight"].T  # the embedding comes first
    a, f = under(layer, "mtp_model_layer.layers.0."), under(layer, "mtp_model_layer.layers.1.")
    x = x + attention(norm(x, a["input_layernorm.weight"], m.rms_norm_eps), under(a, "self_attention."), m)
    y = norm(x, f["pre_mlp_layernorm.weight"], m.rms_norm_eps)
    x = x + swiglu(y, f["mlp.linear_fc1.weight"], f["mlp.linear_fc2.weight"])
    return norm(x, layer["final_layernorm.weight"], m.rms_norm_eps) @ w["output_layer.weight"].T


def split_documents(row: Tensor, eod: int) -> list[Tensor]:
    """The parts of a row [s + 1] that end with eod, and what is left."""
    ends = [i + 1 for i, token in enumerate(row.tolist()) if token == eod]
    borders = [0, *ends, len(row)]
    return [row[a:b] for a, b in pairwise(borders) if a < b]


@dataclass
class Objective:
    """Sums over a step's rows."""

    main_sum: Tensor
    main_targets: int
    mtp_sum: Tensor
    mtp_targets: int
    counts: Tensor  # [moe layers, experts]

    def total(self, mtp_factor: float) -> Tensor:
        """Mean main loss + mtp_factor * mean MTP loss, each over its own targets of the whole step."""
        return self.main_sum / self.main_targets + mtp_factor * self.mtp_sum / max(self.mtp_targets, 1)


def objective(rows: Sequence[Tensor], w: Weights, m: ModelSection, eod: int) -> Objective:
    """The training objective of rows of s + 1 tokens each: of a row's last token only the target is used."""
    found = Objective(torch.zeros(()), 0, torch.zeros(()), 0, torch.zeros(0))
    loads = []
    for row in rows:
        for part in split_documents(row, eod):
            last = part.data_ptr() + part.nbytes == row.data_ptr() + row.nbytes
            inputs = part[:-1] if last else part
            if len(inputs) == 0:
                continue
            document = read(inputs, w, m)
            loads.append(document.counts)
            targets = len(part) - 1
            found.main_sum = found.main_sum + F.cross_entropy(document.logits[:targets], part[1:], reduction="sum")
            found.main_targets += targets
            if targets > 1:
                logits = predict_after_next(document.hidden[: targets - 1], part[1:-1], w, m)
                found.mtp_sum = found.mtp_sum + F.cross_entropy(logits, part[2:], reduction="sum")
                found.mtp_targets += targets - 1
    found.counts = torch.stack(loads).sum(0)
    return found
