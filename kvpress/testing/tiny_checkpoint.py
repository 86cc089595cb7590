"""A tiny random model with a tokenizer, in memory, as a folder, and as a GGUF file: no network, a second to make."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|end|>"
UNKNOWN = "<|unknown|>"
MERGE = ("t", "h")


def tiny_model(*, max_position_embeddings: int = 4096, seed: int = 0) -> Any:
    """A Llama with two layers, 4 query and 2 KV heads of 8 dimensions, random float32 weights, in eval mode."""
    config = LlamaConfig(
        vocab_size=len(byte_vocabulary()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).train(False)
    torch.random.set_rng_state(state)
    return model


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer with one merge: every byte is a token, and so is `th`."""
    tokenizer = Tokenizer(models.BPE(vocab=byte_vocabulary(), merges=[MERGE], unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": END, "eos_token": END, "pad_token": END, "unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def byte_vocabulary() -> dict[str, int]:
    """Two special tokens, the 256 characters that byte-level tokenizers write bytes with, and the merged token."""
    tokens = [END, UNKNOWN, *sorted(pre_tokenizers.ByteLevel.alphabet()), "".join(MERGE)]
    return {token: index for index, token in enumerate(tokens)}


def save_tiny_checkpoint(folder: Path) -> Path:
    """Write the tiny model and tokenizer to `folder` and return it."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_tiny_gguf(path: Path) -> Path:
    """Write the tiny model and tokenizer as a float32 GGUF file and return its path."""
    import gguf

    model = tiny_model()
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = list(byte_vocabulary())
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, 3] + [1] * (len(vocabulary) - 2))  # 3 is a control token, 1 a normal one
    writer.add_token_merges([" ".join(MERGE)])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(0)
    writer.add_unk_token_id(1)
    for name, tensor in gguf_tensors(model).items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The weights under their GGUF names. Query and key rows are interleaved, as llama.cpp rotates neighbours."""
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    tensors = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
    }
    for layer in range(model.config.num_hidden_layers):
        for name, gguf_name in names.items():
            tensor = weights[f"model.layers.{layer}.{name}.weight"]
            if gguf_name in ("attn_q", "attn_k"):
                heads = tensor.shape[0] // model.config.head_dim
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            tensors[f"blk.{layer}.{gguf_name}.weight"] = tensor
    return tensors
