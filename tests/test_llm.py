"""train.py --llm: features that a causal language model proposes: reading its answers, asking, continuing, a whole run."""
import json

import numpy as np
import pytest
import torch

import data
import model as models
import train
from conftest import small_config

SETS = [["sinus rhythm", "left bundle branch block"], ["atrial fibrillation"], ["atrial fibrillation"], ["normal ecg"],
        ["left bundle branch block", "sinus rhythm"], ["first degree av block", "sinus rhythm"], ["sinus tachycardia"]]
GOOD = '["wide qrs complexes", "absent p waves"]'


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory):
    """Folder with a Llama of random weights and a tokenizer of words: what it answers is garbage."""
    from transformers import LlamaConfig, LlamaForCausalLM
    folder = tmp_path_factory.mktemp("llm")
    tokenizer = models.word_tokenizer([train.QUESTION] * 2)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=None)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def asked(monkeypatch):
    """Answers instead of a model's: every set that is asked is listed; atrial fibrillation has a bad answer."""
    sets = []

    def generate(lm, tokenizer, batch):
        sets.extend(batch)
        return ["I cannot tell." if tags == ("atrial fibrillation",) else f'["{tags[0].split()[-1]} waves in v1", {GOOD[1:]}'
                for tags in batch]
    monkeypatch.setattr(train, "load_llm", lambda name, device: (None, None))
    monkeypatch.setattr(train, "generate", generate)
    monkeypatch.setattr(train, "LLM_BATCH", 2)
    return sets


def ask(folder, name="stub"):
    answers = train.Answers(folder, name)
    answers.ask(SETS, torch.device("cpu"))
    return answers


@pytest.mark.parametrize("answer, features", [
    (GOOD, ["wide qrs complexes", "absent p waves"]),
    (f"  {GOOD}\n", ["wide qrs complexes", "absent p waves"]),
    (f"```json\n{GOOD}\n```", ["wide qrs complexes", "absent p waves"]),
    (f"```\n{GOOD}\n```", ["wide qrs complexes", "absent p waves"]),
    (f"<think>\nMaybe [\"delta waves\"]?\n</think>\n\n{GOOD}", ["wide qrs complexes", "absent p waves"]),
    (f"The template opened the thought.</think>{GOOD}", ["wide qrs complexes", "absent p waves"]),
    (f'{{"features": {GOOD}}}', ["wide qrs complexes", "absent p waves"]),
    ("- wide QRS complexes.\n\n* absent P waves;\n\u2022 QRS > 120 ms", ["wide qrs complexes", "absent p waves", "qrs > 120 ms"]),
    ("1. wide QRS complexes\n2) absent  P waves", ["wide qrs complexes", "absent p waves"]),
    ('["Absent P waves", "absent p waves.", " absent p  waves"]', ["absent p waves"]),                             # repeated
    (json.dumps(["absent p waves"] * 500), ["absent p waves"]),
    (json.dumps([f"st elevation in v{i}" for i in range(20)]), [f"st elevation in v{i}" for i in range(8)]),      # too many
    ('["st elevation in v1 and v2 and v3 and v4 and v5 and v6", "tall r waves"]', ["tall r waves"]),              # too long
    ('["negative T-Wellen in V1 bis V3", "ST-Hebung", "ritmo sinusal normal", "onda t invertida", "onde p normale"]', []),
    ('["ST-Senkung in V4", "flat T waves", "\u0448\u0438\u0440\u043e\u043a\u0438\u0439 qrs"]', ["flat t waves"]),
    ('["\u5bbdqrs\u6ce2", "\u0448\u0438\u0440\u043e\u043a\u0438\u0439 qrs", "elevaci\u00f3n del st", "pr \u2265 200 ms"]', []),
    ('["", " ", "...", "120", "in the", "asdf jkl", "see a doctor", "{}", "**wide qrs**"]', []),
    ("[]", []),
    ("", None), ("   \n", None), ("null", None), ("3", None), ('"wide qrs"', None), ("wide qrs", None), ("{}", None),
    (f"Sure! {GOOD}", None), (f"{GOOD}\nI hope this helps.", None), ("Here:\n- wide qrs\n- absent p waves", None),  # prose
    (GOOD[:-1], None), ('["wide qrs", "abse', None), (GOOD + GOOD, None), ("```json\n" + GOOD, None), (f"<think> {GOOD}", None),
    ('["wide qrs", 3]', None), ('[["wide qrs"]]', None), ('{"a": ["wide qrs"], "b": ["st depression"]}', None),
    ("[" * 50000, None), ("waves " * 200, None), ("\x00\ufffd\u5fc3\u7535\u56fe", None)])
def test_only_a_list_is_read_and_only_english_features_of_it(answer, features):
    assert train.parse_features(answer) == features


def test_the_knowledge_table_is_plausible():
    table = data.knowledge()
    for finding in table["findings"].values():
        assert train.parse_features(json.dumps(finding["features"])) == finding["features"]


def test_each_distinct_set_is_asked_once(asked, tmp_path, capsys):
    answers = ask(tmp_path)
    assert sorted(asked) == sorted({tuple(sorted(tags)) for tags in SETS}) and len(asked) == 5
    assert answers.candidates(SETS[0]) == answers.candidates(SETS[4]) == ["block waves in v1", *json.loads(GOOD)]
    assert answers.candidates(["atrial fibrillation"]) == []
    assert "5 distinct sets of tags, 5 distinct features; 1 of 5 answers could not be read" in capsys.readouterr().out
    assert ask(tmp_path).features == answers.features and len(asked) == 5


def test_asking_goes_on_where_it_was_killed(asked, tmp_path):
    """From a file cut anywhere: whole lines hold, batches with a set left are asked again, and the file becomes the same."""
    whole, path = ask(tmp_path), tmp_path / "llm_answers.jsonl"
    text, order = path.read_text(), list(asked)
    ends = np.cumsum([len(line) for line in text.splitlines(keepends=True)])
    for cut in range(0, len(text) + 1, 7):
        path.write_text(text[:cut])
        asked.clear()
        assert ask(tmp_path).features == whole.features and path.read_text() == text
        kept = sum(ends <= cut)
        assert asked == ([] if kept == 5 else order[kept // 2 * 2:])
    with pytest.raises(data.DataError, match="holds the answers of stub, not of other"):
        train.Answers(tmp_path, "other")


def test_a_tiny_model_answers_garbage(tiny_llm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "LLM_TOKENS", 16)
    state = torch.get_rng_state()
    first = ask(tmp_path, str(tiny_llm))
    assert torch.equal(torch.get_rng_state(), state)
    assert set(first.features.values()) == {None} and "5 of 5 answers could not be read" in capsys.readouterr().out
    raw = [json.loads(line)["answer"] for line in (tmp_path / "llm_answers.jsonl").read_text().splitlines()]
    assert all(raw)
    (tmp_path / "again").mkdir()
    ask(tmp_path / "again", str(tiny_llm))
    assert (tmp_path / "again/llm_answers.jsonl").read_text() == (tmp_path / "llm_answers.jsonl").read_text()


def test_padding_does_not_change_an_answer(tiny_llm, monkeypatch):
    monkeypatch.setattr(train, "LLM_TOKENS", 16)
    lm, tokenizer = train.load_llm(str(tiny_llm), torch.device("cpu"))
    sets = [("normal ecg",), ("atrial fibrillation", "left ventricular hypertrophy", "non-specific st-t wave changes")]
    assert train.generate(lm, tokenizer, sets) == [train.generate(lm, tokenizer, [tags])[0] for tags in sets]


def test_a_chat_template_is_used_where_there_is_one(tiny_llm):
    _, tokenizer = train.load_llm(str(tiny_llm), torch.device("cpu"))
    plain = train.prompt_for(tokenizer, ("normal ecg", "st {x}"))
    assert plain.endswith("Report: normal ecg; st {x}\nFeatures:") and plain.count("Report:") == 3
    assert "fibrillatory baseline" in plain and "pr interval longer than 200 ms" in plain
    tokenizer.chat_template = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
                               "{% if add_generation_prompt %}<|assistant|>{% endif %}{% if not enable_thinking %}!{% endif %}")
    chat = train.prompt_for(tokenizer, ("normal ecg", "st {x}"))
    assert chat.startswith("<|user|>") and chat.endswith("<|end|><|assistant|>!") and "reported as: normal ecg; st {x}\n" in chat


def test_an_untrained_answer_ends_with_its_line(tiny_llm, monkeypatch):
    """A model without chat template goes on with further examples; a chat's answer is taken whole."""
    lm, tokenizer = train.load_llm(str(tiny_llm), torch.device("cpu"))
    monkeypatch.setattr(type(tokenizer), "batch_decode", lambda *args, **options: [f" {GOOD}\n\nReport: flutter"])
    monkeypatch.setattr(train, "LLM_TOKENS", 1)
    assert train.generate(lm, tokenizer, [("normal ecg",)]) == [GOOD]
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert train.generate(lm, tokenizer, [("normal ecg",)]) == [f" {GOOD}\n\nReport: flutter"]


def test_a_missing_model_is_told_in_one_sentence(tmp_path):
    with pytest.raises(models.ModelError, match="no-such-model.* neither a folder with a causal language model.*hub: [^\n]+$"):
        train.load_llm(str(tmp_path / "no-such-model"), torch.device("cpu"))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(models.ModelError, match="neither a folder with a causal language model"):
        train.load_llm(str(tmp_path), torch.device("cpu"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """64 simulated records; the cache of these tests is not the user's."""
    return data.open_data("simulated:64", cache=tmp_path_factory.mktemp("cache"))


def recover(store, folder, answer, **options):
    """What an untrained method recovers for 40 records: {row: [[feature, cosine, kept]]}; and the method."""
    tags = data.report_tags(store)
    rows = [row for row in range(40) if tags[row]]
    lines = [{"model": "stub", "tags": sorted(set(tags[row])), "answer": "", "features": answer(row, tags[row])} for row in rows]
    (folder / "llm_answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    torch.manual_seed(0)
    config = small_config("fgclep", width=0.125, dim=16, llm="stub", **options)
    method = models.build_method(config, models.small_text_model(["sinus rhythm"] * 4, steps=1, dim=32, layers=1))
    train.recover_features(method, store, np.array(rows), tags, config, folder, torch.device("cpu"))
    return train.read_recovered(folder), method.eval()


def test_recovery_takes_the_proposed_features(store, tmp_path):
    found, _ = recover(store, tmp_path, lambda row, said: ["delta waves", said[0]], keep_share=0.5)
    assert all([feature for feature, *_ in scored] == ["delta waves"] for scored in found.values())  # what is said is not proposed
    assert sum(kept for scored in found.values() for *_, kept in scored) == pytest.approx(len(found) / 2, abs=1)


def test_recovery_of_more_features_than_are_scored_at_once(store, tmp_path):
    found, method = recover(store, tmp_path, lambda row, said: [f"delta waves in v{row * 10 + i}" for i in range(10)])
    features = sorted({feature for scored in found.values() for feature, *_ in scored})
    assert len(features) > 256
    with torch.no_grad():
        ecg = method.encode_ecg(torch.from_numpy(store.ecg(list(found)))).rhythm
        cosines = ecg @ method.encode_text(features).report.T
    for (row, scored), mine in zip(found.items(), cosines):
        assert [cosine for _, cosine, _ in scored] == pytest.approx([mine[features.index(f)].item() for f, *_ in scored], abs=2e-4)


def test_recovery_without_any_feature(store, tmp_path):
    found, _ = recover(store, tmp_path, lambda row, said: None)
    assert found and not any(found.values())


def test_a_run_with_a_language_model(tiny_llm, store, tmp_path, monkeypatch, capsys):
    """Both stages from the command line; every second answer of the tiny model is replaced by a good one."""
    real = train.generate

    def generate(lm, tokenizer, sets):
        return [GOOD if i % 2 else answer for i, answer in enumerate(real(lm, tokenizer, sets))]
    monkeypatch.setattr(train, "generate", generate)
    monkeypatch.setattr(train, "LLM_TOKENS", 16)
    monkeypatch.chdir(tmp_path)
    train.main(["--llm", str(tiny_llm), "--name", "run", "--data", f"store:{store.path}", "--width", "0.125", "--dim", "16",
                "--mlm-steps", "3", "--batch-size", "16", "--epochs", "1", "--fine-epochs", "1", "--threads", "1"])
    out = capsys.readouterr().out
    assert "distinct sets of tags, 2 distinct features" in out and "recovered features" in out and "precision" not in out
    features = {feature for scored in train.read_recovered(tmp_path / "runs/run").values() for feature, *_ in scored}
    assert features == set(json.loads(GOOD)) and (tmp_path / "runs/run/results.json").exists()
