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
    assert "2 of 6 items; 3 have no answer" in told and "1 count no memorised answer" in told


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
