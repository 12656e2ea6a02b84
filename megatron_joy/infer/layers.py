"""The parts of JoyAI in plain torch, with Hugging Face's weights (facts: arXiv 2604.03044, section 2.1).

Letters: b rows, t new tokens, s all tokens (cached ones and new ones), h hidden, n heads, d width without rotary
position, p with it, e width of a value, r of the key-value latent, f inner width, k experts of a token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_joy.infer.cache import LatentCache
from megatron_joy.recipe.schema import ModelSection

Read = Callable[[str], Tensor]  # a Hugging Face name -> the tensor, on its device and in its dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In fp32. x [..., h]."""
    return F.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype) * weight


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns neighbouring pairs (x[2i], x[2i+1]) by angle i. x [b, t, ..., p], angles [b, t, p / 2] fp32."""
    angles = angles.view(*angles.shape[:2], *(1 for _ in x.shape[3:]), angles.shape[-1])
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)


@dataclass(frozen=True)
class Place:
    """Where new tokens stand: rotary angles [b, t, p / 2] and which of the s tokens each may see, [b, 1, t, s] bool."""

    angles: Tensor
    visible: Tensor


def place(model: ModelSection, padding: Tensor, start: int, tokens: int) -> Place:
    """The place of `tokens` new tokens after `start` ones, in rows whose first `padding` [b] tokens are no text."""
    device = padding.device
    width = model.qk_rope_head_dim
    inverse = 1.0 / model.rope_theta ** (torch.arange(0, width, 2, device=device).float() / width)  # [p / 2]
    new = torch.arange(start, start + tokens, device=device)
    positions = (new[None] - padding[:, None]).clamp(min=0)  # [b, t]
    seen = torch.arange(start + tokens, device=device)
    causal = seen[None, None] <= new[None, :, None]  # [1, t, s]
    # Padding sees padding, so that no row of the softmax is empty.
    text = (seen[None] >= padding[:, None])[:, None] | (new[None] < padding[:, None])[..., None]  # [b, t, s]
    return Place(positions[..., None].float() * inverse, (causal & text)[:, None])


class Attention:
    """MLA. Without earlier tokens keys and values are expanded per head; with them queries go to the latents."""

    def __init__(self, model: ModelSection, read: Read, prefix: str) -> None:
        self.model, self.scale = model, (model.qk_nope_head_dim + model.qk_rope_head_dim) ** -0.5
        self.q_a, self.q_norm = read(prefix + "q_a_proj.weight"), read(prefix + "q_a_layernorm.weight")
        self.q_b = read(prefix + "q_b_proj.weight")
        self.kv_a, self.kv_norm = read(prefix + "kv_a_proj_with_mqa.weight"), read(prefix + "kv_a_layernorm.weight")
        up = read(prefix + "kv_b_proj.weight").view(model.num_attention_heads, -1, model.kv_lora_rank)  # [n, d + e, r]
        parts = up.split([model.qk_nope_head_dim, model.v_head_dim], dim=1)
        self.key_up, self.value_up = (part.contiguous() for part in parts)  # [n, d, r], [n, e, r]
        self.out = read(prefix + "o_proj.weight")

    def __call__(self, x: Tensor, at: Place, layer: int, cache: LatentCache | None) -> Tensor:
        """x [b, t, h] -> [b, t, h]."""
        model = self.model
        queries = F.linear(rms_norm(F.linear(x, self.q_a), self.q_norm, model.rms_norm_eps), self.q_b)
        queries = queries.view(*x.shape[:2], model.num_attention_heads, -1)  # [b, t, n, d + p]
        q_plain, q_rotary = queries.split([model.qk_nope_head_dim, model.qk_rope_head_dim], dim=-1)
        q_rotary = rotate(q_rotary, at.angles)
        latent, rotary = F.linear(x, self.kv_a).split([model.kv_lora_rank, model.qk_rope_head_dim], dim=-1)
        latent, rotary = rms_norm(latent, self.kv_norm, model.rms_norm_eps), rotate(rotary, at.angles)
        fresh = cache is None or cache.length == 0
        if cache is not None:
            latent, rotary = cache.append(layer, latent, rotary)
        attend = self._expanded if fresh else self._absorbed
        values = attend(q_plain, q_rotary, latent, rotary, at.visible)  # [b, t, n, e]
        return F.linear(values.flatten(2), self.out)

    def _expanded(self, q_plain: Tensor, q_rotary: Tensor, latent: Tensor, rotary: Tensor, visible: Tensor) -> Tensor:
        """latent [b, s, r], rotary [b, s, p], visible [b, 1, t, s]."""
        keys = torch.einsum("bsr,ndr->bnsd", latent, self.key_up)
        values = torch.einsum("bsr,ner->bnse", latent, self.value_up)
        shared = rotary[:, None].expand(-1, keys.shape[1], -1, -1)  # [b, n, s, p]
        queries = torch.cat([q_plain, q_rotary], dim=-1).transpose(1, 2)  # [b, n, t, d + p]
        out = F.scaled_dot_product_attention(
            queries, torch.cat([keys, shared], dim=-1), values, attn_mask=visible, scale=self.scale
        )
        return out.transpose(1, 2)

    def _absorbed(self, q_plain: Tensor, q_rotary: Tensor, latent: Tensor, rotary: Tensor, visible: Tensor) -> Tensor:
        """As above, but nothing is computed per head and cached token: q (W c) = (q W) c."""
        queries = torch.einsum("btnd,ndr->btnr", q_plain, self.key_up)
        scores = torch.einsum("btnr,bsr->bnts", queries, latent) + torch.einsum("btnp,bsp->bnts", q_rotary, rotary)
        scores = (scores.float() * self.scale).masked_fill(~visible, float("-inf"))
        mixed = torch.einsum("bnts,bsr->btnr", scores.softmax(dim=-1).to(latent.dtype), latent)
        return torch.einsum("btnr,ner->btne", mixed, self.value_up)


class Dense:
    """SwiGLU."""

    def __init__(self, read: Read, prefix: str) -> None:
        self.gate, self.up = read(prefix + "gate_proj.weight"), read(prefix + "up_proj.weight")
        self.down = read(prefix + "down_proj.weight")

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., h] -> [..., h]."""
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


class Sparse:
    """Routed experts, each run once on all its tokens, and the shared expert."""

    def __init__(self, model: ModelSection, read: Read, prefix: str) -> None:
        self.model = model
        self.router = read(prefix + "gate.weight").float()
        self.bias = read(prefix + "gate.e_score_correction_bias").float()
        self.experts = [Dense(read, f"{prefix}experts.{expert}.") for expert in range(model.n_routed_experts)]
        self.shared = Dense(read, prefix + "shared_experts.")

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [t, h] -> weights [t, k] fp32, experts [t, k]. The bias takes part in the choice, not in the weights."""
        scores = F.linear(x.float(), self.router).sigmoid()
        chosen = (scores + self.bias).topk(self.model.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(1, chosen)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.model.routed_scaling_factor, chosen

    def __call__(self, x: Tensor) -> Tensor:
        """x [b, t, h] -> [b, t, h]."""
        rows = x.flatten(0, 1)  # [b * t, h]
        weights, chosen = self.route(rows)
        order = chosen.flatten().argsort(stable=True)  # the b * t * k (token, expert) pairs, by expert
        tokens = order // chosen.shape[1]
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        mixed = torch.zeros_like(rows)
        for expert, mine, scale in zip(
            self.experts, tokens.split(counts), weights.flatten()[order].split(counts), strict=True
        ):
            if len(mine):
                mixed.index_add_(0, mine, expert(rows[mine]) * scale[:, None].to(rows.dtype))
        return mixed.view_as(x) + self.shared(x)


class Layer:
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, model: ModelSection, read: Read, prefix: str, sparse: bool) -> None:
        self.eps = model.rms_norm_eps
        self.attention_norm = read(prefix + "input_layernorm.weight")
        self.attention = Attention(model, read, prefix + "self_attn.")
        self.feed_forward_norm = read(prefix + "post_attention_layernorm.weight")
        self.feed_forward = Sparse(model, read, prefix + "mlp.") if sparse else Dense(read, prefix + "mlp.")

    def __call__(self, x: Tensor, at: Place, layer: int, cache: LatentCache | None) -> Tensor:
        """x [b, t, h] -> [b, t, h]."""
        x = x + self.attention(rms_norm(x, self.attention_norm, self.eps), at, layer, cache)
        return x + self.feed_forward(rms_norm(x, self.feed_forward_norm, self.eps))
