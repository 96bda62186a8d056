"""train.py --llm: features that a causal language model proposes: reading its answers, asking, continuing, a whole run."""
import json
import re

import pytest
import torch

import data
import model as models
import train
from conftest import toy_config

SETS = [["sinus rhythm", "left bundle branch block"], ["atrial fibrillation"], ["atrial fibrillation"], ["normal ecg"],
        ["left bundle branch block", "sinus rhythm"], ["first degree av block", "sinus rhythm"], ["sinus tachycardia"]]
WAVES = ["wide qrs complexes", "absent p waves"]
GOOD = '["wide qrs complexes", "absent p waves"]'


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory):
    """Folder with a Llama of random weights and a tokenizer of words: what it answers is garbage."""
    from transformers import LlamaConfig, LlamaForCausalLM
    folder = tmp_path_factory.mktemp("llm")
    tokenizer = models.word_tokenizer(["\n".join(data.knowledge()["question"])] * 2)
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
        return ["I cannot tell." if report == "atrial fibrillation" else
                f'["{report.split("; ")[0].split()[-1]} waves in v1", {GOOD[1:]}' for report in batch]
    monkeypatch.setattr(train, "load_llm", lambda name, device: (None, None))
    monkeypatch.setattr(train, "generate", generate)
    monkeypatch.setattr(train, "LLM_BATCH", 2)
    return sets


def ask(folder, name="stub"):
    return train.ask_llm(folder, name, SETS, torch.device("cpu"))


@pytest.mark.parametrize("answer, features", [
    (GOOD, WAVES), (f"  {GOOD}\n", WAVES), (f"```json\n{GOOD}\n```", WAVES), (f'{{"features": {GOOD}}}', WAVES),
    (f"Sure! {GOOD}\nI hope this helps.", WAVES), ('[\n "wide qrs complexes",\n "absent p waves"\n]', WAVES),
    (f"{GOOD}\n\nReport: atrial flutter\nFeatures: [\"saw tooth waves\"]", WAVES),  # goes on with more examples
    (f"<think>\nMaybe [\"delta waves\"]?\n</think>\n\n{GOOD}", WAVES),
    (f"The template opened the thought.</think>{GOOD}", WAVES),
    ('["Absent P waves", "absent p waves.", " absent p  waves"]', ["absent p waves"]),                            # repeated
    (json.dumps(["absent p waves"] * 500), ["absent p waves"]),
    (json.dumps([f"st elevation in v{i}" for i in range(20)]), [f"st elevation in v{i}" for i in range(8)]),     # too many
    ('["st elevation in v1 and v2 and v3 and v4 and v5 and v6", "tall r waves"]', ["tall r waves"]),             # too long
    ('["", " ", "...", "{}", "\u2026"]', []), ("[]", []),
    ('["ST-Senkung in V4", "see a doctor"]', ["st-senkung in v4", "see a doctor"]),      # the coarse model decides
    ("", None), ("   \n", None), ("null", None), ('"wide qrs"', None), ("wide qrs", None), ("- wide qrs", None),
    (GOOD[:-1], None), ('["wide qrs", "abse', None), (f"{GOOD[:-1]}\n\nReport: x\nFeatures: {GOOD}", None),
    ('["wide qrs", 3]', None), ('[["wide qrs"]]', None), ("as in [1], the waves", None),
    ("[" * 50000, None), ("waves " * 200, None), ("\x00\ufffd\u5fc3\u7535\u56fe", None)])
def test_the_first_list_of_an_answer_is_read_and_bounded(answer, features):
    assert train.parse_features(answer) == features


def test_the_knowledge_table_passes_as_an_answer():
    table = data.knowledge()
    for finding in table["findings"].values():
        assert train.parse_features(json.dumps(finding["features"])) == finding["features"][:8]


def test_each_distinct_set_is_asked_once(asked, tmp_path, capsys):
    proposals = ask(tmp_path)
    assert sorted(asked) == sorted({"; ".join(sorted(tags)) for tags in SETS}) and len(asked) == 5
    assert proposals[0] == proposals[4] == ["block waves in v1", *WAVES] and proposals[1] == proposals[2] == []
    assert "5 distinct sets of tags, 5 distinct features; 1 of 5 answers could not be read" in capsys.readouterr().out
    assert ask(tmp_path) == proposals and len(asked) == 5


def test_asking_goes_on_where_it_was_killed(asked, tmp_path, monkeypatch):
    """Killed while any batch is asked: whole batches hold, the others are asked as they were, and the file becomes the same."""
    whole, path, order, answer = ask(tmp_path), tmp_path / "llm_answers.json", list(asked), train.generate
    text = path.read_text()
    for kept in (0, 2, 4):
        path.unlink(missing_ok=True)
        asked.clear()

        def killed(lm, tokenizer, batch):
            if len(asked) == kept:
                raise KeyboardInterrupt
            return answer(lm, tokenizer, batch)
        monkeypatch.setattr(train, "generate", killed)
        with pytest.raises(KeyboardInterrupt):
            ask(tmp_path)
        monkeypatch.setattr(train, "generate", answer)
        assert asked == order[:kept] and ask(tmp_path) == whole and asked == order and path.read_text() == text
    with pytest.raises(data.DataError, match="holds the answers of stub, not of other"):
        ask(tmp_path, "other")
    path.write_text(text[:-9])
    with pytest.raises(data.DataError, match="llm_answers.json: no JSON"):
        ask(tmp_path)


def test_a_tiny_model_answers_garbage(tiny_llm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "LLM_TOKENS", 16)
    state = torch.get_rng_state()
    assert ask(tmp_path, str(tiny_llm)) == [[]] * len(SETS)
    assert torch.equal(torch.get_rng_state(), state)
    assert "5 of 5 answers could not be read" in capsys.readouterr().out
    text = (tmp_path / "llm_answers.json").read_text()
    assert all(json.loads(text)["answers"].values())
    (tmp_path / "again").mkdir()
    ask(tmp_path / "again", str(tiny_llm))
    assert (tmp_path / "again/llm_answers.json").read_text() == text


def test_padding_does_not_change_an_answer(tiny_llm, monkeypatch):
    monkeypatch.setattr(train, "LLM_TOKENS", 16)
    lm, tokenizer = train.load_llm(str(tiny_llm), torch.device("cpu"))
    reports = ["normal ecg", "atrial fibrillation; left ventricular hypertrophy; non-specific st-t wave changes"]
    assert train.generate(lm, tokenizer, reports) == [train.generate(lm, tokenizer, [one])[0] for one in reports]


def test_a_chat_template_is_used_where_there_is_one(tiny_llm):
    _, tokenizer = train.load_llm(str(tiny_llm), torch.device("cpu"))
    plain = train.prompt_for(tokenizer, "normal ecg; st {x}")
    assert plain.endswith("Report: normal ecg; st {x}\nFeatures:") and plain.count("Report:") == 3
    assert "fibrillatory baseline" in plain and "pr interval longer than 200 ms" in plain
    tokenizer.chat_template = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
                               "{% if add_generation_prompt %}<|assistant|>{% endif %}{% if not enable_thinking %}!{% endif %}")
    assert train.prompt_for(tokenizer, "normal ecg; st {x}") == f"<|user|>{plain}<|end|><|assistant|>!"


def test_the_worked_examples_are_those_of_the_knowledge_table():
    examples = re.findall(r"Report: (.+)\nFeatures: (\[.+\])", "\n".join(data.knowledge()["question"]))
    assert len(examples) == 2
    for report, answer in examples:
        features = train.parse_features(answer)
        assert features == json.loads(answer) and set(features) <= set(data.Findings().candidates(report.split("; ")))


def test_a_missing_model_is_told_in_one_sentence(tmp_path):
    with pytest.raises(models.ModelError, match="no-such-model.* neither a folder [^\n]+$"):
        train.load_llm(str(tmp_path / "no-such-model"), torch.device("cpu"))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(models.ModelError, match="neither a folder with a whole model"):
        train.load_llm(str(tmp_path), torch.device("cpu"))
    import transformers
    tokenizer = models.word_tokenizer(["sinus rhythm with atrial fibrillation"] * 2)
    transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=len(tokenizer), d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(models.ModelError, match="does not write text"):
        train.load_llm(str(tmp_path), torch.device("cpu"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """64 simulated records; the cache of these tests is not the user's."""
    return data.open_data("simulated:64", cache=tmp_path_factory.mktemp("cache"))


def recover(store, folder, answer, **options):
    """What an untrained method recovers for 40 records: lines of recovered.jsonl; and rows and method."""
    tags = data.report_tags(store)
    rows = [row for row in range(40) if tags[row]]
    torch.manual_seed(0)
    config = toy_config("fgclep", llm="stub", **options)
    method = models.build_method(config, models.small_text_model(["sinus rhythm"] * 4, steps=1, dim=32, layers=1))
    proposals = [answer(row, tags[row]) for row in rows]
    records = train.Records(store, tags, data.Tags.from_lists([()] * len(tags)), config)
    train.recover_features(method, records, rows, proposals, folder, torch.device("cpu"))
    lines = [json.loads(line) for line in (folder / "recovered.jsonl").read_text().splitlines()]
    assert all(line["id"] == store.records["id"].iloc[line["row"]] for line in lines)
    return lines, rows, method.eval()


def test_recovery_takes_the_proposed_features(store, tmp_path):
    lines, rows, _ = recover(store, tmp_path, lambda row, tags: ["delta waves", tags[0]], keep_share=0.5)
    assert [(line["row"], line["feature"]) for line in lines] == [(row, "delta waves") for row in rows]  # no tag again
    assert sum(line["kept"] for line in lines) == pytest.approx(len(rows) / 2, abs=1)


def test_recovery_of_more_features_than_are_scored_at_once(store, tmp_path):
    lines, rows, method = recover(store, tmp_path, lambda row, tags: [f"delta waves in v{row * 10 + i}" for i in range(10)])
    features = [line["feature"] for line in lines]
    assert len(features) > 256 and features == [f"delta waves in v{row * 10 + i}" for row in rows for i in range(10)]
    with torch.no_grad():
        ecg = method.encode_ecg(torch.from_numpy(store.ecg(rows))).rhythm
        cosines = ecg @ method.encode_text(features).report.T
    for place, line in enumerate(lines):
        assert line["cosine"] == pytest.approx(cosines[rows.index(line["row"]), place].item(), abs=2e-4)


def test_recovery_without_any_feature(store, tmp_path):
    lines, _, _ = recover(store, tmp_path, lambda row, tags: [])
    assert lines == []


def test_a_run_with_a_language_model(tiny_llm, store, tmp_path, monkeypatch, capsys):
    """Both stages from the command line; every second answer of the tiny model is replaced by a good one."""
    real = train.generate

    def generate(lm, tokenizer, sets):
        return [GOOD if i % 2 else answer for i, answer in enumerate(real(lm, tokenizer, sets))]
    monkeypatch.setattr(train, "generate", generate)
    monkeypatch.setattr(train, "LLM_TOKENS", 16)
    monkeypatch.chdir(tmp_path)
    train.main(["--llm", str(tiny_llm), "--targets", "reports", "--name", "run", "--data", f"store:{store.path}", "--width", "0.125", "--dim", "16",
                "--mlm-steps", "3", "--batch-size", "16", "--epochs", "1", "--fine-epochs", "1", "--threads", "1"])
    out = capsys.readouterr().out
    assert "distinct sets of tags, 2 distinct features" in out and "recovered features" in out and "precision" not in out
    features = {json.loads(line)["feature"] for line in (tmp_path / "runs/run/recovered.jsonl").open()}
    assert features == set(WAVES) and (tmp_path / "runs/run/results.json").exists()
