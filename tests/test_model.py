"""model.py: encoders and losses against formulas, the text tower, two processes against one."""
import os
import re
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

import model as models
import train
from conftest import small_config, toy_config


def test_info_nce_by_hand():
    x, y = F.normalize(torch.randn(5, 8), dim=1), F.normalize(torch.randn(5, 8), dim=1)
    p = (x @ y.T / 0.1).exp()
    rows, columns = -(p.diag() / p.sum(1)).log().mean(), -(p.diag() / p.sum(0)).log().mean()
    assert torch.allclose(models.info_nce(x, y, 10), (rows + columns) / 2, atol=1e-5)


def test_soft_sigmoid_and_l1_by_hand():
    logits, target = torch.randn(3, 4), torch.rand(3, 4)
    p = torch.sigmoid(logits)
    assert torch.allclose(models.soft_sigmoid(logits, target, torch.ones_like(target)), -(target * p.log() + (1 - target) * (1 - p).log()).mean(), atol=1e-6)
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


INFARCTIONS = {  # tag -> what it says
    "mi": "myocardial infarction", "myocardial infarction": "myocardial infarction", "sinus rhythm": "sinus rhythm",
    "inferior infarct": "inferior myocardial infarction", "possible inferior infarct": "inferior myocardial infarction",
    "inferior myocardial infarction": "inferior myocardial infarction", "probable inferior mi": "inferior myocardial infarction",
    **{feature: feature for feature in ("st elevation in v1 to v3", "st depression in v1 to v3", "st elevation")}}


def test_exact_targets_by_hand():
    """Of a record whose truth is known, what means the same is true, and words in common mean nothing."""
    truth = ["possible inferior infarct", "st elevation in v1 to v3"]
    texts = ["inferior infarct", "inferior myocardial infarction", "probable inferior mi", "mi", "st elevation", "st elevation in v1 to v3",
             "st depression in v1 to v3", "sinus rhythm", "old inferior infarct"]
    others, chosen = [["sinus rhythm", "old inferior infarct"]] * 3, [[text] for text in texts]
    s = models.tag_containment(chosen, [truth, *others], exact=[True] + [False] * 3, meaning=INFARCTIONS)
    assert s[0, :8].tolist() == [1, 1, 1, 0, 0, 1, 0, 0]
    weight = lambda n: np.log(4 / n) + 0.05  # the last text has no known meaning: its share in the record's words
    assert s[0, 8].item() == pytest.approx(2 * weight(4) / (2 * weight(4) + weight(3)))
    whole = models.tag_containment([["mi", "sinus rhythm", "st elevation", "st elevation in v1 to v3"]], [truth], None, "cpu", [True], INFARCTIONS)
    assert whole.tolist() == [[0.25]]                         # one of the four is true
    reports = models.tag_containment(chosen, [truth, *others])
    assert torch.equal(s[1:], reports[1:]) and 0 < reports[0, 6] < 1  # the others are as they were, to the last bit


@pytest.mark.parametrize("seed", range(5))
def test_rows_of_a_mixed_batch_are_what_each_is_alone(seed):
    g, words = np.random.default_rng(seed), list(INFARCTIONS) + ["old inferior infarct", "no st depression", "normal ecg"]
    tags = [list(g.permutation(words)[:g.integers(1, 6)]) for _ in range(8)]
    chosen, exact = [list(g.permutation(words)[:g.integers(1, 4)]) for _ in range(6)], (g.random(8) < 0.5).tolist()
    s = models.tag_containment(chosen, tags, tags, "cpu", exact, INFARCTIONS)
    for row, sure, own in zip(s, exact, tags):
        alone = models.tag_containment(chosen, [own], tags, "cpu", [sure], INFARCTIONS)
        assert torch.allclose(row, alone[0], atol=1e-6)


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


@pytest.mark.parametrize("layers, trained", [(-1, "all"), (0, "none"), (1, "last"), (2, "both"), (3, "both")])
def test_trainable_layers(layers, trained):
    tower = models.TextTower(*models.small_text_model(TEXTS, steps=1), trainable_layers=layers).train()
    names = {n for n, p in tower.named_parameters() if p.requires_grad}
    if trained == "all":
        assert len(names) == len(list(tower.parameters()))
    elif trained == "none":
        assert not names and not tower.lm.training and not tower(TEXTS[:2]).requires_grad
    else:
        places = {n.split("layer.")[-1][0] for n in names}
        assert all("layer." in n for n in names) and places == ({"1"} if trained == "last" else {"0", "1"})


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11])
def test_a_text_model_of_few_steps(steps):
    assert models.small_text_model(TEXTS, steps=steps, dim=16, layers=1)


def test_texts_longer_than_a_language_model_has_positions_for():
    """A RoBERTa's begin behind that of its padding; nothing is to be cached where no texts can be listed."""
    from transformers import RobertaConfig, RobertaModel
    tokenizer = models.word_tokenizer(TEXTS)
    size = dict(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    roberta = RobertaModel(RobertaConfig(**size, max_position_embeddings=34, pad_token_id=1), add_pooling_layer=False)
    tower = models.TextTower(roberta, tokenizer, 0, max_length=100)
    assert tower.max_length == 32 and tower(["sinus rhythm " * 50]).shape == (1, 16)
    tower.cache([])
    assert tower(TEXTS[:2]).shape == (2, 16)
    lm, tokenizer = models.new_bert(TEXTS, dim=16, layers=1)
    assert models.CardioLM(models.configure("cardiolm", text_max_length=512), (lm, tokenizer)).guess(["sinus " * 400])[1] > 0


def test_a_method_without_a_loss_says_so():
    class Silent(models.ETP):
        def compare(self, vectors, batch):
            return {}
    method = Silent(toy_config("etp"), models.small_text_model(TEXTS, steps=1, dim=32, layers=1))
    with pytest.raises(models.ModelError, match="Silent has no loss"):
        method.weighted(method(toy_batch()))


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
    a, b = tower.encode(["sinus rhythm. normal ecg"]), tower.encode(["sinus rhythm. left axis deviation"])
    assert torch.allclose(a.states[:, :4], b.states[:, :4], atol=1e-6) and not torch.allclose(a.states[:, 4], b.states[:, 4], atol=1e-3)
    assert not torch.allclose(a.report, b.report, atol=1e-3)
    longer = tower.encode(["sinus rhythm. normal ecg", "atrial fibrillation. left axis deviation. sinus rhythm. normal ecg. normal ecg"])
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
    tokens = models.tokenise(tower, texts, return_offsets_mapping=True)
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
                        torch.tensor([[20, 90, 160, -1]] * size, dtype=torch.int32), [i % 2 == 0 for i in range(size)])


def toy_method(name, **options):
    torch.manual_seed(0)
    config = toy_config(name, **options)
    lm, tokenizer = models.small_text_model(TEXTS, steps=1, dim=32, layers=1)
    method = models.build_method(config, (lm, tokenizer)).train()
    for module in method.modules():  # no dropout: two processes draw other numbers than one
        if isinstance(module, models.MERL):
            module.config.uma_dropout = 0.0
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    if name == "cmelt":
        method.far = models.FarTexts(sorted(set(TEXTS_AS_TAGS)), torch.eye(len(set(TEXTS_AS_TAGS))))
    tags = sorted({tag for text in TEXTS_AS_TAGS for tag in text.split(". ")})
    method.set_vocabulary(tags, {tag: tag for tag in tags})
    return method


def test_records_whose_truth_is_known_have_other_targets():
    """Which the tests of chunks and processes need, to see that it is the right records'."""
    for options in ({}, {"text_unit": "report"}):
        losses = [toy_method("fgclep", **options)(toy_batch()._replace(exact=exact))["sigmoid"].item()
                  for exact in (toy_batch().exact, [True] * 8, [False] * 8, ())]
        assert losses[2] == losses[3] and len({round(loss, 5) for loss in losses}) == 3


def test_targets_where_no_tags_are_compared():
    assert small_config("fgclep").targets == small_config("fgclep", text_unit="report").targets == "truth"
    assert models.configure("fgclep", "paper").targets == "reports"
    for options in ({"similarity": "half"}, {"similarity": "cos"}, {"fn_mode": "none"}):
        assert small_config("fgclep", text_unit="report", **options).targets == "reports"
        with pytest.raises(models.ModelError, match="--targets truth says of which records a tag is true"):
            small_config("fgclep", text_unit="report", targets="truth", **options)


@pytest.mark.parametrize("name", ["etp", "merl", "melp"])
def test_the_watch_knows_what_guessing_costs(name):
    """The loss term "contrast" on a batch of equal records and texts, which nothing can tell apart."""
    batch, method = toy_batch(), toy_method(name)
    same = batch._replace(ecg=batch.ecg[:1].expand(8, -1, -1), tags=batch.tags[:1] * 8, sampled=batch.sampled[:1] * 8)
    assert method(same)["contrast"].item() == pytest.approx(train.Watch(None, method, small_config(name, batch_size=8)).chance, rel=1e-4)


@pytest.mark.parametrize("name, options", [("etp", {}), ("merl", {}), ("merl", {"encoder": "vit_tiny"}), ("fgclep", {}),
                                           ("fgclep", {"similarity": "half", "text_unit": "report"}), ("fgclep", {"fn_mode": "l1"}),
                                           ("fgclep", {"fn_mode": "none", "text_unit": "report"}),
                                           ("fgclep", {"similarity": "cos", "text_unit": "report"}),
                                           ("fgclep", {"align": "tag"}), ("fgclep", {"align": "tag", "encoder": "leadvit_tiny", "patch": 50}),
                                           ("fgclep", {"align": "word"}), ("melp", {}), ("melp", {"beats": "rpeak"}),
                                           ("melp", {"as_published": True, "encoder": "w2v_tiny"}), ("cmelt", {}), ("cmelt", {"negatives": "far"}),
                                           ("cmelt", {"negatives": "far", "as_published": True})])
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
    assert not unused, "weight decay would shrink these"


def test_settings_that_need_one_text_a_record_say_so():
    for options in ({"similarity": "half"}, {"fn_mode": "none"}):
        with pytest.raises(models.ModelError, match="add --text-unit report"):
            toy_method("fgclep", **options)


def test_a_method_says_which_of_its_settings_is_wrong():
    for name, options, words in (("melp", {"beats": "fixed"}, "--beats is 'fixed'; it must be one of query, rpeak"),
                                 ("cmelt", {"encoder": "resnet18"}, "use --encoder w2v_tiny"),
                                 ("cmelt", {"negatives": "near"}, "--negatives is 'near'"), ("fgclep", {"align": "beat"}, "--align is")):
        with pytest.raises(models.ModelError, match=words):
            toy_method(name, **options)


GRID = [(name, encoder) for name in ("etp", "merl", "melp", "fgclep") for encoder in
        ("resnet18", "resnet50", "vit_tiny", "leadvit_tiny", "w2v_tiny")] + [("cmelt", "w2v_tiny")]


def on_grid(name, encoder):
    options = dict(patch=20) if "vit" in encoder else dict(negatives="far") if name == "cmelt" else {}
    return toy_method(name, encoder=encoder, **options)


@pytest.mark.parametrize("name, encoder", GRID)
def test_every_encoder_in_every_method(name, encoder):
    """Vectors of length 1 that depend on the ECG, and a gradient in every parameter."""
    method, batch = on_grid(name, encoder), toy_batch()
    sum(method(batch).values()).backward()
    assert not [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    with torch.no_grad():
        views = method.eval().encode_ecg(batch.ecg)
        tokens = method.encode_tokens(batch.ecg)
    assert tokens.dim() == 3 and tokens.shape[2] == method.ecg.dim  # as the encoder gives them, not projected
    assert torch.allclose(views.rhythm.norm(dim=1), torch.ones(8), atol=1e-5) and views.tokens.isfinite().all()
    assert (views.rhythm[0] - views.rhythm[1]).norm() > 1e-4


def grid_rank(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    batch = toy_batch()
    half = list(batch.parts(4))[rank]
    for name, encoder in GRID:
        if encoder == "resnet50":  # blocks of another kind, alike in what is used
            continue
        method = on_grid(name, encoder)
        sum(method(half).values()).backward()
        trained = [p for p in method.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in trained)
        train.average_gradients(trained)
        total = torch.stack([p.grad.double().sum() for p in trained])
        torch.distributed.all_reduce(of_both := total.clone())
        assert torch.allclose(of_both, 2 * total) and total.abs().sum() > 0
    train.leave_processes()


def test_every_encoder_in_every_method_in_two_processes(free_port):
    mp.spawn(grid_rank, (free_port,), nprocs=2)


def test_a_learned_scale_that_is_too_large_still_learns():
    method, batch = toy_method("fgclep", align="tag"), toy_batch()
    with torch.no_grad():
        method.log_scale.fill_(9.0)
        method.log_attention.fill_(9.0)
    method.limit_scales()
    assert method.learned_scale().item() == pytest.approx(100, rel=1e-5)
    sum(method(batch).values()).backward()
    assert method.log_scale.grad.abs() > 0 and method.log_attention.grad.abs() > 0


# ---- a batch in chunks -----------------------------------------------------------------------------------------------

CHUNKED = [("etp", {}), ("merl", {"uma_dropout": 0.3}), ("fgclep", {}), ("fgclep", {"align": "tag"}), ("melp", {}),
           ("fgclep", {"text_unit": "report", "similarity": "half", "align": "word", "encoder": "vit_tiny", "patch": 20}),
           ("cmelt", {"negatives": "far"})]


def one_by_one(method, batch, size):
    """The loss terms of parts encoded one by one, each with gradient, and compared together."""
    batch = method.plan(batch)
    found = [method.represent(part) for part in batch.parts(size)]
    names = {name for vectors, _ in found for name in vectors}
    vectors = {name: train.padded([v[name] for v, _ in found if name in v]) for name in names}
    sums = {name: [sum(s[name][i] for _, s in found) for i in (0, 1)] for name in found[0][1]}
    return method.compare(vectors, batch) | {name: total / count for name, (total, count) in sums.items()}


@pytest.mark.parametrize("size", [3, 1, 8])
@pytest.mark.parametrize("name, options", CHUNKED)
def test_chunks_give_the_gradients_of_all_at_once(name, options, size, device="cpu"):
    """To ten digits, with dropout, masks and negatives drawn again alike, and BatchNorm counted once."""
    if size == 1 and name == "merl":
        pytest.skip("BatchNorm of one record has no variance to speak of")
    results = []
    for how in ("all at once", "chunks"):
        method = toy_method(name, **options, precision="float32").double().to(device)
        for module in method.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        if name == "merl":
            method.config.uma_dropout = 0.3
        batch = toy_batch()
        batch = batch._replace(ecg=batch.ecg.double().to(device), peaks=batch.peaks.to(device))
        torch.manual_seed(3)
        if how == "chunks":
            method.config.chunk, method.config.accumulate = size, 1
            terms = train.chunked(method, batch, method.config, torch.device(device))
        else:
            terms = one_by_one(method, batch, size)
            method.weighted(terms).backward()
        results.append(({k: float(v.detach()) for k, v in terms.items()}, {n: p.grad for n, p in method.named_parameters()},
                        dict(method.named_buffers())))
    (terms, grads, buffers), (others, other_grads, other_buffers) = results
    assert terms == pytest.approx(others, rel=1e-10)
    top = max(g.abs().max() for g in grads.values() if g is not None)
    for n, g in grads.items():
        assert (g is None and other_grads[n] is None) or (g - other_grads[n]).abs().max() <= 1e-10 * top, n
    assert all(torch.allclose(x.double(), other_buffers[n].double(), rtol=1e-12) for n, x in buffers.items())


@pytest.mark.parametrize("name", ["etp", "melp", "fgclep"])
def test_chunks_are_the_whole_batch_where_nothing_normalises_over_it(name):
    results = []
    for size in (0, 3):
        method, batch = toy_method(name, encoder="vit_tiny", patch=20).double(), toy_batch()
        batch = batch._replace(ecg=batch.ecg.double())
        method.config.chunk = size
        if size:
            terms = train.chunked(method, batch, method.config, torch.device("cpu"))
        else:
            terms = method(batch)
            method.weighted(terms).backward()
        results.append([float(method.weighted(terms).detach()), *(p.grad for p in method.parameters() if p.grad is not None)])
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-10)
    top = max(g.abs().max() for g in results[0][1:])
    assert all((a - b).abs().max() <= 1e-10 * top for a, b in zip(results[0][1:], results[1][1:]))


@pytest.mark.parametrize("name, options", [*CHUNKED, ("melp", {"encoder": "resnet50"})])
def test_activations_that_are_computed_again_change_nothing(name, options):
    """Neither gradients nor running statistics, and blocks keep less."""
    results, kept = [], []
    for again in (False, True):
        method, batch, sizes = toy_method(name, **options), toy_batch(), []
        for module in method.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        if again:
            method.recompute()
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            loss = method.weighted(method(batch))
        loss.backward()
        kept.append(sum(sizes))
        results.append([loss, *(p.grad for p in method.parameters() if p.grad is not None), *method.buffers()])
    assert len(results[0]) == len(results[1]) and kept[1] < 0.8 * kept[0]
    assert all(torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-6) for a, b in zip(*results))


# ---- settings --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", models.METHODS)
@pytest.mark.parametrize("preset", ["small", "paper"])
def test_settings_of_a_run_make_the_same_config(method, preset):
    config = models.configure(method, preset)
    assert models.configure(**models.settings_of(config)) == config
    foreign = {name for name in models.TYPES if models.owners(name) and method not in models.owners(name)}
    assert foreign and not foreign & models.settings_of(config).keys()


@pytest.mark.parametrize("method, given, words", [
    ("fgclep", dict(precision="fp32"), "--precision is 'fp32'; it must be one of auto, float32, bf16"),
    ("fgclep", dict(normalise="minmax"), "--normalise is 'minmax'"), ("fgclep", dict(text_unit="tagz"), "--text-unit"),
    ("fgclep", dict(fn_mode="softbce"), "--fn-mode"), ("etp", dict(text_pooling="max"), "--text-pooling"),
    ("etp", dict(report_language="german"), "--report-language"), ("cmelt", dict(negatives="lost"), "--negatives"),
    ("etp", dict(clip=-1.0), "--clip"), ("etp", dict(clip=0.0), "--clip"), ("etp", dict(temperature=-1.0), "--temperature"),
    ("etp", dict(width=-1.0), "--width"), ("etp", dict(lead_drop=float("nan")), "--lead-drop is nan"),
    ("etp", dict(lr=float("inf")), "--lr"), ("etp", dict(lr=0.0), "--lr"), ("etp", dict(lead_drop=1.0), "--lead-drop"),
    ("etp", dict(shift=20.0), "--shift"), ("etp", dict(warmup=1.5), "--warmup"), ("etp", dict(beta2=1.0), "--beta2"),
    ("etp", dict(epochs=-1), "--epochs is -1; it must be a whole number from 1"), ("etp", dict(epochs=2.0), "--epochs"),
    ("etp", dict(accumulate=0), "--accumulate"), ("etp", dict(batch_size=1), "--batch-size"), ("etp", dict(lr=True), "--lr is True"),
    ("etp", dict(seed=-1), "--seed"), ("etp", dict(rate=50), "--rate"), ("etp", dict(threads=-2), "--threads"),
    ("etp", dict(text_trainable_layers=-2), "--text-trainable-layers"), ("etp", dict(max_pool="yes"), "--max-pool"),
    ("etp", dict(seconds=20.0), "no setting 'seconds'"), ("etp", dict(encoder="resnet19"), "unknown --encoder 'resnet19'"),
    ("etp", dict(encoder="vit_tiny", patch=1001), "--patch 1001 is longer"), ("cmelt", dict(patch=10), "--patch is not a setting of"),
    ("etp", dict(encoder="vit_tiny", width=1.0), "--width is not a setting of --encoder vit_tiny"),
    ("etp", dict(patch=10), "--patch is not a setting of --encoder resnet18"), ("etp", dict(name="../x"), "no name of a folder"),
    ("etp", dict(name="a/b"), "no name of a folder"), ("etp", dict(text_unit="tags"), "--text-unit tags is fgclep's"),
    ("fgclep", dict(temperature=0.1), "--temperature is a setting of etp, merl, not of fgclep"),
    ("etp", dict(fine_epochs=2), "--fine-epochs is a setting of fgclep"), ("melp", dict(text_pooling="cls"), "not of melp"),
    ("merl", dict(targets="truth"), "--targets is a setting of fgclep"),
    ("fgclep", dict(llm="x", fine_epochs=0), "add --fine-epochs"), ("clip", {}, "unknown method"),
    ("etp", dict(preset="large"), "--preset is 'large'; it must be one of small, paper")])
def test_a_setting_without_sense_is_refused(method, given, words):
    with pytest.raises(models.ModelError, match=re.escape(words)):
        models.configure(method, **given)


# ---- text models that are not whole ----------------------------------------------------------------------------------

@pytest.fixture
def text_folder(tmp_path):
    from transformers import BertConfig, BertModel
    tokenizer = models.word_tokenizer(TEXTS)
    BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                         max_position_embeddings=64)).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def test_a_text_model_without_its_words_is_refused(text_folder):
    for file in text_folder.glob("*token*"):
        file.unlink()
    with pytest.raises(models.ModelError, match="has no tokenizer of its own.* put its tokenizer.json or vocab.txt there"):
        models.load_text_model(str(text_folder))
    with pytest.raises(models.ModelError, match="has no tokenizer of its own"):
        models.rebuild_text_model(text_folder)  # as a run's tokenizer/


def test_a_text_model_that_lacks_layers_is_refused(text_folder, capsys):
    from safetensors.torch import load_file, save_file
    state = load_file(text_folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if "layer.1." not in k}, text_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(models.ModelError, match=r"its file lacks 16 weights, such as encoder\.layer\.1\."):
        models.load_text_model(str(text_folder))
    save_file({k: v for k, v in state.items() if "pooler" not in k}, text_folder / "model.safetensors", {"format": "pt"})
    lm = models.load_text_model(str(text_folder))
    assert "new, since not in its file: 2 weights, such as pooler.dense.bias" in capsys.readouterr().out
    models.TextTower(*lm)
    with pytest.raises(models.ModelError, match="no pooler of its own"):
        models.TextTower(*models.load_text_model(str(text_folder)), pooling="pooler")


@pytest.mark.parametrize("damage", ["cut", "empty", "pointer", "config", "type", "code", "pipe"])
def test_a_damaged_text_model_is_one_sentence(text_folder, damage, monkeypatch):
    weights, config = text_folder / "model.safetensors", text_folder / "config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    if damage == "empty":
        weights.write_bytes(b"")
    if damage == "pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 299\n")
    if damage == "config":
        config.write_text("{")
    if damage == "type":
        config.write_text(config.read_text().replace('"bert"', '"ecgbert"'))
    if damage == "pipe":
        config.unlink()
        os.mkfifo(config)
    if damage == "code":  # code of its own: never run, not even asked for
        monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked whether to run code"))
        config.write_text(config.read_text().replace('"bert"', '"own"').replace("{", '{"auto_map": {"AutoConfig": "c.C"},', 1))
    with pytest.raises(models.ModelError, match=re.escape(f"text model '{text_folder}' is neither a folder with a whole model")):
        models.load_text_model(str(text_folder))


def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/lm/language_model").mkdir(parents=True)
    assert models.text_model_name("runs/lm") == str(tmp_path / "runs/lm/language_model")
    for name in ("runs/gone", "./gone", "/gone", "a/b/c", "~/gone"):
        with pytest.raises(models.ModelError, match="neither a folder nor a name of the Hugging Face hub"):
            models.text_model_name(name)
    assert models.text_model_name("ncbi/MedCPT-Query-Encoder") == "ncbi/MedCPT-Query-Encoder"


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
    assert len(set(far.draw(["a text of a validation record"] * 200))) > 50
    tags = [[f"block {i}", f"infarct {i}", "sinus rhythm"] for i in range(8)]
    method, batch = toy_method("cmelt", negatives="far"), toy_batch()._replace(tags=tags, sampled=[said[:2] for said in tags])
    method.far = models.FarTexts(list(map(models.join, tags)), torch.eye(8))
    chosen, aligned = method.with_negatives(batch)
    assert [len(said) for said in chosen] == [2] * 8 and aligned.sum() in (3, 4)  # the length gives nothing away
    for said, own, kept in zip(chosen, tags, aligned):
        assert said == own[:2] if kept else not set(said) & set(own)  # what both reports say is no negative
    lost, aligned = toy_method("cmelt", negatives="far", as_published=True).with_negatives(batch)
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

NOTHING_RANDOM = {"negatives": "none", "frame_drop": 0.0, "lead_mask": 0.0, "word_mask": 0.0}
SHARED_OUT = [("etp", {}), ("merl", {}), ("fgclep", {}), ("melp", {}), ("melp", {"beats": "rpeak"}),
              ("fgclep", {"text_unit": "subset", "similarity": "half"}), ("cmelt", NOTHING_RANDOM),
              ("fgclep", {"text_unit": "report", "similarity": "half", "align": "tag"}),
              ("fgclep", {"text_unit": "report", "similarity": "half", "align": "word"}),
              *((name, {"chunk": 3, "encoder": "vit_tiny", "patch": 20}) for name in ("etp", "melp", "fgclep")),
              ("cmelt", {**NOTHING_RANDOM, "negatives": "far", "chunk": 3})]


def loss_and_gradients(name, options, batch):
    """(method with gradients, {term: value})"""
    method = toy_method(name, **options)
    if options.get("negatives") == "far":  # the same for a record in whichever process
        method.with_negatives = lambda part: (
            [["atrial fibrillation"] if int(i) % 3 == 0 else tags for i, tags in zip(part.ids, part.sampled)],
            torch.tensor([int(i) % 3 != 0 for i in part.ids]))
    if method.config.chunk:
        return method, train.chunked(method, batch, method.config, torch.device("cpu"))
    terms = method(batch)
    method.weighted(terms).backward()
    return method, terms


def one_rank(rank, port, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    share = list(toy_batch().parts(4))[rank]
    for number, (name, options) in enumerate(SHARED_OUT):
        method, terms = loss_and_gradients(name, options, share)
        train.average_gradients([p for p in method.parameters() if p.requires_grad])
        torch.save({"terms": {k: v.item() for k, v in terms.items()}, "buffers": dict(method.named_buffers()),
                    "grads": {n: p.grad for n, p in method.named_parameters() if p.grad is not None}}, f"{path}/{number}-{rank}.pt")
    train.leave_processes()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    """Folder with what each of two processes had, for each of SHARED_OUT."""
    path = tmp_path_factory.mktemp("two")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(one_rank, (port, str(path)), nprocs=2)
    return path


@pytest.mark.parametrize("number", range(len(SHARED_OUT)), ids=[f"{name}-{options}" for name, options in SHARED_OUT])
def test_two_processes_give_the_loss_and_gradients_of_one(of_two_processes, number):
    name, options = SHARED_OUT[number]
    method, terms = loss_and_gradients(name, options, toy_batch())
    both = [torch.load(of_two_processes / f"{number}-{rank}.pt", weights_only=True) for rank in range(2)]
    for k, v in terms.items():
        assert abs(np.mean([other["terms"][k] for other in both]) - v.item()) < 1e-5 * max(1, abs(v.item()))
    for other in both:
        grads = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
        assert grads.keys() == other["grads"].keys()
        top = max(g.abs().max() for g in grads.values())
        for n, g in grads.items():
            assert (g - other["grads"][n]).abs().max() < 1e-4 * top, n
        for n, b in method.named_buffers():  # running statistics of batch norm
            assert torch.allclose(b.float(), other["buffers"][n].float(), atol=1e-5), n


def test_a_class_is_there_if_any_of_its_prompts_is_true():
    method = models.METHODS["fgclep"][0].__new__(models.METHODS["fgclep"][0])
    torch.nn.Module.__init__(method)
    method.log_scale = torch.nn.Parameter(torch.tensor(np.log(10.0)))
    like = torch.tensor([[0.9, -0.5, -0.5], [0.1, 0.1, 0.1], [0.0, 0.3, 0.0]])
    score = method.class_score(like)
    assert score[1].item() == pytest.approx(0.1, abs=1e-6)      # alike: their value
    assert score[0].item() == pytest.approx(0.9 - np.log(3) / 10, abs=1e-5)  # one alone stands out: nearly its own
    mean = models.Method.class_score(method, like)
    assert score[0] > score[2] > score[1] and mean[1] == mean[2] > mean[0]


def test_a_report_is_asked_only_what_reports_say_and_a_truth_all_that_it_decides():
    method = models.METHODS["fgclep"][0].__new__(models.METHODS["fgclep"][0])
    torch.nn.Module.__init__(method)
    method.config = small_config("fgclep")
    words = ["flat t waves", "lvh", "sinus rhythm", "poor progression"]
    method.set_vocabulary(words, {"flat t waves": "flat t waves", "lvh": "left ventricular hypertrophy", "sinus rhythm": "sinus rhythm"})
    said = [["flat t waves", "sinus rhythm"], ["lvh", "sinus rhythm"], ["poor progression"]]
    batch = method.plan(models.Batch(None, said, said, ["a", "b", "c"], None, [True, False, False]))
    chosen, _, by = batch.gathered
    assert chosen == [["flat t waves"], ["sinus rhythm"], ["lvh"], ["poor progression"]] == [[text] for text in batch.captions]
    # simulated: all but what nobody has decided about; the others: not the flat T waves that no report speaks of
    assert method.loss_mask(chosen, by, batch).tolist() == [[1, 1, 1, 0], [0, 1, 1, 1], [0, 1, 1, 1]]
    method.set_vocabulary(words, {})  # nobody's truth is known: what a report leaves out counts as false, as published
    batch = method.plan(batch._replace(exact=()))
    assert method.loss_mask(*batch.gathered[::2], batch).all()
    method.config.text_unit = "report"  # a text is of one record
    batch = method.plan(batch._replace(exact=[True, False, False]))
    assert method.loss_mask(*batch.gathered[::2], batch).tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    logits, weight, target = torch.randn(2, 3), torch.ones(2, 3), torch.zeros(2, 3)
    weight[1, 0] = 0
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    wanted = (each.sum() - each[1, 0]) / 5
    assert models.soft_sigmoid(logits, target, weight).item() == pytest.approx(wanted.item(), rel=1e-6)
