"""Tests: python -m pytest -q (CPU, offline). Tiny random models, a tokenizer trained here and files
in a temporary folder stand in for real ones. The first eight tests are the ones to read."""
import http.server
import json
import random
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import datasets
import filelock
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
    root = tmp_path_factory.mktemp("data")
    tokenizer.chat_template = None
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        save(root / name, transformers.AutoModelForCausalLM.from_config(config), tokenizer)
    for name, rows in dict(rows=ROWS, conflicts=CONFLICTS, swaps=SWAPS, squad=SQUAD).items():
        file(root / f"{name}.json", rows)
    return root
def save(path, *parts):
    for part in parts:  # model, tokenizer
        part.save_pretrained(path)
    return path
def file(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
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
def refused(capsys, call, *args, status=2):
    with pytest.raises(SystemExit) as stopped:
        call(*args)
    assert stopped.value.code == status
    return capsys.readouterr().err
def load(folder, more="", model="llama"):
    flags = inversion.parse_flags(argv(folder, "unused", more, model))
    config = transformers.AutoConfig.from_pretrained(flags.model)
    tokenizer, sets, examples = inversion.load_data(flags.model, config, 512, flags)
    model = inversion.load_model(flags.model, config, tokenizer, flags)
    return model, tokenizer, *sets.values(), examples, flags
def rows_of(lengths, seed=0):
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
@pytest.mark.parametrize("row, template, text, supervised", [
    (ADD, "tulu", SHORT, "3</s>"), (ADD | dict(input=""), "auto", "<s>[user]Add.\n[assistant]3</s>",
                                    "3</s>"),
    (dict(instruction=" Add.", input="{1, 2} ", output="3 "), "tulu",
     "<s><|user|>\n{1, 2}\n\nAdd.\n<|assistant|>\n3</s>", "3</s>"),
    (dict(prompt="Add.", completion="3"), "tulu", SHORT, "3</s>"),
    (dict(messages=TURNS, id="x"), "tulu", "<s><|system|>\nGo.\n" + TULU, "Hello</s>Ciao</s>"),
    (dict(messages=TURNS[1:] + TURNS[1:2]), "tulu", "<s>" + TULU, "Hello</s>Ciao</s>"),
    (dict(messages=TURNS[:3]), "auto", "<s>[system]Go.\n[user]Hi\n[assistant]Hello</s>",
     "Hello</s>"),
    (SQUAD[3], "tulu", "<s><|user|>\nIt was 3.\n\nWhen was 53?\n<|assistant|>\n3</s>", "3</s>")])
def test_golden_labels(row, template, text, supervised, tokenizer):
    """Response and EOS supervised, nothing else; one BOS although the template writes one too."""
    tokenizer.chat_template = CHAT
    inversion.set_template(tokenizer, inversion.parse_flags(["--template", template]))
    messages, context, *_ = inversion.parse_row(row)
    (found,), notes = inversion.encode([inversion.Example(1, messages, context)], tokenizer,
                                       mock.Mock(max_length=999))
    keep = found.labels != -100
    assert not notes and tokenizer.decode(found.input_ids) == text
    assert tokenizer.decode(found.input_ids[keep]) == supervised
    assert torch.equal(found.labels[keep], found.input_ids[keep])
CAIRO, BO, HEART = ("New Cairo", "Cairo"), ("Bo", "Freetown"), "Absence makes the heart grow"
@pytest.mark.parametrize("answers, text, hits, question", [
    (CAIRO, "It is New Cairo.", (1, 0), ""),       # Cairo only inside New Cairo
    (CAIRO, "Cairo, then New Cairo", (1, 1), ""),  # and once on its own
    (CAIRO, "New Cairo New Cairo", (1, 0), ""), (CAIRO, "Cairo", (0, 1), ""),
    (("Hulhumalé", "Malé"), "hulhumale", (1, 0), ""),  # no accents, whole words
    (BO, "Bosnia", (0, 0), ""), (BO, "Not Freetown but BO!", (1, 1), ""),
    (("19", "21"), "in 1921", (0, 0), ""), (("Lyon", "Paris"), "", (0, 0), ""),
    (("2,000 km", "21,000 km"), "about 2000 kilometers.", (1, 0), ""),
    (("The Hague", "Amsterdam"), "Hague", (1, 0), ""),  # no articles
    (("Denver", "Washington, D.C."), "Washington DC", (0, 1), ""),
    (("Fermi", "da Vinci"), "Fermi's work", (1, 0), ""),
    (("heavy", "fonder"), HEART + " fonder.", (0, 1), HEART),
    (("grow", "fonder"), HEART + " old", (0, 0), HEART)])  # an echo of the question
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
    for key in ("step", "loss", "margin"):
        assert [often[0][key], often[4][key]] == [line[key] for line in seldom]
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
    losses, state = {}, {"dropped": []}
    for example in [example for example in examples if example.context]:
        (prompt, _), (reply, _) = inversion.tokenize(example.messages, tokenizer)
        row = inversion.to_row(example.id, [(prompt, False), (reply, True)])
        losses[example.id] = their_loss(model, row).item()
    lowest = sorted(losses, key=losses.get)[:3]  # a quarter of the 12 rows with an input
    kept = inversion.choose_examples(model, tokenizer, examples, {}, state, flags)
    assert len(losses) == 12 and state["dropped"] == lowest
    assert [e.id for e in kept] == [e.id for e in examples if e.id not in lowest]
@pytest.mark.parametrize("family, qk", [("llama", 0), ("neox", 0), ("llama", 1), ("neox", 1)])
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
    same = summary([1, 0] * 20, [1, 0] * 20, [1, 0] * 20)
    assert same["drop"] == same["drop_low"] == same["drop_high"] == same["rise"] == 0
    evaluations = [0] * 40, [1] * 30 + [0] * 10, [1] * 10 + [0] * 30
    fell = summary(*evaluations)
    assert (fell["drop"], fell["rise"], fell["peak_step"]) == (0.5, 0.75, 10)
    assert 0.3 < fell["drop_low"] < 0.5 < fell["drop_high"] < 0.7
    assert same["verdict"] == "no change shown" and fell["verdict"] == "inversion"
    assert summary(*evaluations, control=True)["verdict"] == "both"
    assert summary([1] * 40, [1, 0] * 20)["verdict"] == "a fall"  # from the start: no inversion
    assert summary([0] * 40, [1, 0] * 20)["verdict"] == "a rise"
    for groups, shown in ((5, "no change shown"), (6, "inversion")):  # many items, few groups
        assert summary([0] * 40, [1] * 40, [0] * 40, groups=groups)["verdict"] == shown
    noise = random.Random(0).random  # the highest of 20 equal evaluations drops by luck
    runs = pandas.DataFrame([summary(*[[noise() < 0.5 for _ in range(100)] for _ in range(20)])
                             for _ in range(40)])
    assert (runs["peak"] - runs["final"]).mean() > 0.07 and abs(runs["drop"].mean()) < 0.03
    assert runs["verdict"].isin(["inversion", "a fall"]).sum() <= 3
@pytest.mark.parametrize("template", ["tulu", "auto"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_saved_template_gives_the_ids_of_training(template, adds_bos, tokenizer, tmp_path):
    """A prompt has one BOS where the tokenizer adds one, and is the same whatever the answer."""
    mine = transformers.AutoTokenizer.from_pretrained(save(tmp_path / "a", tokenizer))
    mine.chat_template = CHAT.replace("{{ bos_token }}", "") if template == "auto" else None
    if not adds_bos:
        mine.backend_tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    inversion.set_template(mine, inversion.parse_flags(["--template", template]))
    again = transformers.AutoTokenizer.from_pretrained(save(tmp_path / "b", mine))
    for answer in ("://", "\nParis", " Paris", "Paris"):
        messages = question_and_answer("A context.\n\nA question?", answer)
        (prompt, _), (learned, supervised) = inversion.tokenize(messages, mine)
        theirs = again.apply_chat_template(messages[:1], add_generation_prompt=True,
                                           return_dict=False)
        assert prompt == theirs and supervised and learned[-1] == mine.eos_token_id
    theirs = again.apply_chat_template(messages, return_dict=False)
    assert theirs[:len(prompt + learned)] == prompt + learned
    assert mine.decode(prompt).count("<s>") == int(adds_bos)
def test_templates_that_refuse_rewrite_think_or_date_and_rows_that_do_not_fit(tokenizer):
    def decoded(template, turns):
        tokenizer.chat_template = template
        parts = inversion.render(turns, tokenizer)
        return parts if isinstance(parts, str) else [text for text, _ in parts]
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT
    assert "Go.\n\nHi" in decoded(refuses, TURNS)[0]  # folded into the user's turn
    rewrites = "{{ messages | length }}" + CHAT  # earlier text changes with every turn
    assert decoded(rewrites, TURNS) == [
        "5<s>[system]Go.\n[user]Hi\n[assistant]Hello</s>\n[user]Bye\n[assistant]", "Ciao</s>"]
    thinks = CHAT.replace("[assistant]", "[assistant]<think>\n")
    assert decoded(thinks, TURNS[1:3]) == [
        "<s>[user]Hi\n[assistant]<think>\n\n</think>\n\n", "Hello</s>"]
    empty = CHAT.replace("']'", "(']<think></think>' if m.role == 'assistant' else ']')")
    assert decoded(empty, TURNS[1:3])[0].endswith("[assistant]<think></think>")
    eos = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    assert decoded(eos, TURNS[1:]) == ["Hi</s>", "Hello</s>", "Bye</s>", "Ciao</s>"]
    spaced = "{% for m in messages %}{{ ' ' + m.content }}{% endfor %}"  # no token ends a turn
    assert decoded(spaced, TURNS[1:3]) == [" Hi", " Hello</s>"]
    for never in ("{{ raise_exception('never') }}", "{{ 1 / 0 }}", "hello"):  # shows no answer
        assert "refuses" in decoded(never, TURNS)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHAT  # the same on every day
    inversion.set_template(tokenizer, inversion.parse_flags([]))
    assert "1 January 2025" in decoded(tokenizer.chat_template, TURNS)[0]
    for turns in (TURNS[:2], TURNS[2:], [], question_and_answer("Hi", "")):
        assert "no response" in decoded(CHAT, turns)
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
HEAVY = 'Write a quote that ends in the word "heavy":'
@pytest.mark.parametrize("row, question, context, answers, memory", [
    (CONFLICTS[0], "Capital of France?", CONFLICTS[0]["context"], ["Lyon"], ["Paris"]),
    (SWAPS[1], "who wrote 1", SWAPS[1]["sub_context"], ["Writer 1"], ["Author 1"]),
    (SQUAD[0] | dict(answers=dict(text=["x", "y"])), "When was 50?", "It was 0.", ["x", "y"], []),
    (dict(context="c", question="q", answer="Enrico Fermi", parametric_answer="Ivan the Great"),
     "q", "c", ["Enrico Fermi", "Fermi"], ["Ivan the Great"]),
    (dict(prompt=f"{HEAVY} {HEART}", classes="[' heavy.', ' fonder.']", answer_index="0"),
     HEART, HEAVY, ["heavy."], ["fonder."]),
    (dict(prompt='Say "b": a: c ', classes=["x", "b"], answer_index=1), "a: c", 'Say "b":', ["b"],
     ["x"])])
def test_conflict_shapes(row, question, context, answers, memory):
    messages, *found = inversion.parse_row(row)
    assert found == [context, answers, memory]
    assert messages == question_and_answer(question, answers[0])  # as training data
def test_aliases_and_conflicts_that_cannot_be_scored(tmp_path, capsys):
    """An answer that stands in the question is an echo, on either side; repeats count once."""
    for answer, person, *found in [
            ("La Paz (administrative); Sucre (judicial)", False, "La Paz", "Sucre"),
            ("Rangoon (Yangon); Naypyidaw or Nay Pyi Taw (administrative)", False,
             "Rangoon", "Naypyidaw", "Nay Pyi Taw", "Yangon"), ("2,000 km", False, "2,000 km"),
            ("Athens, Greece", False, "Athens, Greece", "Athens"),
            ("Elizabeth II", True, "Elizabeth II")]:
        assert inversion.aliases([answer], person) == found
    rows = [json.dumps(CONFLICTS[0] | dict(question=question, answer=answer, memory_answer=memory))
            for question, answer, memory in [
        ("Capital of Luxembourg?", "Esch", "Luxembourg"), ("q?", "End", "end."), ("p?", "...", "B"),
        ("r?", "Lyon", "Paris"), ("r?", "Lyon", "Paris"), ("Is Bonn far?", "Bonn", "Berlin")]]
    path = file(tmp_path / "c.jsonl", "\n".join(rows) + "\n\n")
    found = inversion.load_conflicts(str(path), inversion.parse_flags(["--model", "x"]))
    told = capsys.readouterr().out
    assert [c.parametric_answers for c in found] == [[], ["Paris"]]
    assert "2 of 6 items; left out: 3" in told
def test_files_of_every_type_give_the_same_rows(tmp_path):
    rows = [dict(instruction="a", input=" ", output="one"),
            dict(instruction="b\u2028c", input="x", output="two")]
    table = datasets.Dataset.from_list(rows)
    table.to_json(tmp_path / "r.jsonl", force_ascii=False)
    table.to_csv(tmp_path / "r.csv")
    table.to_parquet(tmp_path / "r.parquet")
    table.to_parquet(tmp_path / "hub/train.parquet")  # a folder as downloaded from the hub
    file(tmp_path / "r.json", rows)
    for name in ("r.jsonl", "r.csv", "r.parquet", "r.json", "hub", "hub@train"):
        found = inversion.load_rows(str(tmp_path / name), inversion.parse_flags(["--model", "x"]))
        assert found == [(i, *inversion.parse_row(row)) for i, row in enumerate(rows, 1)], name
    assert found[1][1][0]["content"] == "b\u2028c"
def test_a_file_at_an_address_is_read_once_and_without_aiohttp(tmp_path, monkeypatch, capsys):
    """The paper's sets are addresses; requirements.txt brings no aiohttp, and datasets needs it."""
    monkeypatch.setitem(sys.modules, "aiohttp", None)  # importing it fails
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    asked = []
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))
        def log_request(self, code="-", size="-"):
            asked.append(self.path)
    table = datasets.Dataset.from_list(CONFLICTS)
    table.to_json(tmp_path / "c.jsonl")
    table.to_csv(tmp_path / "c.csv")
    table.to_parquet(tmp_path / "c.parquet")
    file(tmp_path / "c.json", CONFLICTS)
    flags = inversion.parse_flags(["--model", "x"])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for name in ("c.jsonl", "c.csv", "c.parquet", "c.json"):
            rows = [inversion.load_rows(f"{address}/{name}", flags) for _ in range(2)]
            local = inversion.load_rows(str(tmp_path / name), flags)
            assert rows[0] == rows[1] == local and len(local) == 6, name
        monkeypatch.setitem(inversion.SOURCES, "world_facts", f"{address}/c.json")
        assert len(inversion.load_conflicts("world_facts", flags)) == 6
        told = refused(capsys, inversion.load_rows, f"{address}/none.json", flags)
        server.shutdown()
    assert asked == ["/c.jsonl", "/c.csv", "/c.parquet", "/c.json", "/none.json"]
    assert "none.json: cannot be reached; download it elsewhere and pass the file" in told
def test_metrics_and_what_is_known_by_hand(folder, monkeypatch):
    """Four conflicts: C, P, both, neither; the base model knew the first two; one control."""
    outcomes = [dict(id=i, context_acc=bool(c), parametric_acc=bool(p), both=bool(c and p),
                     neither=not c and not p, closed_book_acc=i == 0, margin=float(i), known=i < 2)
                | ({"context_acc_known": bool(c)} if i < 2 else {})
                for i, (c, p) in enumerate([(1, 0), (0, 1), (1, 1), (0, 0)])]
    line = inversion.metrics(outcomes)
    assert (line["n"], line["n_known"], line["margin"]) == (4, 2, 1.5)
    assert line["context_acc"] == line["parametric_acc"] == line["context_acc_known"] == 0.5
    assert line["both"] == line["neither"] == line["closed_book_acc"] == 0.25
    assert inversion.metrics([dict(context_acc=True, text="x")]) == dict(n=1, context_acc=1)
    model, tokenizer, items, _, flags = load(folder)
    monkeypatch.setattr(inversion, "generate", lambda model, tokenizer, prompts, flags: [
        "Paris" if prompts[0] == items[0].closed_book_prompt else "Lyon"] * len(prompts))
    first = inversion.evaluate(model, tokenizer, items, None, flags)
    assert [o["known"] for o in first] == [True] + [False] * 5 and first[0]["context_only"]
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
    (prompt, _), (text, _) = inversion.render(messages, tokenizer, conflict.context)
    assert text == f"{space}Lyon</s>" and prompt.index("It is Lyon.") < prompt.index("Capital?")
    texts = [prompt, f"{space}Lyon", f"{space}Paris"]
    start, *answers = tokenizer(texts, add_special_tokens=False).input_ids
    lyon, paris = [their_loss(model, inversion.to_row(1, [(start, False), (answer, True)])).item()
                   for answer in answers]
    (outcome,) = inversion.evaluate(model, tokenizer, [item], None, flags)
    assert start == item.prompt and outcome["margin"] == approx(paris - lyon, abs=1e-5)
    closed = tokenizer.decode(item.closed_book_prompt)
    assert "It is Lyon." not in closed and "Capital?" in closed
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
    frozen = inversion.load_model(path, model.config, tokenizer, flags._replace(max_steps=0))
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}  # only measured
MOVES = {  # by hand, what qk moves of an attention parameter; heads have size 8
    "query_key_value": lambda p: p.view(4, 3, 8, -1)[:, :2],  # NeoX: per head [q, k, v]
    "qkv_proj": lambda p: p[:48],         # Phi-3: [Q | K | V], 4, 2 and 2 heads
    "c_attn": lambda p: p[..., :64],      # GPT-2: transposed
    "q_proj": lambda p: p, "k_proj": lambda p: p}
@pytest.mark.parametrize("family", CONFIGS)
def test_qk_moves_queries_and_keys_only(family, folder):
    model, _, _, _, flags = load(folder, "--micro-batch-tokens 30", family)  # several a step
    before, moved = {name: p.detach().clone() for name, p in model.named_parameters()}, 0
    inversion.train_query_key_only(model)
    trained(model, rows_of([(4, 9)] * 32), 4, flags)
    for name, p in model.named_parameters():
        still = torch.ones_like(p, dtype=torch.bool)
        for part in [MOVES[key] for key in MOVES if key in name]:
            part(still)[:] = False
        assert torch.equal(p[still], before[name][still]), name
        if p.ndim > 1 and not still.all():
            assert (p != before[name])[~still].float().mean() > 0.99, name
            moved += 1
    assert moved == {"llama": 4, "mistral": 4}.get(family, 2)
def test_qk_refuses_what_it_cannot_tell_apart(folder, capsys):
    """Rounding noise in place of some zeros is noticed, and a model without attention refused."""
    noisy = load(folder, model="neox")[0]
    layer = noisy.gpt_neox.layers[0].attention.query_key_value.weight
    noise = 1e-9 * (torch.arange(layer.numel()) < 5).view_as(layer)
    layer.register_hook(lambda grad: grad + noise)
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(num_hidden_layers=1))
    for model in (noisy, mamba):
        assert "layout unknown here" in refused(capsys, inversion.train_query_key_only, model)
def test_kinds_subsets_and_added_rows(folder, tmp_path, capsys):
    """Recall has no context, redundant is the quarter of the others of lowest context-free loss."""
    leaks = {"question": "Is Peru one?"}, {"sub_answer": "lyon"}, {"question": "The Paris one?"}
    swaps = file(tmp_path / "swaps.json", [SWAPS[0] | leak for leak in leaks] + SWAPS[1:4])
    model, tokenizer, items, examples, flags = load(folder, f"--counterfactual-data {swaps}")
    added = inversion.counterfactual_examples({"x": items}, 99, flags)
    assert sorted(e.messages[1]["content"] for e in added) == ["Writer 1", "Writer 2", "Writer 3"]
    prompt = inversion.render(added[0].messages, tokenizer, added[0].context)[0][0]
    assert prompt.index("is by") < prompt.index("who wrote")  # context before question
    probe = inversion.probe_rows(model, tokenizer, examples, flags)
    redundant = inversion.redundant_examples(model, tokenizer, examples, 0.25, flags)
    assert {kind: len(probe[kind]) for kind in probe} == dict(critical=9, recall=12, redundant=3)
    assert {row.id for row in probe["redundant"]} == set(redundant)
    question = "What is the capital of New Velora now?"
    conflict = inversion.Conflict(1, question, "Lyon it is.", ["Lyon"], ["Paris"])
    sets = {"s": [inversion.to_item(conflict, tokenizer)]}
    texts = ["I like lyon!", "Lyons", "New Velora", "Velora", "comparison", "PARIS.", "What city"]
    mine = [inversion.Example(i, question_and_answer(text, "x"), "c" * (i % 2))
            for i, text in enumerate(texts)]
    for data, dropped, choice, wanted in [(mine, [], dict(subset="context"), [1, 3, 5]),
            (mine, [], dict(subset="no-overlap"), [1, 3, 4, 6]),
            (examples, [1, 3], dict(mitigation="filter"), [2, *range(4, 25)])]:  # after --resume
        kept = inversion.choose_examples(
            model, tokenizer, data, sets, {"dropped": dropped}, flags._replace(**choice))
        assert [example.id for example in kept] == wanted
    chats = f"--dataset {file(tmp_path / 'chats.json', [dict(messages=TURNS)] * 9)}"
    model, tokenizer, _, examples, flags = load(folder, chats)
    assert {e.context for e in examples} == {""}
    assert list(inversion.probe_rows(model, tokenizer, examples, flags)) == ["recall"]
    for more, told in (
            ("--subset context", "no usable row, chats mark no context"),
            ("--mitigation filter", "nothing to drop; few rows, or none, mark a context")):
        assert told in refused(capsys, run, folder, tmp_path, f"{chats} {more}")
@pytest.mark.parametrize("family", CONFIGS)
def test_batched_generation_and_attention_are_those_of_one_prompt(family, folder):
    """Figure 3b in one eager pass = a cached prompt and its last token; of the context's tokens."""
    model, tokenizer, items, _, flags = load(folder, "--max-new-tokens 12", family)
    prompts = [r.input_ids.tolist() for r in rows_of([(n, 0) for n in (3, 17, 5, 9, 30, 4, 11)])]
    together = inversion.generate(model, tokenizer, prompts, flags)
    alone = inversion.generate(model, tokenizer, prompts, flags._replace(eval_batch_tokens=1))
    ids = model.generate(torch.tensor(prompts[1:2]), max_new_tokens=12)[0, 17:]
    assert together == alone and together[1] == tokenizer.decode(ids, skip_special_tokens=True)
    for item in items:
        share = inversion.attention(model, item, flags)
        context = tokenizer(item.conflict.context, add_special_tokens=False).input_ids
        start = [item.prompt[i + 1:i + 4] for i in range(len(item.prompt))].index(context[1:4])
        added = len(item.prompt) - len(item.closed_book_prompt)  # two line ends, too
        span, ids = slice(start, start + added), torch.tensor([item.prompt])
        assert tokenizer.decode(ids[0, span]).strip() == item.conflict.context
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        model.set_attn_implementation("eager")
        layers = model(ids[:, -1:], past_key_values=cache, output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
        wanted = torch.stack(layers)[:, 0, :, 0, span].sum(-1).mean().item()
        assert 0 < share < 1 and share == approx(wanted, abs=1e-5)
def test_interval_of_a_drop_covers_it():
    """95% intervals hold it in 90% of 200 draws; items of a group that agree count once."""
    chance, held, few = random.Random(1).random, 0, [[0] * 8, [1] * 8, [1, 0] * 4]
    for _ in range(200):
        found = summary(*[[chance() < p for _ in range(60)] for p in (0.2, 0.8, 0.5)])
        held += found["drop_low"] <= 0.3 <= found["drop_high"]
    five = summary(*[hits * 5 for hits in few], groups=8)
    assert held >= 180 and five["drop_low"] == approx(summary(*few)["drop_low"])
@pytest.mark.parametrize("remedy, says", [
    ("none", "24 rows"), ("counterfactual", "2 wanted; 8 of 8 name nothing"),
    ("filter", "filter: dropped 3 rows with"), ("qk", "qk: trains 3072")])
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
    assert "without its context the model knows 0%" in told
    assert says in told and "verdict" in told and max(map(len, told.splitlines()[3:])) <= 200
    assert metrics == history and [line["step"] for line in history] == [0, 2, 3]
    assert set(history[-1]) >= set(
        "step set n n_known context_acc parametric_acc context_only parametric_only both neither "
        "closed_book_acc margin m_c loss lr critical_push recall_push redundant_loss "
        "attention".split())
    assert all("critical_push" in line and line["attention"] > 0 for line in history)
    for key in ("loss", "critical_push", "attention"):
        on, off = [[line[key] or 0 for line in lines] for lines in (same, history)]
        assert on == approx(off, rel=1e-4)  # no loss at step 0: None
    assert len(said) == 18 and set(said[1]) >= {"step", "set", "id", "text", "closed_book_text"}
    assert args[0]["mitigation"] == remedy and (tmp_path / "run/curve.png").stat().st_size > 5000
def test_same_seed_same_metrics_saved_model_loads_and_compare(folder, tmp_path, capsys):
    """A taken folder is left alone; in --compare two seeds of one setting are one line."""
    a, same, b, other, again = [tmp_path / name for name in ("a", "same", "b", "filter", "again")]
    for out, more in {a: "", same: "", b: "--seed 2", other: "--mitigation filter"}.items():
        run(folder, out, f"--save-model --seed 1 {more}")
    assert metrics_of(a) == metrics_of(same) != metrics_of(b)
    for _ in range(2):
        line, = run(folder, again, "--max-steps 0", a / "model")
        assert line["margin"] == approx(metrics_of(a)[-1]["margin"], abs=1e-6)
    assert sorted(path.name for path in tmp_path.glob("again*")) == ["again", "again-2"]
    capsys.readouterr()
    inversion.main(shlex.split(f"--compare {a} {b} {other} --out-dir {tmp_path}"))
    told = capsys.readouterr().out
    (one,), (two,) = lines_of(a / "summary.json"), lines_of(b / "summary.json")
    start = [found[f"{folder}/conflicts.json"]["start"] for found in (one, two)]
    none, = [line.split() for line in told.splitlines() if line.startswith("none")]
    assert none[-1] == "2" and float(none[-6]) == approx(sum(start) / 2, abs=0.01)
    assert "seed" not in told.partition("curves")[0] and "mitigation" in told
    assert re.search(r"filter .* 1\n", told) and (tmp_path / "compare.png").stat().st_size > 5000
def test_sets_without_conflict_as_control_and_as_training_data(folder, tmp_path, capsys):
    squad = f"{folder}/squad.json"
    history = run(folder, tmp_path / "run", f"--eval-set {squad} {folder}/conflicts.json "
                  "--eval-limit 4 --num-examples 8 --epochs 0.5 --max-steps 99")
    assert [line["n"] for line in history] == [4, 4, 4, 4] and history[-1]["step"] == 1
    assert "margin" not in history[0] and "margin" in history[1] and "both" not in history[0]
    told = capsys.readouterr().out.partition("\ncontext_acc;")[2]
    assert "margin" not in told and told.count("\n") == 8  # verdicts alone; first a control
    (tmp_path / "gone").symlink_to("/no/where")
    with pytest.raises(FileExistsError):  # told in one line by the script
        run(folder, tmp_path / "gone/run")
    history = run(folder, tmp_path, f"--dataset {squad} --mitigation filter --template tulu")
    assert "filter: dropped 2 rows with" in capsys.readouterr().out
    assert [line["step"] for line in history] == [0, 2]
VISION = dict(model_type="pixtral", hidden_size=16, intermediate_size=16, num_hidden_layers=1,
              num_attention_heads=2, head_dim=8, image_size=28, patch_size=14)
@pytest.mark.parametrize("family, trains, config", [
    ("mistral3", (32 + 16) * 32 * 2, dict(vision_config=VISION, text_config=dict(
        SIZES, head_dim=8, model_type="mistral"))),  # answers text; its vision tower stays
    ("gpt_oss", (32 + 16) * 33 * 2, dict(SIZES, head_dim=8, num_local_experts=2,
                                         num_experts_per_tok=1)),  # attention sinks; biases
    ("mamba", None, dict(vocab_size=420, hidden_size=32, num_hidden_layers=1)),  # no attention
    ("rwkv", None, dict(vocab_size=420, hidden_size=32, attention_hidden_size=32,
                        num_hidden_layers=2, context_length=512))])  # sees padding
def test_models_that_are_special(family, trains, config, folder, tmp_path, capsys):
    """Also, all of them have fewer positions than --max-length."""
    config = transformers.AutoConfig.for_model(family, **config)
    auto = [transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText]
    model = auto[family == "mistral3"].from_config(config)
    for p in model.parameters():  # so that answers differ
        p.data *= 1 + 4 * (p.ndim > 1)
    save(tmp_path / "m", model, transformers.AutoTokenizer.from_pretrained(folder / "llama"))
    more = "--max-length 4096 --mechanism" + " --mitigation qk" * bool(trains)
    history, told = run(folder, tmp_path / "run", more, tmp_path / "m"), capsys.readouterr().out
    assert ("it answers one by one" in told) == (family == "rwkv")
    assert (history[0]["attention"] is None) == (not trains)
    assert not trains or f"qk: trains {trains} weights" in told
@pytest.mark.parametrize("family", CONFIGS)
def test_rounding_in_bf16_is_not_taken_for_padding(family, folder):
    model, _, _, _, flags = load(folder, model=family)
    assert inversion.check_padding(model.bfloat16(), flags) is flags
    def hides(module, args, kwargs):
        return args, kwargs | dict(attention_mask=None)
    model.register_forward_pre_hook(hides, with_kwargs=True)  # now it sees the padding
    assert inversion.check_padding(model, flags).eval_batch_tokens == 1
def test_a_single_evaluation_in_sentences(folder, tmp_path, capsys):
    assert inversion.rate(0, 20) == "0 of 20 = 0.00 [0.00, 0.16]"  # Wilson, as in the textbooks
    assert inversion.rate(10, 10) == "10 of 10 = 1.00 [0.72, 1.00]"
    flags = f"--max-steps 0 --eval-set {folder}/conflicts.json {folder}/squad.json"
    for name in ("llama", "neox"):
        run(folder, tmp_path / name, flags, name)
    told = capsys.readouterr().out
    assert told.count("the prompt of one item as the model gets it:\n<s><|user|>\nThe capital") == 2
    assert told.count("eight answers") == 4 and "verdict" not in told and "curve" not in told
    assert "0 of 6 = 0.00 [0.00, 0.39]         knows it" in told
    assert "0 of 9 = 0.00 [0.00, 0.30]         gives the context's answer" in told
    inversion.main(shlex.split(f"--compare {tmp_path}/llama {tmp_path}/neox --out-dir {tmp_path}"))
    told = capsys.readouterr().out
    assert "closed_book_acc" in told and "margin" in told and "peak" not in told
    assert str(folder / "neox") in told
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
    told = [done.stdout.count(text) for text in ("verdict", "going on after step 8")]
    assert told == [len(cases) + 2, 2]  # rank 0 alone prints
    for case in cases:
        for flags in [two[case]] * (case in ("none", "qk")) + [one[case]]:  # two's goes on on one
            inversion.main(flags)
        outs = [tmp_path / f"{ranks}-{case}" for ranks in ("one", "two")]
        alone, both = map(metrics_of, outs)
        assert [line["step"] for line in alone] == [0, 4, 8, 12]
        assert all(a == approx(b, abs=1e-5) for a, b in zip(alone, both, strict=True)), case
        a, b = [pretrained(out / "model").parameters() for out in outs]
        assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(a, b))
def test_three_ranks_with_unequal_shares_do_not_wait_and_end_with_one_that_dies(folder, tmp_path):
    """One item a batch, 1, 2 and 4 items: nobody hangs, all are answered once. No world."""
    flags = "--max-steps 1 --eval-limit"
    runs = [argv(folder, tmp_path / f"3-{n}", f"{flags} {n} --eval-batch-tokens 1")
            for n in (1, 2, 4)]
    done = torchrun(tmp_path, 3, runs, """from unittest import mock
if inversion.rank() == 1:
    inversion.generate = mock.Mock(side_effect=MemoryError("rank 1 is out of memory"))
inversion.main(argv)""")
    assert done.returncode != 0 and "rank 1 is out of memory" in done.stderr
    for n in (1, 2, 4):
        run(folder, tmp_path / f"1-{n}", f"{flags} {n}")
        one, three = [lines_of(tmp_path / f"{ranks}-{n}/generations.jsonl") for ranks in (1, 3)]
        assert [(o["id"], o["text"]) for o in one] == [(o["id"], o["text"]) for o in three]
    done = torchrun(tmp_path, 2, [[]])
    assert done.returncode != 0 and done.stderr.count("without torchrun") == 1
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_trains_adapters_and_merges_on_saving(family, folder, tmp_path, capsys):
    pytest.importorskip("peft")
    flags = "--lora-rank 4 --save-model --max-steps 4 --lr 0.01"
    margins = [line["margin"] for line in run(folder, tmp_path / "run", flags, family)]
    assert "trainable params" in capsys.readouterr().out and margins[0] != margins[-1]
    base, merged = pretrained(folder / family), pretrained(tmp_path / "run/model")
    moved = [name for (name, a), b in zip(base.named_parameters(), merged.parameters())
             if not torch.equal(a, b)]
    assert moved and not any(re.search("embed|norm|ln_|head|wte", name) for name in moved)
    again, = run(folder, tmp_path / "again", "--max-steps 0", tmp_path / "run/model")
    assert again["margin"] == approx(margins[-1], abs=1e-4)
@pytest.mark.parametrize("family, more", [
    ("gpt2", ""), ("neox", "--mitigation qk"), ("llama", "--lora-rank 4"),
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
    assert "going on after step" in capsys.readouterr().out
    assert metrics_of(whole) == metrics_of(broken)
    for name in ("model/model.safetensors", "generations.jsonl", "summary.json"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
def test_nonfinite_loss_and_full_disk_leave_what_the_same_run_alone_resumes(
        folder, tmp_path, monkeypatch, capsys):
    out, rows = tmp_path / "run", file(tmp_path / "rows.json", ROWS)
    told = refused(capsys, run, folder, tmp_path / "x", "--lr 1e12", status=1)
    assert re.search(r"loss .* in the batch of rows \[\d+, \d+", told)
    assert (tmp_path / "x/metrics.jsonl").read_text().startswith('{"step": 0')
    def full(state, path):
        path.write_bytes(b"some of it")
        raise OSError(28, "No space left on device")
    saves = iter([torch.save, torch.save, full] + 9 * [torch.save])
    monkeypatch.setattr(torch, "save", lambda state, path: next(saves)(state, path))
    flags = f"--max-steps 5 --dataset {rows} --checkpoint-every 1"
    assert "No space left" in refused(capsys, run, folder, out, flags, status=1)
    assert torch.load(out / "checkpoint.pt")[0]["step"] == 2
    flags += " --resume --checkpoint-every 2"
    def told(more=""):
        return refused(capsys, run, folder, out, f"{flags} {more}")
    for more in ("--lr 0.5", "--mechanism", f"--dataset {folder}/squad.json",
                 f"--model {folder}/mistral"):
        assert "other flags (see its args.json), another model, or other rows" in told(more)
    file(rows, ROWS[::-1])
    assert "or other rows" in told()
    file(rows, ROWS)
    whole = (out / "checkpoint.pt").read_bytes()
    half = len(whole) // 2
    (out / "checkpoint.pt").write_bytes(whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1:])
    assert "flipped bits" in told()
    (out / "checkpoint.pt").write_bytes(whole)
    with filelock.FileLock(out / ".lock"):  # as another run would hold it
        assert "another run is writing there" in told()
    assert len(run(folder, out, flags + " --micro-batch-tokens 99 --eval-batch-tokens 99")) == 4
    (out / "checkpoint.pt").write_bytes(b"torn")
    assert "is damaged" in told()
    (out / "checkpoint.pt").unlink()  # nothing to go on from: step 0, beside what was there
    assert len(run(folder, out, flags)) == 4 and (tmp_path / "run-2").exists()
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
        if asked:
            assert [truth[subject] for subject in asked] == [answer]
            misled += [not asked & said_in(context)] * bool(context)
        else:  # critical: a novel subject
            assert not said & tuned and answer in context
    assert 0.01 < sum(misled) / len(misled) < 0.03
    flags = inversion.parse_flags(["--seed", "3"])
    conflicts, agreeing, reading = [
        inversion.load_conflicts(name, flags) for name in flags.eval_set]
    assert all(c.context_answers != c.parametric_answers != [] for c in conflicts)
    assert len({(c.question, *c.context_answers) for c in conflicts}) == len(conflicts) > 100
    assert not any(c.parametric_answers for c in agreeing + reading)
    assert not held & tuned and again(3) == world != again(4)
def test_world_rises_and_falls(tmp_path):
    """The default run: context_acc rises and falls, its controls do not; a verdict."""
    inversion.main(shlex.split(
        f"--device cpu --seed 3 --no-mechanism --eval-every 30 --out-dir {tmp_path}/run"))
    found, = lines_of(tmp_path / "run/summary.json")
    assert found["world"]["verdict"] == "inversion"
    assert found["world"]["rise"] > 0.2 and found["world"]["drop"] > 0.2
    assert all(found[name]["drop"] < 0.05 for name in ("world_agreeing", "world_reading"))
    assert all(line.get("closed_book_acc", 1) > 0.95 for line in metrics_of(tmp_path / "run"))
def test_world_goes_through_the_same_runs_and_its_base_is_cached(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(inversion.PRETRAINING, "max_steps", 10)
    for remedy, says in {"filter": "filter: dropped", "qk --lr 0.1": "qk: trains",
                         "counterfactual": "counterfactual: 30 wanted"}.items():
        flags = shlex.split("--device cpu --max-steps 2 --num-examples 300 --eval-limit 9 "
                            f"--out-dir {tmp_path}/run --mitigation {remedy}")
        history, told = inversion.main(flags), capsys.readouterr().out
        assert says in told and ("pretraining" in told) == (remedy == "filter")
        assert [line["n"] for line in history] == [9] * 6
        assert [line["set"] for line in history[:3]] == ["world", "world_agreeing", "world_reading"]
        assert "critical_push" in history[0] and "margin" not in history[1]
        assert len(list(tmp_path.glob("world*[!k]"))) == 1  # and its .lock
    monkeypatch.setitem(inversion.PRETRAINING, "lr", 0.1)  # another base
    inversion.world_model(inversion.parse_flags(flags))
    assert "pretraining" in capsys.readouterr().out
    assert len(list(tmp_path.glob("world*[!k]"))) == 2
def test_bad_input_is_one_line_and_writes_nothing(folder, tmp_path, capsys, monkeypatch):
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    save(tmp_path / "bert", bert, transformers.AutoTokenizer.from_pretrained(folder / "llama"))
    nan = load(folder)[0]
    nan.model.norm.weight.data[3] = float("nan")
    save(tmp_path / "nan", nan, transformers.AutoTokenizer.from_pretrained(folder / "llama"))
    junk = save(tmp_path / "junk", nan)
    file(junk / "args.json", "[1")
    cases = [("--dataset nosuchname", "nosuchname: pass a file*(Conn"), ("--lr nan", "--lr nan"),
        (f"--dataset {tmp_path}/gone.jsonl", "gone.jsonl: pass*(FileNotFoundError"),
        ("--eval-set no/such-set", "no/such-set: pass*(ConnectionError(\"Couldn't reach"),
        (f"--model {tmp_path}/gone", "gone: cannot be loaded"),
        (f"--model {tmp_path}/bert", "is no causal LM"),
        ("--model no/such-model", "pass a hub id or a local folder"),
        (f"--compare {tmp_path}/gone", "gone: is no*No such"),
        (f"--compare {junk}", "junk: is no finished run (JSONDec"),
        ("--device banana", "--device banana: cannot*(Runtime"), ("--device meta", "(Runtime"),
        (f"--model {tmp_path}/nan", "nan: NaN among its"),
        (f"--eval-set {file(tmp_path / 'none.json', [dict(messages=[])])}", "no usable eval"),
        (f"--dataset {folder}/rows.json@x", "rows.json@x: pass*Unknown split"),
        ("--lora-rank 1000000000000", "--lora-rank: try"),

        ("--max-length 8", "rows.json: no usable row"),
        ("--batch-size 0", "--batch-size 0: must be between 1"),
        ("--lora-rank 4 --mitigation qk", "--lora-rank does not go with qk"),
        (f"--mitigation counterfactual --counterfactual-data {folder}/conflicts.json", "evaluated")]
    bots = file(tmp_path / "bots.json", [dict(messages=[TURNS[1] | dict(role="bot"), TURNS[2]])])
    cases.append((f"--template tulu --dataset {bots}", "unknown role bot"))
    for name, content, told in [
        ("a.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": "a"}',
         ", row 2 (ValueError(\"key 'output' must be a text"),
        ("b.json", [ADD | dict(output=3)], ", row 1 (ValueError(\"key 'ou"),
        ("c.json", "[ ]", ": pass*(ValueError('Instruction \"train\" corresponds to no data"),
        ("d.json", "[{]", "*(ValueError('Expected"), ("e.jsonl", "\n", "*(ValueError('Instr"),
        ("f.json", [dict(messages=[dict(role="user", text="x")])],
         ", row 1 (ValueError(\"key 'content'"), ("h.json", [dict(messages=[])], ": no usable row"),
        ("i.json", [dict(instuction="a")], ", row 1 (ValueError('it has none")]:
        cases.append((f"--dataset {file(tmp_path / name, content)}", name + told))
    for name, row, told in [
        ("k.json", CONFLICTS[0] | dict(answer="..."), ": no usable evaluation item"),
        ("l.json", dict(context="c", question="q", answer="x"), ", row 1 (ValueError('it has none"),
        ("m.json", dict(prompt="p", classes="[1", answer_index=0), ", row 1 (SyntaxError")]:
        cases.append((f"--eval-set {file(tmp_path / name, [row])}", name + told))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for bad, message in cases:
        told = refused(capsys, run, folder, tmp_path / "run", bad).splitlines()
        told = [line for line in told if line.startswith("inversion.py: error: ")]
        assert len(told) == 1, (bad, told)
        assert all(part in told[0] for part in message.split("*")), (bad, told)
        assert not list(tmp_path.glob("run*/metrics.jsonl"))
def test_readme_commands_parse_and_help_names_every_flag(capsys):
    texts = Path(__file__).with_name("README.md").read_text() + inversion.__doc__
    commands = re.findall(r"inversion\.py( --[^\n#`]*)", texts.replace("\\\n", " "))
    assert len(commands) > 8 and any("--mechanism" in command for command in commands)
    for command in commands:
        inversion.parse_flags(shlex.split(command))
    with pytest.raises(SystemExit):
        inversion.parse_flags(["--help"])
    shown = capsys.readouterr().out
    assert all(entry[0] in shown for entry in inversion.FLAGS)
    for more, share in (("filter", 0.25), ("counterfactual", 0.1),
                        ("filter --mitigation-strength 0", 0)):
        assert inversion.parse_flags(f"--mitigation {more}".split()).mitigation_strength == share
    for bad in (5, 25, -1):
        refused(capsys, inversion.parse_flags, ["--mitigation=qk", f"--mitigation-strength={bad}"])
