"""Our modules, filled through eval.py's tables of names, against numbers that the authors' code gave
(golden/README.md)."""
import json
import shutil
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import csrc
import eval as evaluation
import model as models
import train
from conftest import GOLDEN, small_config

TIED = {"language_encoder.shared.weight": "language_encoder.encoder.embed_tokens.weight",  # the second name fills both
        "lm_model.bert.embeddings.word_embeddings.weight": "lm_model.cls.predictions.decoder.weight"}


def filled(*parts):
    """The authors' state dictionary of one or more parts, with the weights that the golden arrays were made with."""
    state = {}
    for name in parts:
        for key, shape in json.loads((GOLDEN / f"{name}_state.json").read_text()).items():
            a = np.random.RandomState(zlib.crc32(TIED.get(key, key).encode())).standard_normal(shape) * 0.05
            if key.endswith("running_var"):
                a = np.abs(a) + 0.5
            elif key.endswith("weight") and len(shape) == 1:
                a = a + 1.0
            state[key] = torch.from_numpy(np.asarray(a, np.float32))
    return state


def load(name):
    """The golden arrays of a file as tensors."""
    return {key: torch.from_numpy(a) for key, a in np.load(GOLDEN / f"{name}.npz").items()}


def ecgs(n):
    return draw(n, 12, 5000) * 0.3


def draw(*shapes):
    """The first standard normal numbers of RandomState(0): one array, or several one after another."""
    rng = np.random.RandomState(0)
    many = isinstance(shapes[0], tuple)
    arrays = [torch.from_numpy(rng.standard_normal(shape).astype("float32")) for shape in (shapes if many else (shapes,))]
    return arrays if many else arrays[0]


def agree(golden, bound=2e-5, **ours):
    """Each of ours has the shape of the golden array of its name, and differs by at most bound, relative to the largest."""
    for name, mine in ours.items():
        theirs = golden[name]
        assert mine.shape == theirs.shape, name
        assert (mine - theirs).abs().max() <= bound * theirs.abs().max(), name


def bert(**options):
    """The stand-in for the text model that MERL and MELP were run with."""
    from transformers import BertConfig, BertModel
    return BertModel(BertConfig(vocab_size=200, hidden_size=768, num_hidden_layers=2, num_attention_heads=12, intermediate_size=512,
                                max_position_embeddings=64, **options))


def t5():
    from transformers import T5Config, T5EncoderModel
    return T5EncoderModel(T5Config(vocab_size=32128, d_model=768, d_kv=64, d_ff=256, num_layers=2, num_heads=12,
                                   feed_forward_proj="gated-gelu"))


# ---- MERL ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("encoder, bound", [("resnet18", 2e-5), ("resnet50", 1e-4), ("vit_tiny", 2e-5)])
@torch.no_grad()
def test_merl(encoder, bound):
    golden, vit = load(f"merl_{encoder}"), encoder == "vit_tiny"
    config = small_config("merl", encoder=encoder, dim=256, rate=500, text_pooling="pooler", text_max_length=64,
                          **({"patch": 50} if vit else {"width": 1.0}))
    method = models.MERL(config, (bert(), None)).eval()
    models.load_published(method, filled(f"merl_{encoder}"), "merl")

    def views(mean):
        return [view(mean) for view in (method.view1, method.view2)]
    ecg = ecgs(6)
    encode = method.ecg.states if vit else method.ecg  # the head of the ViT starts before the encoder's norm
    method.encode_tokens = lambda x: encode(x)  # as it is: ext_scaled goes beyond what normalise clips at
    tokens = encode(ecg)
    _, mean, ecg_vector = method.project(tokens)
    ecg1, ecg2 = views(mean)
    text = method.text.run(golden).pooler_output
    text_vector = F.normalize(method.project_text(text), dim=1)
    scale = torch.tensor(1 / 0.07)
    agree(golden, bound, proj_ecg=ecg_vector, proj_text=text_vector, text_pooler=text, ecg1=ecg1, ecg2=ecg2,
          enc_slice=method.ecg.norm(tokens.mean(1))[:2] if vit else tokens.transpose(1, 2)[:2, :8, :8],
          cma=2 * models.info_nce(ecg_vector, text_vector, scale),
          uma=2 * models.info_nce(F.normalize(ecg1, dim=1), F.normalize(ecg2, dim=1), scale))
    golden.update({name: F.normalize(golden[name], dim=1) for name in ("ext", "ext_scaled", "head_ext")})  # as ours are at once
    agree(golden, bound, ext=ecg_vector, ext_scaled=method.encode_ecg(ecg * torch.arange(1.0, 7)[:, None, None]).rhythm)
    if vit:  # the head starts behind the encoder's norm
        tokens, method.ecg.norm = draw(2, 192)[:, None], torch.nn.Identity()
    else:
        tokens = draw(2, *golden["enc_shape"][1:].tolist()).transpose(1, 2)
    _, mean, vector = method.project(tokens)
    agree(golden, bound, head_ext=vector, head_proj=vector, **dict(zip(("head_ecg1", "head_ecg2"), views(mean))))


def test_merl_loss():
    golden = load("merl_loss")
    x, y = golden["x"].requires_grad_(), golden["y"].requires_grad_()
    loss = 2 * models.info_nce(F.normalize(x, dim=1), F.normalize(y, dim=1), 1 / 0.07)
    loss.backward()
    agree(golden, loss=loss.detach(), grad_x=x.grad, grad_y=y.grad)


# ---- MELP ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def melp():
    config = small_config("melp", encoder="w2v_base", dim=256, rate=500, beat_queries=12, caption_queries=128, decoder_layers=1,
                          text_max_length=20)
    method = models.MELP(config, (bert(), SimpleNamespace(cls_token_id=2, bos_token_id=None))).eval()
    return models.load_published(method, filled("melp_ecg_tower", "melp_text_tower"), "melp")


@torch.no_grad()
def test_melp_ecg_tower(melp):
    golden, ecg = load("melp_ecg_tower"), ecgs(2)
    tower = melp.ecg
    frames, features = tower.embed(ecg), tower(ecg)
    assert list(features.shape) == golden["features_shape"].tolist()
    agree(golden, stem_slice=tower.norm_stem(tower.stem(ecg).transpose(1, 2))[:, :8], embeddings_slice=frames[:, :8],
          layer0_slice=tower.layers[0](tower.norm(frames))[:, :8], features_slice=features[:, :8], features_last=features[:, -4:],
          features_mean=features.mean(1))
    agree(golden, 1e-4, features_std_over_time=features.std(1))
    for prefix, tokens in (("", features), ("pool_", draw(2, 312, 768))):
        views, caption = melp.views(tokens, ecg), melp.caption_pool(tokens)
        agree(golden, **{prefix + name: a for name, a in dict(
            beats=views.beats, rhythm=views.beats.mean(1), caption_slice=caption[:, :8], caption_mean=caption.mean(1),
            ext_ecg_emb=melp.pool(tokens, ecg)[0].mean(1)).items()})
    agree(golden, rhythm_normalised=melp.encode_ecg(ecg).rhythm)


@torch.no_grad()
def test_melp_text_tower(melp):
    golden = load("melp_text_tower")
    states, report = melp.text.run(golden)
    sentences, _ = models.sentence_means(states, sentence_of(golden["input_ids"], 18, [0, 1, 2, 3, 4, 199]))
    means = torch.cat([row[:n] for row, n in zip(sentences, golden["counts"])])  # theirs drop what follows the last full stop
    agree(golden, text_latent=F.normalize(melp.project_text(report), dim=1), token_slice=states[:, :, :64], sents=means,
          sents_projected=melp.project_sentences(means))


def sentence_of(ids, stop, special):
    """The number of each piece's sentence, which a full stop ends; -1 for special pieces. ids (B, W)."""
    ends = (ids == stop).int()
    return torch.where(torch.isin(ids, torch.as_tensor(special)), -1, ends.cumsum(1) - ends)


def test_melp_sentences():
    """Where the authors' rule does what is meant, ours gives the same; nothing is lost where theirs loses it."""
    golden = load("melp_sentences")
    sentences = sentence_of(golden["input_ids"][:, :-1], golden["dot_id"], golden["special_ids"])
    ours, count = models.sentence_means(golden["token_embs"], sentences)
    theirs = dict(zip(golden["kept_rows"].tolist(), golden["sents"].split(golden["counts"].tolist())))
    for row in (0, 3, 4, 5):
        agree({"sents": theirs[row]}, sents=ours[row, :count[row]])
    assert 1 not in theirs and count[1] == 1                       # no full stop
    agree({"sents": golden["token_embs"][1, 1:4].mean(0)}, sents=ours[1, 0])
    assert len(theirs[2]) == 1 and count[2] == 2                   # words behind the last full stop
    agree({"sents": theirs[2][0]}, sents=ours[2, 0])
    agree({"sents": golden["token_embs"][2, 5:7].mean(0)}, sents=ours[2, 1])


@torch.no_grad()
def test_melp_caption_decoder():
    golden = load("melp_caption_decoder")
    decoder = models.CaptionDecoder(768, 500, 6).eval()
    state = models.rename(filled("melp_caption_decoder"), models.published()["melp"]["names"])
    decoder.load_state_dict({name.removeprefix("decoder."): a for name, a in state.items()})
    image, text = draw((2, 128, 768), (2, 20, 768))
    logits = decoder(text, image)
    assert list(logits.shape) == golden["logits_shape"].tolist() and torch.equal(logits.argmax(2), golden["argmax"])
    agree(golden, logits_slice=logits[:, :, :64], logits_mean=logits.mean(2), logits_std=logits.std(2),
          logsumexp=logits.logsumexp(2))


def test_melp_coca_loss():
    golden = load("melp_coca_loss")
    ecg, text, logits, scale = (golden[name].requires_grad_() for name in ("ecg", "text", "logits", "logit_scale"))
    clip = models.info_nce(ecg, text, scale)
    caption = models.mean_over_all(*models.masked_cross_entropy(logits, golden["labels"].masked_fill(golden["labels"] == 0, -100)))
    (clip + caption).backward()
    agree(golden, clip_loss=clip.detach(), caption_loss=caption.detach(), grad_ecg=ecg.grad, grad_text=text.grad,
          grad_logit_scale=scale.grad, grad_logits=logits.grad)


# ---- D-BETA (C-MELT) -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def dbeta():
    config = small_config("cmelt", encoder="w2v_base", dim=768, rate=500, fusion_layers=6, as_published=True, frame_drop=0.75)
    method = models.CMELT(config, (t5(), None)).eval()
    return models.load_published(method, filled("dbeta_ecg"), "dbeta")


@torch.no_grad()
def test_dbeta_ecg(dbeta):
    golden, ecg = load("dbeta_ecg"), ecgs(2)
    frames = dbeta.ecg.embed(ecg)
    start = dbeta.ecg.norm(torch.cat([dbeta.cls.expand(2, 1, -1), frames], 1))
    encoded = dbeta.encode_frames(frames)
    assert list(encoded.shape) == golden["encoder_shape"].tolist()
    agree(golden, embeddings_slice=frames[:, :8], embeddings_mean=frames.mean(1), layer0_slice=dbeta.ecg.layers[0](start)[:, :8],
          encoder_slice=encoded[:, :8], encoder_mean=encoded.mean(1), pooled=dbeta.pool_ecg(dbeta.project_ecg(encoded)[:, 0]))
    agree(golden, 1e-4, encoder_std_over_time=encoded.std(1))
    agree({"pooled": F.normalize(golden["pooled"], dim=1)}, pooled=dbeta.encode_ecg(ecg).rhythm)


def heads(dbeta, words, mask, states):
    """What both golden files keep, and the fused streams, the words told and the ECG's stream half-way."""
    text, ecg, half = dbeta.fuse(words, mask, states)
    pair = torch.cat([dbeta.pool_fused_text(text[:, 0]), dbeta.pool_fused_ecg(ecg[:, 0])], 1)
    logits = dbeta.tell_word(text)
    found = dict(text_pooled=dbeta.pool_text(words[:, 0]), ecg_pooled=dbeta.pool_ecg(states[:, 0]), mm_cls=pair, etm_logits=dbeta.match(pair),
                 mm_ecg_slice=ecg[:, :8], mlm_logits_slice=logits[:, :, :64], mlm_logsumexp=logits.logsumexp(2))
    return found, text, ecg, logits, half


@torch.no_grad()
def test_dbeta_fusion(dbeta):
    golden = load("dbeta_fusion")
    words = dbeta.text.run(golden).last_hidden_state
    found, text, ecg, logits, _ = heads(dbeta, dbeta.project_text(words), golden["attention_mask"],
                                        dbeta.project_ecg(dbeta.encode_tokens(ecgs(2))))
    assert list(logits.shape) == golden["mlm_logits_shape"].tolist() and torch.equal(logits.argmax(2), golden["mlm_argmax"])
    agree(golden, 1e-4, **found, t5_slice=words[:, :, :64], mm_text_slice=text[:, :, :64], mm_text_mean=text.mean(1),
          mm_ecg_mean=ecg.mean(1), mlm_logits_mean=logits.mean(2), mlm_logits_std=logits.std(2))


@torch.no_grad()
def test_dbeta_masked(dbeta):
    golden = load("dbeta_masked")
    words = dbeta.project_text(dbeta.text.run(golden).last_hidden_state)
    states, hidden = dbeta.masked_states(dbeta.ecg.embed(ecgs(2)), golden["ids_restore"].argsort(1))
    assert torch.equal(hidden, golden["mem_masks"])
    found, _, ecg, _, half = heads(dbeta, words, golden["attention_mask"], states)
    rebuilt = dbeta.rebuild(half, golden["ids_restore"]).unflatten(2, (12, 16))
    assert list(rebuilt.shape) == golden["mem_logits_shape"].tolist() and list(ecg.shape) == golden["mm_ecg_masked_shape"].tolist()
    agree(golden, 1e-4, **found, mm_ecg3_slice=half[:, :8], mem_logits_slice=rebuilt[:, ::8], mem_logits_mean=rebuilt.mean((2, 3)),
          mem_logits_std=rebuilt.flatten(2).std(2))


@torch.no_grad()
def test_dbeta_parts(dbeta):
    golden = load("dbeta_parts")
    x, y, d = draw((2, 24, 768), (2, 40, 768), (2, 79, 768))
    padding = golden["attention_mask"] == 0
    rebuilt = dbeta.rebuild(d, golden["mem_ids_restore"])
    agree(golden, text_layer0=dbeta.fuse_text[0](x, y, tgt_key_padding_mask=padding)[:, ::4, :256],
          ecg_layer0=dbeta.fuse_ecg[0](y, x, memory_key_padding_mask=padding)[:, ::8, :256],
          mem_logits_slice=rebuilt.unflatten(2, (12, 16))[:, ::8], mem_logits_std=rebuilt.std(2),
          text_unimodal_pooler=dbeta.pool_text(x[:, 0]), ecg_unimodal_pooler=dbeta.pool_ecg(y[:, 0]),
          text_pooler=dbeta.pool_fused_text(x[:, 0]), ecg_pooler=dbeta.pool_fused_ecg(y[:, 0]), mlm_head_slice=dbeta.tell_word(x)[:, :, :64])


def test_dbeta_ets_loss():
    golden = load("dbeta_losses")
    x, y = golden["ets_ecg"].requires_grad_(), golden["ets_text"].requires_grad_()
    loss = csrc.sigmoid_loss(x, y, positive=golden["ets_aligned"].bool())
    loss.backward()
    agree(golden, ets_loss=loss.detach(), ets_grad_ecg=x.grad, ets_grad_text=y.grad)


def test_dbeta_losses():
    golden = load("dbeta_losses")
    inputs = {name: golden[name].requires_grad_() for name in ("mem_logits", "mlm_logits", "etm_logits", "uni_ecg", "uni_text")}
    target = models.frames_of(golden["ecg"])
    mean = lambda pair: models.mean_over_all(*pair)
    parts = dict(mlm=mean(models.masked_cross_entropy(inputs["mlm_logits"], golden["mlm_labels"])),
                 mem=mean(models.reconstruction_loss(inputs["mem_logits"].flatten(2), target, golden["mem_mask"])),
                 etm=mean(models.masked_cross_entropy(inputs["etm_logits"], golden["is_aligned"].long())),
                 ets=csrc.sigmoid_loss(inputs["uni_ecg"], inputs["uni_text"], positive=golden["is_aligned"].bool()))
    total = sum(parts.values())
    total.backward()
    ours = dict(total=total, mem_target=target, **parts, grad_mem_logits=inputs["mem_logits"].grad,
                grad_mlm_logits=inputs["mlm_logits"].grad, grad_etm_logits=inputs["etm_logits"].grad,
                grad_uni_modal_ecg_feats=inputs["uni_ecg"].grad, grad_uni_modal_text_feats=inputs["uni_text"].grad)
    agree(golden, **{"norm_" + name: a.detach() for name, a in ours.items()})


# ---- checkpoints as the authors published them -----------------------------------------------------------------------

TEXTS = ["sinus rhythm. normal ecg", "sinus rhythm", "atrial fibrillation. abnormal ecg. old"]


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """A folder with the stand-in for the text model (other weights than the checkpoint's) and a tokenizer, made once for each."""
    made = {}

    def folder(lm):
        if lm not in made:
            made[lm] = tmp_path_factory.mktemp("text")
            lm().save_pretrained(made[lm])
            models.word_tokenizer(TEXTS * 2, 200).save_pretrained(made[lm])
        return str(made[lm])
    yield folder
    for place in made.values():
        shutil.rmtree(place)


@pytest.mark.parametrize("kind, lm, parts", [
    ("merl", bert, ["merl_resnet18"]), ("melp", bert, ["melp_ecg_tower", "melp_text_tower"]), ("dbeta", t5, ["dbeta_ecg"])])
@torch.no_grad()
def test_published_checkpoint(kind, lm, parts, tmp_path, text_folder):
    state = filled(*parts)
    tower = filled("melp_ecg_tower") if kind == "melp" else {}  # stands inside the whole model
    whole = {"module.model." + ("ecg_encoder." * (name in tower and name != "logit_scale")) + name: a for name, a in state.items()}
    torch.save({"state_dict": whole, "epoch": 3}, tmp_path / "best.pt")
    opened, config = evaluation.open_published(kind, tmp_path / "best.pt", text_folder(lm))
    fresh = models.build_method(config, (lm(), opened.text.tokenizer))
    train.start_from(f"{kind}:{tmp_path / 'best.pt'}", fresh, tmp_path)  # another training starts from them
    assert all(torch.equal(a, fresh.state_dict()[name]) for name, a in opened.ecg.state_dict(prefix="ecg.").items())
    (tmp_path / "best.pt").unlink()  # up to a gigabyte
    direct = models.load_published(models.build_method(config, (lm(), opened.text.tokenizer)), state, kind).eval()
    views = opened.encode_ecg(ecgs(1)), opened.encode_text(TEXTS)
    order = list(range(12))
    if kind != "dbeta":  # the authors' leads 4 and 5 are aVF and aVL, ours aVL and aVF
        order[4:6] = 5, 4
    for ours, theirs in zip(views, (direct.encode_ecg(ecgs(1)[:, order]), direct.encode_text(TEXTS))):
        assert all(torch.allclose(a, b, atol=1e-5 * float(b.abs().max())) for a, b in zip(ours, theirs) if a is not None)
    assert kind == "dbeta" or not torch.allclose(views[0].rhythm, direct.encode_ecg(ecgs(1)).rhythm, atol=1e-5)
    assert opened.similarity(*views).shape == (1, 3) and not opened.training
    if kind == "melp":
        tokenizer = opened.text.tokenizer
        assert opened.text.first == tokenizer.convert_tokens_to_ids("[BOS]") != tokenizer.cls_token_id
    if kind == "dbeta":  # the authors' T5 sees no mask: one text at a time, as ours does in a batch
        opened.text.mask = False
        assert torch.allclose(opened.encode_text(TEXTS[1:2]).report[0], views[1].report[1], atol=1e-5)


@pytest.fixture(scope="module")
def merl_resnet18():
    return filled("merl_resnet18")


@pytest.mark.parametrize("wrap", [dict, lambda state: {"module." + name: a for name, a in state.items()}, "safetensors"])
def test_published_file_formats(merl_resnet18, wrap, tmp_path, text_folder):
    from safetensors.torch import save_file
    file = tmp_path / ("best.safetensors" if wrap == "safetensors" else "best.pth")
    save_file(merl_resnet18, file) if wrap == "safetensors" else torch.save(wrap(merl_resnet18), file)
    method, config = evaluation.open_published("merl", file, text_folder(bert))
    assert config.encoder == "resnet18" and torch.equal(method.down.weight, merl_resnet18["downconv.weight"])


def test_published_vision_transformer(tmp_path, text_folder):
    torch.save(filled("merl_vit_tiny"), tmp_path / "best.pth")
    assert evaluation.open_published("merl", tmp_path / "best.pth", text_folder(bert))[1].encoder == "vit_tiny"


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("downconv.weight"), r"lacks 1 weights, such as down\.weight"),
    (lambda s: s.update({"surprise.weight": s["downconv.bias"]}), r"1 unexpected names in the checkpoint: surprise\.weight"),
    (lambda s: s.update({"lm_model.encoder.layer.2.output.dense.bias": s["downconv.bias"]}),
     r"no place for text\.lm\.encoder\.layer\.2\.output\.dense\.bias"),
    (lambda s: s.update({"linear1.weight": s["linear1.weight"][:, 1:]}), r"sizes .*: view1\.weight \(256, 255\) for \(256, 256\)"),
    (lambda s: s.update({"proj_t.0.weight": s["proj_t.0.weight"].T}), r"project_text\.0\.weight \(768, 256\) for \(256, 768\)"),
])
def test_published_checkpoint_that_does_not_fit(merl_resnet18, change, message, tmp_path, text_folder):
    state = dict(merl_resnet18)
    change(state)
    torch.save(state, tmp_path / "best.pth")
    with pytest.raises(models.ModelError, match=message):
        evaluation.open_published("merl", tmp_path / "best.pth", text_folder(bert))
