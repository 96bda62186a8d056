"""What only a GPU can show: the same loss as on the CPU, bf16 training, torch.compile, resuming. Skipped without CUDA."""
import pytest
import torch

import train
from test_model import toy_batch, toy_method
from test_train import TINY, tiny_store  # noqa: F401 (a fixture)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("name", ["etp", "merl", "fgclep"])
def test_loss_and_gradients_are_those_of_the_cpu(name):
    batch, losses, grads = toy_batch(), [], []
    for device in ("cpu", "cuda"):
        method = toy_method(name).to(device)
        loss = sum(method(batch._replace(ecg=batch.ecg.to(device))).values())
        loss.backward()
        losses.append(loss.item())
        grads.append({n: p.grad.cpu() for n, p in method.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # TF32 convolutions
    top = max(g.abs().max() for g in grads[0].values())
    assert all((g - grads[1][n]).abs().max() < 0.02 * top for n, g in grads[0].items())


@pytest.mark.parametrize("flags", [[], ["--compile"], ["--accumulate", "2"], ["--precision", "float32"]])
def test_training_runs_to_its_table(tiny_store, tmp_path, monkeypatch, flags):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    train.main(["--name", "gpu", "--data", f"store:{tiny_store}", "--fine-epochs", "1", *TINY, *flags])
    assert (tmp_path / "runs/gpu/results.json").exists()
