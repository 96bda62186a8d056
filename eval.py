"""Zero-shot evaluation: python eval.py --zeroshot ptbxl   (newest run; or --run runs/NAME, or --ckpt FILE)

Prints a table per label set, writes results.json and zeroshot_SET.png into the run. With --compare runs/* it prints one
table over runs and seeds, and writes comparison.json and comparison.png into the folder that holds the first run. Nothing here
is ever used to choose a model or a threshold; rows are the official test split (PTB-XL fold 10) unless --folds says otherwise.
"""
import argparse
import itertools
import json
import os
import pickle
import re
import sys
import textwrap
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from tqdm import tqdm

import data
import model as models

PTBXL = ("ptbxl_super", "ptbxl_sub", "ptbxl_form", "ptbxl_rhythm")  # "ptbxl": the four published sets
RESAMPLES = 1000  # of the bootstrap
NO_MATTER = ("name", "seed", "threads", "workers", "save_every", "compile")  # config fields in which repetitions may differ
ENOUGH = 10       # positives a class needs for the second mean: fewer make macro AUROC a lottery (METHODS 0.4)


def newest_run(folder="runs"):
    """The finished run of `folder` that was written last. Errors: DataError where there is none."""
    runs = sorted(Path(folder).glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise data.DataError(f"no finished run in {folder}/: train one first (python train.py), or name one with --run")
    return runs[-1].parent


def read_config(run):
    """config.json of a run folder as a dictionary. Errors: DataError where there is none."""
    path = Path(run) / "config.json"
    if not path.exists():
        raise data.DataError(f"{run}: not a run folder (no config.json)")
    return json.loads(path.read_text())


def load_run(run, checkpoint=None, device="cpu", text_model=""):
    """(method in eval mode, its config) of a run folder. checkpoint: other weights than its model.safetensors, or NAME:FILE as the
    authors published them, for which the run does not matter (open_published). Errors: DataError, ModelError."""
    if published := publication(checkpoint):
        return open_published(*published, text_model, device)
    run, config = Path(run), SimpleNamespace(**read_config(run))
    weights = Path(checkpoint or run / "model.safetensors")
    if not weights.exists():
        raise data.DataError(f"{weights} is missing: the run did not finish; continue it with: python train.py --resume {run}")
    if config.method == "cardiolm":
        raise models.ModelError(f"{run} is a language model without an ECG encoder: give it to another run with --text-model {run}")
    method = models.build_method(config, models.rebuild_text_model(run / "tokenizer")).to(device)
    method.load_state_dict(load_file(weights, device=str(device)))
    return method.eval(), config


@torch.no_grad()
def embed_records(method, store, rows, device, what="encoding ECGs", batch=256):
    """Rhythm embeddings of rows of a store -> (R, dim) float32 on the CPU, L2-normalised."""
    out = []
    for start in tqdm(range(0, len(rows), batch), desc=what, leave=False):
        ecg = torch.from_numpy(store.ecg(rows[start:start + batch])).to(device)
        out.append(method.encode_ecg(ecg).rhythm.float().cpu())
    return torch.cat(out)


@torch.no_grad()
def embed_texts(tower, texts, batch=256):
    """Mean word of each text: list of R strings -> (R, D) on the CPU."""
    was, out = tower.training, []
    tower.eval()
    for start in tqdm(range(0, len(texts), batch), desc="encoding texts", leave=False):
        states, words, _ = tower.encode(texts[start:start + batch])
        out.append(models.masked_mean(states, words).cpu())
    tower.train(was)
    return torch.cat(out)


@torch.no_grad()
def score_records(method, store, rows, prompts, scales, device, batch=256):
    """Zero-shot scores of rows of a store: prompts are C lists of texts, a class' score is the mean over its texts -> (R, C) float32."""
    texts = [text.rstrip(". ") for row in prompts for text in row]  # worded as statements are
    text, scores = method.encode_text(texts), []
    for start in tqdm(range(0, len(rows), batch), desc="encoding ECGs", leave=False):
        ecg = torch.from_numpy(store.ecg(rows[start:start + batch])).to(device)
        like = method.similarity(method.encode_ecg(ecg), text, scales).float().cpu()           # (B, texts)
        scores.append(torch.stack([part.mean(1) for part in like.split([len(row) for row in prompts], 1)], 1))
    return torch.cat(scores).numpy()


# ---- published checkpoints -------------------------------------------------------------------------------------
# --ckpt merl:FILE, melp:FILE, dbeta:FILE. Names in the authors' state dictionaries -> ours; * stands for anything, the same on both
# sides in order. A name with +0, +1, +2 is a part (query, key, value) of a larger tensor of ours; "-" is what neither training nor
# zero-shot here has a use for.

MERL_NAMES = """
*num_batches_tracked                      -
ecg_encoder.linear.*                      -
downconv.*                                down.*
att_pool_head.positional_embedding        pool.positions
att_pool_head.cls_token                   pool.cls
att_pool_head.mhsa.*                      pool.attention.*
att_pool_head.c_proj.*                    pool.out.*
linear1.weight                            view1.weight
linear2.weight                            view2.weight
proj_t.*                                  project_text.*
proj_e.*                                  project_ecg.*
lm_model.*                                text.lm.*
ecg_encoder.pos_embedding                 ecg.positions
ecg_encoder.to_patch_embedding.*          ecg.patch.*
ecg_encoder.block*.attn.norm.*            ecg.blocks.*.norm1.*
ecg_encoder.block*.ff.norm.*              ecg.blocks.*.norm2.*
ecg_encoder.block*.attn.fn.to_qkv.*       ecg.blocks.*.attention.in_proj_*
ecg_encoder.block*.attn.fn.to_out.0.*     ecg.blocks.*.attention.out_proj.*
ecg_encoder.block*.ff.fn.net.0.*          ecg.blocks.*.mlp.0.*
ecg_encoder.block*.ff.fn.net.3.*          ecg.blocks.*.mlp.2.*
ecg_encoder.layer*.conv1.*                ecg.layer*.convs.0.*
ecg_encoder.layer*.conv2.*                ecg.layer*.convs.1.*
ecg_encoder.layer*.conv3.*                ecg.layer*.convs.2.*
ecg_encoder.layer*.bn1.*                  ecg.layer*.norms.0.*
ecg_encoder.layer*.bn2.*                  ecg.layer*.norms.1.*
ecg_encoder.layer*.bn3.*                  ecg.layer*.norms.2.*
ecg_encoder.*                             ecg.*
"""
W2V_NAMES = """
ecg_encoder.mask_emb                                      -
ecg_encoder.quantizer.*                                   -
ecg_encoder.project_q.*                                   -
ecg_encoder.final_proj.*                                  -
ecg_encoder.feature_extractor.conv_layers.0.0.weight      ecg.stem.0.weight
ecg_encoder.feature_extractor.conv_layers.0.2.*           ecg.stem.1.*
ecg_encoder.feature_extractor.conv_layers.1.0.weight      ecg.stem.3.weight
ecg_encoder.feature_extractor.conv_layers.2.0.weight      ecg.stem.5.weight
ecg_encoder.feature_extractor.conv_layers.3.0.weight      ecg.stem.7.weight
ecg_encoder.layer_norm.*                                  ecg.norm_stem.*
ecg_encoder.post_extract_proj.*                           ecg.project.*
ecg_encoder.conv_pos.pos_conv.0.weight_g                  ecg.place.parametrizations.weight.original0
ecg_encoder.conv_pos.pos_conv.0.weight_v                  ecg.place.parametrizations.weight.original1
ecg_encoder.conv_pos.pos_conv.0.*                         ecg.place.*
ecg_encoder.encoder.layer_norm.*                          ecg.norm.*
ecg_encoder.encoder.layers.*.self_attn.q_proj.*           ecg.layers.*.self_attn.in_proj_*+0
ecg_encoder.encoder.layers.*.self_attn.k_proj.*           ecg.layers.*.self_attn.in_proj_*+1
ecg_encoder.encoder.layers.*.self_attn.v_proj.*           ecg.layers.*.self_attn.in_proj_*+2
ecg_encoder.encoder.layers.*.self_attn.out_proj.*         ecg.layers.*.self_attn.out_proj.*
ecg_encoder.encoder.layers.*.self_attn_layer_norm.*       ecg.layers.*.norm1.*
ecg_encoder.encoder.layers.*.fc1.*                        ecg.layers.*.linear1.*
ecg_encoder.encoder.layers.*.fc2.*                        ecg.layers.*.linear2.*
ecg_encoder.encoder.layers.*.final_layer_norm.*           ecg.layers.*.norm2.*
"""
OPEN_CLIP_BLOCK = """
THEIRS.*.ln_1.*             OURS.*.norm1.*
THEIRS.*.ln_2.*             OURS.*.norm2.*
THEIRS.*.ln_1_kv.*          OURS.*.norm_context.*
THEIRS.*.attn.*             OURS.*.attention.*
THEIRS.*.mlp.c_fc.*         OURS.*.mlp.0.*
THEIRS.*.mlp.c_proj.*       OURS.*.mlp.2.*
"""
OPEN_CLIP_POOL = """
attn_pool_THEIRS.query          OURS.query
attn_pool_THEIRS.attn.*         OURS.attention.*
attn_pool_THEIRS.ln_q.*         OURS.norm_query.*
attn_pool_THEIRS.ln_k.*         OURS.norm_context.*
ln_THEIRS.*                     OURS.norm.*
"""
BERT_LAYER = """
THEIRS.*.attention.self.query.*                 OURS.*.self_attn.in_proj_*+0
THEIRS.*.attention.self.key.*                   OURS.*.self_attn.in_proj_*+1
THEIRS.*.attention.self.value.*                 OURS.*.self_attn.in_proj_*+2
THEIRS.*.attention.output.dense.*               OURS.*.self_attn.out_proj.*
THEIRS.*.attention.output.LayerNorm.*           OURS.*.norm1.*
THEIRS.*.crossattention.self.query.*            OURS.*.multihead_attn.in_proj_*+0
THEIRS.*.crossattention.self.key.*              OURS.*.multihead_attn.in_proj_*+1
THEIRS.*.crossattention.self.value.*            OURS.*.multihead_attn.in_proj_*+2
THEIRS.*.crossattention.output.dense.*          OURS.*.multihead_attn.out_proj.*
THEIRS.*.crossattention.output.LayerNorm.*      OURS.*.norm2.*
THEIRS.*.intermediate.dense.*                   OURS.*.linear1.*
THEIRS.*.output.dense.*                         OURS.*.linear2.*
THEIRS.*.output.LayerNorm.*                     OURS.*.norm3.*
"""


def of(table, theirs, ours):
    """A table of a part, for the part of these names."""
    return table.replace("THEIRS", theirs).replace("OURS", ours)


MELP_NAMES = (W2V_NAMES + of(OPEN_CLIP_POOL, "contrast", "beat_pool") + of(OPEN_CLIP_POOL, "caption", "caption_pool")
              + of(OPEN_CLIP_BLOCK, "resblocks", "decoder.blocks") + of(OPEN_CLIP_BLOCK, "cross_attn", "decoder.cross") + """
proj_contrast           project_beats
logit_scale             log_scale
ecg_encoder.logit_scale -
bn.*                    -
ln_final.*              decoder.norm.*
text_projection         decoder.vocabulary
lm_model.cls.*          -
lm_model.bert.*         text.lm.*
proj_t.*                project_text.*
sent_proj.*             project_sentences.*
""")
DBETA_NAMES = (W2V_NAMES + of(BERT_LAYER, "multi_modal_ecg_layers", "fuse_ecg")
               + of(BERT_LAYER, "multi_modal_language_layers", "fuse_text")
               + of(OPEN_CLIP_BLOCK, "mim_head.decoder.resblocks", "rebuild.blocks") + """
class_embedding                         cls
language_encoder.*                      text.lm.*
multi_modal_language_proj.*             project_text.*
multi_modal_ecg_proj.*                  project_ecg.*
modality_type_embeddings.*              modality.*
multi_modal_ecg_pooler.dense.*          pool_fused_ecg.0.*
multi_modal_language_pooler.dense.*     pool_fused_text.0.*
unimodal_ecg_pooler.dense.*             pool_ecg.0.*
unimodal_language_pooler.dense.*        pool_text.0.*
mlm_head.transform.dense.*              tell_word.0.*
mlm_head.transform.LayerNorm.*          tell_word.2.*
mlm_head.decoder.weight                 tell_word.3.weight
mlm_head.decoder.bias                   -
mlm_head.bias                           tell_word.3.bias
mim_head.mask_token                     rebuild.mask
mim_head.decoder_embed.*                rebuild.embed.*
mim_head.decoder_pos_embed.pe           -
mim_head.decoder_norm.*                 rebuild.norm.*
mim_head.decoder_pred.*                 rebuild.predict.*
itm_head.fc.*                           match.*
""")
# --ckpt NAME:FILE -> (our method, names, what a file may lack). D-BETA's T5 sees no attention mask, but one text at a time has no
# padding: that is our tower with its mask, in any batch.
PUBLISHED = {"merl": ("merl", MERL_NAMES, ()), "melp": ("melp", MELP_NAMES, ("decoder.", "caption_pool.", "project_sentences.")),
             "dbeta": ("cmelt", DBETA_NAMES, ())}
WRAPPER = re.compile(r"^((module|model)\.)*(ecg_encoder\.(?=ecg_encoder\.|attn_pool|ln_c|proj_contrast|bn\.)"
                     r"|\w*decoder\.(?=resblocks|cross_attn|ln_final|text_proj))?")
DROPPED = ("text.lm.pooler.", "text.lm.embeddings.position_ids")  # parts of a language model that a tower may do without


def publication(checkpoint):
    """"merl:FILE" -> ("merl", "FILE"), None for any other checkpoint."""
    kind, colon, file = str(checkpoint or "").partition(":")
    return (kind, file) if colon and kind in PUBLISHED else None


def rename(state, names):
    """The authors' state dictionary -> ours by a table of names. Errors: models.ModelError with the names that are not in it."""
    rules, parts, unknown = [line.split() for line in names.strip().splitlines() if line], {}, []
    rules = [(re.compile(re.escape(theirs).replace(r"\*", "(.*?)")), ours.split("*")) for theirs, ours in rules]
    for theirs, value in state.items():
        bare = WRAPPER.sub("", theirs)
        match, ours = next(((m, ours) for pattern, ours in rules if (m := pattern.fullmatch(bare))), (None, None))
        if match is None:
            unknown.append(theirs)
        elif ours != ["-"]:
            name, _, part = "".join(a + b for a, b in itertools.zip_longest(ours, match.groups(), fillvalue="")).partition("+")
            parts.setdefault(name, {})[part] = value
    if unknown:
        raise models.ModelError(f"{len(unknown)} unexpected names in the checkpoint: {', '.join(unknown[:10])}")
    return {name: found[""] if "" in found else torch.cat([found[part] for part in sorted(found)]) for name, found in parts.items()
            if "" in found or len(found) == 3}  # else it counts as missing


def load_published(method, state, kind):
    """Fill a method with the authors' weights, kind a key of PUBLISHED. Errors: models.ModelError that names what is missing,
    unknown or misshapen."""
    _, names, optional = PUBLISHED[kind]
    given = rename(state, names)
    ours = {k: v for k, v in method.state_dict().items() if not k.endswith("num_batches_tracked")}
    unused = {k for k in given.keys() - ours.keys() if k.startswith(DROPPED)}
    if unexpected := sorted(given.keys() - ours.keys() - unused):
        raise models.ModelError(f"this {method.config.method} has no place for {', '.join(unexpected[:10])}")
    if missing := sorted(k for k in ours.keys() - given.keys() if not k.startswith(optional)):
        raise models.ModelError(f"the checkpoint lacks {len(missing)} weights, such as {', '.join(missing[:10])}")
    if misshapen := sorted(k for k in given.keys() & ours.keys() if extent(given[k]) != extent(ours[k])):
        raise models.ModelError("other sizes than this method's: " + ", ".join(
            f"{k} {tuple(given[k].shape)} for {tuple(ours[k].shape)}" for k in misshapen[:5]))
    method.load_state_dict({k: given[k].reshape(ours[k].shape) for k in given.keys() - unused}, strict=False)
    return method


def extent(x):
    """Shape without the axes of length 1, of which the authors have more."""
    return [n for n in x.shape if n > 1]


def open_published(kind, file, text_model="", device="cpu"):
    """(method in eval mode, its config) of an authors' checkpoint, with the paper's preset; text_model: where the tokenizer and the
    shape of the text tower are, if not on the hub under the published name. Errors: ModelError, DataError."""
    from train import Config  # here, since train.py imports this file: the defaults of all settings are its
    if kind not in PUBLISHED:
        raise models.ModelError(f"no published checkpoint {kind!r}; known: {', '.join(PUBLISHED)}")
    state = read_tensors(file)
    method, _, _ = PUBLISHED[kind]
    _, small, paper = models.METHODS[method]
    config = Config(**{**small, **paper, "method": method, "data": ""})
    config.text_model = text_model or config.text_model
    if kind == "merl":
        vits = {width: name for name, (width, _, _) in models.ViT1d.SIZES.items()}
        vit, down = state_width(state, "to_patch_embedding.weight"), state_width(state, "downconv.weight", 1)
        config.encoder = f"vit_{vits.get(vit, 'tiny')}" if vit else "resnet50" if down == 2048 else "resnet18"
    lm, tokenizer = models.load_text_model(config.text_model)
    if kind == "melp":
        config.beat_queries = state_width(state, "attn_pool_contrast.query") or config.beat_queries
        tokenizer.add_special_tokens({"bos_token": "[BOS]"})  # in place of [CLS], which goes to the end
        if len(tokenizer) > lm.config.vocab_size:
            lm.resize_token_embeddings(len(tokenizer))
    method = load_published(models.build_method(config, (lm, tokenizer)), state, kind)
    if kind in ("merl", "melp"):  # trained with MIMIC-IV-ECG's order of leads, aVF before aVL (METHODS 0, item 6); ours is aVL, aVF
        first = next(m for m in method.ecg.modules() if isinstance(m, torch.nn.Conv1d))
        first.weight.data = first.weight.data[:, [0, 1, 2, 3, 5, 4, 6, 7, 8, 9, 10, 11]].clone()
    return method.to(device).eval(), config


def read_tensors(file):
    """The state dictionary in a file of torch or safetensors; nothing but tensors is unpickled. Errors: data.DataError."""
    try:
        if str(file).endswith(".safetensors"):
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, pickle.UnpicklingError, RuntimeError, SafetensorError) as error:
        raise data.DataError(f"{file}: not a checkpoint of tensors that can be loaded safely ({type(error).__name__})") from error
    for key in ("state_dict", "model", "model_state_dict"):  # what surrounds the weights in a training checkpoint
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise data.DataError(f"{file}: holds other things than named tensors")
    return state


def state_width(state, ending, axis=0):
    """The size along an axis of the tensor whose name ends so, 0 where there is none."""
    return next((value.shape[axis] for name, value in state.items() if name.endswith(ending)), 0)


# ---- metrics -------------------------------------------------------------------------------------------------------

def auroc_of_resamples(score, positive, weights):
    """AUROC of one class in many bootstrap resamples at once. score (R,), positive (R,) bool, weights (K, R): how often
    each row was drawn. Returns (K,), NaN where a resample lacks positives or negatives. Ties count half."""
    order = np.argsort(score, kind="stable")
    score, positive, weights = score[order], positive[order], weights[:, order]
    pos, neg = weights * positive, weights * ~positive
    below = np.concatenate([np.zeros((len(weights), 1)), np.cumsum(neg, 1)], 1)  # (K, R + 1)
    left, right = np.searchsorted(score, score, "left"), np.searchsorted(score, score, "right")
    wins = (pos * (below[:, left] + below[:, right])).sum(1) / 2
    pairs = pos.sum(1) * neg.sum(1)
    return np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def best_f1(score, positive):
    """Largest F1 over all thresholds ON THESE ROWS, as published (METHODS 4.2): an optimistic number."""
    precision, recall, _ = precision_recall_curve(positive, score)
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12)))


def interval(samples):
    """95 % bootstrap interval [low, high]."""
    return [float(v) for v in np.nanpercentile(samples, [2.5, 97.5])]


def score_classes(names, scores, positives, seed=0):
    """Metrics of a label set. scores (R, C), positives (R, C) bool -> dict with "macro", "macro_enough" and "classes".

    A class without positives, or without negatives, is listed and left out of the means. The bootstrap draws rows."""
    weights = np.random.default_rng(seed).multinomial(len(scores), np.full(len(scores), 1 / len(scores)), RESAMPLES)  # (K, R)
    classes, samples = {}, {}
    for c, name in enumerate(names):
        count = int(positives[:, c].sum())
        classes[name] = {"positives": count}
        if 0 < count < len(scores):
            samples[name] = auroc_of_resamples(scores[:, c], positives[:, c], weights)
            classes[name] |= {"auroc": float(roc_auc_score(positives[:, c], scores[:, c])), "interval": interval(samples[name]),
                              "auprc": float(average_precision_score(positives[:, c], scores[:, c])),
                              "f1": best_f1(scores[:, c], positives[:, c])}
    means = {}
    for title, least in (("macro", 1), ("macro_enough", ENOUGH)):
        chosen = [n for n in samples if classes[n]["positives"] >= least]
        if chosen:
            means[title] = {"classes": len(chosen), "interval": interval(np.nanmean([samples[n] for n in chosen], 0)),
                            **{m: float(np.mean([classes[n][m] for n in chosen])) for m in ("auroc", "auprc", "f1")}}
    return {"records": len(scores), **means, "classes": classes}


def print_table(title, result):
    line = "{:<44} {:>9} {:>7} {:>15} {:>7} {:>7}"
    print(f"\n{title}: {result['records']} records")
    print(line.format("class", "positives", "AUROC", "95 % interval", "AUPRC", "best F1"))
    for name, r in result["classes"].items():
        if "auroc" in r:
            print(line.format(name[:44], r["positives"], *columns(r)))
        else:
            print(line.format(name[:44], r["positives"], "-", "no positives", "-", "-"))
    for key, text in (("macro", "macro, classes with positives"), ("macro_enough", f"macro, at least {ENOUGH} positives")):
        if key in result:
            print(line.format(f"{text} ({result[key]['classes']})", "", *columns(result[key])))


def columns(r):
    return f"{r['auroc']:.3f}", "{:.3f} - {:.3f}".format(*r["interval"]), f"{r['auprc']:.3f}", f"{r['f1']:.3f}"


def plot(title, result, path):
    """AUROC of every class with its interval, best at the top."""
    from matplotlib.figure import Figure
    shown = sorted(((r["auroc"], n, r) for n, r in result["classes"].items() if "auroc" in r), key=lambda x: x[0])
    figure = Figure(figsize=(8, 1.4 + 0.24 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for y, (auroc, _, r) in enumerate(shown):
        axes.plot(r["interval"], [y, y], color="0.7", lw=3, solid_capstyle="butt", zorder=1)
        axes.plot(auroc, y, "o", color="C0" if r["positives"] >= ENOUGH else "0.5", ms=5, zorder=2)
    axes.axvline(0.5, color="0.8", lw=1, zorder=0)
    axes.axvline(result["macro"]["auroc"], color="C1", lw=1, ls="--", zorder=0)
    axes.set_yticks(range(len(shown)), [f"{n} ({r['positives']})" for _, n, r in shown], fontsize=8)
    axes.set(xlim=(min(0.4, *(r["interval"][0] for _, _, r in shown)), 1.0), ylim=(-0.8, len(shown) - 0.2), xlabel="AUROC",
             title=f"{title}: macro AUROC {result['macro']['auroc']:.3f}, {result['records']} records")
    figure.savefig(path, dpi=120)


# ---- zero-shot -------------------------------------------------------------------------------------------------------

def class_prompts(name, classes, style):
    """One list of texts a class. style: descriptive (the project's, prompts.json), plain (class names), or a JSON file
    {code: text or [texts]}, such as the published ones; a class the file lacks is an error."""
    table = data.label_set(name)
    if style == "plain":
        return [[table[c]["name"]] for c in classes]
    if style == "descriptive":
        return [table[c]["prompts"] for c in classes]
    with open(style, encoding="utf-8") as file:
        given = json.load(file)
    given = given.get(name, given)
    missing = [c for c in classes if c not in given and c.rstrip("_") not in given]
    if missing:
        raise data.DataError(f"{style} has no prompt for {', '.join(missing)} of {name}")
    texts = [given.get(c, given.get(c.rstrip("_"))) for c in classes]
    return [[t.lower() for t in ([text] if isinstance(text, str) else text)] for text in texts]


def find_store(source, config, spec):
    """The store to evaluate on: --data or the run's own where they hold records of that source; else, for PTB-XL, what is in
    $PTBXL or data/ptbxl, and the default simulated records."""
    for given in filter(None, (spec, config.data)):
        store = data.open_data(given, config.rate)
        if store.records["source"].iloc[0] == source:
            return store
    if source == "simulated":
        return data.open_data("simulated", config.rate)
    place = os.environ.get("PTBXL", os.path.join("data", "ptbxl"))
    if not os.path.exists(os.path.join(place, "ptbxl_database.csv")):
        raise data.DataError(f"PTB-XL is not in {place}: download it from https://physionet.org/content/ptb-xl/ (3 GB, free, "
                             "CC BY 4.0) and say where it is with --data ptbxl:PATH")
    return data.open_data(f"ptbxl:{place}", config.rate)


def test_rows(store, folds=None):
    """Row numbers of a store's test records, of PTB-XL those of the given folds."""
    records = store.records
    return np.flatnonzero(records["fold"].isin(folds) if folds and records["source"].iloc[0] == "ptbxl" else records["split"] == "test")


def zeroshot(run, sets, checkpoint=None, spec=None, prompts="descriptive", folds=None, scales=None, text_model="",
             device="cpu"):
    """Zero-shot classification (METHODS 4.2): score = similarity of the ECG with the class' texts -> {set: metrics}.

    checkpoint, text_model: load_run. scales: of rhythm, beat, token, whose mean is the score; default: the method's."""
    method, config = load_run(run, checkpoint, device, text_model)
    names = [n for s in sets for n in (PTBXL if s == "ptbxl" else (s,))]
    for name in names:
        data.label_set(name)  # an unknown name ends here
    results = {}
    for source in dict.fromkeys(name.split("_")[0] for name in names):
        store = find_store(source, config, spec)
        rows = test_rows(store, folds)
        labels = {name: data.label_matrix(store.records.iloc[rows], name) for name in names if name.split("_")[0] == source}
        texts = {name: class_prompts(name, classes, prompts) for name, (classes, _, _) in labels.items()}
        scores = score_records(method, store, rows, [text for name in texts for text in texts[name]], scales, device)
        for name, (classes, positives, keep) in labels.items():
            if not keep.any():
                raise data.DataError(f"{store.path}: no record to evaluate has a label of {name}")
            mine, scores = scores[:, :len(classes)], scores[:, len(classes):]
            results[name] = score_classes(classes, mine[keep], positives[keep])
    return {name: results[name] for name in names}


def report(run, sets, **options):
    """Evaluate, print the tables, write results.json and the pictures into the run."""
    results = zeroshot(run, sets, **options)
    for name, result in results.items():
        print_table(f"zero-shot {name}", result)
    save_results(run, results, options)
    return results


def save_results(run, results, options):
    """results.json and zeroshot_SET.png of a run; what is known of other label sets stays."""
    for name, result in results.items():
        plot(f"zero-shot {name}", result, Path(run) / f"zeroshot_{name}.png")
    given = {k: str(v) for k, v in options.items()}
    remember(run, "zeroshot", {n: {"options": given, **r} for n, r in results.items()})


def remember(run, key, found):
    """Add to an entry of a run's results.json."""
    path = Path(run) / "results.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known.setdefault(key, {}).update(found)
    path.write_text(json.dumps(known, indent=1))


# ---- reports written from the ECG --------------------------------------------------------------------------------------

def overlap(written, truth):
    """Micro precision, recall and F1 of sets: both lists of R sets."""
    hits, said, true = sum(len(a & b) for a, b in zip(written, truth)), sum(map(len, written)), sum(map(len, truth))
    return {"precision": hits / max(1, said), "recall": hits / max(1, true), "f1": 2 * hits / max(1, said + true)}


def generate(run, checkpoint=None, spec=None, folds=None, beams=1, text_model="", device="cpu", batch=64):
    """Let a run write the reports of its test records; prints how far they agree with the doctors', writes reports.jsonl.

    Compared as sets: whole statements, and findings (codes that data.Findings reads in them). The yardstick is to give every record
    the commonest training report. Errors: ModelError where the method does not write."""
    method, config = load_run(run, checkpoint, device, text_model)
    if not hasattr(method, "generate"):
        raise models.ModelError(f"a {config.method} run writes no reports; --method melp does")
    store = data.open_data(spec or config.data, config.rate)
    tags, read = data.report_tags(store, config.report_language), data.Findings()
    rows = [row for row in test_rows(store, folds) if tags[row]]
    if not rows:
        raise data.DataError(f"{store.path}: none of the records asked for has a report")
    texts = []
    for start in tqdm(range(0, len(rows), batch), desc="writing", leave=False):
        texts += method.generate(torch.from_numpy(store.ecg(rows[start:start + batch])).to(device), beams)
    written = [[s.strip(" .") for s in text.split(". ") if s.strip(" .")] for text in texts]
    common = Counter(tuple(tags[row]) for row in np.flatnonzero(store.records["split"] == "train") if tags[row]).most_common(1)[0][0]
    found, truth = {}, [tags[row] for row in rows]
    for name, said in (("written", written), ("commonest report", [list(common)] * len(rows))):
        found[name] = {"statements": overlap(list(map(set, said)), list(map(set, truth))),
                       "findings": overlap([set(read.named(s)) for s in said], [set(read.named(s)) for s in truth])}
    with open(Path(run) / "reports.jsonl", "w") as file:
        for row, true, said in zip(rows, truth, written):
            file.write(json.dumps({"id": str(store.records["id"].iloc[row]), "report": true, "written": said}) + "\n")
    print(f"\nreports of {len(rows)} records, {len(set(texts))} different ones, {beams} beam(s)\n{'':<18} "
          + "".join(f"{kind + ' ' + m:>22}" for kind in ("statements", "findings") for m in ("precision", "recall", "F1")))
    for name, r in found.items():
        print(f"{name:<18} " + "".join(f"{r[kind][m]:22.3f}" for kind in ("statements", "findings") for m in ("precision", "recall", "f1")))
    remember(run, "reports", {f"{beams} beam(s)": {"records": len(rows), "different": len(set(texts)), **found}})
    return found


# ---- language --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def report_language(method, texts, run, batch=64):
    """How many hidden words of `texts` a CardioLM guesses; prints it and adds it to results.json. The yardstick is to say the
    commonest word every time."""
    method.eval()
    counts, sums = Counter(), torch.zeros(3)
    torch.manual_seed(0)  # training is over
    for start in range(0, len(texts), batch):
        part = texts[start:start + batch]
        sums += torch.stack([x.float().cpu() for x in method.guess(part)])
        counts.update(piece for row in method.tokenizer(part, add_special_tokens=False)["input_ids"] for piece in row)
    loss, right = (sums[[0, 2]] / sums[1]).tolist()
    found = {"texts": len(texts), "loss": loss, "accuracy": right, "commonest": max(counts.values()) / counts.total()}
    print(f"masked words of {len(texts)} texts not trained on: {100 * right:.1f} % right (always the commonest word: "
          f"{100 * found['commonest']:.1f} %), loss {loss:.3f}")
    remember(run, "language", found)


# ---- many runs -------------------------------------------------------------------------------------------------------

def group_runs(configs):
    """Configs that differ in NO_MATTER only belong together -> {title: their places}, in order of appearance. A title is the
    method and what sets the group apart from the method's others; each field's most common value goes without saying (among
    equally common ones the first). A field that an older version did not have is None."""
    fields = [f for f in dict.fromkeys(f for config in configs for f in config) if f not in NO_MATTER]
    groups, titled = {}, {}
    for place, config in enumerate(configs):
        groups.setdefault(tuple(config.get(f) for f in fields), []).append(place)
    for values, places in groups.items():
        method = configs[places[0]]["method"]
        peers = [v for v, p in groups.items() if configs[p[0]]["method"] == method]
        usual = [Counter(column).most_common(1)[0][0] for column in zip(*peers)]
        titled[" ".join([method] + [f"{f}={v}" for f, v, u in zip(fields, values, usual) if v != u])] = places
    return titled


def over_runs(runs, name, mean):
    """The macro AUROC of label set `name` over runs; mean: "macro" or "macro_enough". None where it has no such class."""
    found = [r["results"][name][mean] for r in runs if mean in r["results"][name]]
    if not found:
        return None
    values = [m["auroc"] for m in found]
    return {"auroc": values, "mean": float(np.mean(values)), "lowest": min(values), "highest": max(values),
            "interval": np.mean([m["interval"] for m in found], 0).tolist()}


def summarise(runs):
    """runs of a group: [{"run", "config", "training" (None for runs of older versions), "results": {set: metrics}}] -> dict.
    Over runs: AUROCs are macro AUROCs; each end of the interval, speed and parameters are means."""
    means = {key: {name: over_runs(runs, name, mean) for name in runs[0]["results"]}
             for key, mean in (("sets", "macro"), ("sets_enough", "macro_enough"))}
    known = [r["training"] for r in runs if r["training"]]
    costs = {k: float(np.mean([t[k] for t in known])) if known else None for k in ("records_per_second", "parameters")}
    return {"runs": [r["run"] for r in runs], "seeds": [r["config"]["seed"] for r in runs],
            "config": {k: v for k, v in runs[0]["config"].items() if k not in NO_MATTER},
            **means, **costs, "training": [r["training"] for r in runs]}


def cell(s):
    """mean (lowest - highest) [interval]"""
    if s is None:
        return "-"
    spread = f" ({s['lowest']:.3f} - {s['highest']:.3f})" if len(s["auroc"]) > 1 else ""
    return f"{s['mean']:.3f}{spread} [{s['interval'][0]:.3f}, {s['interval'][1]:.3f}]"


def markdown(groups, key="sets"):
    """{title: summary} -> table of "sets" (classes with positives) or "sets_enough" (with at least ENOUGH)."""
    names = list(next(iter(groups.values()))["sets"])
    lines = ["| method | seeds | " + " | ".join(n.removeprefix("ptbxl_") for n in names) + " | records/s | parameters |",
             "|---" * (len(names) + 4) + "|"]
    for title, group in groups.items():
        cost = [f"{group['records_per_second']:.0f}", f"{group['parameters'] / 1e6:.2f} M"] if group["parameters"] else ["-", "-"]
        lines.append("| " + " | ".join([title, str(len(group["runs"])), *map(cell, group[key].values()), *cost]) + " |")
    return "\n".join(lines)


def plot_comparison(groups, path):
    """A panel for each label set, a line for each group: a dot for each run, the mean as a stroke, the interval as a bar."""
    from matplotlib.figure import Figure
    sets = list(next(iter(groups.values()))["sets"])
    labels = [textwrap.fill(title, 32) for title in groups]
    methods = list(dict.fromkeys(group["config"]["method"] for group in groups.values()))
    height = sum(0.3 + 0.14 * label.count("\n") for label in labels)
    figure = Figure(figsize=(2.2 + 2.3 * len(sets), 1.2 + height), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(sets), sharey=True, squeeze=False)[0], sets):
        for y, group in enumerate(groups.values()):
            s, colour = group["sets"][name], f"C{methods.index(group['config']['method']) % 10}"
            if s is None:
                continue
            axes.plot(s["interval"], [y, y], color=colour, alpha=0.25, lw=8, solid_capstyle="butt", zorder=1)
            axes.plot([s["mean"]] * 2, [y - 0.3, y + 0.3], color=colour, lw=1.5, zorder=2)
            axes.plot(s["auroc"], [y] * len(s["auroc"]), "o", color=colour, mec="white", mew=0.6, ms=5.5, zorder=3)
        axes.set_title(name, fontsize=10)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(axis="x", labelsize=8)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.supxlabel("macro AUROC of each run, their mean, and the 95 % bootstrap interval", fontsize=8)
    figure.savefig(path, dpi=150)


def compare(runs, sets, **options):
    """Evaluate finished runs, put repetitions together (group_runs), print one table, and write it to comparison.json and
    comparison.png in the parent folder of the first run. Plain files among `runs` are passed over, so that runs/* will do.
    Errors: DataError for a folder that is not a finished run, and where runs were asked about different numbers of records."""
    runs = list(dict.fromkeys(run for run in map(Path, runs) if not run.is_file()))
    if not runs:
        raise data.DataError("no run folder to compare")
    configs = [read_config(run) for run in runs]
    for run in runs:  # before hours of evaluation
        if not (run / "model.safetensors").exists():
            raise data.DataError(f"{run} is not a finished run: continue it with python train.py --resume {run}, or leave it out")
    found = []
    for run, config in zip(tqdm(runs, desc="runs"), configs):
        results = zeroshot(run, sets, **options)
        save_results(run, results, options)
        training = run / "training.json"
        found.append({"run": str(run), "config": config, "results": results,
                      "training": json.loads(training.read_text()) if training.exists() else None})
        for name, first in found[0]["results"].items():
            if results[name]["records"] != first["records"]:
                raise data.DataError(f"{name} has {results[name]['records']} records for {run}, but {first['records']} for "
                                     f"{runs[0]}: name the same for all with --data")
    groups = {title: summarise([found[i] for i in places]) for title, places in group_runs(configs).items()}
    print("macro AUROC: mean over seeds (lowest - highest) [95 % bootstrap interval, mean of its ends over seeds]\n")
    print(markdown(groups))
    print(f"\nthe same over classes with at least {ENOUGH} positives\n")
    print(markdown(groups, "sets_enough"))
    for one in found:
        if warnings := (one["training"] or {}).get("warnings"):
            print(f"\nwarnings in training of {one['run']}: {len(warnings)}, the last at {warnings[-1]}")
    path = runs[0].parent / "comparison.json"
    path.write_text(json.dumps({"options": {k: str(v) for k, v in options.items()}, "groups": groups}, indent=1))
    plot_comparison(groups, path.with_suffix(".png"))
    print(f"\nwritten to {path} and {path.with_suffix('.png')}")
    return groups


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zeroshot", nargs="+", metavar="SET",
                        help=f"ptbxl (= {', '.join(PTBXL)}), simulated, or any label set: {', '.join(data.LABEL_SETS)}")
    parser.add_argument("--run", help="run folder [the newest in runs/]")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="finished run folders: one table over all")
    parser.add_argument("--ckpt", help="a .safetensors file, with config and tokenizer from --run or from beside it; or merl:FILE, "
                        "melp:FILE, dbeta:FILE, a checkpoint as its authors published it")
    parser.add_argument("--text-model", default="", help="of a published checkpoint: folder with its tokenizer [the published name]")
    parser.add_argument("--generate", action="store_true", help="write the test records' reports (melp)")
    parser.add_argument("--beams", type=int, default=1, help="of --generate; 1: greedy")
    parser.add_argument("--data", metavar="ptbxl:PATH", help="where the records are")
    parser.add_argument("--prompts", default="descriptive", help="descriptive | plain | a JSON file {code: text or [texts]}")
    parser.add_argument("--scales", type=lambda text: text.split(","), help="rhythm,beat,token or some of them [the method's own]")
    parser.add_argument("--folds", type=lambda text: [int(f) for f in text.split(",")], help="PTB-XL folds, e.g. 9,10 [10]")
    args = parser.parse_args(argv)
    if not (args.zeroshot or args.generate and not args.compare):
        parser.error("say what to do: --zeroshot SET or --generate; --compare needs --zeroshot SET")
    where = dict(spec=args.data, folds=args.folds, device="cuda" if torch.cuda.is_available() else "cpu")
    how = dict(prompts=args.prompts, scales=args.scales)
    if args.compare:
        if args.run or args.ckpt:
            parser.error("--compare names its own runs: drop --run and --ckpt")
        compare(args.compare, args.zeroshot, **where, **how)
        return
    weights = dict(checkpoint=args.ckpt, text_model=args.text_model)
    if published := publication(args.ckpt):  # its results go to a folder of their own beside the runs
        run = Path("runs") / f"published-{published[0]}-{Path(published[1]).stem}"
        run.mkdir(parents=True, exist_ok=True)
    else:
        run = args.run or (Path(args.ckpt).parent if args.ckpt else newest_run())
    print(f"run {run}")
    if args.zeroshot:
        report(run, args.zeroshot, **weights, **where, **how)
    if args.generate:
        generate(run, beams=args.beams, **weights, **where)


if __name__ == "__main__":
    try:
        main()
    except (data.DataError, models.ModelError) as error:
        sys.exit(f"error: {error}")
