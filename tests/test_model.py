"""model.py: encoders and losses against formulas, the text tower, two processes against one."""
import os
import re

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

import model as models
from conftest import ROOT, small_config


def test_info_nce_by_hand():
    x, y = F.normalize(torch.randn(5, 8), dim=1), F.normalize(torch.randn(5, 8), dim=1)
    p = (x @ y.T / 0.1).exp()
    rows, columns = -(p.diag() / p.sum(1)).log().mean(), -(p.diag() / p.sum(0)).log().mean()
    assert torch.allclose(models.info_nce(x, y, 10), (rows + columns) / 2, atol=1e-5)
    assert torch.allclose(models.info_nce(x, y, 10, sides=1), rows, atol=1e-5)


def test_soft_sigmoid_and_l1_by_hand():
    logits, target = torch.randn(3, 4), torch.rand(3, 4)
    p = torch.sigmoid(logits)
    assert torch.allclose(models.soft_sigmoid(logits, target), -(target * p.log() + (1 - target) * (1 - p).log()).mean(), atol=1e-6)
    x = F.normalize(torch.randn(3, 8), dim=1)
    assert torch.allclose(models.l1_similarity(x, x, torch.eye(3)), ((x @ x.T) - torch.eye(3)).abs().sum() / 3)


def test_tag_containment():
    tags = [["sinus rhythm", "normal ecg"], ["sinus rhythm", "possible lateral ischemia"], ["atrial fibrillation"], ["sinus rhythm"]]
    s = models.tag_containment([["sinus rhythm"], ["lateral ischemia"], ["atrial fibrillation"], ["sinus rhythm", "normal ecg"]], tags).numpy()
    assert s.shape == (4, 4)
    assert np.allclose(s[:, 0], [1, 1, 0, 1])                 # who says sinus rhythm
    assert np.allclose(s[:, 1], [0, 1, 0, 0])                 # contained in longer words
    assert np.allclose(s[:, 2], [0, 0, 1, 0])
    assert np.allclose(s[:, 3], [1, 0.5, 0, 0.5])             # half of the text is true of records 1 and 3
    rare = models.tag_containment([["sinus tachycardia"]], tags[:1] * 7 + [["sinus tachycardia"]])
    assert rare[0, 0] < 0.1 and rare[-1, 0] == 1              # a common word in common says little


@pytest.mark.parametrize("name, tokens, dim", [("resnet18", 63, 256), ("resnet50", 63, 1024), ("vit_tiny", 100, 192)])
@pytest.mark.parametrize("leads", [1, 12])
def test_encoders_take_any_leads_and_length(name, tokens, dim, leads):
    encoder = models.build_encoder(name, leads, 1000, width=0.5, patch=10).eval()
    assert encoder(torch.randn(2, leads, 1000)).shape == (2, tokens, dim)
    assert encoder(torch.randn(1, leads, 640)).shape == (1, 40 if "res" in name else 64, dim)


def test_unknown_encoder_is_named():
    with pytest.raises(ValueError, match="resnet19"):
        models.build_encoder("resnet19", 12, 1000)


def test_normalise():
    ecg = torch.randn(2, 12, 100) * 3
    ecg[0, 3] = 0.7  # a flat lead
    record, lead = models.normalise(ecg, "record"), models.normalise(ecg, "lead")
    assert record.amin((1, 2)).eq(0).all() and torch.allclose(record.amax((1, 2)), torch.ones(2))
    assert lead[0, 3].eq(0).all() and torch.allclose(lead[1].amax(1), torch.ones(12)) and torch.allclose(lead[1].amin(1), -torch.ones(12))
    assert models.normalise(ecg, "mv").abs().max() <= 5


# ---- text tower ----------------------------------------------------------------------------------------------------

TEXTS = ["sinus rhythm. normal ecg.", "atrial fibrillation. left axis deviation.", "sinus rhythm. left bundle branch block."] * 30


def test_text_tower_encodes_each_text_once_and_ignores_padding():
    tower = models.TextTower(*models.small_text_model(TEXTS, steps=5)).eval()
    seen = []
    tokenizer = tower.tokenizer
    tower.tokenizer = lambda texts, **options: seen.append(list(texts)) or tokenizer(texts, **options)
    out = tower(["normal ecg.", TEXTS[1], "normal ecg."])
    assert seen == [["normal ecg.", TEXTS[1]]]
    assert torch.equal(out[0], out[2]) and torch.allclose(out[0], tower(["normal ecg."])[0], atol=1e-5)


def test_text_model_is_made_from_the_reports_and_again_the_same():
    (lm1, tok1), (lm2, tok2) = (models.small_text_model(TEXTS, seed=3, steps=4) for _ in range(2))
    assert tok1.get_vocab() == tok2.get_vocab() and tok1.tokenize("atrial fibrillation") == ["atrial", "fibrillation"]
    assert all(torch.equal(a, b) for a, b in zip(lm1.state_dict().values(), lm2.state_dict().values()))


@pytest.mark.parametrize("layers, trained", [(-1, "all"), (0, "none"), (1, "last")])
def test_trainable_layers(layers, trained):
    tower = models.TextTower(*models.small_text_model(TEXTS, steps=1), trainable_layers=layers).train()
    names = {n for n, p in tower.named_parameters() if p.requires_grad}
    if trained == "all":
        assert len(names) == len(list(tower.parameters()))
    elif trained == "none":
        assert not names and not tower.lm.training and not tower(TEXTS[:2]).requires_grad
    else:
        assert names and all("layer.1." in n for n in names)


def test_text_tower_of_any_folder(tmp_path):
    """Any Hugging Face encoder: here a small BERT saved to and loaded from a folder."""
    with pytest.raises(models.ModelError, match="no-such-model.* neither a folder"):
        models.load_text_model(str(tmp_path / "no-such-model"))
    lm, tokenizer = models.small_text_model(TEXTS, steps=1)
    models.save_text_model(lm, tokenizer, tmp_path)
    lm.save_pretrained(tmp_path)
    loaded = models.load_text_model(str(tmp_path))
    a, b = (models.TextTower(*m).eval()(TEXTS[:2]) for m in ((lm, tokenizer), loaded))
    assert torch.allclose(a, b, atol=1e-6)


# ---- beats -----------------------------------------------------------------------------------------------------------

def test_tokens_are_pooled_into_beats():
    peaks = torch.tensor([[20, 60, 150, -1], [5, 10, 90, 199], [-1, -1, -1, -1]], dtype=torch.int32)
    tokens = torch.randn(3, 20, 5, dtype=torch.float64, requires_grad=True)  # a token is ten samples
    beats, count = models.pool_beats(tokens, peaks, 200)
    assert beats.shape == (3, 4, 5) and count.tolist() == [3, 4, 0]
    borders = [[(0, 4), (4, 10), (10, 20)],           # half-way: samples 40, 105 (in the middle of token 10, which goes on)
               [(0, 1), (1, 5), (5, 14), (14, 20)]]   # 7.5: the middle of token 0 (5) lies before it
    for b, parts in enumerate(borders):
        for k, (start, stop) in enumerate(parts):
            assert torch.allclose(beats[b, k], tokens[b, start:stop].mean(0)), (b, k)
    assert not beats[0, 3].any() and not beats[2].any()
    assert torch.autograd.gradcheck(lambda t: models.pool_beats(t, peaks, 200)[0], tokens)


def test_a_beat_shorter_than_a_token_takes_the_token_of_its_peak():
    tokens, peaks = torch.randn(1, 2, 3), torch.tensor([[10, 40, 150]], dtype=torch.int32)  # tokens of 100 samples
    beats, _ = models.pool_beats(tokens, peaks, 200)
    assert torch.equal(beats[0], tokens[0][[0, 0, 1]])


# ---- methods ---------------------------------------------------------------------------------------------------------

def toy_batch(size=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    tags = [t.rstrip(".").split(". ") for t in (TEXTS * 2)[:size]]
    return models.Batch(torch.randn(size, 12, 200, generator=g), tags, tags, [str(i) for i in range(size)],
                        torch.tensor([[20, 90, 160, -1]] * size, dtype=torch.int32))


def toy_method(name, **options):
    torch.manual_seed(0)
    config = small_config(name, width=0.125, dim=16, seconds=2.0, uma_dropout=0.0, **options)
    lm, tokenizer = models.small_text_model(TEXTS, steps=1, dim=32, layers=1)
    lm.config.hidden_dropout_prob = lm.config.attention_probs_dropout_prob = 0.0
    for module in lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return models.build_method(config, (lm, tokenizer)).train()


@pytest.mark.parametrize("name, options", [("etp", {}), ("merl", {}), ("merl", {"encoder": "vit_tiny"}), ("fgclep", {}),
                                           ("fgclep", {"similarity": "half", "text_unit": "report"}), ("fgclep", {"fn_mode": "l1"}),
                                           ("fgclep", {"fn_mode": "none", "text_unit": "report"}),
                                           ("fgclep", {"similarity": "cos", "text_unit": "report"})])
def test_a_method_learns_a_toy_batch(name, options):
    method, batch = toy_method(name, **options), toy_batch()
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        loss = sum(method(batch).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    views = method.eval().encode_ecg(batch.ecg)
    assert torch.allclose(views.rhythm.norm(dim=1), torch.ones(8), atol=1e-5) and views.tokens.dim() == 3
    unused = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused, "DDP would wait for these for ever"


def test_settings_that_need_one_text_a_record_say_so():
    for options in ({"similarity": "half"}, {"fn_mode": "none"}):
        with pytest.raises(models.ModelError, match="add --text-unit report"):
            toy_method("fgclep", **options)


# ---- two processes against one ---------------------------------------------------------------------------------------

def one_rank(rank, world, port, name, options, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    method, whole = toy_method(name, **options), toy_batch()
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    parallel = torch.nn.parallel.DistributedDataParallel(method, broadcast_buffers=False)
    terms = parallel(models.Batch(whole.ecg[share], whole.chosen[share], whole.tags[share], whole.ids[share], whole.peaks[share]))
    sum(terms.values()).backward()
    torch.save({"terms": {k: v.item() for k, v in terms.items()}, "buffers": dict(method.named_buffers()),
                "grads": {n: p.grad for n, p in method.named_parameters() if p.grad is not None}}, f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name, options", [("etp", {}), ("merl", {}), ("fgclep", {}),
                                           ("fgclep", {"text_unit": "subset", "similarity": "half"})])
def test_two_processes_give_the_loss_and_gradients_of_one(name, options, tmp_path, free_port):
    mp.spawn(one_rank, (2, free_port, name, options, str(tmp_path)), nprocs=2)
    method = toy_method(name, **options)
    terms = method(toy_batch())
    sum(terms.values()).backward()
    for rank in range(2):
        other = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for k, v in terms.items():
            assert abs(other["terms"][k] - v.item()) < 1e-5 * max(1, abs(v.item()))
        grads = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
        assert grads.keys() == other["grads"].keys()
        top = max(g.abs().max() for g in grads.values())
        for n, g in grads.items():
            assert (g - other["grads"][n]).abs().max() < 1e-4 * top, n
        for n, b in method.named_buffers():  # running statistics of batch norm
            assert torch.allclose(b.float(), other["buffers"][n].float(), atol=1e-5), n


def test_the_method_in_the_readme_trains(monkeypatch):
    readme = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(class SigLIP.*?)```", readme, re.S)[1]
    assert code.count("\n") <= 30
    monkeypatch.setattr(models, "METHODS", dict(models.METHODS))
    exec(code, vars(models))
    method, batch = toy_method("siglip"), toy_batch()
    first = sum(method(batch).values())
    first.backward()
    assert method.project_ecg.weight.grad.abs().sum() > 0 and method.project_text.weight.grad.abs().sum() > 0
