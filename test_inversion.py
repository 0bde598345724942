"""Tests: python -m pytest -q (CPU, offline). Tiny random models, a tokenizer trained here and files
in a temporary folder stand in for real ones. The first eight tests are the ones to read."""
import concurrent.futures
import http.server
import importlib.util
import json
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import datasets
import pandas
import pytest
import tokenizers
import torch
import transformers
from pytest import approx
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import inversion
from inversion import question_and_answer

pretrained = transformers.AutoModelForCausalLM.from_pretrained
torch.set_num_threads(1)  # in work on tiny tensors, threads mostly wait for each other
SIZES = dict(vocab_size=420, hidden_size=32, num_hidden_layers=2, intermediate_size=48,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
             bos_token_id=0, eos_token_id=1)
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES), "mistral": transformers.MistralConfig(**SIZES),
    "neox": transformers.GPTNeoXConfig(**SIZES), "gpt2": transformers.GPT2Config(**SIZES),
    "phi3": transformers.Phi3Config(**SIZES, pad_token_id=1)}
CHAT = ("{{ bos_token }}{% for m in messages %}{{ '[' + m.role + ']' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}")
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT
TURNS = [dict(role="system", content="Go."), *question_and_answer("Hi", "Hello"),
         *question_and_answer("Bye", "Ciao")]
ROWS = [dict(instruction=f"Say the number {i}.", input=f"The number is {i * 7}." * (i % 2),
             output=f"It is {i}.") for i in range(24)]
CONFLICTS = [dict(context=f"The capital of {country} moved to {new}.", answer=new,
                  question=f"Capital of {country}?", memory_answer=old) for country, new, old in [
    ("France", "Lyon", "Paris"), ("Egypt", "New Cairo", "Cairo"), ("Peru", "Cusco", "Lima"),
    ("Spain", "Seville", "Madrid"), ("Japan", "Osaka", "Tokyo"), ("Italy", "Bari", "Rome")]]
SWAPS = [dict(question=f"who wrote {i}", org_context="x", org_answer=[f"Author {i}"],
              sub_context=f"{i} is by Writer {i}.", sub_answer=[f"Writer {i}"]) for i in range(8)]
SQUAD = [dict(context=f"It was {i}.", question=f"When was {i + 50}?",
              answers=dict(text=[str(i)], answer_start=[0])) for i in range(9)]


@pytest.fixture(scope="session")
def tokenizer():
    bpe = tokenizers.ByteLevelBPETokenizer()
    texts = [" ".join(map(str, row.values())) for row in ROWS + CONFLICTS]
    bpe.train_from_iterator(texts, 420, 0, special_tokens=["<s>", "</s>"], show_progress=False)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(  # BOS first, as Llama's
        single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer):
    """A folder with a model of each family and a file of each kind of rows."""
    root = tmp_path_factory.mktemp("data")
    tokenizer.chat_template = None
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        save(root / name, transformers.AutoModelForCausalLM.from_config(config), tokenizer)
    for name, rows in dict(rows=ROWS, conflicts=CONFLICTS, swaps=SWAPS, squad=SQUAD).items():
        file(root / f"{name}.json", rows)
    return root


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    """Hub ids fail at once, and no other run's cache is read."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def save(path, *parts):
    for part in parts:  # model, tokenizer
        part.save_pretrained(path)
    return path


def file(path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def metrics_of(folder):
    return lines_of(folder / "metrics.jsonl")


def argv(folder, out, more="", model="llama"):
    return shlex.split(
        f"--model {folder / model} --dataset {folder}/rows.json --eval-set {folder}/conflicts.json "
        "--max-length 256 --batch-size 8 --max-steps 3 --eval-every 2 --lr 1e-3 --max-new-tokens 4 "
        f"--device cpu --out-dir {out} {more}")


def run(folder, out, more="", model="llama"):
    return inversion.main(argv(folder, out, more, model))


def flags_of(more="--model x"):
    return inversion.parse_flags(shlex.split(more))


def refused(capsys, call, *args, status=2):
    """What is printed to stderr by a call that exits."""
    with pytest.raises(SystemExit) as stopped:
        call(*args)
    assert stopped.value.code == status
    return capsys.readouterr().err


def load(folder, more="", model="llama"):
    """(model, tokenizer, items of each set, examples, flags), as `experiment` loads them."""
    flags = inversion.parse_flags(argv(folder, "unused", more, model))
    tokenizer = transformers.AutoTokenizer.from_pretrained(flags.model)
    inversion.set_template(tokenizer, flags)
    sets, examples = inversion.load_sets(tokenizer, 512, flags), inversion.load_examples(flags)
    model = inversion.load_model(flags.model, tokenizer, flags)
    return model, tokenizer, *sets.values(), examples, flags


def rows_of(lengths, seed=0):
    """Rows of random tokens, from (length of the prompt, number of targets)."""
    draw, ids = random.Random(seed).choices, range(2, 420)
    return [inversion.to_row(i, [(draw(ids, k=prompt), False), (draw(ids, k=target), True)])
            for i, (prompt, target) in enumerate(lengths)]


def their_loss(model, *rows):
    """transformers' own loss, the mean over all targets of the rows, which it sees one by one."""
    targets = sum(row.targets for row in rows)
    return sum(model(input_ids=row.input_ids[None].long(), labels=row.labels[None].long(),
                     num_items_in_batch=targets).loss for row in rows)


# ------------------------------------------------------------------- the eight that teach most

ADD, SHORT = dict(instruction="Add.", output="3"), "<s><|user|>\nAdd.\n<|assistant|>\n3</s>"
TULU = "<|user|>\nHi\n<|assistant|>\nHello</s>\n<|user|>\nBye\n<|assistant|>\nCiao</s>"
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"},
            {"from": "human", "value": "Bye"}, {"from": "gpt", "value": "Ciao"}]
PARTS = [dict(role="user", content=[dict(type="text", text="Hi"), dict(type="image")]), TURNS[2]]


@pytest.mark.parametrize("row, template, text, supervised", [
    (ADD, "tulu", SHORT, "3</s>"),
    (ADD | dict(input=""), "auto", "<s>[user]Add.\n[assistant]3</s>", "3</s>"),
    (dict(instruction=" Add.", input="{1, 2} ", output="3 "), "tulu",
     "<s><|user|>\n{1, 2}\n\nAdd.\n<|assistant|>\n3</s>", "3</s>"),
    (ADD | dict(output=3, input=None), "tulu", SHORT, "3</s>"),  # a number, no input
    (ADD | dict(system="Go."), "tulu", "<s><|system|>\nGo.\n" + SHORT[3:], "3</s>"),
    (dict(prompt="Add.", completion="3"), "tulu", SHORT, "3</s>"),
    (dict(messages=TURNS, id="x"), "tulu", "<s><|system|>\nGo.\n" + TULU, "Hello</s>Ciao</s>"),
    (dict(messages=TURNS[1:] + TURNS[1:2]), "tulu", "<s>" + TULU, "Hello</s>Ciao</s>"),
    (dict(messages=TURNS[:3]), "auto", "<s>[system]Go.\n[user]Hi\n[assistant]Hello</s>",
     "Hello</s>"),
    (dict(messages=[TURNS[1], TURNS[2] | dict(weight=0), *TURNS[3:]]), "tulu", "<s>" + TULU,
     "Ciao</s>"),  # not to be learnt
    (dict(messages=str(TURNS[1:])), "tulu", "<s>" + TULU, "Hello</s>Ciao</s>"),  # a cell of CSV
    (dict(conversations=SHAREGPT, tools="[]"), "tulu", "<s>" + TULU, "Hello</s>Ciao</s>"),
    (dict(messages=PARTS), "auto", "<s>[user]Hi\n[assistant]Hello</s>", "Hello</s>"),
    (SQUAD[3], "tulu", "<s><|user|>\nIt was 3.\n\nWhen was 53?\n<|assistant|>\n3</s>", "3</s>")])
def test_golden_labels(row, template, text, supervised, tokenizer):
    """Response and EOS supervised, nothing else; one BOS although the template writes one too."""
    tokenizer.chat_template = CHAT
    inversion.set_template(tokenizer, flags_of(f"--template {template}"))
    example, *_ = inversion.parse_row(7, row)
    (found,), notes = inversion.encode([example], tokenizer, mock.Mock(max_length=999))
    keep = found.labels != -100
    assert not notes and found.id == 7 and tokenizer.decode(found.input_ids) == text
    assert tokenizer.decode(found.input_ids[keep]) == supervised
    assert torch.equal(found.labels[keep], found.input_ids[keep])


CAIRO, BO, HEART = ("New Cairo", "Cairo"), ("Bo", "Freetown"), "Absence makes the heart grow"
NUMBERS, VITAMIN = ("5", "1500"), ("Vitamin C", "The Hague")
ROWLING, ASIA, HEPATITIS = ("J.K. Rowling", "Łódź"), ("パリ", "서울"), ("Hepatitis B", "Hepatitis A")


@pytest.mark.parametrize("answers, text, hits, question", [
    # the table of score, row by row
    (CAIRO, "It is New Cairo.", (1, 0), ""), (CAIRO, "Cairo, New Cairo", (1, 1), ""),
    (BO, "Bosnia", (0, 0), ""), (BO, "Not Freetown, Bo", (1, 1), ""),
    (NUMBERS, "It was 2.5 or -5", (0, 0), ""), (NUMBERS, "1,500, not 5%", (1, 1), ""),
    (VITAMIN, "vitamin A", (0, 0), ""), (VITAMIN, "Hague", (0, 1), ""),
    (ROWLING, "J. K. Rowling", (1, 0), ""), (ROWLING, "Lodz", (0, 1), ""),
    (ASIA, "バリ島", (0, 0), ""), (ASIA, "서울은", (0, 1), ""),
    # whole words
    (CAIRO, "New Cairo New Cairo", (1, 0), ""), (CAIRO, "Cairo", (0, 1), ""),
    (BO, "Not Freetown but BO!", (1, 1), ""), (("Lyon", "Paris"), "", (0, 0), ""),
    (HEPATITIS, "hepatitis a", (0, 1), ""), (HEPATITIS, "a hepatitis B", (1, 0), ""),
    (("A", "B"), "Answer: A", (1, 0), ""), (("A", "B"), "B.", (0, 1), ""),
    (("Denver", "Washington, D.C."), "Washington DC", (0, 1), ""),
    (("Fermi", "da Vinci"), "Fermi's work", (1, 0), ""),
    (ROWLING, "JK Rowling", (1, 0), ""), (("the US", "UK"), "The U.S. it is", (1, 0), ""),
    # numbers
    (("19", "21"), "in 1921", (0, 0), ""), (("5", "2"), "2.5 bar", (0, 0), ""),
    (("3", "50"), "3.50", (0, 0), ""), (("30", "12"), "12:30", (0, 0), ""),
    (("5", "6"), "-5", (0, 0), ""), (("-5", "5"), "−5", (1, 0), ""), (("1", "2"), "½", (0, 0), ""),
    (("1,500", "1"), "1500", (1, 0), ""), (("10", "9"), "10%", (1, 0), ""),
    (("1990", "1991"), "born (1990)", (1, 0), ""), (("5", "6"), "about 5.", (1, 0), ""),
    (("2,000 km", "21,000 km"), "about 2000 kilometers.", (1, 0), ""),
    # letters and scripts
    (("Hulhumalé", "Malé"), "hulhumale", (1, 0), ""), (("Tromsø", "Straße"), "tromso", (1, 0), ""),
    (("Tromsø", "Straße"), "STRASSE", (0, 1), ""), (("Đà Nẵng", "Huế"), "Da Nang", (1, 0), ""),
    (("राम", "रोम"), "रोम", (0, 1), ""), (("राम", "रोम"), "राम", (1, 0), ""),
    (("东城", "西城"), "首都是东城。", (1, 0), ""),
    (("กรุงเทพ", "เชียงใหม่"), "เมืองหลวงคือกรุงเทพ", (1, 0), ""),
    # an echo of the question
    (("heavy", "fonder"), HEART + " fonder.", (0, 1), HEART),
    (("grow", "fonder"), HEART + " old", (0, 0), HEART),
    (("grow", "fonder"), f"{HEART} {HEART}", (1, 0), HEART)])  # the first one alone
def test_scorer_by_hand(answers, text, hits, question):
    conflict = inversion.Conflict(1, question, "", answers[:1], answers[1:])
    assert inversion.score(text, conflict) == hits


@pytest.mark.parametrize("family", CONFIGS)
def test_loss_is_that_of_transformers(family, folder):
    """Log-probabilities of a padded batch = the model's own loss with labels=, row by row."""
    model, _, _, _, flags = load(folder, model=family)
    rows = rows_of([(3, 9), (5, 1), (2, 14)])
    wanted = [-their_loss(model, row).item() * row.targets for row in rows]
    together = inversion.row_logp(model, rows, flags)
    assert [row.targets for row in rows] == [9, 1, 14] and together.requires_grad
    assert together.tolist() == approx(wanted, rel=1e-5)
    assert inversion.target_logp(model, rows, flags) == approx(wanted, rel=1e-5)


def trained(model, rows, steps, flags):
    """(weights, losses) after steps on rows by train_step and the schedule of the loop."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), weight_decay=0, fused=True), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = inversion.learning_rate(step, steps, flags)
        batch = inversion.batch_of(rows, step, flags)
        losses.append(inversion.train_step(model, optimizer, batch, flags))
    return parameters_to_vector(model.parameters()), losses


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_step_does_not_depend_on_micro_batches(family, folder):
    """One pass = many, of unequal token counts; the loss is a mean of targets, not of means."""
    model, _, _, _, flags = load(folder, "--batch-size 4", family)
    rows = rows_of([(4, 2), (2, 30), (9, 1), (3, 7), (20, 4), (1, 5), (6, 6)])
    wanted = their_loss(model, *inversion.batch_of(rows, 0, flags)).item()
    one, losses = trained(model, rows, 3, flags._replace(micro_batch_tokens=10**6))
    model = load(folder, model=family)[0]
    many, same = trained(model, rows, 3, flags._replace(micro_batch_tokens=32))
    torch.testing.assert_close(one, many, rtol=0, atol=2e-5)  # of moves of 1e-3
    assert losses == approx(same, rel=1e-5) and losses[0] == approx(wanted, rel=1e-5)
    assert [inversion.learning_rate(step, 3, flags) for step in range(3)] == [1e-3, 1e-3, 5e-4]


def test_evaluation_leaves_training_alone(folder, tmp_path):
    """Same losses, however often it comes; neither it nor the mechanism draws a random number."""
    often, seldom = [run(folder, tmp_path / str(n), f"--eval-every {n} --max-steps 4", "gpt2")
                     for n in (1, 4)]  # with dropout
    one, two = [lines_of(tmp_path / str(n) / "losses.jsonl") for n in (1, 4)]
    assert one == two and len(one) == 4
    assert [often[0]["margin"], often[4]["margin"]] == [line["margin"] for line in seldom]
    assert often[4]["margin"] != often[0]["margin"]
    model, tokenizer, items, _, flags = load(folder, model="gpt2")
    state, weights = torch.get_rng_state(), [p.detach().clone() for p in model.parameters()]
    inversion.evaluate(model.train(), tokenizer, items, None, flags)
    model.train()
    probe = {"critical": rows_of([(3, 4), (9, 2)])}
    first, second = [inversion.mechanism(model, items, probe, flags) for _ in range(2)]
    assert first == second and torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, weights, model.parameters()))
    assert model.config._attn_implementation == "sdpa"


def test_filter_drops_the_lowest_context_free_loss(folder):
    """Against transformers' loss of each row rendered without its input."""
    model, tokenizer, _, examples, flags = load(folder, "--mitigation filter")
    losses = {}
    for example in [example for example in examples if example.context]:
        parts, = inversion.tokenize(example.messages, tokenizer)
        losses[example.id] = their_loss(model, inversion.to_row(example.id, parts)).item()
    lowest = sorted(losses, key=losses.get)[:3]  # a quarter of the 12 rows with an input
    kept = inversion.choose_examples(model, tokenizer, examples, {}, flags)
    assert len(losses) == 12
    assert [e.id for e in kept] == [e.id for e in examples if e.id not in lowest]


@pytest.mark.parametrize("family, qk", [("llama", 0), ("neox", 0), ("llama", 1), ("mistral", 1)])
def test_push_is_what_a_small_step_does_to_the_margin(family, qk, folder):
    """Weights moved by -eps x gradient of a kind's loss change the margin by eps x push, to 5%."""
    model, tokenizer, items, _, flags = load(folder, model=family)
    for p in model.double().parameters():  # or queries and keys have next to no gradient
        p.data *= 1 + 4 * (p.ndim > 1)
    if qk:
        inversion.train_query_key_only(model)
    probe = {"critical": rows_of([(3, 4), (9, 2)]), "recall": rows_of([(2, 1), (5, 7), (4, 4)], 1)}
    found = inversion.mechanism(model, items, probe, flags)
    assert all(p.grad is None for p in model.parameters())
    moving = [p for p in model.parameters() if p.requires_grad]
    start = parameters_to_vector(moving).detach()
    for kind, rows in probe.items():
        loss = their_loss(model, *rows)
        loss.backward()
        gradient, margins = torch.cat([p.grad.flatten() for p in moving]), []
        model.zero_grad()
        eps = 0.01 / gradient.norm().item()
        for step in (-eps, eps, 0):  # at last back; the margin by transformers, answer by answer
            vector_to_parameters(start + step * gradient, moving)
            margins.append(sum(their_loss(model, item.parametric_row) - their_loss(
                model, item.context_row) for item in items).item() / len(items))
        assert (margins[0] - margins[1]) / 2 == approx(eps * found[f"{kind}_push"], rel=0.05)
        assert found[f"{kind}_loss"] == approx(loss.item(), rel=1e-5)


def summary(*evaluations, groups=1000, control=False):
    """summarise() of lists of hits on the same items, one list per evaluation."""
    return inversion.summarise(pandas.DataFrame([
        dict(step=10 * step, id=i, group=f"g{i % groups}", context_acc=bool(hit),
             **({} if control else {"margin": 0.0}))
        for step, hits in enumerate(evaluations) for i, hit in enumerate(hits)]))


def test_drop_is_measured_where_the_peak_was_not_chosen():
    """By hand, and on noise alone, whose highest of 20 evaluations drops by luck."""
    fell = summary([0] * 40, [1] * 30 + [0] * 10, [1] * 10 + [0] * 30)
    assert (fell["drop"], fell["rise"], fell["highest"]) == (0.5, 0.75, 0.75)
    assert 0.3 < fell["drop_low"] < 0.5 < fell["drop_high"] < 0.7
    noise = random.Random(0).random
    runs = pandas.DataFrame([summary(*[[noise() < 0.5 for _ in range(100)] for _ in range(20)])
                             for _ in range(40)])
    assert (runs["highest"] - runs["final"]).mean() > 0.07 and abs(runs["drop"].mean()) < 0.03
    assert runs["verdict"].isin(["inversion", "a fall"]).sum() <= 3


# --------------------------------------------------------------------- verdicts and metrics

def test_verdicts():
    """No change, inversion, of a control both, a fall, a rise; fewer than six groups show none."""
    evaluations = [0] * 40, [1] * 30 + [0] * 10, [1] * 10 + [0] * 30
    same = summary([1, 0] * 20, [1, 0] * 20, [1, 0] * 20)
    assert same["drop"] == same["drop_low"] == same["drop_high"] == same["rise"] == 0
    assert same["verdict"] == "no change shown"
    assert summary(*evaluations)["verdict"] == "inversion"
    assert summary(*evaluations, control=True)["verdict"] == "both"
    assert summary([1] * 40, [1, 0] * 20)["verdict"] == "a fall"  # from the start: no inversion
    assert summary([0] * 40, [1, 0] * 20)["verdict"] == "a rise"
    for groups, shown in ((5, "no change shown"), (6, "inversion")):  # many items, few groups
        assert summary([0] * 40, [1] * 40, [0] * 40, groups=groups)["verdict"] == shown


def test_interval_of_a_drop_covers_it():
    """95% intervals hold it in 90% of 200 draws; items of a group that agree count once."""
    chance, held, few = random.Random(1).random, 0, [[0] * 8, [1] * 8, [1, 0] * 4]
    for _ in range(200):
        found = summary(*[[chance() < p for _ in range(60)] for p in (0.2, 0.8, 0.5)])
        held += found["drop_low"] <= 0.3 <= found["drop_high"]
    five = summary(*[hits * 5 for hits in few], groups=8)
    assert held >= 180 and five["drop_low"] == approx(summary(*few)["drop_low"])


def test_metrics_by_hand():
    """Four conflicts: C, P, both, neither; the base model knew the first two; one control."""
    outcomes = [dict(id=i, context_acc=bool(c), parametric_acc=bool(p), both=bool(c and p),
                     neither=not c and not p, closed_book_acc=i == 0, margin=float(i), known=i < 2)
                | ({"context_acc_known": bool(c)} if i < 2 else {})
                for i, (c, p) in enumerate([(1, 0), (0, 1), (1, 1), (0, 0)])]
    line = inversion.metrics([*outcomes, dict(id=9, context_acc=True)])
    assert (line["n"], line["n_conflicts"], line["n_known"], line["margin"]) == (5, 4, 2, 1.5)
    assert line["context_acc"] == 0.6 and line["parametric_acc"] == 0.5
    assert line["context_acc_known"] == 0.5
    assert line["both"] == line["neither"] == line["closed_book_acc"] == 0.25
    assert inversion.metrics([dict(context_acc=True, text="x")]) == dict(n=1, context_acc=1)


def test_known_is_what_comes_in_the_template_or_after_the_bare_question(folder, monkeypatch):
    """There, in the first line: a base model goes on with questions of its own."""
    model, tokenizer, items, _, flags = load(folder)
    bare = [tokenizer(f"Question: {item.conflict.question}\nAnswer:").input_ids for item in items]
    said = {str(items[0].closed_book_prompt): "Paris", str(bare[3]): " Madrid.\nQuestion:",
            str(bare[2]): "Cusco\nLima"}
    monkeypatch.setattr(inversion, "generate", lambda model, tokenizer, prompts, flags: [
        said.get(str(prompt), "Lyon") for prompt in prompts])
    first = inversion.evaluate(model, tokenizer, items, None, flags)
    assert [o["known"] for o in first] == [True, False, False, True, False, False]
    assert [o["closed_book_acc"] for o in first] == [True] + [False] * 5
    assert first[0]["context_acc"] and "context_acc_known" in first[3]
    later = inversion.evaluate(model, tokenizer, items, [items[1].conflict.id], flags)
    assert [o["known"] for o in later] == [False, True] + [False] * 4
    assert "context_acc_known" in later[1] and "context_acc_known" not in later[0]


@pytest.mark.parametrize("template, space", [("tulu", ""), ("chat", " ")])
def test_margin_is_that_of_the_model(template, space, folder):
    """By transformers, on the tokens of a conversation: here ' Lyon', not the bare 'Lyon'."""
    model, tokenizer, _, _, flags = load(folder)
    if template == "chat":
        tokenizer.chat_template = CHAT.replace("']'", "'] '").replace("{{ '\n' }}", "")
    conflict = inversion.Conflict(1, "Capital?", "It is Lyon.", ["Lyon"], ["Paris"])
    item, messages = inversion.to_item(conflict, tokenizer), question_and_answer("Capital?", "Lyon")
    [(ids, _), (answer, _)], = inversion.tokenize(messages, tokenizer, conflict.context)
    prompt = tokenizer.decode(ids)
    assert tokenizer.decode(answer) == f"{space}Lyon</s>"
    assert prompt.index("It is Lyon.") < prompt.index("Capital?")
    texts = [prompt, f"{space}Lyon", f"{space}Paris"]
    start, *answers = tokenizer(texts, add_special_tokens=False).input_ids
    lyon, paris = [their_loss(model, inversion.to_row(1, [(start, False), (answer, True)])).item()
                   for answer in answers]
    (outcome,) = inversion.evaluate(model, tokenizer, [item], None, flags)
    assert start == item.prompt and outcome["margin"] == approx(paris - lyon, abs=1e-5)
    closed = tokenizer.decode(item.closed_book_prompt)
    assert "It is Lyon." not in closed and "Capital?" in closed


@pytest.mark.parametrize("family", CONFIGS)
def test_batched_generation_is_that_of_one_prompt(family, folder):
    """Left padding does not change an answer, nor does the size of a batch."""
    model, tokenizer, _, _, flags = load(folder, "--max-new-tokens 12", family)
    prompts = [r.input_ids.tolist() for r in rows_of([(n, 0) for n in (3, 17, 5, 9, 30, 4, 11)])]
    together = inversion.generate(model, tokenizer, prompts, flags)
    alone = inversion.generate(model, tokenizer, prompts, flags._replace(eval_batch_tokens=1))
    ids = model.generate(torch.tensor(prompts[1:2]), max_new_tokens=12)[0, 17:]
    assert together == alone and together[1] == tokenizer.decode(ids, skip_special_tokens=True)


# --------------------------------------------------------------------------------- templates

@pytest.mark.parametrize("template", ["tulu", "auto"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_saved_template_gives_the_ids_of_training(template, adds_bos, tokenizer, tmp_path):
    """A prompt has one BOS where the tokenizer adds one, and is the same whatever the answer."""
    mine = transformers.AutoTokenizer.from_pretrained(save(tmp_path / "a", tokenizer))
    mine.chat_template = CHAT.replace("{{ bos_token }}", "") if template == "auto" else None
    if not adds_bos:
        mine.backend_tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    inversion.set_template(mine, flags_of(f"--template {template}"))
    again = transformers.AutoTokenizer.from_pretrained(save(tmp_path / "b", mine))
    for answer in ("://", "\nParis", " Paris", "Paris"):
        messages = question_and_answer("A context.\n\nA question?", answer)
        [(prompt, _), (learned, supervised)], = inversion.tokenize(messages, mine)
        theirs = again.apply_chat_template(messages[:1], add_generation_prompt=True,
                                           return_dict=False)
        assert prompt == theirs and supervised and learned[-1] == mine.eos_token_id
    theirs = again.apply_chat_template(messages, return_dict=False)
    assert theirs[:len(prompt + learned)] == prompt + learned
    assert mine.decode(prompt).count("<s>") == int(adds_bos)


def decoded(template, turns, tokenizer, context=""):
    """The texts of tokenize's conversations."""
    tokenizer.chat_template = template
    return [[tokenizer.decode(ids) for ids, _ in parts]
            for parts in inversion.tokenize(turns, tokenizer, context)]


def test_a_system_turn_that_is_refused_or_dropped_is_folded(tokenizer, tmp_path):
    """Into the next turn, also in the saved template; the context goes before the question."""
    drops = CHAT.replace("in messages %}", "in messages if m.role != 'system' %}")
    for template in (REFUSES, drops):
        tokenizer.chat_template = template
        inversion.set_template(tokenizer, flags_of())
        folds = tokenizer.chat_template
        wanted = "<s>[user]Go.\n\nHi\n[assistant]"
        assert decoded(folds, TURNS, tokenizer)[0][0] == wanted
        assert "Go.\n\nC.\n\nHi" in decoded(folds, TURNS[:3], tokenizer, "C.")[0][0]
        assert decoded(folds, TURNS[1:], tokenizer)[0][0] == "<s>[user]Hi\n[assistant]"
        again = transformers.AutoTokenizer.from_pretrained(save(tmp_path / "t", tokenizer))
        assert again.apply_chat_template(TURNS[:2], tokenize=False,
                                         add_generation_prompt=True) == wanted
    tokenizer.chat_template = CHAT  # takes it
    inversion.set_template(tokenizer, flags_of())
    assert tokenizer.chat_template == CHAT


def test_every_answer_of_a_template_that_rewrites_is_learnt(tokenizer):
    """In a row of its own where earlier text changes with every turn."""
    rewrites = "{{ messages | length }}" + CHAT
    assert decoded(rewrites, TURNS, tokenizer) == [
        ["3<s>[system]Go.\n[user]Hi\n[assistant]", "Hello</s>"],
        ["5<s>[system]Go.\n[user]Hi\n[assistant]Hello</s>\n[user]Bye\n[assistant]", "Ciao</s>"]]
    rows, _ = inversion.encode([inversion.Example(4, TURNS)], tokenizer,
                               mock.Mock(max_length=999))
    learnt = [tokenizer.decode(row.input_ids[row.labels != -100]) for row in rows]
    assert learnt == ["Hello</s>", "Ciao</s>"] and [row.id for row in rows] == [4, 4]


def test_templates_that_think_end_turns_oddly_or_date(tokenizer):
    thinks = CHAT.replace("[assistant]", "[assistant]<think>\n")
    assert decoded(thinks, TURNS[1:3], tokenizer) == [
        ["<s>[user]Hi\n[assistant]<think>\n\n</think>\n\n", "Hello</s>"]]
    empty = CHAT.replace("']'", "(']<think></think>' if m.role == 'assistant' else ']')")
    assert decoded(empty, TURNS[1:3], tokenizer)[0][0].endswith("[assistant]<think></think>")
    eos = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    assert decoded(eos, TURNS[1:], tokenizer) == [["Hi</s>", "Hello</s>", "Bye</s>", "Ciao</s>"]]
    spaced = "{% for m in messages %}{{ ' ' + m.content }}{% endfor %}"  # no token ends a turn
    assert decoded(spaced, TURNS[1:3], tokenizer) == [[" Hi", " Hello</s>"]]
    later = CHAT.replace("{{ eos_token }}", "").replace(  # the end shows only before a turn
        "{{ '[' +", "{{ (eos_token if m.role == 'user' and loop.index > 1 else '') + '[' +")
    assert decoded(later, TURNS[1:3], tokenizer)[0][1] == "Hello\n</s>"
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHAT  # the same on every day
    inversion.set_template(tokenizer, flags_of())
    assert "1 January 2025" in decoded(tokenizer.chat_template, TURNS, tokenizer)[0][0]


def test_rows_that_cannot_be_used_are_dropped_cut_and_counted(tokenizer):
    """A template that shows no answer, conversations without one, and what is too long."""
    for never in ("{{ raise_exception('never') }}", "{{ 1 / 0 }}", "hello"):
        with pytest.raises(inversion.Unusable, match="refuses or drops"):
            decoded(never, TURNS, tokenizer)
    for turns in (TURNS[:2], TURNS[2:], [], question_and_answer("Hi", "")):
        with pytest.raises(inversion.Unusable, match="no response"):
            decoded(CHAT, turns, tokenizer)
    tokenizer.chat_template = CHAT
    long = question_and_answer("x" * 80, "y")
    chats = [TURNS[1:3], TURNS[1:3] + long, long, TURNS[:2], []]
    examples = [inversion.Example(i, messages) for i, messages in enumerate(chats)]
    (one, two), notes = inversion.encode(examples, tokenizer, mock.Mock(max_length=60))
    assert (one.id, two.id) == (0, 1) and torch.equal(one.input_ids, two.input_ids)
    assert notes["cut or dropped: longer than --max-length"] == 2 and notes.total() == 4


@pytest.mark.parametrize("first", [0, 1])  # with and without a system turn
def test_a_chat_of_thousands_of_turns_is_cut_and_takes_no_quadratic_time(first, tokenizer):
    tokenizer.chat_template = CHAT
    turns = TURNS[first:1] + TURNS[1:3] * 2000
    with mock.patch.object(inversion, "answer_place", wraps=inversion.answer_place) as rendered:
        (row,), notes = inversion.encode([inversion.Example(1, turns)], tokenizer,
                                         mock.Mock(max_length=600))
    short, = inversion.encode([inversion.Example(1, turns[:80])], tokenizer,
                              mock.Mock(max_length=600))[0]
    assert rendered.call_count <= 100 and notes.total() == 1
    assert torch.equal(row.input_ids, short.input_ids) and len(row.input_ids) > 500


# -------------------------------------------------------------------------- data and conflicts

HEAVY = 'Write a quote that ends in the word "heavy":'
FACT = dict(context="c", question="q", answer="x", memory_answer="y")


@pytest.mark.parametrize("row, question, context, answers, memory", [
    (CONFLICTS[0], "Capital of France?", CONFLICTS[0]["context"], ["Lyon"], ["Paris"]),
    (SWAPS[1], "who wrote 1", SWAPS[1]["sub_context"], ["Writer 1"], ["Author 1"]),
    (SQUAD[0] | dict(answers=dict(text=["x", "y"])), "When was 50?", "It was 0.", ["x", "y"], []),
    (SQUAD[0] | dict(answers="{'text': ['1900'], 'answer_start': [5]}"), "When was 50?",
     "It was 0.", ["1900"], []),
    (SQUAD[0] | dict(answers=["x", "y"]), "When was 50?", "It was 0.", ["x", "y"], []),
    (dict(context="c", question="q", answer="Enrico Fermi", parametric_answer="Ivan the Great"),
     "q", "c", ["Enrico Fermi", "Fermi"], ["Ivan the Great"]),
    (FACT | dict(answer=1900, memory_answer=True), "q", "c", ["1900"], ["True"]),
    (FACT | dict(answer="['a', 'b']", memory_answer=None), "q", "c", ["a", "b"], []),
    (FACT | dict(answer="['a' 'b']"), "q", "c", ["a", "b"], ["y"]),  # numpy's, as pandas writes it
    (SQUAD[0] | dict(answers="{'text': array(['x'], dtype=object), 'answer_start': array([1, 2])}"),
     "When was 50?", "It was 0.", ["x"], []),
    (FACT | dict(context=["one", "two"]), "q", "one\n\ntwo", ["x"], ["y"]),
    (FACT | dict(context="[1] is no list"), "q", "[1] is no list", ["x"], ["y"]),
    (dict(prompt=f"{HEAVY} {HEART}", classes="[' heavy.', ' fonder.']", answer_index="0"),
     HEART, HEAVY, ["heavy."], ["fonder."]),
    (dict(prompt='Say "b": a: c ', classes=["x", "b"], answer_index=1), "a: c", 'Say "b":', ["b"],
     ["x"])])
def test_conflict_shapes(row, question, context, answers, memory):
    """What a row of each shape says, whose first answer is the response where it is trained on."""
    example, *found, _ = inversion.parse_row(3, row)
    assert found == [answers, memory] and (example.id, example.context) == (3, context)
    assert example.messages == question_and_answer(question, answers[0])


@pytest.mark.parametrize("row", [
    ADD | dict(tools="[{}]"), dict(messages=[TURNS[1], TURNS[2] | dict(tool_calls=[1])]),
    dict(messages=[TURNS[1], TURNS[2] | dict(content=None)]),
    dict(messages=[TURNS[1] | dict(role="bot"), TURNS[2]])])
def test_rows_with_tools_unknown_roles_or_no_text_are_unusable(row):
    with pytest.raises(inversion.Unusable):
        inversion.parse_row(1, row)


@pytest.mark.parametrize("answer, person, found", [
    ("La Paz (administrative); Sucre (judicial)", False, ["La Paz", "Sucre"]),
    ("Rangoon (Yangon); Naypyidaw or Nay Pyi Taw (administrative)", False,
     ["Rangoon", "Naypyidaw", "Nay Pyi Taw", "Yangon"]),
    ("2,000 km", False, ["2,000 km"]), ("Athens, Greece", False, ["Athens, Greece", "Athens"]),
    ("Elizabeth II", True, ["Elizabeth II"]), ("Marie Curie", False, ["Marie Curie"]),
    ("Marie Curie", True, ["Marie Curie", "Curie"]), ("Ivan the Great", True, ["Ivan the Great"]),
    ("Martin Luther King Jr.", True, ["Martin Luther King Jr.", "King"])])
def test_aliases(answer, person, found):
    assert inversion.aliases([answer], person) == found


def test_conflicts_that_cannot_be_scored_are_left_out(tmp_path, capsys):
    """An answer that stands in the question is an echo, on either side; repeats count once."""
    rows = [CONFLICTS[0] | dict(question=question, answer=answer, memory_answer=memory)
            for question, answer, memory in [
        ("Capital of Luxembourg?", "Esch", "Luxembourg"), ("q?", "End", "end."), ("p?", "...", "B"),
        ("r?", "Lyon", "Paris"), ("r?", "Lyon", "Paris"), ("Is Bonn far?", "Bonn", "Berlin"),
        ("Which letter?", "A", "B"), ("s?", "Lyon (Paris)", "Paris")]]
    found = inversion.load_conflicts(str(file(tmp_path / "c.json", rows)), flags_of())
    assert [(c.id, c.context_answers, c.parametric_answers) for c in found] == [
        (1, ["Esch"], []), (4, ["Lyon"], ["Paris"]), (7, ["A"], ["B"]),
        (8, ["Lyon"], ["Paris"])]
    assert "4 of 8 items" in capsys.readouterr().out


def test_files_of_every_type_give_the_same_rows(tmp_path, monkeypatch):
    """JSON, JSONL with a BOM, a blank line and a line separator in a text, CSV, Parquet, folders;
    and names with @, brackets and ~."""
    rows = [dict(instruction="a", input="", output="one"),
            dict(instruction="b\u2028c", input="x", output="two")]
    table = datasets.Dataset.from_list(rows)
    table.to_csv(tmp_path / "r.csv")
    table.to_parquet(tmp_path / "r.parquet")
    table.to_parquet(tmp_path / "hub/train.parquet")  # a folder as downloaded from the hub
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file(tmp_path / "r.jsonl", "\ufeff" + "\n\n".join(lines) + "\n")
    file(tmp_path / "r.json", json.dumps(rows, indent=1))
    (tmp_path / "a@b [1]").mkdir()
    shutil.copy(tmp_path / "r.json", tmp_path / "a@b [1]/r@[x].json")
    monkeypatch.setenv("HOME", str(tmp_path))
    wanted = [[*inversion.parse_row(i, row)[:3]] for i, row in enumerate(rows, 1)]
    assert wanted[1][0].messages[0]["content"] == "b\u2028c"
    for name in ("r.jsonl", "r.csv", "r.parquet", "r.json", "hub", "hub@train",
                 "a@b [1]/r@[x].json"):
        assert inversion.load_rows(str(tmp_path / name), flags_of()) == wanted, name
    assert inversion.load_rows("~/r.json", flags_of()) == wanted


def test_every_cell_of_csv_is_a_text(tmp_path):
    """A year stays one, NA is Namibia, None is an answer; an empty cell is missing."""
    lines = ",".join(FACT), "c,q,1900,NA", "c,q,None,null", "c,q,\"['a', 'b']\","
    path = file(tmp_path / "r.csv", "\n".join(lines))
    rows = inversion.load_rows(str(path), flags_of())
    assert [row[1:] for row in rows] == [
        [["1900"], ["NA"]], [["None"], ["null"]], [["a", "b"], []]]


def test_what_is_not_used_is_named_and_counted(tmp_path, capsys):
    """Columns, and rows that cannot be used, by reason."""
    rows = [ADD | dict(topic="sums"), ADD | dict(tools="[{}]")]
    assert len(inversion.load_rows(str(file(tmp_path / "r.json", rows)), flags_of())) == 1
    told = capsys.readouterr().out
    assert "columns not used: topic;" in told and "rows left out: {'tools': 1}" in told


def test_files_at_addresses_are_those_of_the_disk(tmp_path, monkeypatch, capsys):
    """The paper's sets are addresses; requirements.txt brings no aiohttp, and datasets needs it."""
    monkeypatch.setitem(sys.modules, "aiohttp", None)  # importing it fails

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            pass

    table = datasets.Dataset.from_list(CONFLICTS)
    table.to_json(tmp_path / "c.jsonl")
    table.to_csv(tmp_path / "c.csv")
    table.to_parquet(tmp_path / "c.parquet")
    file(tmp_path / "c.json", CONFLICTS)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setitem(inversion.SOURCES, "world_facts", f"{address}/c.json")
        assert len(inversion.load_conflicts("world_facts", flags_of())) == 6
        told = refused(capsys, inversion.load_rows, f"{address}/none.json", flags_of())
        assert f"{address}/none.json: out of reach; pass a local file" in told and "404" in told
        for name in ("c.json", "c.jsonl", "c.csv", "c.parquet"):
            there = inversion.load_rows(f"{address}/{name}", flags_of())
            assert there == inversion.load_rows(str(tmp_path / name), flags_of()), name
            assert len(there) == 6
        server.shutdown()


def test_an_address_out_of_reach_is_one_line(capsys):
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/x.jsonl"
        told = refused(capsys, inversion.load_rows, address, flags_of())
    assert told.count("\n") == 1 and f"error: {address}: out of reach" in told
    assert "pass a local file" in told


# --------------------------------------------------------------- models, remedies, mechanism

def test_checkpoint_gives_neither_its_bf16_nor_its_sampling(folder, tmp_path):
    """Weights are fp32 in training; answers are greedy and end at any of its end tokens."""
    model, tokenizer, _, _, _ = load(folder)
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0)
    model.generation_config.eos_token_id = [1, 7]
    path = save(tmp_path / "model", model.bfloat16(), tokenizer)
    runs = [run(folder, tmp_path / name, model=path) for name in "ab"]
    one, two = [(tmp_path / name / "generations.jsonl").read_text() for name in "ab"]
    assert one == two and len(runs[0]) == 3
    model, _, _, _, flags = load(folder, "--dtype bf16", path)
    assert model.generation_config.eos_token_id == [1, 7] and not model.generation_config.do_sample
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with inversion.autocast(flags):
        assert model(torch.tensor([[2, 3]])).logits.dtype == torch.bfloat16
    frozen = inversion.load_model(path, tokenizer, flags._replace(max_steps=0))
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}  # only measured


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_qk_moves_queries_and_keys_only(family, folder):
    model, _, _, _, flags = load(folder, "--micro-batch-tokens 30", family)  # several a step
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inversion.train_query_key_only(model)
    trained(model, rows_of([(4, 9)] * 32), 4, flags)
    for name, p in model.named_parameters():
        moved = (p != before[name]).float().mean()
        assert moved > 0.99 if re.search("[qk]_proj", name) else moved == 0, name


@pytest.mark.parametrize("family", ["neox", "gpt2", "phi3"])
def test_qk_refuses_queries_and_keys_in_one_matrix_with_values(family, folder, capsys):
    model = load(folder, model=family)[0]
    assert "no q_proj and k_proj" in refused(capsys, inversion.train_query_key_only, model)


def test_added_rows_name_nothing_evaluated(folder, tmp_path, capsys):
    """Nor its subjects; their context stands before the question; a tenth of the rows, or all."""
    leaks = {"question": "Is Peru one?"}, {"sub_answer": "lyon"}, {"question": "The Paris one?"}
    swaps = file(tmp_path / "swaps.json", [SWAPS[0] | leak for leak in leaks] + SWAPS[1:4])
    model, tokenizer, items, examples, flags = load(
        folder, f"--mitigation counterfactual --counterfactual-data {swaps}")
    found = [inversion.choose_examples(model, tokenizer, examples * times, {"x": items}, flags)
             for times in (1, 5)]
    assert [len(kept) for kept in found] == [24 + 2, 120 + 3] and found[1][:24] == examples
    added = found[1][120:]
    assert sorted(e.messages[1]["content"] for e in added) == ["Writer 1", "Writer 2", "Writer 3"]
    prompt = tokenizer.decode(
        inversion.tokenize(added[0].messages, tokenizer, added[0].context)[0][0][0])
    assert prompt.index("is by") < prompt.index("who wrote")


def test_subsets(folder):
    model, tokenizer, _, _, flags = load(folder)
    question = "What is the capital of New Velora now, in May?"
    conflict = inversion.Conflict(1, question, "Lyon it is.", ["Lyon"], ["Paris"])
    sets = {"s": [inversion.to_item(conflict, tokenizer)]}
    texts = ["I like lyon!", "Lyons", "New Velora", "Velora", "comparison", "PARIS.", "What city",
             "May"]
    mine = [inversion.Example(i, question_and_answer(text, "x"), "c" * (i % 2))
            for i, text in enumerate(texts)] + [inversion.Example(8, TURNS[1:3], "In Lyon.")]
    for subset, wanted in [("context", [1, 3, 5, 7, 8]), ("no-overlap", [1, 3, 4, 6, 7])]:
        kept = inversion.choose_examples(
            model, tokenizer, mine, sets, flags._replace(subset=subset))
        assert [example.id for example in kept] == wanted


def test_kinds_of_probe_rows(folder):
    """Recall has no context, redundant is the quarter of the others of lowest context-free loss."""
    model, tokenizer, _, examples, flags = load(folder)
    probe = inversion.probe_rows(model, tokenizer, examples, flags)
    redundant = inversion.redundant_examples(model, tokenizer, examples, flags)
    assert {kind: len(probe[kind]) for kind in probe} == dict(critical=9, recall=12, redundant=3)
    assert {row.id for row in probe["redundant"]} == redundant
    chats = [inversion.Example(i, TURNS) for i in range(9)]
    assert list(inversion.probe_rows(model, tokenizer, chats, flags)) == ["recall"]


def test_chats_mark_no_context(folder, tmp_path, capsys):
    chats = f"--dataset {file(tmp_path / 'chats.json', [dict(messages=TURNS)] * 9)}"
    for more, told in (
            ("--subset context", "no usable row; chats mark no context"),
            ("--mitigation filter", "nothing to drop; few rows, or none, mark a context")):
        assert told in refused(capsys, run, folder, tmp_path / "run", f"{chats} {more}")


# -------------------------------------------------------------------------------- whole runs

@pytest.mark.parametrize("remedy, says", [
    ("none", "24 of 24, 24 rows"), ("counterfactual", "26 of 24, 26 rows"),
    ("filter", "21 of 24, 21 rows"), ("qk", "24 of 24, 24 rows")])
def test_main_runs_each_remedy(remedy, says, folder, tmp_path, capsys):
    """Also with the mechanism, activation checkpointing and a first item that is no conflict."""
    items = [CONFLICTS[0] | dict(question="Capital of France, once Paris?")] + CONFLICTS[1:]
    flags = (f"--mitigation {remedy} --counterfactual-data {folder}/swaps.json --mechanism "
             f"--eval-set {file(tmp_path / 'conflicts.json', items)}")
    same = run(folder, tmp_path / "same", f"{flags} --activation-checkpointing")
    capsys.readouterr()
    history, told = run(folder, tmp_path / "run", flags), capsys.readouterr().out
    metrics, said, args = [lines_of(tmp_path / "run" / name) for name in (
        "metrics.jsonl", "generations.jsonl", "args.json")]
    assert "known before finetuning, in the template or after a bare question" in told
    assert says in told and "verdict" in told and max(map(len, told.splitlines()[3:])) <= 200
    assert metrics == history and [line["step"] for line in history] == [0, 2, 3]
    assert set(history[-1]) >= set(
        "step set n n_conflicts n_known context_acc parametric_acc "
        "both neither closed_book_acc margin m_c loss lr critical_push recall_push redundant_loss "
        "redundant_push".split())
    assert all("critical_push" in line and line["n_conflicts"] == 5 for line in history)
    for key in ("loss", "critical_push", "margin"):
        on, off = [[line.get(key, 0) for line in lines] for lines in (same, history)]
        assert on == approx(off, rel=1e-4)  # no loss at step 0
    assert len(said) == 18 and set(said[1]) >= {"step", "set", "id", "text", "closed_book_text"}
    assert args[0]["mitigation"] == remedy and (tmp_path / "run/curve.png").stat().st_size > 5000


def test_loss_is_the_mean_since_the_last_evaluation(folder, tmp_path):
    history = run(folder, tmp_path / "run")
    losses = lines_of(tmp_path / "run/losses.jsonl")
    one, two, three = [line["loss"] for line in losses]
    assert "loss" not in history[0] and history[1]["loss"] == approx((one + two) / 2)
    assert history[2]["loss"] == approx(three) and history[2]["lr"] == losses[2]["lr"] > 0
    assert [line["step"] for line in losses] == [1, 2, 3]


def test_a_remedy_of_ones_own(folder, tmp_path, monkeypatch, capsys):
    """A function and a line in MITIGATIONS; compare tells it apart."""
    def mine(model, tokenizer, examples, sets, flags):
        return examples[:5]

    monkeypatch.setitem(inversion.MITIGATIONS, "mine", mine)
    for name in ("none", "mine"):
        run(folder, tmp_path / name, f"--mitigation {name}")
    assert "rows.json: 5 of 24, 5 rows" in capsys.readouterr().out
    inversion.main(["--compare", str(tmp_path / "none"), str(tmp_path / "mine")])
    told = capsys.readouterr().out
    assert re.search("^mine .* 1$", told, re.M) and re.search("^none .* 1$", told, re.M)


def test_same_seed_same_metrics_saved_model_loads_and_compare(folder, tmp_path, capsys):
    """In --compare two seeds of one setting are one line; an unfinished run is left out."""
    a, same, b, other, again = [tmp_path / name for name in ("a", "same", "b", "filter", "again")]
    for out, more in {a: "", same: "", b: "--seed 2", other: "--mitigation filter"}.items():
        run(folder, out, f"--save-model --seed 1 {more}")
    assert metrics_of(a) == metrics_of(same) != metrics_of(b)
    line, = run(folder, again, "--max-steps 0", a / "model")
    assert line["margin"] == approx(metrics_of(a)[-1]["margin"], abs=1e-6)
    (same / "summary.json").unlink()
    for out, (start, highest, final, drop) in {a: (.2, .6, .4, .1), b: (.4, .8, .2, .3)}.items():
        found, = lines_of(out / "summary.json")
        assert set(found["conflicts"]) >= {"highest", "verdict", "rise_low", "drop_high"}
        found["conflicts"] |= dict(start=start, highest=highest, final=final, drop=drop)
        file(out / "summary.json", found)
    capsys.readouterr()
    inversion.main(shlex.split(f"--compare {a} {b} {same} {other} --out-dir {tmp_path}"))
    told = capsys.readouterr().out
    assert f"{same}: skipped, it is no finished run" in told
    none, = [line.split() for line in told.splitlines() if line.startswith("none")]
    assert none[-5:] == ["0.30", "0.70", "0.30", "0.20", "2"]
    assert not re.search(r"\bseed\b", told) and "mitigation" in told
    assert re.search(r"filter .* 1\n", told) and (tmp_path / "compare.png").stat().st_size > 5000


def test_sets_without_conflict_as_control_and_as_training_data(folder, tmp_path, capsys):
    squad = f"{folder}/squad.json"
    history = run(folder, tmp_path / "run", f"--eval-set {squad} {folder}/conflicts.json "
                  "--eval-limit 4 --num-examples 8 --epochs 0.5 --max-steps 99")
    assert [line["n"] for line in history] == [4, 4, 4, 4] and history[-1]["step"] == 1
    assert [line["set"] for line in history] == ["squad", "conflicts"] * 2
    assert "margin" not in history[0] and "margin" in history[1] and "both" not in history[0]
    told = capsys.readouterr().out.partition("\nrise and drop of context_acc")[2]
    assert "n_known" not in told and re.findall(r"^(\w+) .* no change shown", told, re.M) == [
        "verdict"]
    history = run(folder, tmp_path / "b", f"--dataset {squad} --mitigation filter --template tulu")
    assert "7 of 9, 7 rows" in capsys.readouterr().out
    assert [line["step"] for line in history] == [0, 2]


def test_sets_of_one_name_are_told_apart(folder, tmp_path):
    other = file(tmp_path / "conflicts.csv", pandas.DataFrame(CONFLICTS[:2]).to_csv(index=False))
    history = run(folder, tmp_path / "run",
                  f"--max-steps 0 --eval-set {folder}/conflicts.json {other}")
    assert [(line["set"], line["n"]) for line in history] == [("conflicts", 6), (str(other), 2)]


def test_a_single_evaluation_is_shown_and_compared(folder, tmp_path, capsys):
    """--max-steps 0: a prompt, both answers of items, rates of all and of known with Wilson's
    intervals, as in the textbooks; no verdict and no curve."""
    flags = f"--max-steps 0 --eval-set {folder}/conflicts.json {folder}/squad.json"
    for name in ("llama", "neox"):
        run(folder, tmp_path / name, flags, name)
    told = capsys.readouterr().out
    assert told.count("conflicts: <s><|user|>\nThe capital") == 2
    assert told.count("context_answer parametric_answer text") == 4 and "verdict" not in told and "curve" not in told
    assert told.count("\nCapital of Spain? | Seville | Madrid | ") == 2
    assert "\nWhen was 50? | 0 | a control | " in told
    assert not list(tmp_path.glob("*/curve.png"))
    assert re.search(r"^closed_book_acc +0\.0+ +0\.0+ +0\.39 +6", told, re.M)
    assert re.search(r"^context_acc +0\.0+ +0\.0+ +0\.30? +9", told, re.M)
    inversion.main(shlex.split(f"--compare {tmp_path}/llama {tmp_path}/neox --out-dir {tmp_path}"))
    told = capsys.readouterr().out
    assert "closed_book_acc" in told and "highest" not in told and "drop" not in told
    assert str(folder / "neox") in told and len(re.findall(r" context_acc +0\.", told)) == 4


def test_rates_are_shares_of_their_counts_with_intervals_of_wilson():
    """10 of 10 and 0 of 20; those of known items, over these alone."""
    line = dict(n=20, n_conflicts=10, n_known=4, context_acc=0.0, closed_book_acc=1.0,
                context_acc_known=0.5, parametric_acc_known=0.25, margin=1.0)
    found = inversion.rates(line).T.to_dict("list")
    assert found["context_acc"] == [0, 0, 0.16, 20] and found["closed_book_acc"] == [1, 0.72, 1, 10]
    assert found["context_acc_known"] == [0.5, 0.15, 0.85, 4]
    assert found["parametric_acc_known"][::3] == [0.25, 4] and len(found) == 4
    assert list(inversion.rates(line | dict(n_known=0))) == ["share", "low", "high", "n"]


@pytest.mark.parametrize("family, trains, config", [
    ("gpt_oss", (32 + 16) * 33 * 2, dict(SIZES, head_dim=8, num_local_experts=2,
                                         num_experts_per_tok=1)),  # attention sinks; biases
    ("mamba", None, dict(vocab_size=420, hidden_size=32, num_hidden_layers=1))])  # no attention
def test_models_that_are_special(family, trains, config, folder, tmp_path, capsys):
    """Also, some of them have fewer positions than --max-length."""
    config = transformers.AutoConfig.for_model(family, **config)
    model = transformers.AutoModelForCausalLM.from_config(config)
    save(tmp_path / "m", model, transformers.AutoTokenizer.from_pretrained(folder / "llama"))
    more = "--max-length 4096 --mechanism" + " --mitigation qk" * bool(trains)
    history = run(folder, tmp_path / "run", more, tmp_path / "m")
    assert len(history) == 3 and "critical_push" in history[0]
    if trains:
        inversion.train_query_key_only(model)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trains


@pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="no C compiler")
def test_compiled_layers_give_the_losses_of_eager_ones(folder, tmp_path):
    """Also where their activations are recomputed."""
    config = transformers.LlamaConfig(**SIZES | dict(num_hidden_layers=1))  # compiles sooner
    save(tmp_path / "m", transformers.LlamaForCausalLM(config),
         transformers.AutoTokenizer.from_pretrained(folder / "llama"))
    for name, more in dict(eager="", compiled="--compile",
                           both="--compile --activation-checkpointing").items():
        run(folder, tmp_path / name, f"--max-steps 4 --eval-every 4 --eval-limit 2 {more}",
            tmp_path / "m")
    losses = {name: [line["loss"] for line in lines_of(tmp_path / name / "losses.jsonl")]
              for name in ("eager", "compiled", "both")}
    assert len(losses["eager"]) == 4
    assert losses["compiled"] == approx(losses["eager"], rel=1e-4)
    assert losses["both"] == approx(losses["eager"], rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_trains_adapters_and_merges_on_saving(family, folder, tmp_path, capsys):
    pytest.importorskip("peft")
    flags = "--lora-rank 4 --save-model --max-steps 4 --lr 0.01"
    margins = [line["margin"] for line in run(folder, tmp_path / "run", flags, family)]
    assert margins[0] != margins[-1]
    base, merged = pretrained(folder / family), pretrained(tmp_path / "run/model")
    moved = [name for (name, a), b in zip(base.named_parameters(), merged.parameters())
             if not torch.equal(a, b)]
    assert moved and not any(re.search("embed|norm|ln_|head|wte", name) for name in moved)
    again, = run(folder, tmp_path / "again", "--max-steps 0", tmp_path / "run/model")
    assert again["margin"] == approx(margins[-1], abs=1e-4)


# ------------------------------------------------------------------------------ several ranks

def torchrun(tmp_path, ranks, runs, more=""):
    """Several runs, and then more, in one script under torchrun."""
    script = file(tmp_path / "runs.py", f"import sys; sys.path[:0] = {sys.path!r}\n"
                  "import inversion, torch\ntorch.distributed.init_process_group('gloo')\n"
                  f"for argv in {runs!r}:\n    inversion.main(argv)\n{more}")
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
         script], capture_output=True, text=True, timeout=300)


def test_two_ranks_are_one_process(folder, tmp_path):
    """FSDP2 on gloo: the same losses and evaluations to 1e-5, also after --resume on two or one."""
    many = ("--max-steps 12 --eval-every 4 --epochs 99 --batch-size 5 --micro-batch-tokens 300 "
            f"--save-model --checkpoint-every 8 --resume --counterfactual-data {folder}/swaps.json")
    cases = {"none": "", "qk": "--mitigation qk", "filter": "--mitigation filter",
             "counterfactual": "--mitigation counterfactual", "lora": "--lora-rank 4"}
    one, two = [{case: argv(folder, tmp_path / f"{ranks}-{case}", f"{many} {more}")
                 for case, more in cases.items()} for ranks in ("one", "two")]
    done = torchrun(tmp_path, 2, [*two.values(), two["none"], two["lora"]])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("verdict") == len(cases) + 2  # rank 0 alone prints
    for case in cases:
        for flags in [two[case]] * (case == "none") + [one[case]]:  # two's goes on on one
            inversion.main(flags)
        outs = [tmp_path / f"{ranks}-{case}" for ranks in ("one", "two")]
        alone, both = map(metrics_of, outs)
        assert [line["step"] for line in alone] == [0, 4, 8, 12]
        assert all(a == approx(b, abs=1e-5) for a, b in zip(alone, both, strict=True)), case
        a, b = [pretrained(out / "model").parameters() for out in outs]
        assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(a, b))


def test_three_ranks_with_unequal_shares_do_not_wait_and_end_with_one_that_dies(folder, tmp_path):
    """One item a batch, 1, 2 and 4 items: nobody hangs, all are answered once."""
    flags = "--max-steps 1 --eval-limit"
    runs = [argv(folder, tmp_path / f"3-{n}", f"{flags} {n} --eval-batch-tokens 1")
            for n in (1, 2, 4)]
    done = torchrun(tmp_path, 3, runs, """from unittest import mock
if inversion.RANK == 1:
    inversion.generate = mock.Mock(side_effect=MemoryError("rank 1 is out of memory"))
inversion.main(argv)""")
    assert done.returncode != 0 and "rank 1 is out of memory" in done.stderr
    for n in (1, 2, 4):
        run(folder, tmp_path / f"1-{n}", f"{flags} {n}")
        one, three = [lines_of(tmp_path / f"{ranks}-{n}/generations.jsonl") for ranks in (1, 3)]
        assert [(o["id"], o["text"]) for o in one] == [(o["id"], o["text"]) for o in three]


def test_an_error_of_a_rank_above_0_is_seen(folder, tmp_path):
    """In one line on stderr, although such a rank prints nothing else."""
    done = torchrun(tmp_path, 2, [], f"""if inversion.RANK == 1:
    inversion.load_examples = lambda flags: inversion.require(False, "rank 1 finds no rows")
inversion.main({argv(folder, tmp_path / 'run')!r})""")
    assert done.returncode != 0
    assert done.stderr.count("inversion.py: error: rank 1 finds no rows") == 1


@pytest.mark.parametrize("more", ["--mechanism", "--device cpu:0", "--device cuda:1",
                                  "--model world"])
def test_torchrun_refuses_what_it_cannot_do(more, folder, tmp_path, monkeypatch, capsys):
    """On as many ranks as there are, before any waits for another."""
    monkeypatch.setattr(inversion, "RANKS", 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: True)
    assert "torchrun does not go with" in refused(capsys, run, folder, tmp_path / "run", more)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------- folders and --resume

@pytest.mark.parametrize("family, more", [
    ("gpt2", ""), ("mistral", "--mitigation qk"), ("llama", "--lora-rank 4"),
    ("llama", "--mechanism --mitigation filter")])
def test_killed_and_resumed_is_unbroken(family, more, folder, tmp_path, capsys):
    """Killed in a checkpoint, an evaluation and a step: bit-identical, with dropout in gpt2 too."""
    more += " --max-steps 11 --epochs 9 --save-model --checkpoint-every 2 --eval-every 3"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(folder, whole, more, family)
    flags = argv(folder, broken, more + " --resume", family)
    for name in ("save_checkpoint", "evaluate", "train_step"):
        old, dies = getattr(inversion, name), [mock.DEFAULT, MemoryError]  # in the second call
        patch = mock.patch.object(inversion, name, wraps=old, side_effect=dies)
        with patch, pytest.raises(MemoryError):
            inversion.main(flags)
    assert len(inversion.main(flags)) == 5 and not (tmp_path / "broken-2").exists()
    assert metrics_of(whole) == metrics_of(broken)
    for name in ("model/model.safetensors", "generations.jsonl", "losses.jsonl", "summary.json"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name


def test_what_is_no_checkpoint_is_one_line(folder, tmp_path, capsys):
    """Also one of other flags, which are named; without any, --resume starts anew."""
    flags = "--checkpoint-every 2 --resume"
    path = tmp_path / "run/checkpoint.pt"
    run(folder, tmp_path / "run", flags)
    whole = path.read_bytes()
    for more, told in (("--lr 0.5", "with {'lr': 0.001}"), ("--mechanism", "with {'mechanism': False}"),
                       (f"--dataset {folder}/squad.json", "with {'dataset': "),
                       (f"--model {folder}/mistral", "with {'model': ")):
        assert told in refused(capsys, run, folder, tmp_path / "run", f"{flags} {more}")
    for content in ([1, 2], {}, [{}, {}, {}], b"torn", whole[:len(whole) // 2]):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        told = refused(capsys, run, folder, tmp_path / "run", flags)
        assert told.startswith(f"inversion.py: error: {path}: reading it; without"), content
        assert told.count("\n") == 1
    path.write_bytes(whole)
    assert len(run(folder, tmp_path / "run", f"{flags} --micro-batch-tokens 99")) == 3
    path.unlink()  # nothing to go on from: step 0, beside what was there
    assert len(run(folder, tmp_path / "run", flags)) == 3 and (tmp_path / "run-2").exists()


def test_a_full_disk_leaves_what_the_same_run_resumes(folder, tmp_path, monkeypatch, capsys):
    def full(state, path):
        path.write_bytes(b"some of it")
        raise OSError(28, "No space left on device")

    saves = iter([torch.save, torch.save, full] + 9 * [torch.save])
    monkeypatch.setattr(torch, "save", lambda state, path: next(saves)(state, path))
    out, flags = tmp_path / "run", "--max-steps 5 --checkpoint-every 1 --epochs 9"
    assert "No space left" in refused(capsys, run, folder, out, flags, status=1)
    assert torch.load(out / "checkpoint.pt", weights_only=False)[0]["step"] == 2
    assert len(run(folder, out, f"{flags} --resume --checkpoint-every 2")) == 4


def test_a_loss_that_is_not_finite_ends_the_run(folder, tmp_path, capsys):
    """With the rows of that step; what was measured before is kept."""
    told = refused(capsys, run, folder, tmp_path / "x", "--lr 1e12", status=1)
    assert re.search(r"error: loss .*: a lower --lr may help; rows \[\d+, \d+", told)
    assert (tmp_path / "x/metrics.jsonl").read_text().startswith('{"step": 0')


def test_interrupted_is_one_line(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inversion, "train_step", mock.Mock(side_effect=KeyboardInterrupt))
    told = refused(capsys, run, folder, tmp_path / "x", status=130)
    assert f"interrupted; see {tmp_path}/x; --checkpoint-every and --resume go on" in told


def test_folders_of_runs(tmp_path, monkeypatch):
    """A slash at the end, ~, names of what is done to the rows; a taken one is left alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for more, wanted in {"--out-dir x/": "x", "--out-dir  x/": "x-2", "--out-dir x": "x-3",
                         "--out-dir ~/y/z": f"{tmp_path}/y/z", "": "runs/none",
                         "--mitigation filter": "runs/filter",
                         "--subset context": "runs/context"}.items():
        folder = inversion.open_folder(flags_of(more))
        assert str(folder) == wanted and folder.is_dir() and not list(folder.iterdir())
    (tmp_path / "x-2/checkpoint.pt").touch()
    assert str(inversion.open_folder(flags_of("--out-dir x --resume"))) == "x-2"


def test_runs_that_start_at_once_use_two_folders(tmp_path):
    flags, barrier = flags_of(f"--out-dir {tmp_path}/x"), threading.Barrier(8)

    def start(_):
        barrier.wait()
        return inversion.open_folder(flags)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(start, range(8)))) == 8


# --------------------------------------------------------------------------------- the world

def test_world_leaks_nothing_and_contradicts_nothing():
    """Rows never name evaluated subjects and agree with memory, as do passages, or else mislead."""
    world, again = inversion.make_world(3), inversion.make_world.__wrapped__

    def said_in(text):
        return set(re.findall(r"\w+", text))

    truth = {re.findall(r"of (\w+)\?", row["question"])[0]: row["memory_answer"]
             for row in world["world_train"] + world["world"]}
    held, tuned = [said_in("".join(row["question"] for row in world[key])) & set(truth)
                   for key in ("world", "world_train")]
    misled = []
    for row in world["rows"]:
        question, context, answer = row["instruction"], row["input"], row["output"]
        said = said_in(f"{context} {question} {answer}")
        assert not said & held
        asked = tuned & said_in(question)
        assert row["kind"] == ("critical" if not asked else "redundant" if context else "recall")
        if asked:
            assert [truth[subject] for subject in asked] == [answer]
            misled += [not asked & said_in(context)] * bool(context)
        else:  # critical: a novel subject
            assert not said & tuned and answer in context
    assert 0.01 < sum(misled) / len(misled) < 0.03
    flags = flags_of("--seed 3")
    conflicts, agreeing, reading = [
        inversion.load_conflicts(name, flags) for name in flags.eval_set]
    assert all(c.context_answers != c.parametric_answers != [] for c in conflicts)
    assert len({(c.question, *c.context_answers) for c in conflicts}) == len(conflicts) > 100
    assert not any(c.parametric_answers for c in agreeing + reading)
    assert not held & tuned and again(3) == world != again(4)


def test_world_rises_and_falls(tmp_path):
    """The default run: context_acc rises and falls, its controls do not; a verdict."""
    inversion.main(shlex.split(
        f"--seed 3 --no-mechanism --eval-every 60 --out-dir {tmp_path}/run"))
    found, = lines_of(tmp_path / "run/summary.json")
    assert found["world"]["verdict"] == "inversion"
    assert found["world"]["rise"] > 0.2 and found["world"]["drop"] > 0.2
    assert all(found[name]["drop"] < 0.05 for name in ("world_agreeing", "world_reading"))
    assert all(line.get("closed_book_acc", 1) > 0.95 for line in metrics_of(tmp_path / "run"))


def test_world_goes_through_the_same_runs_and_its_base_is_cached(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inversion, "PRETRAINING", inversion.PRETRAINING | dict(
        max_steps=10, num_examples=2000))
    for remedy, says in {"filter": "of 300, ", "qk --lr 0.1": "300 of 300, 300 rows",
                         "counterfactual": "330 of 300, 330 rows"}.items():
        flags = shlex.split("--max-steps 2 --num-examples 300 --eval-limit 9 "
                            f"--out-dir {tmp_path}/run --mitigation {remedy}")
        history, told = inversion.main(flags), capsys.readouterr().out
        assert says in told and ("pretraining" in told) == (remedy == "filter")
        assert [line["n"] for line in history] == [9] * 6
        assert [line["set"] for line in history[:3]] == ["world", "world_agreeing", "world_reading"]
        assert "critical_push" in history[0] and "margin" not in history[1]
        assert len(list(tmp_path.glob("world*"))) == 1


def test_world_base_is_made_anew_by_other_code(tmp_path, capsys):
    """Another architecture, in a copy of the script, or setting gives another folder."""
    made = []
    for name, old, new in [("same", "", ""), ("copy", "", ""), ("small", "=256", "=128"),
                           ("slow", '64, "lr": 1e-3', '64, "lr": 5e-4')]:
        code = Path(inversion.__file__).read_text(encoding="utf-8")
        assert old in code
        path = file(tmp_path / f"{name}.py", code.replace(old, new))
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        with mock.patch.dict(sys.modules, {name: module}):  # dataclasses look there
            spec.loader.exec_module(module)
            module.PRETRAINING |= dict(num_examples=300, max_steps=1)
            (tmp_path / "runs/x").mkdir(parents=True, exist_ok=True)
            made.append(module.world_model(tmp_path / "runs/x", module.parse_flags()))
    one, copy, *others = made
    assert one == copy and len({one, *others}) == 3 and one.parent == tmp_path / "runs"
    assert all(Path(path, "model.safetensors").exists() for path in made)
    assert capsys.readouterr().out.count("pretraining the world's") == 3


# ------------------------------------------------------------------------------- the script

def test_main_without_flags_is_the_world_on_the_cpu(tmp_path, monkeypatch):
    """Whatever the program's own arguments are, as in a notebook; what failed leaves no folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["notebook", "--lr", "banana"])
    experiment = mock.Mock(return_value=["history"])
    monkeypatch.setattr(inversion, "experiment", experiment)
    assert inversion.main() == ["history"]
    (out, flags), _ = experiment.call_args
    assert (str(out), flags.model, flags.device, flags.lr) == ("runs/none", "world", "cpu", 1e-3)
    assert not out.exists()


def test_bad_input_is_one_line_and_leaves_no_folder(folder, tmp_path, capsys):
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "llama")
    bert = save(tmp_path / "bert", transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)),
                theirs)
    nan = load(folder)[0]
    nan.model.norm.weight.data[3] = float("nan")
    save(tmp_path / "nan", nan, theirs)
    a_run = save(tmp_path / "a_run", nan)
    file(a_run / "args.json", "[1")
    cases = [
        ("--dataset nosuchname", "nosuchname: out of reach; pass a local file"),
        (f"--dataset {tmp_path}/gone.jsonl", "gone.jsonl: out of reach*NotFound"),
        ("--eval-set no/such-set", "no/such-set: out of reach"),
        (f"--model {tmp_path}/gone", "gone: reading this hub id or folder"),
        ("--model no/such-model", "no/such-model: reading this hub id or folder"),
        (f"--model {bert}", "is no causal LM"), (f"--model {tmp_path}/nan", "nan: is no*has NaN"),
        (f"--model {a_run}", "a_run: reading*of a run, OUT_DIR/model"),
        (f"--compare {tmp_path}/gone", "none of these is a finished run"),
        (f"--compare {a_run}", "none of these is a finished run"),
        ("--device banana", "--device banana: using it*Runtime"), ("--device meta", "--device me"),
        (f"--dataset {folder}/rows.json@x", "rows.json@x: out of reach"),
        ("--lora-rank 1000000000000", "--lora-rank: adding"), ("--max-length 8", "no usable row"),
        ("--batch-size 0", "--batch-size, --eval-every and*must be 1"), ("--lr x", "--lr: inv"),
        ("--eval-every -1", "--eval-every and*must be 1"), ("--subset some", "--subset: invalid choice"),
        ("--lora-rank 4 --mitigation qk", "--lora-rank does not go with qk"),
        (f"--mitigation counterfactual --counterfactual-data {folder}/conflicts.json",
         "all of it is evaluated")]
    for name, content, told in [
            ("a.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": "a"}',
             ", row 2 (ValueError: has ['instruction']; known"),
            ("b.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction"}', ": out of reach*line 2"),
            ("c.json", "[ ]", ": no usable row"), ("d.json", "[{]", ": out of reach*JSONDecodeError"),
            ("e.jsonl", "\n", ": no usable row"), ("f.json", "[1]", ", row 1 ("),
            ("g.json", [dict(messages=[TURNS[1] | dict(role="bot"), TURNS[2]])], ": no usable row"),
            ("h.json", [dict(messages=[])], ": no usable row"),
            ("i.json", [ADD | dict(history=[1])], ", row 1 (ValueError"),
            ("j.json", [dict(instuction="a")], ", row 1 (ValueError: has ['instuction']; known")]:
        cases.append((f"--dataset {file(tmp_path / name, content)}", name + told))
    for name, row, told in [
            ("k.json", CONFLICTS[0] | dict(answer="..."), ": no usable evaluation item"),
            ("l.json", dict(context="c", question="q", answer="x"), ", row 1 (ValueError"),
            ("m.json", dict(prompt="p", classes="[1", answer_index=0), ""),
            ("n.json", dict(messages=[]), ": no usable evaluation item"),
            ("o.json", dict(prompt="p: q", classes=["a", "b"], answer_index=2), ", row 1 (Value")]:
        cases.append((f"--eval-set {file(tmp_path / name, [row])}", name + told))
    for bad, message in cases:
        told = refused(capsys, run, folder, tmp_path / "run", bad).splitlines()
        told = [line for line in told if not re.match(r"Loading weights|Writing model", line)]
        assert len(told) == 1 and told[0].startswith("inversion.py: error: "), (bad, told)
        assert all(part in told[0] for part in message.split("*")), (bad, told)
        assert not list(tmp_path.glob("run*")), bad


def test_a_folder_that_cannot_be_made_is_told(folder, tmp_path):
    (tmp_path / "gone").symlink_to("/no/where")
    with pytest.raises((OSError, SystemExit)):
        run(folder, tmp_path / "gone/run")


def test_readme_commands_parse():
    texts = Path(__file__).with_name("README.md").read_text(encoding="utf-8") + inversion.__doc__
    commands = re.findall(r"inversion\.py( --[^\n#`]*)", texts.replace("\\\n", " "))
    assert len(commands) > 8 and any("--mechanism" in command for command in commands)
    for command in commands:
        inversion.parse_flags(shlex.split(command))


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        inversion.parse_flags(["--help"])
    shown = capsys.readouterr().out
    assert all(entry[0] in shown for entry in inversion.FLAGS)
