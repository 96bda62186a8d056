"""model.py: encoders and losses against formulas, the text tower, two processes against one."""
import os
import re

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

import model as models
import train
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
    assert torch.allclose(models.l1_similarity(x @ x.T, torch.eye(3)), ((x @ x.T) - torch.eye(3)).abs().sum() / 3)


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
TEXTS_AS_TAGS = [models.join(text.rstrip(".").split(". ")) for text in TEXTS]


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


def test_hidden_words():
    _, tokenizer = models.small_text_model(TEXTS, steps=1)
    tokens = tokenizer(TEXTS * 20, padding=True, return_special_tokens_mask=True, return_tensors="pt")
    ids, words = tokens["input_ids"], tokens["special_tokens_mask"] == 0
    torch.manual_seed(0)
    masked, labels = models.mask_words(ids, words, tokenizer, 0.25)
    chosen = labels >= 0
    assert not (chosen & ~words).any() and torch.equal(labels[chosen], ids[chosen]) and torch.equal(masked[~chosen], ids[~chosen])
    assert abs(chosen.sum() / words.sum() - 0.25) < 0.02
    shares = [(masked[chosen] == tokenizer.mask_token_id).float().mean(), (masked[chosen] == ids[chosen]).float().mean()]
    assert abs(shares[0] - 0.8) < 0.03 and abs(shares[1] - 0.1) < 0.03


def causal_tower():
    return models.CausalTower(*models.small_text_model(TEXTS, steps=1, dim=32, layers=1), max_length=32).eval()


def test_a_causal_tower_sees_only_what_stands_before():
    tower = causal_tower()
    a, b = tower(["sinus rhythm. normal ecg"]), tower(["sinus rhythm. left axis deviation"])
    assert torch.allclose(a.states[:, :4], b.states[:, :4], atol=1e-6) and not torch.allclose(a.states[:, 4], b.states[:, 4], atol=1e-3)
    assert not torch.allclose(a.report, b.report, atol=1e-3)
    longer = tower(["sinus rhythm. normal ecg", "atrial fibrillation. left axis deviation. sinus rhythm. normal ecg. normal ecg"])
    assert torch.allclose(a.report[0], longer.report[0], atol=1e-5)  # however far the batch is padded
    assert torch.allclose(a.sentences[0, :2], longer.sentences[0, :2], atol=1e-5) and longer.sentence_count.tolist() == [2, 5]


def test_a_model_that_cannot_be_causal_is_refused():
    from transformers import DistilBertConfig, DistilBertModel
    lm = DistilBertModel(DistilBertConfig(vocab_size=50, dim=32, n_layers=1, n_heads=2, hidden_dim=32))
    with pytest.raises(models.ModelError, match="distilbert.* cannot be run as a causal one"):
        models.CausalTower(lm, None)


def test_sentences_are_split_at_full_stops_that_end_one():
    tower = causal_tower()
    texts = ["sinus rhythm. normal ecg", "st depression of 0.5 mv in v1", "sinus rhythm. left axis deviation.", "atrial fibrillation. "]
    tokens = tower.tokenise(texts, return_offsets_mapping=True)
    sentence = models.sentence_of_piece(texts, tokens["offset_mapping"], tokens["words"])
    means, count = models.sentence_means(torch.eye(sentence.shape[1]).expand(4, -1, -1), sentence)
    assert count.tolist() == [2, 1, 2, 1]  # nothing vanishes without a full stop, nothing behind the last one is dropped, 0.5 is whole
    assert torch.allclose(means[0, 0, 1:4], torch.full((3,), 1 / 3)) and torch.allclose(means[0, 1, 4:6], torch.full((2,), 1 / 2))
    assert torch.allclose(means[1, 0].sum(), torch.tensor(1.0)) and not means[1, 1].any()


def test_words_move_to_the_front():
    x, real = torch.randn(2, 4, 3), torch.tensor([[False, True, False, True], [False, False, False, True]])
    rows, count = models.first_rows(x, real)
    assert count.tolist() == [2, 1] and torch.equal(rows[0], x[0, [1, 3]]) and torch.equal(rows[1, 0], x[1, 3]) and not rows[1, 1].any()


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
    method = models.build_method(config, (lm, tokenizer)).train()
    for module in method.modules():  # no dropout: two processes draw other numbers than one
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    if name == "cmelt":
        method.far = models.FarTexts(sorted(set(TEXTS_AS_TAGS)), torch.eye(len(set(TEXTS_AS_TAGS))))
    return method


@pytest.mark.parametrize("name", ["etp", "merl", "melp"])
def test_the_watch_knows_what_guessing_costs(name):
    """The loss term "contrast" on a batch of equal records and texts, which nothing can tell apart."""
    batch, method = toy_batch(), toy_method(name)
    same = batch._replace(ecg=batch.ecg[:1].expand(8, -1, -1), tags=batch.tags[:1] * 8, chosen=batch.chosen[:1] * 8)
    assert method(same)["contrast"].item() == pytest.approx(train.Watch(None, method, small_config(name, batch_size=8)).chance, rel=1e-4)


@pytest.mark.parametrize("name, options", [("etp", {}), ("merl", {}), ("merl", {"encoder": "vit_tiny"}), ("fgclep", {}),
                                           ("fgclep", {"similarity": "half", "text_unit": "report"}), ("fgclep", {"fn_mode": "l1"}),
                                           ("fgclep", {"fn_mode": "none", "text_unit": "report"}),
                                           ("fgclep", {"similarity": "cos", "text_unit": "report"}),
                                           ("fgclep", {"align": "tag"}), ("fgclep", {"align": "tag", "encoder": "leadvit_tiny", "patch": 50}),
                                           ("fgclep", {"align": "word"}), ("melp", {}), ("melp", {"beats": "rpeak"}),
                                           ("melp", {"beat_mean": False, "encoder": "w2v_tiny"}), ("cmelt", {}), ("cmelt", {"negatives": "far"}),
                                           ("cmelt", {"negatives": "lost", "mem_target": "input", "text_mask": False})])
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
    assert np.mean(losses[-3:]) < losses[0] - 0.02
    views = method.eval().encode_ecg(batch.ecg)
    assert torch.allclose(views.rhythm.norm(dim=1), torch.ones(8), atol=1e-5) and views.tokens.dim() == 3
    unused = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused, "DDP would wait for these for ever"


def test_settings_that_need_one_text_a_record_say_so():
    for options in ({"similarity": "half"}, {"fn_mode": "none"}):
        with pytest.raises(models.ModelError, match="add --text-unit report"):
            toy_method("fgclep", **options)


def test_a_method_says_which_of_its_settings_is_wrong():
    for name, options, words in (("melp", {"beats": "fixed"}, "unknown --beats"), ("cmelt", {"encoder": "resnet18"}, "use --encoder w2v_tiny"),
                                 ("cmelt", {"negatives": "near"}, "unknown --negatives"), ("fgclep", {"align": "beat"}, "unknown --align")):
        with pytest.raises(models.ModelError, match=words):
            toy_method(name, **options)


def test_melp_learns_to_write_the_reports_of_a_batch():
    """Three kinds of ECG, three reports: after some updates the ECG decides what is written, greedily and with beams."""
    method = toy_method("melp", caption_queries=4, decoder_layers=1)
    kinds = torch.eye(3).repeat_interleave(4, 1)[torch.arange(9) % 3][:, :, None] * torch.randn(1, 12, 200, generator=torch.Generator().manual_seed(1))
    tags = [TEXTS_AS_TAGS[i % 3].split(". ") for i in range(9)]
    batch = models.Batch(kinds, tags, tags, list("abcdefghi"), torch.tensor([[20, 90, 160]] * 9, dtype=torch.int32))
    optimiser = torch.optim.AdamW(method.parameters(), lr=3e-3)
    for _ in range(60):
        loss = method(batch)["caption"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    method.eval()
    for beams in (1, 3):
        assert method.generate(kinds[:3], beams) == TEXTS_AS_TAGS[:3], beams


def test_beats_of_a_record_without_a_beat_are_the_whole_record():
    method = toy_method("melp", beats="rpeak").eval()
    tokens = torch.randn(2, 13, method.ecg.dim)
    beats, count = method.pool(tokens, torch.zeros(2, 12, 200), torch.tensor([[-1, -1], [50, 150]], dtype=torch.int32))
    assert count.tolist() == [1, 2] and torch.allclose(beats[0, 0], method.beat_pool(tokens[0].mean(0)), atol=1e-6)
    views = method.encode_ecg(torch.zeros(2, 12, 200))  # no peaks at hand: they are looked for
    assert views.beat_count.tolist() == [1, 1] and views.rhythm.isfinite().all()


def test_negatives_are_far_and_reach_the_model():
    texts = [f"text {i}" for i in range(100)]
    angle = torch.arange(100) / 100 * np.pi
    far = models.FarTexts(texts, torch.stack([angle.cos(), angle.sin()], 1), nearest=10)
    assert set(far.draw(["text 0"] * 200)) == {f"text {i}" for i in range(90, 100)}  # the ten that point away
    tags = [[f"block {i}", f"infarct {i}", "sinus rhythm"] for i in range(8)]
    method, batch = toy_method("cmelt", negatives="far"), toy_batch()._replace(tags=tags, chosen=[said[:2] for said in tags])
    method.far = models.FarTexts(list(map(models.join, tags)), torch.eye(8))
    chosen, aligned = method.with_negatives(batch)
    assert [len(said) for said in chosen] == [2] * 8 and aligned.sum() in (3, 4)  # the length gives nothing away
    for said, own, kept in zip(chosen, tags, aligned):
        assert said == own[:2] if kept else not set(said) & set(own)  # what both reports say is no negative
    lost, aligned = toy_method("cmelt", negatives="lost").with_negatives(batch)
    assert [models.join(tags) for tags in lost] == batch.texts and aligned.sum() in (3, 4)  # the published code's defect, on request


def test_masked_frames_are_rebuilt_from_the_whole_record():
    ecg = torch.randn(2, 3, 83) * torch.tensor([1.0, 5.0, 0.1])[:, None] + 2
    frames = models.frames_of(ecg)
    assert frames.shape == (2, 5, 48)
    lead = frames.unflatten(2, (3, 16)).transpose(1, 2).flatten(2)  # (B, L, 80)
    assert torch.allclose(lead.mean(2), torch.zeros(2, 3), atol=1e-5) and torch.allclose(lead.var(2), torch.ones(2, 3), atol=1e-3)


def test_scales_mix_and_unknown_ones_are_named():
    method, batch = toy_method("melp").eval(), toy_batch()
    with torch.no_grad():
        ecg, text = method.encode_ecg(batch.ecg), method.encode_text(batch.texts[:3])
        rhythm, beat, both = (method.similarity(ecg, text, scales) for scales in (["rhythm"], ["beat"], ["rhythm", "beat"]))
    assert both.shape == (8, 3) and torch.allclose(both, (rhythm + beat) / 2, atol=1e-5)
    assert torch.allclose(rhythm, ecg.rhythm @ text.report.T, atol=1e-6) and beat.abs().max() <= 1
    with pytest.raises(models.ModelError, match="no token scale, only rhythm, beat"):
        method.similarity(ecg, text, ["token"])


def test_tags_ask_the_patches():
    """FG-CLEP v2: softmax over the patches of 10 x cosine, the patches' mean by it, its cosine with the tag."""
    method, batch = toy_method("fgclep", align="tag").eval(), toy_batch()
    with torch.no_grad():
        ecg, text = method.encode_ecg(batch.ecg), method.encode_text(["sinus rhythm", "normal ecg"])
        like = method.similarity(ecg, text, ["beat"])
        x = torch.einsum("bkd,cd->bkc", ecg.beats, text.report)
        seen = torch.einsum("bkc,bkd->bcd", (10 * x).softmax(1), ecg.beats)
    assert torch.allclose(like, torch.cosine_similarity(seen, text.report[None], dim=2), atol=1e-5)


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


NOTHING_RANDOM = {"negatives": "none", "frame_drop": 0.0, "lead_mask": 0.0, "word_mask": 0.0}


@pytest.mark.parametrize("name, options", [("etp", {}), ("merl", {}), ("fgclep", {}), ("melp", {}), ("melp", {"beats": "rpeak"}),
                                           ("fgclep", {"text_unit": "subset", "similarity": "half"}), ("cmelt", NOTHING_RANDOM),
                                           ("fgclep", {"text_unit": "report", "similarity": "half", "align": "tag"}),
                                           ("fgclep", {"text_unit": "report", "similarity": "half", "align": "word"})])
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
