"""Whether a device can train the model in bfloat16 or float16."""

from types import SimpleNamespace

import torch

from attn_ext.nmt.data import make_batch
from attn_ext.nmt.model import ModelConfig, Seq2Seq


def bf16_problem(config, device, backend=None):
    """Why a model cannot be trained in bfloat16 on a device; None if it can.

    A GPU is asked. For a CPU there is nobody to ask, and it may show late: without AVX-512,
    PyTorch's LSTM fails in batches whose sentences are equally long, and in no others. So a model
    of the same cells, as small as can be, is trained on such a batch, which takes milliseconds.

    Args:
        config: ModelConfig; its sizes do not matter.
        device: where this process is to train; others may be unlike it.
        backend: of `attn_ext`, as for Seq2Seq.

    Raises:
        RuntimeError: it cannot be trained in float32 either.
    """
    if device.type == "cuda":
        # Emulated, it would be slower than float32.
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
        return None if has_it else "this GPU has no bfloat16"
    return _problem(config, device, backend, torch.bfloat16)


def fp16_problem(config, device, backend=None):
    """Why a model cannot be trained in float16 on a device; None if it can. See `bf16_problem`."""
    if device.type == "cuda":
        return None
    return _problem(config, device, backend, torch.float16)


def _problem(config, device, backend, dtype):
    try:
        _train_and_evaluate(config, device, backend, dtype)
    except RuntimeError as error:
        _train_and_evaluate(config, device, backend)
        return (
            f"PyTorch cannot train decoder {config.decoder} with encoder cell "
            f"{config.encoder_cell} in {str(dtype).removeprefix('torch.')} on this CPU "
            f"({_first_sentence(error)})"
        )
    return None


@torch.random.fork_rng(devices=[])
def _train_and_evaluate(config, device, backend, dtype=None):
    sizes = {"vocab_size": 8, "embedding": 8, "hidden": 8}
    tiny = ModelConfig(**sizes, decoder=config.decoder, encoder_cell=config.encoder_cell)
    model = Seq2Seq(tiny, backend).to(device)
    batch = make_batch([([3, 4], [5, 6])] * 2, SimpleNamespace(bos=1, eos=2), device)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        loss, _ = model(batch)
    loss.backward()
    with torch.autocast(device.type, dtype, enabled=dtype is not None), torch.no_grad():
        model.eval()(batch)


def _first_sentence(error):
    return str(error).partition("\n")[0].partition(". ")[0]
