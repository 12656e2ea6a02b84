"""Run as a program: bits of a small DeepSeek-V3's logits from transformers; with `megatron` after the stand-ins are in.

Prints one JSON object: a hash of the logits and of the rotary frequencies, and what of torch is no longer itself.
"""

import hashlib
import json
import sys

import torch

NAMES = {
    "torch": "zeros ones empty full tensor arange rand randn randint zeros_like empty_like load save",
    "torch.cuda": "current_device is_available Stream Event synchronize get_rng_state manual_seed device_count",
    "torch.Tensor": "cuda cpu to type new_empty new_zeros",
    "torch.distributed": "all_reduce all_gather all_to_all_single new_group",
    "torch.nn.functional": "linear grouped_mm scaled_dot_product_attention rms_norm",
}
HOLDERS = {
    "torch": torch,
    "torch.cuda": torch.cuda,
    "torch.Tensor": torch.Tensor,
    "torch.distributed": torch.distributed,
    "torch.nn.functional": torch.nn.functional,
}


def snapshot() -> dict[str, int]:
    """Identity of what other libraries use of torch."""
    return {
        f"{holder}.{name}": hash(getattr(HOLDERS[holder], name))
        for holder, names in NAMES.items()
        for name in names.split()
    }


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def main(with_megatron: bool) -> None:
    torch.set_num_threads(1)
    before, modules = snapshot(), (torch, torch.cuda, sys.modules["torch"])
    if with_megatron:
        import megatron_joy.train.step  # noqa: F401 - and with it Megatron-core, through the stand-ins

        assert "megatron.core.optimizer" in sys.modules
    changed = [name for name, value in snapshot().items() if before[name] != value]
    changed += [] if modules == (torch, torch.cuda, sys.modules["torch"]) else ["torch itself"]
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
    widths = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    config = DeepseekV3Config(num_hidden_layers=2, first_k_dense_replace=1, **sizes, **heads, **widths, **experts)
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config).eval()
    tokens = torch.arange(40).view(2, 20) % 64
    with torch.no_grad():
        logits = model(tokens).logits
    frequencies = model.model.rotary_emb.inv_freq
    print(json.dumps({"logits": digest(logits), "frequencies": digest(frequencies), "changed": changed}))


if __name__ == "__main__":
    main(with_megatron=sys.argv[1:] == ["megatron"])
