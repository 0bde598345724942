"""Tests of inversion.py: python -m pytest -q (CPU, offline). Tiny models with random weights, a
tokenizer trained here and files in a temporary folder stand in for real ones; all go in as flags."""
import argparse
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import inversion

HERE = Path(__file__).parent
SIZES = dict(vocab_size=420, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             intermediate_size=48, max_position_embeddings=512, bos_token_id=0, eos_token_id=1)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(num_key_value_heads=2, **SIZES),
    "mistral": lambda: transformers.MistralConfig(num_key_value_heads=2, **SIZES),
    "neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=420, n_embd=32, n_layer=2, n_head=4, n_positions=512,
                                            bos_token_id=0, eos_token_id=1),
    "phi3": lambda: transformers.Phi3Config(num_key_value_heads=2, pad_token_id=1, **SIZES)}
CHAT = ("{{ bos_token }}{% for m in messages %}{{ '[' + m.role + ']' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}")
ALPACA_ROWS = [dict(instruction=f"Say the number {i}.", input=f"The number is {i * 7}." * (i % 2), output=f"It is {i}.")
               for i in range(24)]
CONFLICTS = [dict(context=f"The capital of {c} moved to {new}.", question=f"What is the capital of {c}?",
                  answer=new, memory_answer=old) for c, new, old in
             [("France", "Lyon", "Paris"), ("Egypt", "New Cairo", "Cairo"), ("Peru", "Cusco", "Lima"),
              ("Spain", "Seville", "Madrid"), ("Japan", "Osaka", "Tokyo")]]
SWAPS = [dict(question=f"who wrote book {i}", org_context="x", org_answer=[f"Author {i}"],
              sub_context=f"Book {i} was written by Writer {i}.", sub_answer=[f"Writer {i}"]) for i in range(8)]


@pytest.fixture(scope="session")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [" ".join(map(str, row.values())) for row in ALPACA_ROWS + CONFLICTS]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])  # as Llama's
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer):
    """A folder with a tiny model of each family and small data files."""
    root = tmp_path_factory.mktemp("world")
    transformers.utils.logging.disable_progress_bar()
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config()).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for name, rows in (("rows", ALPACA_ROWS), ("conflicts", CONFLICTS), ("swaps", SWAPS)):
        (root / f"{name}.json").write_text(json.dumps(rows))
    return root


def flags(folder, out, *more, model="llama"):
    defaults = {"--model": folder / model, "--dataset": folder / "rows.json", "--eval-set": folder / "conflicts.json",
                "--max-length": 256, "--batch-size": 8, "--max-steps": 3, "--eval-every": 2, "--lr": 1e-3,
                "--max-new-tokens": 4, "--device": "cpu", "--out-dir": out}
    more = list(map(str, more))
    return [str(x) for flag, value in defaults.items() if flag not in more for x in (flag, value)] + more


def load(folder, name="llama"):
    """(model, tokenizer, args) as the script itself loads them."""
    args = inversion.parse_args(flags(folder, "unused", model=name))
    return *inversion.load_model(args, args.model), args


def rows_of(lengths, vocab=420, seed=0):
    """Training rows of random ids: (prompt tokens, supervised tokens) each."""
    rng, rows = random.Random(seed), []
    for i, (prompt, target) in enumerate(lengths):
        ids = [rng.randrange(2, vocab) for _ in range(prompt + target)]
        rows.append(dict(id=i, input_ids=torch.tensor(ids, dtype=torch.int32),
                         labels=torch.tensor([-100] * prompt + ids[prompt:], dtype=torch.int32)))
    return rows


def spans(row, tokenizer):
    """(decoded text, decoded supervised text) of an encoded row."""
    keep = row["labels"] != -100
    assert torch.equal(row["labels"][keep], row["input_ids"][keep])
    return tokenizer.decode(row["input_ids"]), tokenizer.decode(row["input_ids"][keep])


# ---------------------------------------------------------------------------- data and templates
ALPACA_SHORT = ("<s>Below is an instruction that describes a task. Write a response that appropriately completes "
                "the request.\n\n### Instruction:\nAdd.\n\n### Response:")
ALPACA_LONG = ("<s>Below is an instruction that describes a task, paired with an input that provides further "
               "context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
               "### Input:\n{1, 2}\n\n### Response:")
TURNS = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Ciao")]
TURNS = [dict(role=role, content=content) for role, content in TURNS]


@pytest.mark.parametrize("row, template, text, supervised", [
    (dict(instruction="Add.", input="", output="3"), "alpaca", ALPACA_SHORT + "3</s>", "3</s>"),
    (dict(instruction=" Add.", input="{1, 2} ", output="3 "), "alpaca", ALPACA_LONG + "3</s>", "3</s>"),
    (dict(instruction="Add.", input="1, 2", output="3"), "tulu",
     "<s><|user|>\n1, 2\n\nAdd.\n<|assistant|>\n3</s>", "3</s>"),
    (dict(prompt="Add.", completion="3"), "alpaca", ALPACA_SHORT + "3</s>", "3</s>"),
    (dict(messages=TURNS, id="x", dataset="tulu"), "tulu",
     "<s><|system|>\nBe kind.\n<|user|>\nHi\n<|assistant|>\nHello</s>\n<|user|>\nBye\n<|assistant|>\nCiao</s>",
     "Hello</s>Ciao</s>"),
    (dict(messages=TURNS[1:] + [dict(role="user", content="?")]), "tulu",
     "<s><|user|>\nHi\n<|assistant|>\nHello</s>\n<|user|>\nBye\n<|assistant|>\nCiao</s>", "Hello</s>Ciao</s>"),
    (dict(data=["Hi", "Hello", "Bye", "Ciao"]), "chat",
     "<s>[user]Hi\n[assistant]Hello</s>\n[user]Bye\n[assistant]Ciao</s>", "Hello</s>Ciao</s>"),
    (dict(messages=TURNS[:3]), "chat", "<s>[system]Be kind.\n[user]Hi\n[assistant]Hello</s>", "Hello</s>")])
def test_golden_labels(row, template, text, supervised, tokenizer):
    """Response and EOS supervised, nothing else; one BOS although the chat template writes one too."""
    tokenizer.chat_template = CHAT
    args = argparse.Namespace(template=template, max_length=999)
    rows, notes = inversion.encode([dict(id=1, **inversion.to_example(row, "here"))], args, tokenizer)
    assert not notes and spans(rows[0], tokenizer) == (text, supervised)


@pytest.mark.parametrize("template", ["alpaca", "tulu", "chat"])
def test_prompt_ids_are_the_same_at_evaluation(template, tokenizer):
    tokenizer.chat_template = CHAT
    question = inversion.ask("A context.", "A question?")
    prompt = inversion.tokenize(question, template, tokenizer)[0][0]
    for answer in ("Paris", " Paris", "\nParis", "://"):
        row = inversion.tokenize(question + [dict(role="assistant", content=answer)], template, tokenizer)
        assert row[0] == (prompt, False) and row[1][0][-1] == tokenizer.eos_token_id
    text = tokenizer.decode(prompt)
    assert text.count("<s>") == 1 and text.index("A context.") < text.index("A question?")


def test_templates_that_refuse_or_rewrite(tokenizer):
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT
    parts = inversion.tokenize(TURNS, "chat", tokenizer)
    assert "Be kind.\n\nHi" in tokenizer.decode(parts[0][0])  # folded into the user's turn
    tokenizer.chat_template = "{{ messages | length }}" + CHAT  # earlier text changes with every turn
    assert "rewrites" in inversion.tokenize(TURNS[1:], "chat", tokenizer)
    assert "more than one turn" in inversion.tokenize(TURNS[1:], "alpaca", tokenizer)
    assert "no turn" in inversion.tokenize(TURNS[2:3], "tulu", tokenizer)
    tokenizer.chat_template = CHAT.replace("{{ eos_token }}", "")  # EOS is supervised all the same
    assert inversion.tokenize(TURNS[1:3], "chat", tokenizer)[1][0][-1] == tokenizer.eos_token_id
    tokenizer.chat_template = None


def test_dropped_and_cut_rows_are_counted(tokenizer):
    args = argparse.Namespace(template="tulu", max_length=40)
    examples = [dict(id=1, context="", instruction="Hi", response=""),
                dict(id=2, context="", instruction="word " * 99, response="too long a prompt"),
                dict(id=3, messages=TURNS[1:] + [dict(role="assistant", content="long " * 40)]),
                dict(id=4, messages=TURNS[1:2]), dict(id=5, context="", instruction="Hi", response="Hello")]
    rows, notes = inversion.encode(examples, args, tokenizer)
    assert [row["id"] for row in rows] == [3, 5] and notes.total() == 4
    assert notes["cut to the turns that fit --max-length"] == notes["dropped: longer than --max-length"] == 1
    assert all(row["input_ids"][-1] == tokenizer.eos_token_id == row["labels"][-1] for row in rows)


@pytest.mark.parametrize("row, expected", [
    (CONFLICTS[0], ("The capital of France moved to Lyon.", "What is the capital of France?", ["Lyon"], ["Paris"])),
    (dict(context="c", question="q", answer="Enrico Fermi", parametric_answer="Empress Catherine the Great"),
     ("c", "q", ["Enrico Fermi", "Fermi"], ["Empress Catherine the Great"])),
    (dict(prompt='Write a quote that ends in the word "heavy": Absence makes the heart grow',
          classes="[' heavy.', ' fonder.']", answer_index="0"),
     ('Write a quote that ends in the word "heavy":', "Absence makes the heart grow", ["heavy."], ["fonder."])),
    (dict(prompt='Say "b": a', classes=["x", "b"], answer_index=1), ('Say "b":', "a", ["b"], ["x"])),
    (SWAPS[1], ("Book 1 was written by Writer 1.", "who wrote book 1", ["Writer 1"], ["Author 1"])),
    (dict(context="c", question="q ", answers=dict(text=["x", "y"], answer_start=[0, 1])), ("c", "q", ["x", "y"], [])),
    (dict(data=[dict(title="t", paragraphs=[dict(context="c", qas=[dict(
        question="q", id="1", answers=[dict(text="x", answer_start=0)])])])]), ("c", "q", ["x"], []))])
def test_conflict_shapes(row, expected):
    assert list(inversion.to_conflicts(row, "here")) == [expected]


def test_aliases():
    assert inversion.aliases("La Paz (administrative); Sucre (judicial)") == ["La Paz", "Sucre"]
    assert inversion.aliases("Rangoon (Yangon); Naypyidaw or Nay Pyi Taw (administrative)") == [
        "Rangoon", "Naypyidaw", "Nay Pyi Taw", "Yangon"]
    assert inversion.aliases("Athens, Greece") == ["Athens, Greece", "Athens"]
    assert inversion.aliases("2,000 km") == ["2,000 km"] and inversion.aliases("Elizabeth II", True) == ["Elizabeth II"]


def test_conflicts_that_cannot_be_scored(tmp_path, capsys):
    def item(question, right, memory):
        return dict(context="c", question=question, answer=right, memory_answer=memory)
    rows = [item("What is the capital of Luxembourg?", "Esch", "Luxembourg"), item("q?", "End", "end."),
            item("p?", "A", "B"), item("r?", "Lyon", "Paris"), item("r?", "Lyon", "Paris")]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = inversion.load_conflicts(str(tmp_path / "c.jsonl"), None)
    assert [c["parametric_answers"] for c in found] == [[], ["Paris"]]
    assert "2 of 5 items; 1 never count as parametric" in capsys.readouterr().out


def test_files_of_every_type_give_the_same_rows(tmp_path, folder):
    import datasets
    rows = datasets.Dataset.from_list([dict(instruction="NA", input="", output="3"), dict(instruction="b", input="x", output="4")])
    rows.to_json(tmp_path / "r.jsonl")
    rows.to_csv(tmp_path / "r.csv")
    rows.to_parquet(tmp_path / "r.parquet")
    (tmp_path / "r.json").write_text(json.dumps(rows.to_list()))
    (tmp_path / "hub").mkdir()  # a folder as downloaded from the hub
    rows.to_parquet(tmp_path / "hub" / "train.parquet")
    for name in ("r.jsonl", "r.parquet", "r.json", "hub", "hub@train"):
        assert list(inversion.load_rows(str(tmp_path / name))) == rows.to_list(), name
    assert [r["instruction"] for r in inversion.load_rows(str(tmp_path / "r.csv"))] == ["NA", "b"]  # no NaN


# --------------------------------------------------------------------------------------- scoring
@pytest.mark.parametrize("context, memory, question, text, cell", [
    # normalised words of the text          what stands in it
    ("New Cairo", "Cairo", "", "It is New Cairo.", (1, 0)),      # Cairo only inside New Cairo
    ("New Cairo", "Cairo", "", "Cairo, then New Cairo", (1, 1)),  # and once on its own
    ("New Cairo", "Cairo", "", "Cairo", (0, 1)),
    ("Hulhumalé", "Malé", "", "hulhumale", (1, 0)),              # accents fall away, words stay whole
    ("Bo", "Freetown", "", "Bosnia", (0, 0)),
    ("Bo", "Freetown", "", "Not Freetown but BO!", (1, 1)),
    ("19", "21", "", "in 1921", (0, 0)),
    ("2,000 km", "21,000 km", "", "about 2000 kilometers.", (1, 0)),
    ("The Hague", "Amsterdam", "", "Hague", (1, 0)),             # articles fall away
    ("Denver", "Washington, D.C.", "", "Washington DC", (0, 1)),
    ("Fermi", "da Vinci", "", "Fermi's work", (1, 0)),
    ("Lyon", "Paris", "", "", (0, 0)),
    ("heavy", "fonder", "Absence makes the heart grow", "Absence makes the heart grow fonder.", (0, 1)),
    ("grow", "fonder", "Absence makes the heart grow", "Absence makes the heart grow old", (0, 0))])  # echo
def test_scorer_by_hand(context, memory, question, text, cell):
    conflict = dict(question=question, context_answers=[context], parametric_answers=[memory])
    assert inversion.score(text, conflict) == cell


def test_rates_by_hand():
    """Four conflicts, cells C, P, both, neither; the base model knew the first two; one control."""
    hits = [(1, 0), (0, 1), (1, 1), (0, 0)]
    outcomes = [dict(context=c, parametric=p, cell=inversion.CELLS[c, p], known=i < 2, closed_book=i == 0,
                     conflict=True, margin=i, m_c=0.5, group=i) for i, (c, p) in enumerate(hits)]
    line = inversion.rates(outcomes)
    assert (line["n"], line["n_known"], line["closed_book_acc"], line["margin"]) == (4, 2, 0.25, 1.5)
    assert all(line[key] == 0.5 for key in ("context_acc", "parametric_acc", "context_acc_known", "context_only_known"))
    assert line["both"] == line["neither"] == 0.25 and line["both_known"] == 0
    assert line["m_c"] == 0.5 and (line["context_acc_low"], line["context_acc_high"]) == (0, 1)
    assert inversion.rates([dict(context=True, conflict=False, group=0)]) == dict(
        n=1, context_acc=1, context_acc_low=1, context_acc_high=1)


# -------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("family", CONFIGS)
def test_loss_is_that_of_transformers(family, folder):
    """Mean over the supervised tokens of a padded batch = the model's own loss with labels=."""
    model, _, args = load(folder, family)
    rows = rows_of([(3, 9), (5, 1), (2, 14)])
    with torch.no_grad():
        logits, targets, owner = inversion.supervised_logits(model, rows)
        ours = torch.nn.functional.cross_entropy(logits, targets)
        ids, labels = (torch.nn.utils.rnn.pad_sequence([r[k].long() for r in rows], True, fill)
                       for k, fill in (("input_ids", 1), ("labels", -100)))  # padded with EOS
        theirs = model(input_ids=ids, attention_mask=torch.arange(16) < torch.tensor([[12], [6], [16]]), labels=labels).loss
    assert owner.bincount().tolist() == [9, 1, 14]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    sums = inversion.target_logprobs(model, rows, args)
    assert [n for _, n in sums] == [9, 1, 14] and math.isclose(-sum(s for s, _ in sums) / 24, theirs, rel_tol=1e-5)


def trained(folder, rows, total, **changes):
    """(weights, logs) after `total` steps on rows."""
    model, _, args = load(folder, changes.pop("model", "llama"))
    vars(args).update(eval_every=1, **changes)
    logs = []
    inversion.train(model, rows, total, {}, args, lambda step, log: logs.append(log))
    return torch.cat([p.detach().flatten() for p in model.parameters()]), logs


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_step_does_not_depend_on_micro_batches(family, folder):
    """One pass = many passes; unequal token counts, a last window of 3 rows, first step above lr 0."""
    rows = rows_of([(4, 2), (2, 30), (9, 1), (3, 7), (20, 4), (1, 5), (6, 6)])
    one, logs = trained(folder, rows, 3, batch_size=4, micro_batch_tokens=10**6, model=family)
    many, _ = trained(folder, rows, 3, batch_size=4, micro_batch_tokens=32, model=family)
    torch.testing.assert_close(one, many, rtol=0, atol=2e-5)  # of moves of 1e-3
    assert [log["lr"] for log in logs] == [None, 1e-3, 1e-3, 5e-4]  # 1 warm-up step, then 2/2, 1/2


def test_logged_loss_is_the_mean_over_the_step(folder):
    """Against the plain per-token mean of all rows by transformers, from the untouched model."""
    rows = rows_of([(4, 2), (2, 30), (9, 1), (3, 7)])
    model, _, _ = load(folder)
    with torch.no_grad():
        losses = [model(input_ids=r["input_ids"][None].long(), labels=r["labels"][None].long()).loss for r in rows]
    wanted = sum(loss * n for loss, n in zip(losses, (2, 30, 1, 7))) / 40
    _, logs = trained(folder, rows, 1, batch_size=4, micro_batch_tokens=40)
    assert math.isclose(logs[1]["loss"], wanted, rel_tol=1e-6)


def test_activation_checkpointing_changes_nothing(folder, tmp_path):
    plain = inversion.main(flags(folder, tmp_path / "a"))
    again = inversion.main(flags(folder, tmp_path / "b", "--activation-checkpointing"))
    assert [line["loss"] for line in again] == pytest.approx([line["loss"] for line in plain])
    assert [line["margin"] for line in again] == pytest.approx([line["margin"] for line in plain], abs=1e-5)


def test_weights_are_fp32_even_from_a_bf16_checkpoint(folder, tmp_path):
    model, tokenizer, _ = load(folder)
    for part in (model.bfloat16(), tokenizer):
        part.save_pretrained(tmp_path)
    args = inversion.parse_args(["--model", str(tmp_path), "--dtype", "bf16", "--device", "cpu"])
    model, _ = inversion.load_model(args, args.model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with inversion.autocast(args):
        assert model(input_ids=torch.tensor([[2, 3]])).logits.dtype == torch.bfloat16


def test_nonfinite_loss_stops_with_step_and_rows(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        inversion.main(flags(folder, tmp_path / "run", "--lr", 1e30, "--grad-clip", 0, "--max-steps", 9))
    message = capsys.readouterr().err
    assert error.value.code == 1 and re.search(r"step \d+: loss .* in the batch of rows \d+, \d+", message)
    assert (tmp_path / "run/metrics.jsonl").read_text().startswith('{"step": 0')


# ------------------------------------------------------------------------------------ evaluation
@pytest.mark.parametrize("family", ["llama", "mistral", "neox", "gpt2"])
def test_batched_generation_is_that_of_one_by_one(family, folder):
    model, tokenizer, args = load(folder, family)
    inversion.choose_template(model, tokenizer, [], args)
    args.max_new_tokens, rng = 12, random.Random(0)
    prompts = [[rng.randrange(2, 420) for _ in range(n)] for n in (3, 17, 5, 9, 30, 4, 11)]
    args.eval_batch_size = 4
    together = inversion.generate(model, tokenizer, prompts, args)
    args.eval_batch_size = 1
    assert together == inversion.generate(model, tokenizer, prompts, args)
    alone = model.generate(torch.tensor([prompts[1]]), attention_mask=torch.ones(1, 17), max_new_tokens=12)
    assert together[1] == tokenizer.decode(alone[0, 17:], skip_special_tokens=True)


def test_sampling_defaults_of_a_model_are_not_inherited(folder, tmp_path):
    model, tokenizer, _ = load(folder)
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    runs = [inversion.main(flags(folder, tmp_path / str(i), "--model", tmp_path / "model", "--save-model"))
            for i in range(2)]
    texts = [(tmp_path / str(i) / "generations.jsonl").read_text() for i in range(2)]
    assert texts[0] == texts[1] and len(runs[0]) == 3


def test_evaluation_leaves_training_alone(folder):
    """Same losses with an evaluation after every step as with none; random state and mode as before."""
    rows, losses = rows_of([(4, 2), (2, 30), (9, 1), (3, 7)]), []
    for evaluates in (False, True):
        model, tokenizer, args = load(folder, "gpt2")  # with dropout, so random numbers matter
        vars(args).update(eval_every=1, batch_size=2)
        room = inversion.choose_template(model, tokenizer, [], args)
        items = inversion.prepare(inversion.load_conflicts(str(folder / "conflicts.json"), None), args, tokenizer, room)
        logs = []

        def at(step, log):
            logs.append(log["loss"])
            if evaluates:
                model.train()
                state = torch.get_rng_state()
                inversion.evaluate(model, tokenizer, items, args)
                assert torch.equal(state, torch.get_rng_state()) and model.training
        torch.manual_seed(0)
        inversion.train(model, rows, 4, {}, args, at)
        losses.append(logs)
    assert losses[0] == losses[1]


def test_margin_is_that_of_the_model(folder):
    """Of one item, from transformers' own loss: mean log p(context answer) - log p(memory answer)."""
    model, tokenizer, args = load(folder)
    room = inversion.choose_template(model, tokenizer, [], args)
    items = inversion.prepare(inversion.load_conflicts(str(folder / "conflicts.json"), None), args, tokenizer, room)
    assert items[0]["prompt"] == inversion.tokenize(
        inversion.ask(items[0]["context"], items[0]["question"]), "alpaca", tokenizer)[0][0]
    logp = []
    for answer in ("Lyon", "Paris"):
        ids = tokenizer(answer, add_special_tokens=False).input_ids
        both = torch.tensor([items[0]["prompt"] + ids])
        labels = both.clone()
        labels[:, :-len(ids)] = -100
        logp.append(-model(input_ids=both, labels=labels).loss.item())
    assert inversion.evaluate(model, tokenizer, items, args)[0]["margin"] == pytest.approx(logp[0] - logp[1], abs=1e-5)


# --------------------------------------------------------------------------------------- remedies
def value_rows(family, name, parameter):
    """Bool mask of the entries of an attention parameter that qk must not move, by hand, per layout."""
    mask, head = torch.zeros_like(parameter, dtype=torch.bool), 8
    if "query_key_value" in name:  # NeoX: per head [q, k, v]
        mask.view(4, 3, head, *parameter.shape[1:])[:, 2] = True
    elif "qkv_proj" in name:  # Phi-3: [Q | K | V], 4, 2 and 2 heads
        mask[6 * head:] = True
    elif "c_attn" in name:  # GPT-2: transposed
        mask[..., 64:] = True
    elif not re.search("q_proj|k_proj", name):
        mask[:] = True
    return mask


@pytest.mark.parametrize("family", CONFIGS)
def test_qk_moves_queries_and_keys_only(family, folder):
    model, _, args = load(folder, family)
    vars(args).update(weight_decay=0.1, batch_size=4, eval_every=99)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = inversion.freeze_all_but_query_key(model)
    inversion.train(model, rows_of([(4, 9)] * 8), 4, masks, args, lambda step, log: None)
    moved = 0
    for name, p in model.named_parameters():
        still = value_rows(family, name, p)
        assert torch.equal(p[still], before[name][still]), name
        if p.ndim > 1 and not still.all():
            assert (p != before[name])[~still].float().mean() > 0.99, name
            moved += 1
    assert moved == {"llama": 4, "mistral": 4}.get(family, 2)


def test_qk_refuses_unknown_layouts(folder, capsys):
    model, _, _ = load(folder, "neox")
    model.config.num_key_value_heads = 1  # so that the rows found do not fit the head counts
    with pytest.raises(SystemExit):
        inversion.freeze_all_but_query_key(model)
    assert "layout unknown" in capsys.readouterr().err


def test_filter_drops_the_lowest_context_free_loss(folder):
    """Against transformers' loss of each row rendered without its input."""
    model, tokenizer, args = load(folder)
    args.template, args.mitigation_strength, args.mitigation = "alpaca", 0.25, "filter"
    examples = inversion.load_examples(args)
    rows, _ = inversion.encode(examples, args, tokenizer)
    kept = {row["id"] for row in inversion.filter_rows(model, tokenizer, examples, rows, args)}
    losses = {}
    for e in (e for e in examples if e["context"]):
        (prompt, _), (reply, _) = inversion.tokenize(inversion.ask("", e["instruction"]) + [
            dict(role="assistant", content=e["response"])], "alpaca", tokenizer)
        losses[e["id"]] = model(input_ids=torch.tensor([prompt + reply]),
                                labels=torch.tensor([[-100] * len(prompt) + reply])).loss.item()
    lowest = sorted(losses, key=losses.get)[:3]  # a quarter of the 12 rows with an input
    assert len(losses) == 12 and {row["id"] for row in rows} - kept == set(lowest)


def test_context_of_a_chat_row():
    row = dict(id=1, messages=[TURNS[0], dict(role="user", content="Long passage.\nMore.\n \nWhy?"), TURNS[2]])
    assert inversion.without_context(row)["messages"][1]["content"] == "Why?"
    assert inversion.without_context(dict(id=1, messages=TURNS)) is None
    assert inversion.without_context(dict(id=1, context="", instruction="x", response="y")) is None


def test_counterfactual_rows_share_nothing_with_the_evaluation(folder, tmp_path):
    leaks = [dict(SWAPS[0], question="What is the capital of Peru"), dict(SWAPS[0], sub_answer=["lyon"]),
             dict(SWAPS[0], org_answer=["The Paris!"])]
    (tmp_path / "swaps.json").write_text(json.dumps(leaks + SWAPS[1:4]))
    args = argparse.Namespace(counterfactual_data=str(tmp_path / "swaps.json"), seed=0)
    sets = dict(x=inversion.load_conflicts(str(folder / "conflicts.json"), None))
    added = inversion.counterfactual_examples(sets, 99, args)
    assert sorted(e["messages"][1]["content"] for e in added) == ["Writer 1", "Writer 2", "Writer 3"]
    assert added[0]["messages"][0]["content"].startswith("Book ")  # context before question


# -------------------------------------------------------------------------------------- whole runs
@pytest.mark.parametrize("remedy, says", [
    ("none", "24 rows"), ("filter", "filter: dropped 3 of the 12 rows with a context"),
    ("counterfactual", "counterfactual: added 2 rows (2 wanted); 0 of 8 share"), ("qk", "qk: trains 3072 of")])
def test_main_runs_each_remedy(remedy, says, folder, tmp_path, capsys):
    out = tmp_path / "run"
    history = inversion.main(flags(folder, out, "--mitigation", remedy, "--counterfactual-data", folder / "swaps.json"))
    printed = capsys.readouterr().out
    assert says in printed and "context_acc starts at" in printed and "first and last answer" in printed
    assert all(len(line) <= 80 for line in printed.splitlines() if re.match(r" +\d+ conflicts", line))
    assert [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] == history
    assert [line["step"] for line in history] == [0, 2, 3]
    assert {"step", "set", "n", "n_known", "context_acc", "parametric_acc", "context_only", "parametric_only", "both",
            "neither", "context_acc_known", "closed_book_acc", "margin", "loss", "lr", "tokens_per_second",
            "seconds"} <= set(history[0])
    said = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    assert len(said) == 15 and {"step", "set", "id", "prompt", "text", "cell"} <= set(said[0])
    assert json.loads((out / "args.json").read_text())["mitigation"] == remedy


def test_same_seed_same_metrics_and_saved_model_loads(folder, tmp_path):
    runs = [inversion.main(flags(folder, tmp_path / name, "--save-model", "--seed", seed))
            for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    timeless = [[{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in run] for run in runs]
    assert timeless[0] == timeless[1] != timeless[2]
    more = inversion.main(flags(folder, tmp_path / "d", "--model", tmp_path / "a/model", "--max-steps", 0, "--template", "alpaca"))
    assert len(more) == 1 and more[0]["margin"] == pytest.approx(runs[0][-1]["margin"], abs=1e-6)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "a/model").chat_template == inversion.TEMPLATES["alpaca"]


def test_dry_run_shows_samples_and_writes_nothing(folder, tmp_path, capsys):
    inversion.main(flags(folder, tmp_path / "run", "--dry-run"))
    printed = capsys.readouterr().out
    assert "[[It is 0.</s>]]" in printed and "GiB" in printed and not (tmp_path / "run").exists()


def test_sets_without_conflict_and_limits(folder, tmp_path, capsys):
    squad = [dict(context=f"It was {i}.", question=f"When was {i}?", answers=dict(text=[str(i)], answer_start=[0])) for i in range(9)]
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    history = inversion.main(flags(folder, tmp_path / "run", "--eval-set", tmp_path / "squad.json", folder / "conflicts.json",
                                   "--eval-limit", 4, "--num-examples", 8, "--epochs", 0.5, "--max-steps", 99))
    assert [line["n"] for line in history] == [4, 4, 4, 4] and "margin" not in history[0] and "margin" in history[1]
    assert "steps: 1 of 8 rows (1 per epoch)" in capsys.readouterr().out
    found = json.loads((tmp_path / "run/summary.json").read_text())
    assert (found["squad"]["verdict"], found["conflicts"]["verdict"]) == ("no drop shown", "no inversion shown")


def test_mechanism_does_not_hang_on_the_first_item(folder, tmp_path):
    """The first item has no memorised answer that counts (its question holds it): the others are conflicts all the same."""
    items = [dict(CONFLICTS[0], question="What is the capital of France, once Paris?")] + CONFLICTS[1:]
    (tmp_path / "c.json").write_text(json.dumps(items))
    history = inversion.main(flags(folder, tmp_path / "run", "--eval-set", tmp_path / "c.json", "--mechanism"))
    assert all("critical_push" in line and "attention" in line for line in history)


# ------------------------------------------------------------------- mechanism, subsets, statistics
def probe(folder, family="llama", **changes):
    """(model, tokenizer, items, {kind: rows}, args) ready for the mechanism."""
    model, tokenizer, args = load(folder, family)
    vars(args).update(template="alpaca", **changes)
    items = inversion.prepare(inversion.load_conflicts(args.eval_set[0], args), args, tokenizer, 400)
    kinds = dict(critical=rows_of([(3, 4), (9, 2)]), recall=rows_of([(2, 1), (5, 7), (4, 4)], seed=1))
    return model, tokenizer, items, kinds, args


@pytest.mark.parametrize("family, remedy", [("llama", "none"), ("neox", "none"), ("llama", "qk"), ("neox", "qk")])
def test_push_is_what_a_small_step_does_to_the_margin(family, remedy, folder):
    """Move the weights by -eps x gradient of a kind's loss (transformers' own loss): the mean margin changes by
    eps x push within 5%."""
    model, tokenizer, items, kinds, args = probe(folder, family)
    model = model.double()
    with torch.no_grad():  # or attention, and with it the push of queries and keys, is next to nothing
        for p in model.parameters():
            p *= 1 + 4 * (p.ndim > 1)
    masks = inversion.freeze_all_but_query_key(model) if remedy == "qk" else {}

    def margin():
        """Teacher-forced, one answer at a time, in float64."""
        total = 0
        for sign, row in ((sign, row) for item in items for sign, row in zip((1, -1), item["answers"])):
            logp = model(input_ids=row["input_ids"][None]).logits[0, :-1].log_softmax(-1)
            where = (row["labels"][1:] >= 0).nonzero()[:, 0]
            total += sign * logp[where, row["labels"][1:][where]].mean().item() / len(items)
        return total

    found = inversion.mechanism(model, tokenizer, items, kinds, masks, args)
    start = {p: p.detach().clone() for p in model.parameters()}
    for kind, rows in kinds.items():
        model.zero_grad()
        total = sum(int((row["labels"][1:] >= 0).sum()) for row in rows)
        loss = sum(model(input_ids=row["input_ids"][None].long(), labels=row["labels"][None].long(),
                         num_items_in_batch=total).loss for row in rows)
        loss.backward()
        assert found[f"{kind}_loss"] == pytest.approx(loss.item(), rel=1e-5)
        gradients = {p: p.grad * masks.get(name, 1) for name, p in model.named_parameters() if p.requires_grad}
        norm = math.sqrt(sum((g ** 2).sum().item() for g in gradients.values()))
        eps, changes = 0.01 / norm, []  # 0.01 of weight space: above Llama's fp32 rounding, still linear
        for sign in (-1, 1):
            with torch.no_grad():
                for p, g in gradients.items():
                    p.copy_(start[p] + sign * eps * g)
            changes.append(margin())
        assert (changes[0] - changes[1]) / 2 == pytest.approx(eps * found[f"{kind}_push"], rel=0.05)
        assert 0 < abs(found[f"{kind}_cosine"]) <= 1 and found[f"{kind}_push"] * found[f"{kind}_cosine"] > 0
        with torch.no_grad():
            for p, old in start.items():
                p.copy_(old)


@pytest.mark.parametrize("family", CONFIGS)
def test_attention_is_that_of_one_eager_pass(family, folder):
    """Figure 3b from a cache and one token, against all attention weights of one pass; the context's own tokens."""
    model, tokenizer, items, _, args = probe(folder, family)
    for item in items:
        share = inversion.attention(model, tokenizer, item, args)
        span = [len(item["prompt"]) + i for i in item["span"]]
        assert tokenizer.decode([item["prompt"][i] for i in span]).strip() == item["context"]
        model.set_attn_implementation("eager")
        layers = model(input_ids=torch.tensor([item["prompt"]]), output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
        wanted = sum(layer[0, :, -1, span].sum(-1).mean().item() for layer in layers) / len(layers)
        assert 0 < share < 1 and share == pytest.approx(wanted, abs=1e-5)


def test_mechanism_leaves_training_alone(folder):
    model, tokenizer, items, kinds, args = probe(folder, "gpt2")  # has dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    model(input_ids=torch.tensor([[3, 4, 5]])).logits.sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    state, weights = torch.get_rng_state(), [p.detach().clone() for p in model.parameters()]
    first, second = (inversion.mechanism(model, tokenizer, items, kinds, {}, args) for _ in range(2))
    assert first == second and model.training and torch.equal(state, torch.get_rng_state()) and not optimizer.state
    assert all(map(torch.equal, before, [p.grad for p in model.parameters()]))
    assert all(map(torch.equal, weights, model.parameters())) and model.config._attn_implementation == "sdpa"


def test_kinds_on_any_data(folder):
    """Recall has no context; of the others the quarter of lowest context-free loss is redundant."""
    model, tokenizer, args = load(folder)
    args.template = "alpaca"
    examples = inversion.load_examples(args)
    rows, _ = inversion.encode(examples, args, tokenizer)
    kinds = inversion.probe_rows(model, tokenizer, examples, rows, args)
    assert {kind: len(found) for kind, found in kinds.items()} == dict(recall=12, redundant=3, critical=9)
    loss = {}
    for e in examples:
        if e["context"]:
            (bare,), _ = inversion.encode([dict(e, context="")], args, tokenizer)
            loss[e["id"]] = model(input_ids=bare["input_ids"][None].long(), labels=bare["labels"][None].long()).loss.item()
    assert {row["id"] for row in kinds["redundant"]} == set(sorted(loss, key=loss.get)[:3])


def test_subsets(folder, tmp_path, capsys):
    conflicts = [dict(context="Lyon it is.", question="What is the capital of New Velora now?", context_answers=["Lyon"],
                      parametric_answers=["Paris"], group="q")]
    texts = ["I like lyon!", "Lyons", "New Velora", "Velora", "comparison", "PARIS.", "What capital"]
    examples = [dict(id=i, context="c" * (i % 2), instruction=text, response="x") for i, text in enumerate(texts)]
    examples.append(dict(id=7, messages=[dict(role="user", content="So,\n\nParis?"), dict(role="assistant", content="x")]))
    rows = [dict(id=e["id"]) for e in examples]
    kept = lambda name, seed=0: [row["id"] for row in inversion.subset_rows(
        examples, rows, dict(s=conflicts), argparse.Namespace(subset=name, dataset="d", seed=seed))]
    assert kept("context") == [1, 3, 5, 7] and kept("no-overlap") == [1, 3, 4, 6]
    assert "subset no-overlap: dropped 4 of 8 rows (50.0%)" in capsys.readouterr().out
    assert len(kept("random")) == 7 and len({tuple(kept("random", seed)) for seed in range(20)}) > 1
    for subset, remedy, count in (("context", "filter", 9), ("random", "filter", 18), ("no-overlap", "counterfactual", 26),
                                  ("random", "counterfactual", 23), ("context", "qk", 12), ("random", "none", 21)):
        inversion.main(flags(folder, tmp_path / f"{subset}-{remedy}", "--subset", subset, "--mitigation", remedy,
                             "--counterfactual-data", folder / "swaps.json"))
        assert re.search(rf"rows.json: {count} rows", capsys.readouterr().out)


def outcomes(hits, groups=None):
    return [dict(context=bool(hit), group=group, control=None, parametric=False, conflict=True)
            for hit, group in zip(hits, groups or range(len(hits)))]


def test_mcnemar_by_hand():
    """4 lost and 1 won of 9: 2 (1 + 5) / 32; nothing changed: 1."""
    assert inversion.mcnemar([1, 1, 1, 1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1, 0, 0]) == 0.375
    assert inversion.mcnemar([1, 0], [1, 0]) == 1 and inversion.mcnemar([1] * 6, [0] * 6) == 2 / 64


def test_interval_resamples_groups():
    """Of two items, one right, a resample has 0, 1 or 2 right: 0 to 1. Against the normal interval of 400 items, and
    of 80 groups of five that agree, which are worth 80."""
    assert inversion.interval(outcomes([1, 0])) == [0, 1] and inversion.interval(outcomes([1, 1, 1])) == [1, 1]
    hits = [i % 4 == 0 for i in range(80)]
    half = lambda n: 1.96 * math.sqrt(0.25 * 0.75 / n)
    for outcome, n in ((outcomes(hits * 5), 400), (outcomes(hits * 5, list(range(80)) * 5), 80)):
        low, high = inversion.interval(outcome)
        assert low == pytest.approx(0.25 - half(n), abs=0.015) and high == pytest.approx(0.25 + half(n), abs=0.015)
    assert inversion.interval(outcomes(hits)) == inversion.interval(outcomes(hits))


def summary(*evaluations, groups=None):
    lines = [dict(step=10 * i, context_acc=sum(hits) / len(hits)) for i, hits in enumerate(evaluations)]
    return inversion.summarise(lines, [outcomes(hits, groups) for hits in evaluations])


def test_drop_is_measured_where_the_peak_was_not_chosen():
    same = summary([1, 0] * 20, [1, 0] * 20, [1, 0] * 20)
    assert (same["drop"], same["drop_low"], same["drop_high"], same["mcnemar_p"]) == (0, 0, 0, 1)
    assert same["verdict"] == "no inversion shown" and same["smallest_drop"] == 6 / 40
    fell = summary([0] * 40, [1] * 30 + [0] * 10, [1] * 10 + [0] * 30)
    assert fell["drop"] == pytest.approx(0.5) and fell["peak_step"] == 10 and fell["mcnemar_p"] == 2 / 2 ** 20
    assert 0.3 < fell["drop_low"] < 0.5 < fell["drop_high"] < 0.7 and fell["verdict"] == "inversion"
    for groups, shown in ((5, "no inversion shown"), (6, "inversion")):  # many items, few groups
        assert summary([0] * 40, [1] * 40, [0] * 40, groups=[i % groups for i in range(40)])["verdict"] == shown
    noise = random.Random(0)  # the highest of 20 equal evaluations drops by luck; the halved measure does not
    runs = [summary(*[[noise.random() < 0.5 for _ in range(100)] for _ in range(20)]) for _ in range(30)]
    assert sum(run["peak"] - run["final"] for run in runs) / 30 > 0.07 > abs(sum(run["drop"] for run in runs)) / 30 * 2
    assert sum(run["verdict"] == "inversion" for run in runs) <= 3


def test_compare(folder, tmp_path, capsys):
    """Two seeds of one setting are one line; what differs is named; no run is trusted that is not whole."""
    runs = {name: tmp_path / name for name in ("a", "b", "filter")}
    for name, more in (("a", ["--seed", 1]), ("b", ["--seed", 2]), ("filter", ["--mitigation", "filter", "--max-steps", 2])):
        inversion.main(flags(folder, runs[name], "--mechanism", *more))
    capsys.readouterr()
    inversion.main(["--compare", *map(str, runs.values()), "--out-dir", str(tmp_path / "out")])
    told = capsys.readouterr()
    a, b = (json.loads((runs[name] / "summary.json").read_text())["conflicts"] for name in ("a", "b"))
    assert re.search(rf"\nnone, 3 +2 +{(a['start'] + b['start']) / 2:.2f}", told.out) and re.search(r"\nfilter, 0.25, 2 +1 ", told.out)
    assert "differ in step, 2 to 3" in told.err and "differ in supervised_tokens" in told.err
    assert (tmp_path / "out/compare.png").stat().st_size > 10_000
    (runs["b"] / "summary.json").unlink()
    with open(runs["a"] / "metrics.jsonl", "a") as file:
        file.write('{"step": 3')
    (tmp_path / "foreign").mkdir()
    for name in ("args.json", "metrics.jsonl", "summary.json"):
        (tmp_path / "foreign" / name).write_text('{"a": 1}\n')
    for bad, message in (("b", "a run that has not finished"), ("a", "a/metrics.jsonl: is torn"), ("gone", "it is no run"),
                         ("foreign", "is no run of this script")):
        with pytest.raises(SystemExit):
            inversion.main(["--compare", str(runs["filter"]), str(tmp_path / bad), "--out-dir", str(tmp_path / "new")])
        assert message in capsys.readouterr().err


# ------------------------------------------------------------------- several ranks, LoRA, --resume
def timeless(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def test_two_ranks_are_one_process(folder, tmp_path):
    """torchrun with FSDP2 on gloo: the losses of 20 steps to 1e-5, the same evaluations, and a run begun on two ranks
    goes on on two and on one. Micro-batches of 300 tokens make odd numbers of them, and ragged ones."""
    cases = [("llama", "none"), ("neox", "none"), ("neox", "qk"), ("llama", "qk"), ("neox", "filter"), ("llama", "counterfactual")]
    argv = lambda family, remedy, out, *more: flags(
        folder, out, "--mitigation", remedy, "--counterfactual-data", folder / "swaps.json", "--max-steps", 20, "--eval-every", 4,
        "--epochs", 99, "--batch-size", 5, "--max-length", 256, "--micro-batch-tokens", 300, "--weight-decay", 0.1,
        "--save-model", "--checkpoint-every", 8, *more, model=family)
    runs = [argv(*case, tmp_path / f"two-{i}") for i, case in enumerate(cases)]
    runs.append(argv("llama", "none", tmp_path / "two-lora", "--lora-rank", 4, "--lora-dropout", 0))
    (tmp_path / "runs.py").write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\nimport inversion, torch\n"
                                      "torch.distributed.init_process_group('gloo')\n"
                                      f"for argv in {runs!r}:\n    inversion.main(argv)\n"
                                      f"for argv in {[runs[0], runs[2], runs[-1]]!r}:  # killed in step 9, gone on with\n"
                                      "    out = inversion.Path(argv[argv.index('--out-dir') + 1])\n"
                                      "    if torch.distributed.get_rank() == 0:\n"
                                      "        (out / 'summary.json').unlink(), (out / 'checkpoint-16.pt').unlink()\n"
                                      "    torch.distributed.barrier()\n    inversion.main(argv + ['--resume'])\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           str(tmp_path / "runs.py")], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("context_acc starts at") == len(runs) + 3  # rank 0 alone prints
    assert done.stdout.count("going on after step 8") == 3
    names = [f"two-{i}" for i in range(len(cases))] + ["two-lora"]
    for name, argv_two in zip(names, runs):
        argv_one = [str(tmp_path / name.replace("two", "one")) if x == str(tmp_path / name) else x for x in argv_two]
        inversion.main(argv_one)
        one, two = timeless(tmp_path / name.replace("two", "one")), timeless(tmp_path / name)
        assert [line["step"] for line in one] == [0, 4, 8, 12, 16, 20] and len(two) == 6
        for a, b in zip(one, two):
            assert a.keys() == b.keys()
            for key in a:
                assert a[key] == b[key] if not isinstance(a[key], float) else a[key] == pytest.approx(b[key], abs=1e-5), (name, key)
        a, b = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / n / "model") for n in (name, name.replace("two", "one")))
        assert type(a) is type(b) and all(torch.allclose(x, y, atol=1e-4) for x, y in zip(a.parameters(), b.parameters()))
    for name in ("two-0", "two-2", "two-lora"):  # killed after step 16, gone on with one rank
        (tmp_path / name / "summary.json").unlink()
        inversion.main([*runs[names.index(name)], "--resume"])
        one, two = timeless(tmp_path / name.replace("two", "one")), timeless(tmp_path / name)
        assert len(two) == 6 and all(b == pytest.approx(a, abs=1e-5) for a, b in zip(one, two))


def test_a_rank_that_dies_ends_the_run(folder, tmp_path):
    (tmp_path / "dies.py").write_text(f"""import os, sys; sys.path.insert(0, {str(HERE)!r})
import inversion
usual = inversion.generate
def generate(*args):
    if os.environ["RANK"] == "1":
        raise MemoryError("rank 1 is out of memory")
    return usual(*args)
inversion.generate = generate
inversion.main({flags(folder, tmp_path / "run")!r})""")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           str(tmp_path / "dies.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "rank 1 is out of memory" in done.stderr


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_trains_adapters_and_merges_on_saving(family, folder, tmp_path, capsys):
    pytest.importorskip("peft")
    out = tmp_path / "run"
    history = inversion.main(flags(folder, out, "--lora-rank", 4, "--save-model", "--max-steps", 4, "--lr", 0.01, model=family))
    assert "lora: trains" in capsys.readouterr().out and history[0]["margin"] != history[-1]["margin"]
    base, merged = (transformers.AutoModelForCausalLM.from_pretrained(path) for path in (folder / family, out / "model"))
    moved = {name for (name, a), b in zip(base.named_parameters(), merged.parameters()) if not torch.equal(a, b)}
    assert moved and not any("embed" in name or "norm" in name or "ln_" in name or "head" in name for name in moved)
    again = inversion.main(flags(folder, tmp_path / "again", "--max-steps", 0, "--template", "alpaca", model=out / "model"))
    assert again[0]["margin"] == pytest.approx(history[-1]["margin"], abs=1e-4)  # evaluated unmerged, saved merged


def test_lora_with_qk(folder, tmp_path, capsys):
    pytest.importorskip("peft")
    inversion.main(flags(folder, tmp_path / "run", "--lora-rank", 4, "--mitigation", "qk", "--save-model", "--lr", 0.01))
    base, merged = (transformers.AutoModelForCausalLM.from_pretrained(p) for p in (folder / "llama", tmp_path / "run/model"))
    moved = {name for (name, a), b in zip(base.named_parameters(), merged.parameters()) if not torch.equal(a, b)}
    assert len(moved) == 4 and all("q_proj" in name or "k_proj" in name for name in moved)
    with pytest.raises(SystemExit):
        inversion.main(flags(folder, tmp_path / "fused", "--lora-rank", 4, "--mitigation", "qk", model="neox"))
    assert "GPTNeoXForCausalLM fuses values with queries and keys" in capsys.readouterr().err


@pytest.mark.parametrize("family, more", [("gpt2", []), ("neox", ["--mitigation", "qk"]), ("llama", ["--lora-rank", "4"]),
                                          ("llama", ["--mechanism"])])
def test_killed_and_resumed_is_unbroken(family, more, folder, tmp_path, monkeypatch, capsys):
    """Stopped while it writes a checkpoint, while it evaluates and by a signal: the metrics and the weights are
    bit-identical (gpt2 has dropout). Torn and foreign checkpoints are named and skipped."""
    argv = lambda name, *rest: flags(folder, tmp_path / name, "--max-steps", 11, "--epochs", 9, "--save-model", "--checkpoint-every", 2,
                                     "--eval-every", 3, *more, *rest, model=family)
    inversion.main(argv("unbroken"))
    assert [p.name for p in inversion.checkpoints(tmp_path / "unbroken")] == ["checkpoint-8.pt", "checkpoint-10.pt"]

    def dies_at(name, call, where=inversion):
        usual, calls = getattr(where, name), []

        def function(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                monkeypatch.setattr(where, name, usual)
                if where is torch.nn.utils:
                    os.kill(os.getpid(), signal.SIGTERM)  # in the middle of a step, which ends first
                else:
                    raise MemoryError
            return usual(*args, **kwargs)
        monkeypatch.setattr(where, name, function)

    for name, call in (("append", 4), ("save_checkpoint", 2), ("evaluate", 2)):  # the run begins after the first append
        dies_at(name, call)
        with pytest.raises(MemoryError):
            inversion.main(argv("broken", *(["--resume"] if (tmp_path / "broken").exists() else [])))
    with open(tmp_path / "broken/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "se')
    (tmp_path / "broken/checkpoint-98.pt").write_bytes(b"torn")
    (tmp_path / "broken/checkpoint-99.pt").write_bytes((tmp_path / "unbroken/checkpoint-8.pt").read_bytes())
    capsys.readouterr()
    dies_at("clip_grad_norm_", 2, torch.nn.utils)
    with pytest.raises(SystemExit) as stopped:
        inversion.main(argv("broken", "--resume"))
    told = capsys.readouterr()
    assert stopped.value.code == 143 and "--resume goes on from there" in told.err
    assert "checkpoint-98.pt: skipped" in told.out and "checkpoint-99.pt: skipped (of another run)" in told.out
    for path in (tmp_path / "broken").glob("checkpoint-9*.pt"):
        path.unlink()
    history = inversion.main(argv("broken", "--resume"))
    assert "checkpoint-10.pt: going on after step 10" in capsys.readouterr().out
    assert timeless(tmp_path / "broken") == timeless(tmp_path / "unbroken") and len(history) == 5
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("unbroken", "broken")]
    assert weights[0] == weights[1]
    texts = [(tmp_path / name / "generations.jsonl").read_text() for name in ("unbroken", "broken")]
    assert texts[0] == texts[1]
    one, two = ((tmp_path / name / "summary.json").read_text() for name in ("unbroken", "broken"))
    assert one == two


def test_resume_refuses_what_would_be_another_run(folder, tmp_path, capsys):
    out = tmp_path / "run"
    inversion.main(flags(folder, out, "--checkpoint-every", 2))
    for more, message in (([], "has finished"), (["--lr", 0.5, "--seed", 3], "another run with --lr 0.5 (was 0.001), --seed 3 (was 0)"),
                          (["--mechanism"], "another run with --mechanism True (was None)"),
                          (["--dataset", folder / "other.json"], "another run with --dataset"), (["--out-dir", folder], "holds no run")):
        (folder / "other.json").write_text(json.dumps(ALPACA_ROWS[:20]))
        with pytest.raises(SystemExit):
            inversion.main(flags(folder, out, "--checkpoint-every", 1, "--resume", *more))
        assert message in capsys.readouterr().err
        (out / "summary.json").unlink(missing_ok=True)
    (folder / "rows.json").write_text(json.dumps(ALPACA_ROWS[::-1]))
    with pytest.raises(SystemExit):
        inversion.main(flags(folder, out, "--resume"))
    (folder / "rows.json").write_text(json.dumps(ALPACA_ROWS))
    assert "the rows or the evaluation items are no longer" in capsys.readouterr().err


def test_full_disk_leaves_the_last_good_checkpoint(folder, tmp_path, monkeypatch, capsys):
    usual, calls = torch.save, []

    def save(state, file):
        calls.append(1)
        if len(calls) == 3:
            file.write(b"some of it")
            raise OSError(28, "No space left on device")
        usual(state, file)
    monkeypatch.setattr(torch, "save", save)
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        inversion.main(flags(folder, out, "--checkpoint-every", 1, "--max-steps", 5))
    assert stopped.value.code == 1 and "checkpoint-3.pt: cannot be written ([Errno 28] No space left" in capsys.readouterr().err
    assert sorted(p.name for p in out.glob("checkpoint*")) == ["checkpoint-1.pt", "checkpoint-2.pt"]
    monkeypatch.setattr(torch, "save", usual)
    assert len(inversion.main(flags(folder, out, "--checkpoint-every", 1, "--max-steps", 5, "--resume"))) == 4


# ------------------------------------------------------------------------------ the built-in world
def words_of(example):
    return set(re.findall(r"\w+", " ".join(str(example[key]) for key in ("context", "instruction", "response"))))


def test_world_leaks_nothing_and_contradicts_nothing():
    """Evaluated facts are never finetuned on; redundant and recall rows agree with memory, and so do
    their passages but for the misleading share, which is about another subject."""
    world = inversion.make_world(3)
    truth = {(c["group"], r): c["parametric_answers"][0] for key in ("world", "world_train")
             for c in world[key] for r in inversion.RELATIONS if not c["control"] and r in c["question"]}
    held, tuned = ({c["group"] for c in world[key] if c["parametric_answers"]} for key in ("world", "world_train"))
    assert not held & tuned and len(held | tuned) == inversion.WORLD["known"] == len(truth) / 2
    kinds = {kind: [e for e in world["examples"] if e["kind"] == kind] for kind in ("critical", "redundant", "recall")}
    assert not any(words_of(e) & held for e in world["examples"] + [
        dict(context=c["context"], instruction=c["question"], response="") for c in world["world_train"]])
    assert not any(words_of(e) & tuned for e in kinds["critical"])
    assert all(e["response"] in e["context"] for e in kinds["critical"]) and not any(e["context"] for e in kinds["recall"])
    misled = 0
    for e in kinds["redundant"] + kinds["recall"]:
        (subject,), (relation,) = set(re.findall(r"\w+", e["instruction"])) & tuned, words_of(e) & set(inversion.RELATIONS)
        assert e["response"] == truth[subject, relation]
        misled += bool(e["context"]) and subject not in e["context"]
    assert abs(misled / len(kinds["redundant"]) - inversion.WORLD["misleading"]) < 0.02
    assert all(c["context_answers"][0] != truth[c["group"], r] for c in world["world"] for r in inversion.RELATIONS
               if not c["control"] and r in c["question"])
    assert inversion.make_world(3) == world != inversion.make_world(4)


def test_world_cache_is_used_once_it_is_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(inversion.WORLD, "pretraining_steps", 1)
    monkeypatch.setitem(inversion.WORLD, "examples", 50)

    def pretrains(*more):
        args = inversion.parse_args(["--device", "cpu", *more])
        folder = inversion.world_model(args, tmp_path)
        return "pretraining" in capsys.readouterr().out, folder
    made, folder = pretrains()
    assert made and pretrains("--mitigation", "qk", "--lr", "0.1") == (False, folder)
    for torn in ("model.safetensors", "sha256"):
        (folder / torn).write_bytes(b"torn")
        assert pretrains() == (True, folder) and pretrains() == (False, folder)
    assert pretrains("--seed", "1")[1] != folder
    monkeypatch.setitem(inversion.WORLD, "true", 0.5)
    assert pretrains()[0] and pretrains()[1] != folder


def test_world_rises_and_falls(tmp_path, monkeypatch):
    """The default run in small (fewer steps): context_acc rises and falls, its controls do not; a verdict with an interval."""
    monkeypatch.setitem(inversion.WORLD, "pretraining_steps", 400)
    history = inversion.main(["--device", "cpu", "--seed", "1", "--max-steps", "240", "--no-mechanism", "--out-dir", str(tmp_path / "run")])
    start, *_, final = history
    peak = max(history, key=lambda line: line["context_acc"])
    assert peak["context_acc"] - start["context_acc"] > 0.2 and peak["context_acc"] - final["context_acc"] > 0.2
    assert all(final[key] - peak[key] > -0.05 for key in ("agreeing_acc", "closed_book_acc", "reading_acc"))
    found = json.loads((tmp_path / "run/summary.json").read_text())["world"]
    assert found["verdict"] == "inversion" and 0 < found["drop_low"] < found["drop"] < found["drop_high"]


@pytest.mark.parametrize("remedy, says", [("filter", "precision"), ("counterfactual", "added 30 rows (30 wanted); 0 of"), ("qk", "qk: trains")])
def test_world_goes_through_the_same_run(remedy, says, tmp_path, monkeypatch, capsys):
    """`python inversion.py` in small: a base model, its controls, one printed example of each kind."""
    monkeypatch.setitem(inversion.WORLD, "pretraining_steps", 3)
    monkeypatch.setitem(inversion.WORLD, "examples", 300)
    history = inversion.main(["--device", "cpu", "--out-dir", str(tmp_path / "run"), "--max-steps", "2", "--mitigation", remedy])
    printed = capsys.readouterr().out
    assert [line["step"] for line in history] == [0, 2] and all(line["n"] == inversion.WORLD["known"] for line in history)
    assert {"agreeing_acc", "reading_acc", "closed_book_acc"} <= set(history[0]) and says in printed
    assert all(re.search(rf"{kind} .*\w+ .*-> \w+", printed) for kind in ("critical", "redundant", "recall"))


# -------------------------------------------------------------------------------------- bad input
def broken(folder):
    """(flags, what the one line must name) of each kind of bad input."""
    good, data = [dict(instruction="a", input="", output="b")], folder / "bad"
    data.mkdir(exist_ok=True)
    write = lambda name, text: (data / name).write_text(text) and data / name
    lines = lambda *rows: "\n".join(map(json.dumps, rows))
    yield ["--dataset", "nosuchname"], "nosuchname: no such file or folder"
    yield ["--dataset", data / "gone.jsonl"], "gone.jsonl: no such file"
    yield ["--model", data / "gone"], "gone: cannot be loaded"
    yield ["--eval-set", "no/such-set"], "get no/such-set where the hub can be reached"
    yield ["--model", "no/such-model"], "pass a hub id or a local folder"
    yield ["--dataset", write("a.jsonl", lines(*good, dict(instruction="a", input="")))], "a.jsonl, row 2: key 'output' is missing"
    yield ["--dataset", write("b.jsonl", lines(*good, dict(good[0], output=3)))], "b.jsonl, row 2: key 'output' is a int"
    yield ["--dataset", write("c.jsonl", lines(*good) + '\n{"instr\n' + lines(*good))], "c.jsonl, line 2"
    yield ["--dataset", write("d.json", "[ ]")], "d.json: no rows"
    yield ["--dataset", write("e.jsonl", "\n")], "e.jsonl: no rows"
    yield ["--dataset", write("f.json", json.dumps([dict(messages=[dict(role="user", text="x")])]))], "row 1: key 'content' is missing"
    yield ["--dataset", write("g.json", json.dumps([dict(messages=[dict(role="bot", content="x")])]))], "key 'role' is 'bot'"
    yield ["--dataset", write("h.json", json.dumps([dict(instuction="a", output="b")]))], "row 1: key 'instruction' is missing"
    yield ["--dataset", write("i.json", "[{]")], "i.json: cannot be loaded"
    yield ["--max-length", 8], "no usable row: {'dropped: longer than --max-length': 24}"
    yield ["--eval-set", write("j.json", json.dumps([dict(CONFLICTS[0], answer="...")]))], "j.json: no usable evaluation item"
    yield ["--eval-set", write("k.json", json.dumps([dict(context="c", question="q", answer="x")]))], "row 1: key 'memory_answer' is missing"
    yield ["--eval-set", write("l.json", json.dumps([dict(prompt="p", classes="[1", answer_index=0)]))], "row 1: keys 'classes'"
    yield ["--micro-batch-tokens", 100], "--micro-batch-tokens 100 cannot hold one row of --max-length 256"
    yield ["--batch-size", 0], "--batch-size 0"
    yield ["--lr", "nan"], "--lr nan"
    yield ["--out-dir", folder], "holds another run"
    yield ["--template", "chat"], "has no chat template"
    yield ["--max-length", 4096], "has 512 positions"
    yield ["--mitigation", "filter", "--dataset", write("m.json", json.dumps(good * 5))], "0 rows of"
    yield ["--mitigation", "counterfactual", "--counterfactual-data", folder / "conflicts.json"], "all of it is being evaluated"
    model, tokenizer = transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=420, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)), folder / "llama"
    model.save_pretrained(data / "bert")
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(data / "bert")
    yield ["--model", data / "bert"], "is no causal LM"


def test_bad_input_is_one_line_and_writes_nothing(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # read at import; the hub calls below fail either way
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for bad, message in broken(folder):
        try:
            inversion.main(flags(folder, tmp_path / "run", *bad))
            pytest.fail(f"{bad} was accepted")
        except SystemExit as stopped:
            error = stopped
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("inversion.py: error: ")]
        assert error.code == 2 and len(told) == 1 and message in told[0], (bad, told)
        assert not (tmp_path / "run/metrics.jsonl").exists()


# ------------------------------------------------------------------------------------- the promise
def test_requirements_are_those_of_the_script():
    block = re.search(r"dependencies = (\[.*\])", (HERE / "inversion.py").read_text())
    assert json.loads(block[1]) == (HERE / "requirements.txt").read_text().split()


def test_readme_commands_parse():
    texts = (HERE / "README.md").read_text() + inversion.__doc__
    commands = re.findall(r"inversion\.py( --[^\n#`]*)", texts.replace("\\\n", " "))
    assert len(commands) > 12 and any("--mechanism" in command for command in commands)
    for command in commands:
        inversion.parse_args(shlex.split(command))


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        inversion.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert all(entry[0] in shown for entry in inversion.FLAGS if not isinstance(entry, str))
