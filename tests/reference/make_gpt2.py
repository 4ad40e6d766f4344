"""Makes gpt2.npz: a small GPT-2 of transformers, its weights and its logits, in float64.

pip install torch==2.13.0 transformers==5.24.0  &&  python tests/reference/make_gpt2.py
"""

import pathlib

import numpy as np
import torch
import transformers

N, T = 2, 12


def arrays() -> dict[str, np.ndarray]:
    """Every weight under the name that it has in a file, as ``weights/name``; ids; logits."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 16, "vocab_size": 50, "n_positions": T}
    config = transformers.GPT2Config(
        **sizes, bos_token_id=None, eos_token_id=None, attn_implementation="eager"
    )
    model = transformers.GPT2LMHeadModel(config).to(torch.float64).eval()
    with torch.no_grad():
        for p in model.parameters():  # no bias 0, no scale 1, and few digits: a small file
            p.copy_((p + 0.2 * torch.randn_like(p)).to(torch.float16))
        ids = torch.randint(50, (N, T))
        logits = model(ids).logits
        weights = {f"weights/{name}": p.numpy() for name, p in model.transformer.named_parameters()}
    return {"ids": ids.numpy(), "logits": logits.numpy()} | weights


if __name__ == "__main__":
    np.savez_compressed(pathlib.Path(__file__).with_name("gpt2.npz"), **arrays())
