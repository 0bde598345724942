"""Tests of inversion.py: python -m pytest -q (CPU, offline). Tiny models with random weights, a
tokenizer trained here and files in a temporary folder stand in for real ones; all go in as flags.
The first eight tests are the ones to read."""
import json
import math
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas
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
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=420, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=0,
        eos_token_id=1),
    "phi3": lambda: transformers.Phi3Config(num_key_value_heads=2, pad_token_id=1, **SIZES)}
CHAT = ("{{ bos_token }}{% for m in messages %}{{ '[' + m.role + ']' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}")
ALPACA_ROWS = [dict(instruction=f"Say the number {i}.", input=f"The number is {i * 7}." * (i % 2),
                    output=f"It is {i}.") for i in range(24)]
CONFLICTS = [dict(context=f"The capital of {c} moved to {new}.", question=f"Capital of {c}?",
                  answer=new, memory_answer=old) for c, new, old in
             [("France", "Lyon", "Paris"), ("Egypt", "New Cairo", "Cairo"), ("Peru", "Cusco", "Lima"),
              ("Spain", "Seville", "Madrid"), ("Japan", "Osaka", "Tokyo"), ("Italy", "Bari", "Rome")]]
SWAPS = [dict(question=f"who wrote book {i}", org_context="x", org_answer=[f"Author {i}"],
              sub_context=f"Book {i} was written by Writer {i}.", sub_answer=[f"Writer {i}"])
         for i in range(8)]
SQUAD = [dict(context=f"It was {i}.", question=f"When was {i + 50}?",
              answers=dict(text=[str(i)], answer_start=[0])) for i in range(9)]
TURNS = [dict(role=role, content=content) for role, content in [
    ("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"),
    ("assistant", "Ciao")]]


@pytest.fixture(scope="session")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = [" ".join(map(str, row.values())) for row in ALPACA_ROWS + CONFLICTS]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.post_processor = processors.TemplateProcessing(  # BOS first, as Llama's
        single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer):
    """A folder with a tiny model of each family and small data files."""
    root = tmp_path_factory.mktemp("data")
    transformers.utils.logging.disable_progress_bar()
    tokenizer.chat_template = None
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config()).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for name, rows in (("rows", ALPACA_ROWS), ("conflicts", CONFLICTS), ("swaps", SWAPS),
                       ("squad", SQUAD), ("chats", [dict(messages=TURNS)] * 9)):
        (root / f"{name}.json").write_text(json.dumps(rows))
    return root


def argv(folder, out, *more, model="llama"):
    defaults = {"--model": folder / model, "--dataset": folder / "rows.json",
                "--eval-set": folder / "conflicts.json", "--max-length": 256, "--batch-size": 8,
                "--max-steps": 3, "--eval-every": 2, "--lr": 1e-3, "--max-new-tokens": 4,
                "--device": "cpu", "--out-dir": out}
    more = list(map(str, more))
    kept = {flag: value for flag, value in defaults.items() if flag not in more}
    return [str(x) for pair in kept.items() for x in pair] + more


def load(folder, model="llama", *more):
    """(model, tokenizer, items, examples, flags) as the script itself loads them."""
    flags = inversion.parse_flags(argv(folder, "unused", *more, model=model))
    tokenizer, sets, examples = inversion.load_data(flags.model, flags)
    items = list(sets.values())[0]
    return inversion.load_model(flags.model, tokenizer, flags), tokenizer, items, examples, flags


def rows_of(lengths, seed=0):
    """Rows of random ids: (prompt tokens, supervised tokens) each."""
    rng = random.Random(seed)
    return [inversion.to_row(i, [([rng.randrange(2, 420) for _ in range(prompt)], False),
                                 ([rng.randrange(2, 420) for _ in range(target)], True)])
            for i, (prompt, target) in enumerate(lengths)]


def their_loss(model, row, targets=None):
    """transformers' own loss of a row: mean over its targets, or their sum / `targets`."""
    more = {} if targets is None else dict(num_items_in_batch=targets)
    return model(input_ids=row.input_ids[None].long(), labels=row.labels[None].long(), **more).loss


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def timeless(folder):
    return [{key: value for key, value in line.items() if key not in ("seconds", "tokens_per_second")}
            for line in lines_of(folder / "metrics.jsonl")]


# ------------------------------------------------------------------- the eight that teach most
ALPACA_SHORT = ("<s>Below is an instruction that describes a task. Write a response that "
                "appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Response:")
ALPACA_LONG = ("<s>Below is an instruction that describes a task, paired with an input that provides "
               "further context. Write a response that appropriately completes the request.\n\n"
               "### Instruction:\nAdd.\n\n### Input:\n{1, 2}\n\n### Response:")


@pytest.mark.parametrize("row, template, text, supervised", [
    (dict(instruction="Add.", input="", output="3"), "alpaca", ALPACA_SHORT + "3</s>", "3</s>"),
    (dict(instruction="Add.", output="3"), "alpaca", ALPACA_SHORT + "3</s>", "3</s>"),
    (dict(instruction=" Add.", input="{1, 2} ", output="3 "), "alpaca", ALPACA_LONG + "3</s>", "3</s>"),
    (dict(instruction="Add.", input="1, 2", output="3"), "tulu",
     "<s><|user|>\n1, 2\n\nAdd.\n<|assistant|>\n3</s>", "3</s>"),
    (dict(prompt="Add.", completion="3"), "alpaca", ALPACA_SHORT + "3</s>", "3</s>"),
    (dict(messages=TURNS, id="x"), "tulu", "<s><|system|>\nBe kind.\n<|user|>\nHi\n<|assistant|>\nHello"
     "</s>\n<|user|>\nBye\n<|assistant|>\nCiao</s>", "Hello</s>Ciao</s>"),
    (dict(messages=TURNS[1:] + [dict(role="user", content="?")]), "tulu", "<s><|user|>\nHi\n<|assistant|>"
     "\nHello</s>\n<|user|>\nBye\n<|assistant|>\nCiao</s>", "Hello</s>Ciao</s>"),
    (dict(messages=TURNS[:3]), "chat", "<s>[system]Be kind.\n[user]Hi\n[assistant]Hello</s>", "Hello</s>"),
    (dict(SQUAD[3]), "tulu", "<s><|user|>\nIt was 3.\n\nWhen was 53?\n<|assistant|>\n3</s>", "3</s>")])
def test_golden_labels(row, template, text, supervised, tokenizer):
    """Response and EOS supervised, nothing else; one BOS although the template writes one too."""
    tokenizer.chat_template = CHAT
    inversion.set_template(tokenizer, False, inversion.parse_flags(["--template", template]))
    messages, context, *_ = inversion.parse_row(row)
    (found,), notes = inversion.encode([inversion.Example(1, messages, context)], tokenizer, 999)
    keep = found.labels != -100
    assert not notes and torch.equal(found.labels[keep], found.input_ids[keep])
    assert tokenizer.decode(found.input_ids) == text
    assert tokenizer.decode(found.input_ids[keep]) == supervised


@pytest.mark.parametrize("context, memory, question, text, hits", [
    ("New Cairo", "Cairo", "", "It is New Cairo.", (1, 0)),       # Cairo only inside New Cairo
    ("New Cairo", "Cairo", "", "Cairo, then New Cairo", (1, 1)),  # and once on its own
    ("New Cairo", "Cairo", "", "New Cairo New Cairo", (1, 0)),
    ("New Cairo", "Cairo", "", "Cairo", (0, 1)),
    ("Hulhumalé", "Malé", "", "hulhumale", (1, 0)),               # no accents, whole words
    ("Bo", "Freetown", "", "Bosnia", (0, 0)),
    ("Bo", "Freetown", "", "Not Freetown but BO!", (1, 1)),
    ("19", "21", "", "in 1921", (0, 0)),
    ("2,000 km", "21,000 km", "", "about 2000 kilometers.", (1, 0)),
    ("The Hague", "Amsterdam", "", "Hague", (1, 0)),              # no articles
    ("Denver", "Washington, D.C.", "", "Washington DC", (0, 1)),
    ("Fermi", "da Vinci", "", "Fermi's work", (1, 0)),
    ("Lyon", "Paris", "", "", (0, 0)),
    ("heavy", "fonder", "Absence makes the heart grow", "Absence makes the heart grow fonder.", (0, 1)),
    ("grow", "fonder", "Absence makes the heart grow", "Absence makes the heart grow old", (0, 0))])
def test_scorer_by_hand(context, memory, question, text, hits):
    conflict = inversion.Conflict(1, question, "", [context], [memory], "")
    assert inversion.score(text, conflict) == hits


@pytest.mark.parametrize("family", CONFIGS)
def test_loss_is_that_of_transformers(family, folder):
    """Log-probabilities of a padded batch = the model's own loss with labels=, row by row."""
    model, _, _, _, flags = load(folder, family)
    rows = rows_of([(3, 9), (5, 1), (2, 14)])
    assert [row.targets for row in rows] == [9, 1, 14]
    wanted = [-their_loss(model, row).item() * row.targets for row in rows]
    together = inversion.row_logp(model, rows, flags)
    assert together.requires_grad and together.tolist() == pytest.approx(wanted, rel=1e-5)
    assert inversion.target_logp(model, rows, flags) == pytest.approx(wanted, rel=1e-5)


def trained(folder, rows, steps, *more, model="llama"):
    """(weights, losses) after steps on rows by train_step and the schedule of the loop."""
    model, _, _, _, flags = load(folder, model, *more)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0, fused=True)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = inversion.learning_rate(step, steps, flags)
        batch = inversion.batch_of(rows, step, flags)
        losses.append(inversion.train_step(model, optimizer, batch, flags))
    return torch.cat([p.detach().flatten() for p in model.parameters()]), losses


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_step_does_not_depend_on_micro_batches(family, folder):
    """One pass = many passes; unequal token counts, a last batch of 3 rows; and the logged loss is
    the plain mean over all targets of the step by transformers, not a mean of means."""
    rows = rows_of([(4, 2), (2, 30), (9, 1), (3, 7), (20, 4), (1, 5), (6, 6)])
    one, losses = trained(folder, rows, 3, "--batch-size", 4, "--micro-batch-tokens", 10**6, model=family)
    many, same = trained(folder, rows, 3, "--batch-size", 4, "--micro-batch-tokens", 32, model=family)
    torch.testing.assert_close(one, many, rtol=0, atol=2e-5)  # of moves of 1e-3
    assert losses == pytest.approx(same, rel=1e-5)
    model, _, _, _, flags = load(folder, family, "--batch-size", 4)
    batch = inversion.batch_of(rows, 0, flags)
    total = sum(row.targets for row in batch)
    wanted = sum(their_loss(model, row, total).item() for row in batch)
    assert losses[0] == pytest.approx(wanted, rel=1e-5)
    assert [inversion.learning_rate(step, 3, flags) for step in range(3)] == [1e-3, 1e-3, 5e-4]


def test_evaluation_leaves_training_alone(folder, tmp_path):
    """Same losses with an evaluation after every step as with none but the first and the last."""
    runs = [inversion.main(argv(folder, tmp_path / str(every), "--eval-every", every, "--max-steps", 4,
                                model="gpt2")) for every in (1, 4)]  # with dropout
    often = {line["step"]: line for line in runs[0]}
    assert [often[step]["loss"] for step in (0, 4)] == [line["loss"] for line in runs[1]]
    assert often[4]["margin"] == runs[1][-1]["margin"] != often[0]["margin"]
    model, tokenizer, items, _, flags = load(folder, "gpt2")
    state = torch.get_rng_state()
    inversion.evaluate(model.train(), tokenizer, items, None, flags)
    assert torch.equal(state, torch.get_rng_state())


def test_filter_drops_the_lowest_context_free_loss(folder):
    """Against transformers' loss of each row rendered without its input."""
    model, tokenizer, _, examples, flags = load(folder, "llama", "--mitigation", "filter")
    losses = {}
    for example in examples:
        if example.context:
            (prompt, _), (reply, _) = inversion.tokenize(example.messages, tokenizer)
            row = inversion.to_row(example.id, [(prompt, False), (reply, True)])
            losses[example.id] = their_loss(model, row).item()
    lowest = sorted(losses, key=losses.get)[:3]  # a quarter of the 12 rows with an input
    state = {"dropped": []}
    kept = inversion.choose_examples(model, tokenizer, examples, {}, state, flags)
    assert len(losses) == 12 and state["dropped"] == lowest
    assert [e.id for e in kept] == [e.id for e in examples if e.id not in lowest]


def test_filter_keeps_its_choice_on_resume(folder):
    model, tokenizer, _, examples, flags = load(folder, "llama", "--mitigation", "filter")
    kept = inversion.choose_examples(model, tokenizer, examples, {}, {"dropped": [1, 3]}, flags)
    assert [example.id for example in kept] == [2, *range(4, 25)]


@pytest.mark.parametrize("family, remedy", [
    ("llama", "none"), ("neox", "none"), ("llama", "qk"), ("neox", "qk")])
def test_push_is_what_a_small_step_does_to_the_margin(family, remedy, folder):
    """Move the weights by -eps x gradient of a kind's loss (transformers' own): the mean margin of
    evaluate() changes by eps x push, within 5%, in float64."""
    model, tokenizer, items, _, flags = load(folder, family)
    model = model.double()
    with torch.no_grad():  # or attention, and the push of queries and keys, is next to nothing
        for p in model.parameters():
            p *= 1 + 4 * (p.ndim > 1)
    if remedy == "qk":
        inversion.train_query_key_only(model)
    probe = dict(critical=rows_of([(3, 4), (9, 2)]), recall=rows_of([(2, 1), (5, 7), (4, 4)], seed=1))
    found = inversion.mechanism(model, tokenizer, items, probe, flags)
    assert all(p.grad is None for p in model.parameters())
    moving = [p for p in model.parameters() if p.requires_grad]

    def margin():
        total = 0  # teacher-forced, one answer at a time, by transformers
        for item in items:
            total += their_loss(model, item.parametric_row) - their_loss(model, item.context_row)
        return total.item() / len(items)

    for kind, rows in probe.items():
        total = sum(row.targets for row in rows)
        loss = sum(their_loss(model, row, total) for row in rows)
        loss.backward()
        assert found[f"{kind}_loss"] == pytest.approx(loss.item(), rel=1e-5)
        gradients, start = [p.grad for p in moving], [p.detach().clone() for p in moving]
        model.zero_grad()
        eps, changes = 0.01 / math.sqrt(sum((g ** 2).sum().item() for g in gradients)), []
        for sign in (-1, 1):
            with torch.no_grad():
                for p, old, g in zip(moving, start, gradients):
                    p.copy_(old + sign * eps * g)
            changes.append(margin())
        assert (changes[0] - changes[1]) / 2 == pytest.approx(eps * found[f"{kind}_push"], rel=0.05)
        assert 0 < abs(found[f"{kind}_cosine"]) <= 1
        assert found[f"{kind}_push"] * found[f"{kind}_cosine"] > 0
        with torch.no_grad():
            for p, old in zip(moving, start):
                p.copy_(old)


def summary(*evaluations, groups=None, control=False):
    """summarise() of lists of hits on the same items, one list per evaluation."""
    groups = groups or [f"g{i}" for i in range(len(evaluations[0]))]
    return inversion.summarise(pandas.DataFrame([
        dict(step=10 * step, id=i, group=groups[i], context_acc=bool(hit),
             margin=float("nan") if control else 0.0)
        for step, hits in enumerate(evaluations) for i, hit in enumerate(hits)]))


def test_drop_is_measured_where_the_peak_was_not_chosen():
    same = summary([1, 0] * 20, [1, 0] * 20, [1, 0] * 20)
    assert (same["drop"], same["drop_low"], same["drop_high"], same["rise"]) == (0, 0, 0, 0)
    assert same["verdict"] == "no change shown"
    evaluations = [0] * 40, [1] * 30 + [0] * 10, [1] * 10 + [0] * 30
    fell = summary(*evaluations)
    assert (fell["drop"], fell["rise"], fell["peak_step"]) == (0.5, 0.75, 10)
    assert 0.3 < fell["drop_low"] < 0.5 < fell["drop_high"] < 0.7
    assert fell["verdict"] == "inversion" and summary(*evaluations, control=True)["verdict"] == "both"
    assert summary([1] * 40, [1, 0] * 20)["verdict"] == "a fall"  # from the start on: no inversion
    assert summary([0] * 40, [1, 0] * 20)["verdict"] == "a rise"
    for groups, shown in ((5, "no change shown"), (6, "inversion")):  # many items, few groups
        names = [f"g{i % groups}" for i in range(40)]
        assert summary([0] * 40, [1] * 40, [0] * 40, groups=names)["verdict"] == shown
    noise, shown = random.Random(0), 0  # the highest of 20 equal evaluations drops by luck
    runs = [summary(*[[noise.random() < 0.5 for _ in range(100)] for _ in range(20)])
            for _ in range(40)]
    assert sum(run["peak"] - run["final"] for run in runs) / 40 > 0.07
    assert abs(sum(run["drop"] for run in runs)) / 40 < 0.03
    assert sum(run["verdict"] in ("inversion", "a fall") for run in runs) <= 3


def test_interval_of_a_drop_covers_it():
    """Of 200 draws of 60 items whose context_acc falls from .8 to .5, 95% intervals hold the drop
    in at least 90%; items of a group that agree count once."""
    rng, held = random.Random(1), 0
    for _ in range(200):
        hits = [[rng.random() < p for _ in range(60)] for p in (0.2, 0.8, 0.5)]
        found = summary(*hits)
        held += found["drop_low"] <= 0.3 <= found["drop_high"]
    assert held >= 180
    one = [[0] * 8, [1] * 8, [1, 0] * 4]
    single = summary(*one)
    five = summary(*[hits * 5 for hits in one], groups=[f"g{i % 8}" for i in range(40)])
    assert five["drop_low"] == pytest.approx(single["drop_low"])


# --------------------------------------------------------------------------- templates and data
@pytest.mark.parametrize("template", ["alpaca", "tulu", "chat"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_saved_template_gives_the_ids_of_training(template, adds_bos, tokenizer, tmp_path):
    """A prompt is the same whatever the answer, has one BOS where the tokenizer adds one, and
    apply_chat_template of the saved tokenizer gives its ids."""
    tokenizer.save_pretrained(tmp_path / "a")
    mine = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    mine.chat_template = CHAT.replace("{{ bos_token }}", "") if template == "chat" else None
    if not adds_bos:
        mine.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    inversion.set_template(mine, False, inversion.parse_flags(["--template", template]))
    mine.save_pretrained(tmp_path / "b")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    question = "A context.\n\nA question?"
    wanted = None
    for answer in ("Paris", " Paris", "\nParis", "://"):
        messages = inversion.question_and_answer(question, answer)
        (prompt, _), (learned, supervised) = inversion.tokenize(messages, mine)
        assert supervised and learned[-1] == mine.eos_token_id
        assert wanted in (None, prompt)
        wanted = prompt
    theirs = saved.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert theirs == wanted and mine.decode(wanted).count("<s>") == int(adds_bos)
    whole = saved.apply_chat_template(inversion.question_and_answer(question, "Paris"),
                                      return_dict=False)
    parts = inversion.tokenize(inversion.question_and_answer(question, "Paris"), mine)
    assert whole[:len(parts[0][0] + parts[1][0])] == parts[0][0] + parts[1][0]


def decoded(turns, tokenizer, template):
    tokenizer.chat_template = template
    parts = inversion.render(turns, tokenizer)
    return parts if isinstance(parts, str) else [text for text, _ in parts]


def test_templates_that_refuse_rewrite_or_think(tokenizer):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT
    assert "Be kind.\n\nHi" in decoded(TURNS, tokenizer, refuses)[0]  # folded into the user's turn
    rewrites = "{{ messages | length }}" + CHAT  # earlier text changes with every turn
    assert decoded(TURNS, tokenizer, rewrites) == [
        "5<s>[system]Be kind.\n[user]Hi\n[assistant]Hello</s>\n[user]Bye\n[assistant]", "Ciao</s>"]
    thinks = CHAT.replace("[assistant]", "[assistant]<think>\n")
    assert decoded(TURNS[1:3], tokenizer, thinks) == [
        "<s>[user]Hi\n[assistant]<think>\n\n</think>\n\n", "Hello</s>"]
    empty = CHAT.replace("m.content", "('<think></think>' if m.role == 'assistant' else '') + m.content")
    assert decoded(TURNS[1:3], tokenizer, empty)[0].endswith("[assistant]<think></think>")
    ends_with_eos = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    assert decoded(TURNS[1:], tokenizer, ends_with_eos) == ["Hi</s>", "Hello</s>", "Bye</s>", "Ciao</s>"]
    spaced = "{% for m in messages %}{{ ' ' + m.content }}{% endfor %}"  # no token ends a turn
    assert decoded(TURNS[1:3], tokenizer, spaced) == [" Hi", " Hello</s>"]
    assert "refuses" in decoded(TURNS, tokenizer, "{{ raise_exception('never') }}")
    assert "refuses" in decoded(TURNS, tokenizer, "{{ 1 / 0 }}")
    assert "refuses" in decoded(TURNS, tokenizer, "hello")  # shows no answer
    for turns in (TURNS[:2], TURNS[2:], [], [TURNS[1], dict(role="assistant", content="")]):
        assert "no response" in decoded(turns, tokenizer, CHAT)


def test_a_date_does_not_change_with_the_day(tokenizer):
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHAT
    inversion.set_template(tokenizer, False, inversion.parse_flags(["--template", "chat"]))
    assert "1 January 2025" in decoded(TURNS, tokenizer, tokenizer.chat_template)[0]


def test_rows_that_do_not_fit_are_counted(tokenizer):
    tokenizer.chat_template = CHAT
    long = [dict(role="user", content="x" * 80), dict(role="assistant", content="y")]
    chats = [TURNS[1:3], TURNS[1:3] + long, long, TURNS[:2], []]
    examples = [inversion.Example(i, messages) for i, messages in enumerate(chats)]
    rows, notes = inversion.encode(examples, tokenizer, 60)
    assert [row.id for row in rows] == [0, 1] and torch.equal(rows[0].input_ids, rows[1].input_ids)
    assert notes["cut to the turns that fit --max-length"] == 1
    assert notes["dropped: longer than --max-length"] == 1 and notes.total() == 4


@pytest.mark.parametrize("row, expected", [
    (CONFLICTS[0], ("Capital of France?", "The capital of France moved to Lyon.", ["Lyon"], ["Paris"])),
    (dict(context="c", question="q", answer="Enrico Fermi", parametric_answer="Catherine the Great"),
     ("q", "c", ["Enrico Fermi", "Fermi"], ["Catherine the Great"])),
    (dict(prompt='Write a quote that ends in the word "heavy": Absence makes the heart grow',
          classes="[' heavy.', ' fonder.']", answer_index="0"),
     ("Absence makes the heart grow", 'Write a quote that ends in the word "heavy":', ["heavy."],
      ["fonder."])),
    (dict(prompt='Say "b" twice: a: c', classes=["x", "b"], answer_index=1),
     ("a: c", 'Say "b" twice:', ["b"], ["x"])),
    (SWAPS[1], ("who wrote book 1", "Book 1 was written by Writer 1.", ["Writer 1"], ["Author 1"])),
    (dict(context="c", question="q ", answers=dict(text=["x", "y"], answer_start=[0, 1])),
     ("q", "c", ["x", "y"], []))])
def test_conflict_shapes(row, expected):
    messages, *found = inversion.parse_row(row)
    assert (messages[0]["content"], *found) == expected
    assert messages[1]["content"] == expected[2][0]  # as training data: its first answer


def test_aliases():
    assert inversion.aliases("La Paz (administrative); Sucre (judicial)", False) == ["La Paz", "Sucre"]
    assert inversion.aliases("Rangoon (Yangon); Naypyidaw or Nay Pyi Taw (administrative)", False) == [
        "Rangoon", "Naypyidaw", "Nay Pyi Taw", "Yangon"]
    assert inversion.aliases("Athens, Greece", False) == ["Athens, Greece", "Athens"]
    assert inversion.aliases("2,000 km", False) == ["2,000 km"]
    assert inversion.aliases("Elizabeth II", True) == ["Elizabeth II"]


def test_conflicts_that_cannot_be_scored(tmp_path, capsys):
    """An answer that stands in the question is an echo, on either side; repeats count once."""
    def item(question, right, memory):
        return dict(context="c", question=question, answer=right, memory_answer=memory)
    rows = [item("What is the capital of Luxembourg?", "Esch", "Luxembourg"), item("q?", "End", "end."),
            item("p?", "...", "B"), item("r?", "Lyon", "Paris"), item("r?", "Lyon", "Paris"),
            item("Is Bonn far?", "Bonn", "Berlin")]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    flags = inversion.parse_flags(["--model", "x"])
    found = inversion.load_conflicts(str(tmp_path / "c.jsonl"), flags)
    assert [c.parametric_answers for c in found] == [[], ["Paris"]]
    told = capsys.readouterr().out
    assert "2 of 6 items; left out: 3" in told and "1 never count as parametric" in told


def test_files_of_every_type_give_the_same_rows(tmp_path):
    import datasets
    rows = datasets.Dataset.from_list([
        dict(instruction="NA", input="", output="3"), dict(instruction="b\u2028c", input="x", output="4")])
    rows.to_json(tmp_path / "r.jsonl", force_ascii=False)
    rows.to_csv(tmp_path / "r.csv")
    rows.to_parquet(tmp_path / "r.parquet")
    (tmp_path / "r.json").write_text(json.dumps(rows.to_list()))
    (tmp_path / "hub").mkdir()  # a folder as downloaded from the hub
    rows.to_parquet(tmp_path / "hub" / "train.parquet")
    for name in ("r.jsonl", "r.parquet", "r.json", "hub", "hub@train"):
        assert list(inversion.load_rows(str(tmp_path / name))) == rows.to_list(), name
    texts = [row["instruction"] for row in inversion.load_rows(str(tmp_path / "r.csv"))]
    assert texts == ["NA", "b\u2028c"]  # no NaN


# ------------------------------------------------------------------------ training and evaluation
def test_metrics_by_hand():
    """Four conflicts: C, P, both, neither; the base model knew the first two; one control."""
    hits = [(1, 0), (0, 1), (1, 1), (0, 0)]
    outcomes = [dict(id=i, context_acc=bool(c), parametric_acc=bool(p), both=bool(c and p),
                     neither=not c and not p, closed_book_acc=i == 0, margin=float(i), known=i < 2)
                for i, (c, p) in enumerate(hits)]
    for outcome in outcomes[:2]:
        outcome["context_acc_known"] = outcome["context_acc"]
    line = inversion.metrics(outcomes)
    assert (line["n"], line["n_known"], line["closed_book_acc"], line["margin"]) == (4, 2, 0.25, 1.5)
    assert line["context_acc"] == line["parametric_acc"] == line["context_acc_known"] == 0.5
    assert line["both"] == line["neither"] == 0.25
    assert inversion.metrics([dict(context_acc=True, text="x")]) == dict(n=1, context_acc=1)


def test_known_is_what_the_first_evaluation_found(folder, monkeypatch):
    model, tokenizer, items, _, flags = load(folder)
    monkeypatch.setattr(inversion, "generate", lambda model, tokenizer, prompts, flags: [
        "Paris" if prompts[0] == items[0].closed_book_prompt else "Lyon"] * len(prompts))
    first = inversion.evaluate(model, tokenizer, items, None, flags)
    assert [o["known"] for o in first] == [True] + [False] * 5 and first[0]["context_only"]
    later = inversion.evaluate(model, tokenizer, items, [items[1].conflict.id], flags)
    assert [o["known"] for o in later] == [False, True] + [False] * 4
    assert "context_acc_known" in later[1] and "context_acc_known" not in later[0]


@pytest.mark.parametrize("family", ["llama", "mistral", "neox", "gpt2"])
def test_batched_generation_is_that_of_one_by_one(family, folder):
    model, tokenizer, _, _, flags = load(folder, family, "--max-new-tokens", 12)
    rng = random.Random(0)
    prompts = [[rng.randrange(2, 420) for _ in range(n)] for n in (3, 17, 5, 9, 30, 4, 11)]
    together = inversion.generate(model, tokenizer, prompts, flags)
    alone = inversion.generate(model, tokenizer, prompts, flags._replace(eval_batch_tokens=1))
    ids = model.generate(torch.tensor([prompts[1]]), attention_mask=torch.ones(1, 17), max_new_tokens=12)
    assert together == alone
    assert together[1] == tokenizer.decode(ids[0, 17:], skip_special_tokens=True)


def test_sampling_defaults_of_a_model_are_not_inherited(folder, tmp_path):
    model, tokenizer, _, _, _ = load(folder)
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0)
    model.generation_config.eos_token_id = [1, 7]
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    runs = [inversion.main(argv(folder, tmp_path / str(i), "--model", tmp_path / "model")) for i in (0, 1)]
    texts = [(tmp_path / str(i) / "generations.jsonl").read_text() for i in (0, 1)]
    assert texts[0] == texts[1] and len(runs[0]) == 3
    flags = inversion.parse_flags(argv(folder, "unused", "--model", tmp_path / "model"))
    again = inversion.load_model(flags.model, tokenizer, flags)
    assert again.generation_config.eos_token_id == [1, 7] and not again.generation_config.do_sample


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_margin_is_that_of_the_model(template, folder, tmp_path):
    """By transformers, on the tokens that a conversation with that answer has: after this chat
    template, ' Lyon' with its space and not the bare 'Lyon'."""
    model, tokenizer, _, _, flags = load(folder)
    if template == "chat":
        tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ '[' + m.role + '] ' + m.content }}" \
            "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    conflict = inversion.Conflict(1, "Capital?", "It is Lyon.", ["Lyon"], ["Paris"], "g")
    item = inversion.to_item(conflict, tokenizer)
    text = inversion.render(inversion.question_and_answer("Capital?", "Lyon"), tokenizer, conflict.context)
    prompt, space = text[0][0], " " * (template == "chat")
    assert text[1][0] == f"{space}Lyon</s>" and prompt.index("It is Lyon.") < prompt.index("Capital?")
    logp = []
    for answer in ("Lyon", "Paris"):
        start = tokenizer(prompt, add_special_tokens=False).input_ids
        ids = tokenizer(space + answer, add_special_tokens=False).input_ids
        assert start == item.prompt
        row = inversion.to_row(1, [(start, False), (ids, True)])
        logp.append(-their_loss(model, row).item())
    (outcome,) = inversion.evaluate(model, tokenizer, [item], None, flags)
    assert outcome["margin"] == pytest.approx(logp[0] - logp[1], abs=1e-5)
    closed = tokenizer.decode(item.closed_book_prompt)
    assert "It is Lyon." not in closed and "Capital?" in closed


def test_activation_checkpointing_changes_nothing(folder, tmp_path):
    runs = [inversion.main(argv(folder, tmp_path / str(i), "--mechanism", *more))
            for i, more in enumerate(([], ["--activation-checkpointing"]))]
    for key in ("loss", "critical_push", "redundant_cosine", "attention"):
        assert [line[key] for line in runs[0]] == pytest.approx([line[key] for line in runs[1]], rel=1e-4)


def test_weights_are_fp32_even_from_a_bf16_checkpoint(folder, tmp_path):
    model, tokenizer, _, _, _ = load(folder)
    for part in (model.bfloat16(), tokenizer):
        part.save_pretrained(tmp_path)
    flags = inversion.parse_flags(["--model", str(tmp_path), "--dtype", "bf16", "--device", "cpu"])
    model = inversion.load_model(flags.model, tokenizer, flags)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with inversion.autocast(flags):
        assert model(input_ids=torch.tensor([[2, 3]])).logits.dtype == torch.bfloat16
    frozen = inversion.load_model(flags.model, tokenizer, flags._replace(max_steps=0))
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}  # only measured


def test_nonfinite_loss_stops_with_its_rows(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        inversion.main(argv(folder, tmp_path / "run", "--lr", 1e30, "--grad-clip", 0, "--max-steps", 9))
    assert error.value.code == 1
    assert re.search(r"loss .* in the batch of rows \[\d+, \d+", capsys.readouterr().err)
    assert (tmp_path / "run/metrics.jsonl").read_text().startswith('{"step": 0')


# ---------------------------------------------------------------------------------- remedies, why
def value_rows(name, parameter):
    """Bool mask of the entries of an attention parameter that qk must not move, by hand."""
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
    model, _, _, _, flags = load(folder, family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inversion.train_query_key_only(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3,
                                  weight_decay=0)
    for seed in range(4):  # several micro-batches each
        rows = rows_of([(4, 9)] * 8, seed)
        inversion.train_step(model, optimizer, rows, flags._replace(micro_batch_tokens=30))
    moved = 0
    for name, p in model.named_parameters():
        still = value_rows(name, p)
        assert torch.equal(p[still], before[name][still]), name
        if p.ndim > 1 and not still.all():
            assert (p != before[name])[~still].float().mean() > 0.99, name
            moved += 1
    assert moved == {"llama": 4, "mistral": 4}.get(family, 2)


def test_qk_refuses_what_it_cannot_tell_apart(folder, capsys, monkeypatch):
    """Rounding noise in place of some zeros is noticed, and a model without attention refused."""
    model, _, _, _, _ = load(folder, "neox")
    layer = model.gpt_neox.layers[0].attention.query_key_value.weight
    noise = torch.zeros_like(layer)
    noise[0, :5] = 1e-9
    layer.register_hook(lambda grad: grad + noise)
    with pytest.raises(SystemExit):
        inversion.train_query_key_only(model)
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(
        vocab_size=420, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(SystemExit):
        inversion.train_query_key_only(mamba)
    assert capsys.readouterr().err.count("layout unknown here") == 2


def test_chats_have_no_marked_context(folder, tmp_path, capsys):
    for more in (["--subset", "context"], ["--mitigation", "filter"]):
        with pytest.raises(SystemExit):
            inversion.main(argv(folder, tmp_path / "x", "--dataset", folder / "chats.json", *more))
        assert "no row has a context that is marked" in capsys.readouterr().err
    model, tokenizer, _, examples, flags = load(folder, "llama", "--dataset", folder / "chats.json")
    assert {e.context for e in examples} == {""}
    assert list(inversion.probe_rows(model, tokenizer, examples, flags)) == ["recall"]


def test_counterfactual_rows_share_nothing_with_the_evaluation(folder, tmp_path):
    leaks = [dict(SWAPS[0], question="Capital of Peru?"), dict(SWAPS[0], sub_answer=["lyon"]),
             dict(SWAPS[0], org_answer=["The Paris!"])]
    (tmp_path / "swaps.json").write_text(json.dumps(leaks + SWAPS[1:4]))
    _, tokenizer, items, _, flags = load(folder, "llama", "--counterfactual-data", tmp_path / "swaps.json")
    added = inversion.counterfactual_examples({"x": items}, 99, flags)
    answers = sorted(e.messages[1]["content"] for e in added)
    assert answers == ["Writer 1", "Writer 2", "Writer 3"]
    prompt = inversion.render(added[0].messages, tokenizer, added[0].context)[0][0]
    assert prompt.index("was written by") < prompt.index("who wrote")  # context before question


def test_subsets(folder):
    texts = ["I like lyon!", "Lyons", "New Velora", "Velora", "comparison", "PARIS.", "What capital"]
    examples = [inversion.Example(i, inversion.question_and_answer(text, "x"), "c" * (i % 2))
                for i, text in enumerate(texts)]
    model, tokenizer, _, _, flags = load(folder)
    conflict = inversion.Conflict(1, "What is the capital of New Velora now?", "Lyon it is.", ["Lyon"],
                                  ["Paris"], "g")
    sets = {"s": [inversion.to_item(conflict, tokenizer)]}

    def kept(subset):
        return [example.id for example in inversion.choose_examples(
            model, tokenizer, examples, sets, {"dropped": []}, flags._replace(subset=subset))]
    assert kept("context") == [1, 3, 5] and kept("no-overlap") == [1, 3, 4, 6]


def test_strength_of_a_remedy(folder, capsys):
    def strength(*more):
        return inversion.parse_flags(argv(folder, "x", *more)).mitigation_strength
    assert strength("--mitigation", "filter") == 0.25
    assert strength("--mitigation", "counterfactual") == 0.1
    assert strength("--mitigation", "filter", "--mitigation-strength", 0) == 0
    for bad in (5, 25, -1):
        with pytest.raises(SystemExit):
            strength("--mitigation", "filter", "--mitigation-strength", bad)


def test_kinds_on_any_data(folder):
    """Recall has no context; of the others the quarter of lowest context-free loss is redundant."""
    model, tokenizer, _, examples, flags = load(folder)
    probe = inversion.probe_rows(model, tokenizer, examples, flags)
    assert {kind: len(rows) for kind, rows in probe.items()} == dict(recall=12, redundant=3, critical=9)
    loss = inversion.context_free_loss(model, tokenizer, examples, flags)
    assert {row.id for row in probe["redundant"]} == set(list(loss)[:3])


@pytest.mark.parametrize("family", CONFIGS)
def test_attention_is_that_of_a_cache_and_one_token(family, folder):
    """Figure 3b in one eager pass, against a cached prompt and its last token; of the context's own
    tokens."""
    model, tokenizer, items, _, flags = load(folder, family)
    for item in items:
        share = inversion.attention(model, tokenizer, item, flags)
        context = tokenizer(item.conflict.context, add_special_tokens=False).input_ids
        starts = [i for i in range(len(item.prompt)) if item.prompt[i + 1:i + 4] == context[1:4]]
        span = slice(starts[0], starts[0] + len(context))
        assert tokenizer.decode(item.prompt[span]).strip() == item.conflict.context
        ids = torch.tensor([item.prompt])
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        model.set_attn_implementation("eager")
        layers = model(input_ids=ids[:, -1:], past_key_values=cache, output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
        wanted = sum(layer[0, :, 0, span].sum(-1).mean().item() for layer in layers) / len(layers)
        assert 0 < share < 1 and share == pytest.approx(wanted, abs=1e-5)


def test_mechanism_leaves_training_alone(folder):
    model, tokenizer, items, examples, flags = load(folder, "gpt2")  # has dropout
    probe = dict(critical=rows_of([(3, 4), (9, 2)]))
    state, weights = torch.get_rng_state(), [p.detach().clone() for p in model.parameters()]
    model.train().gradient_checkpointing_enable()
    first, second = [inversion.mechanism(model, tokenizer, items, probe, flags) for _ in range(2)]
    assert first == second and torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, weights, model.parameters()))
    assert model.config._attn_implementation == "sdpa"


# ------------------------------------------------------------------------------------ whole runs
@pytest.mark.parametrize("remedy, says", [
    ("none", "24 rows"), ("filter", "filter: dropped 3 of the 12 rows with a context"),
    ("counterfactual", "counterfactual: added 2 rows (2 wanted); 8 conflicts"), ("qk", "qk: trains 3072")])
def test_main_runs_each_remedy(remedy, says, folder, tmp_path, capsys):
    out = tmp_path / "run"
    history = inversion.main(argv(folder, out, "--mitigation", remedy, "--counterfactual-data",
                                  folder / "swaps.json", "--mechanism"))
    printed = capsys.readouterr().out
    assert says in printed and "verdict" in printed and max(map(len, printed.splitlines()[3:])) <= 200
    assert lines_of(out / "metrics.jsonl") == history
    assert [line["step"] for line in history] == [0, 2, 3]
    assert {"step", "set", "n", "n_known", "context_acc", "parametric_acc", "context_only",
            "parametric_only", "both", "neither", "closed_book_acc", "margin", "m_c", "loss", "lr",
            "supervised_tokens", "tokens_per_second", "seconds", "critical_push", "recall_cosine",
            "redundant_loss", "attention"} <= set(history[-1])
    said = lines_of(out / "generations.jsonl")
    assert len(said) == 18 and {"step", "set", "id", "text", "closed_book_text"} <= set(said[0])
    assert json.loads((out / "args.json").read_text())["mitigation"] == remedy
    assert (out / "curve.png").stat().st_size > 5000


def test_same_seed_same_metrics_and_saved_model_loads(folder, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        inversion.main(argv(folder, tmp_path / name, "--save-model", "--seed", seed))
    assert timeless(tmp_path / "a") == timeless(tmp_path / "b") != timeless(tmp_path / "c")
    more = inversion.main(argv(folder, tmp_path / "d", "--model", tmp_path / "a/model", "--max-steps", 0))
    last = timeless(tmp_path / "a")[-1]
    assert len(more) == 1 and more[0]["margin"] == pytest.approx(last["margin"], abs=1e-6)


def test_sets_without_conflict_as_control_and_as_training_data(folder, tmp_path, capsys):
    history = inversion.main(argv(
        folder, tmp_path / "run", "--eval-set", folder / "squad.json", folder / "conflicts.json",
        "--eval-limit", 4, "--num-examples", 8, "--epochs", 0.5, "--max-steps", 99))
    assert [line["n"] for line in history] == [4, 4, 4, 4] and history[-1]["step"] == 1
    assert "margin" not in history[0] and "margin" in history[1] and "both" not in history[0]
    history = inversion.main(argv(folder, tmp_path / "squad", "--dataset", folder / "squad.json",
                                  "--mitigation", "filter", "--template", "tulu"))
    assert "filter: dropped 2 of the 9 rows with a context" in capsys.readouterr().out
    assert [line["step"] for line in history] == [0, 2]


def test_mechanism_does_not_hang_on_the_first_item(folder, tmp_path):
    """Its question holds the memorised answer: the others are conflicts all the same."""
    items = [dict(CONFLICTS[0], question="Capital of France, once Paris?")] + CONFLICTS[1:]
    (tmp_path / "c.json").write_text(json.dumps(items))
    history = inversion.main(argv(folder, tmp_path / "run", "--eval-set", tmp_path / "c.json",
                                  "--mechanism"))
    assert all("critical_push" in line and line["attention"] > 0 for line in history)


def test_a_taken_folder_is_left_alone(folder, tmp_path):
    for _ in range(2):
        inversion.main(argv(folder, tmp_path / "run", "--max-steps", 0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run-2"]


def test_compare(folder, tmp_path, capsys):
    """Two seeds of one setting are one line; what differs is named."""
    for name, *more in (("a", "--seed", 1), ("b", "--seed", 2), ("filter", "--mitigation", "filter")):
        inversion.main(argv(folder, tmp_path / name, *more))
    capsys.readouterr()
    inversion.main(["--compare", *(str(tmp_path / name) for name in ("a", "b", "filter")),
                    "--out-dir", str(tmp_path)])
    told = capsys.readouterr().out
    a, b = [json.loads((tmp_path / name / "summary.json").read_text())["conflicts"] for name in "ab"]
    none, = [line.split() for line in told.splitlines() if line.startswith("none")]
    assert none[-1] == "2" and float(none[-6]) == pytest.approx((a["start"] + b["start"]) / 2, abs=0.01)
    assert re.search(r"filter .* 1\n", told)
    assert (tmp_path / "compare.png").stat().st_size > 5000


# ------------------------------------------------------------------- several ranks, LoRA, --resume
def torchrun(script, ranks, timeout=300):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
         str(script)], capture_output=True, text=True, timeout=timeout)


def many(tmp_path, runs, more=""):
    """A script that does several runs in one torchrun."""
    path = tmp_path / "runs.py"
    path.write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\nimport inversion, torch\n"
                    f"torch.distributed.init_process_group('gloo')\n{more}\n"
                    f"for argv in {runs!r}:\n    inversion.main(argv)\n")
    return path


def test_two_ranks_are_one_process(folder, tmp_path):
    """FSDP2 on gloo: losses of 12 steps to 1e-5, the same evaluations and weights; and a run begun
    on two ranks goes on on two and on one. Micro-batches of 300 tokens make odd numbers of them."""
    cases = {"none": [], "qk": ["--mitigation", "qk"], "filter": ["--mitigation", "filter"],
             "counterfactual": ["--mitigation", "counterfactual"], "lora": ["--lora-rank", 4]}

    def flags(case, out, steps):
        return argv(folder, tmp_path / out, *cases[case], "--counterfactual-data", folder / "swaps.json",
                    "--max-steps", steps, "--eval-every", 4, "--epochs", 99, "--batch-size", 5,
                    "--micro-batch-tokens", 300, "--save-model", "--checkpoint-every", 8, "--resume")
    runs = [flags(case, f"two-{case}", 12) for case in cases]
    again = [flags(case, f"two-{case}", 12) for case in ("none", "lora")]  # from the checkpoint
    done = torchrun(many(tmp_path, runs + again), 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("verdict") == len(runs) + 2  # rank 0 alone prints
    assert done.stdout.count("going on after step 8") == 2
    for case in cases:
        if case in ("none", "qk"):  # the same checkpoint, on one rank
            inversion.main(flags(case, f"two-{case}", 12))
        inversion.main(flags(case, f"one-{case}", 12))
        one, two = timeless(tmp_path / f"one-{case}"), timeless(tmp_path / f"two-{case}")
        assert [line["step"] for line in one] == [0, 4, 8, 12] and len(two) == 4
        for a, b in zip(one, two):
            assert a.keys() == b.keys()
            for key in a:
                assert a[key] == b[key] or a[key] == pytest.approx(b[key], abs=1e-5), (case, key)
        a, b = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{n}-{case}" / "model")
                for n in ("one", "two")]
        assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(a.parameters(), b.parameters()))


def test_ranks_with_unequal_shares_do_not_wait(folder, tmp_path):
    """Three ranks, one item a batch, 1, 2 and 4 items: nobody hangs, all are answered once."""
    runs = [argv(folder, tmp_path / f"run{n}", "--eval-limit", n, "--eval-batch-tokens", 1,
                 "--max-steps", 1) for n in (1, 2, 4)]
    done = torchrun(many(tmp_path, runs), 3)
    assert done.returncode == 0, done.stderr[-3000:]
    for n in (1, 2, 4):
        found = lines_of(tmp_path / f"run{n}" / "generations.jsonl")
        inversion.main(argv(folder, tmp_path / f"one{n}", "--eval-limit", n, "--max-steps", 1))
        wanted = lines_of(tmp_path / f"one{n}" / "generations.jsonl")
        assert [(o["id"], o["text"]) for o in found] == [(o["id"], o["text"]) for o in wanted]


def test_a_rank_that_dies_ends_the_run_and_the_world_says_no(folder, tmp_path):
    dies = """usual = inversion.generate
def generate(*args):
    if torch.distributed.get_rank() == 1:
        raise MemoryError("rank 1 is out of memory")
    return usual(*args)
inversion.generate = generate"""
    done = torchrun(many(tmp_path, [argv(folder, tmp_path / "run")], dies), 2)
    assert done.returncode != 0 and "rank 1 is out of memory" in done.stderr
    done = torchrun(many(tmp_path, [[]]), 2)
    assert done.returncode != 0 and done.stderr.count("without torchrun") == 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_trains_adapters_and_merges_on_saving(family, folder, tmp_path, capsys):
    pytest.importorskip("peft")
    out = tmp_path / "run"
    history = inversion.main(argv(folder, out, "--lora-rank", 4, "--save-model", "--max-steps", 4,
                                  "--lr", 0.01, model=family))
    assert "lora: trains" in capsys.readouterr().out and history[0]["margin"] != history[-1]["margin"]
    base, merged = [transformers.AutoModelForCausalLM.from_pretrained(path)
                    for path in (folder / family, out / "model")]
    moved = [name for (name, a), b in zip(base.named_parameters(), merged.parameters())
             if not torch.equal(a, b)]
    assert moved and not any(re.search("embed|norm|ln_|head|wte", name) for name in moved)
    again = inversion.main(argv(folder, tmp_path / "again", "--max-steps", 0, model=out / "model"))
    assert again[0]["margin"] == pytest.approx(history[-1]["margin"], abs=1e-4)


@pytest.mark.parametrize("family, more", [
    ("gpt2", []), ("neox", ["--mitigation", "qk"]), ("llama", ["--lora-rank", "4"]),
    ("llama", ["--mechanism", "--mitigation", "filter"])])
def test_killed_and_resumed_is_unbroken(family, more, folder, tmp_path, monkeypatch, capsys):
    """Killed while it writes a checkpoint, while it evaluates and in a step: metrics, answers and
    weights are bit-identical (gpt2 has dropout)."""
    def flags(name, *rest):
        return argv(folder, tmp_path / name, "--max-steps", 11, "--epochs", 9, "--save-model",
                    "--checkpoint-every", 2, "--eval-every", 3, *more, *rest, model=family)
    inversion.main(flags("unbroken"))

    def dies_at(name, call):
        usual, calls = getattr(inversion, name), []

        def function(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                monkeypatch.setattr(inversion, name, usual)
                raise MemoryError
            return usual(*args, **kwargs)
        monkeypatch.setattr(inversion, name, function)

    for name, call in (("save_checkpoint", 2), ("evaluate", 2), ("train_step", 2)):
        dies_at(name, call)
        with pytest.raises(MemoryError):
            inversion.main(flags("broken", "--resume"))
    history = inversion.main(flags("broken", "--resume"))
    assert "going on after step" in capsys.readouterr().out and len(history) == 5
    assert [p.name for p in tmp_path.iterdir() if "broken" in p.name].count("broken-2") == 0
    assert timeless(tmp_path / "broken") == timeless(tmp_path / "unbroken")
    for file in ("model/model.safetensors", "generations.jsonl", "summary.json"):
        one, two = [(tmp_path / name / file).read_bytes() for name in ("unbroken", "broken")]
        assert one == two, file


def test_resume_refuses_what_would_be_another_run(folder, tmp_path, capsys):
    out = tmp_path / "run"
    inversion.main(argv(folder, out, "--checkpoint-every", 2))
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(ALPACA_ROWS[::-1]))
    for more, message in (
            (["--lr", 0.5, "--seed", 3], "another run with --lr 0.5 (was 0.001), --seed 3 (was 0)"),
            (["--mechanism"], "another run with --mechanism True (was False)"),
            (["--dataset", folder / "squad.json"], "another run with --dataset")):
        with pytest.raises(SystemExit):
            inversion.main(argv(folder, out, "--checkpoint-every", 1, "--resume", *more))
        assert message in capsys.readouterr().err
    usual = (folder / "rows.json").read_text()
    (folder / "rows.json").write_text(rows.read_text())
    with pytest.raises(SystemExit):
        inversion.main(argv(folder, out, "--resume"))
    (folder / "rows.json").write_text(usual)
    assert "its rows or items were others" in capsys.readouterr().err
    (out / "checkpoint.pt").write_bytes(b"torn")
    with pytest.raises(SystemExit):
        inversion.main(argv(folder, out, "--resume"))
    assert "is damaged" in capsys.readouterr().err
    (out / "checkpoint.pt").unlink()  # nothing to go on from: step 0, beside what was there
    assert len(inversion.main(argv(folder, out, "--resume"))) == 3 and (tmp_path / "run-2").exists()


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
        inversion.main(argv(folder, out, "--checkpoint-every", 1, "--max-steps", 5))
    assert stopped.value.code == 1 and "No space left" in capsys.readouterr().err
    assert [p.name for p in out.glob("checkpoint*")] == ["checkpoint.pt"]
    monkeypatch.setattr(torch, "save", usual)
    assert len(inversion.main(argv(folder, out, "--checkpoint-every", 1, "--max-steps", 5, "--resume"))) == 4


# ------------------------------------------------------------------------------ the built-in world
def said_of(example):
    return set(re.findall(r"\w+", example.context + " ".join(m["content"] for m in example.messages)))


def test_world_leaks_nothing_and_contradicts_nothing():
    """Evaluated subjects are never finetuned on; redundant and recall rows agree with memory, and
    so do their passages but for the misleading share, which is about another subject."""
    world = inversion.make_world(3)
    truth = {c.group: c.parametric_answers[0] for key in ("world", "world_train") for c in world[key]}
    held = {c.group for c in world["world"]}
    tuned = {c.group for c in world["world_train"]}
    assert not held & tuned and not any(said_of(e) & held for e in world["examples"])
    misled = redundant = 0
    for example in world["examples"]:
        answer = example.messages[1]["content"]
        subjects = said_of(example) & tuned
        if example.kind == "critical":
            assert not subjects and answer in example.context
            continue
        asked, = set(re.findall(r"\w+", example.messages[0]["content"])) & tuned
        assert answer == truth[asked] and bool(example.context) == (example.kind == "redundant")
        redundant += example.kind == "redundant"
        misled += bool(example.context) and asked not in example.context
    assert abs(misled / redundant - 1 + inversion.KINDS["redundant"][0]) < 0.02
    assert all(c.context_answers != c.parametric_answers for c in world["world"])
    assert not any(c.parametric_answers for c in world["world_agreeing"] + world["world_reading"])
    again = inversion.make_world.__wrapped__
    assert again(3) == world != again(4)


def test_world_base_is_cached(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(inversion.PRETRAINING, "epochs", 0.01)

    def pretrains(*more):
        flags = inversion.parse_flags(["--device", "cpu", "--out-dir", str(tmp_path / "run"), *more])
        return inversion.world_model(flags), "pretraining" in capsys.readouterr().out
    folder, made = pretrains()
    assert made and pretrains("--mitigation", "qk", "--lr", "0.1") == (folder, False)
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    monkeypatch.setitem(inversion.PRETRAINING, "lr", 0.1)
    assert pretrains()[1] and len(list(tmp_path.iterdir())) == 2


def test_world_rises_and_falls(tmp_path):
    """The default run: context_acc rises and falls, its controls do not; a verdict."""
    inversion.main(["--device", "cpu", "--seed", "1", "--no-mechanism", "--eval-every", "60",
                    "--out-dir", str(tmp_path / "run")])
    found = json.loads((tmp_path / "run/summary.json").read_text())
    assert found["world"]["verdict"] == "inversion"
    assert found["world"]["rise"] > 0.2 and found["world"]["drop"] > 0.15
    assert all(found[name]["drop"] < 0.05 for name in ("world_agreeing", "world_reading"))
    lines = [line for line in timeless(tmp_path / "run") if line["set"] == "world"]
    assert all(line["closed_book_acc"] > 0.9 for line in lines)


@pytest.mark.parametrize("remedy, says", [
    ("filter", "filter: dropped"), ("counterfactual", "counterfactual: added 30 rows"), ("qk", "qk: trains")])
def test_world_goes_through_the_same_run(remedy, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(inversion.PRETRAINING, "epochs", 0.01)
    history = inversion.main(["--device", "cpu", "--out-dir", str(tmp_path / "run"), "--max-steps", "2",
                              "--mitigation", remedy, "--num-examples", "300", "--eval-limit", "9"])
    assert says in capsys.readouterr().out and [line["n"] for line in history] == [9] * 6
    assert [line["set"] for line in history[:3]] == ["world", "world_agreeing", "world_reading"]
    assert "critical_push" in history[0] and "margin" not in history[1]


# -------------------------------------------------------------------------------------- bad input
def broken(folder, data):
    """(flags, what the one line must name) of each kind of bad input."""
    good = [dict(instruction="a", input="", output="b")]

    def file(name, content):
        text = content if isinstance(content, str) else "\n".join(map(json.dumps, content))
        (data / name).write_text(text)
        return data / name
    yield ["--dataset", "nosuchname"], "nosuchname: no rows"
    yield ["--dataset", data / "gone.jsonl"], "gone.jsonl: no rows"
    yield ["--model", data / "gone"], "gone: cannot be loaded"
    yield ["--eval-set", "no/such-set"], "no/such-set: no rows"
    yield ["--model", "no/such-model"], "pass a hub id or a local folder"
    rows = file("a.jsonl", good + [dict(instruction="a", input="")])
    yield ["--dataset", rows], "a.jsonl, row 2: ValueError(\"key 'output' must be a text"
    yield ["--dataset", file("b.json", json.dumps([dict(good[0], output=3)]))], "row 1: ValueError(\"key 'ou"
    yield ["--dataset", file("d.json", "[ ]")], "d.json: no rows"
    yield ["--dataset", file("e.jsonl", "\n")], "e.jsonl: no rows"
    chat = [dict(messages=[dict(role="user", text="x")])]
    yield ["--dataset", file("f.json", json.dumps(chat))], "f.json, row 1: ValueError(\"key 'content'"
    chat = [dict(messages=[dict(role="bot", content="x"), dict(role="assistant", content="x")])]
    yield ["--dataset", file("g.json", json.dumps(chat)), "--template", "tulu"], "unknown role bot"
    yield ["--dataset", file("h.json", json.dumps([dict(messages=[])]))], "h.json: no usable row"
    yield ["--dataset", file("i.json", json.dumps([dict(instuction="a")]))], "row 1: ValueError('it has none"
    yield ["--dataset", file("j.json", "[{]")], "j.json: no rows"
    yield ["--max-length", 8], "rows.json: no usable row"
    same = dict(CONFLICTS[0], answer="...")
    yield ["--eval-set", file("k.json", json.dumps([same]))], "k.json: no usable evaluation item"
    bare = dict(context="c", question="q", answer="x")
    yield ["--eval-set", file("l.json", json.dumps([bare]))], "row 1: ValueError('it has none"
    trap = dict(prompt="p", classes="[1", answer_index=0)
    yield ["--eval-set", file("m.json", json.dumps([trap]))], "m.json, row 1: SyntaxError"
    yield ["--batch-size", 0], "--batch_size 0: must be between 1"
    yield ["--lr", "nan"], "--lr nan"
    yield ["--lora-rank", 4, "--mitigation", "qk"], "--lora-rank does not go with qk"
    yield ["--template", "chat"], "has no chat template"
    yield ["--max-length", 4096], "has 512 positions"
    yield ["--compare", data / "gone"], "No such file"
    yield ["--mitigation", "counterfactual", "--counterfactual-data", folder / "conflicts.json"], "evaluated"
    bert = transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=420, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    bert.save_pretrained(data / "bert")
    transformers.AutoTokenizer.from_pretrained(folder / "llama").save_pretrained(data / "bert")
    yield ["--model", data / "bert"], "is no causal LM"


def test_bad_input_is_one_line_and_writes_nothing(folder, tmp_path, capsys, monkeypatch):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for bad, message in broken(folder, tmp_path):
        with pytest.raises((SystemExit, OSError)) as stopped:
            inversion.main(argv(folder, tmp_path / "run", *bad))
        told = capsys.readouterr().err
        if isinstance(stopped.value, OSError):  # told in one line where the script is started
            told = f"inversion.py: error: {stopped.value!r}"
        told = [line for line in told.splitlines() if line.startswith("inversion.py: error: ")]
        assert len(told) == 1 and message in told[0], (bad, told)
        assert not list(tmp_path.glob("run*/metrics.jsonl"))


# ------------------------------------------------------------------------------------- the promise
def test_readme_commands_parse():
    texts = (HERE / "README.md").read_text() + inversion.__doc__
    commands = re.findall(r"inversion\.py( --[^\n#`]*)", texts.replace("\\\n", " "))
    assert len(commands) > 8 and any("--mechanism" in command for command in commands)
    for command in commands:
        inversion.parse_flags(shlex.split(command))


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        inversion.parse_flags(["--help"])
    shown = capsys.readouterr().out
    assert all(entry[0] in shown for entry in inversion.FLAGS)
