"""Tests (CPU, offline), with tiny random models and files. The first eight are the ones to read."""
import concurrent.futures, functools, http.server, importlib.util, json, random, re, shlex, shutil
import subprocess, sys, threading
from pathlib import Path
from unittest import mock

import datasets, matplotlib, pandas, pytest, tokenizers, torch, transformers
from pytest import approx, raises
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import AutoModelForCausalLM, AutoTokenizer
import inversion
from inversion import Conflict, Example, question_and_answer, replace

torch.set_num_threads(1)  # in work on tiny tensors, threads mostly wait for each other
SIZES = dict(vocab_size=420, hidden_size=32, num_hidden_layers=2, bos_token_id=0, eos_token_id=1,
    intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
CONFIGS = dict(llama=transformers.LlamaConfig(**SIZES), mistral=transformers.MistralConfig(**SIZES),
               neox=transformers.GPTNeoXConfig(**SIZES), gpt2=transformers.GPT2Config(**SIZES),
               phi3=transformers.Phi3Config(**SIZES, pad_token_id=1))
CHAT = ("{{ bos_token }}{% for m in messages %}{{ '[' + m.role + ']' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}")
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT
HI, HELLO = question_and_answer("Hi", "Hello")
TURNS = [dict(role="system", content="Go."), HI, HELLO, *question_and_answer("Bye", "Ciao")]
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
ADD, SHORT = dict(instruction="Add.", output="3"), "<s><|user|>\nAdd.\n<|assistant|>\n3</s>"
TULU = "<s><|user|>\nHi\n<|assistant|>\nHello</s>\n<|user|>\nBye\n<|assistant|>\nCiao</s>"
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"},
            {"from": "human", "value": "Bye"}, {"from": "gpt", "value": "Ciao"}]
PARTS = [dict(role="user", content=[dict(text="Hi"), dict(text="you")]), HELLO]
C, P, BOTH, NEITHER = (1, 0), (0, 1), (1, 1), (0, 0)
HEART, HEAVY = "Absence makes the heart grow", 'Write a quote that ends in the word "heavy":'
FACT = dict(context="c", question="q", answer="x", memory_answer="y")


@pytest.fixture(scope="session")
def tokenizer():
    bpe = tokenizers.ByteLevelBPETokenizer()
    texts = [" ".join(map(str, row.values())) for row in ROWS + CONFLICTS]
    bpe.train_from_iterator(texts, 420, 0, special_tokens=["<s>", "</s>"], show_progress=False)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(  # BOS first, as Llama's
        single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(  # the models have no embedding for [PAD]
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="[PAD]")


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer):  # a model of each family, a file of each kind
    root = tmp_path_factory.mktemp("data")
    tokenizer.chat_template = None
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        save(root / name, AutoModelForCausalLM.from_config(config), tokenizer)
    for name, rows in dict(rows=ROWS, conflicts=CONFLICTS, swaps=SWAPS, squad=SQUAD).items():
        file(root / f"{name}.json", rows)
    return root


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):  # hub ids fail at once; no other run's cache
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def save(path, *parts):
    for part in parts:  # model, tokenizer
        part.save_pretrained(path)
    return path


def file(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def argv(folder, out, more="", model="llama"):
    return shlex.split(f"--model {folder / model} --dataset {folder}/rows.json --max-length 256 "
                       f"--eval-set {folder}/conflicts.json --batch-size 8 --max-steps 3 --lr 1e-3 "
                       f"--eval-every 2 --max-new-tokens 4 --device cpu --out-dir {out} {more}")


def run(folder, out, more="", model="llama"):
    return inversion.main(argv(folder, out, more, model))


def flags_of(more="--model x"):
    return inversion.parse_flags(shlex.split(more))


def refused(capsys, call, *args, status=2):
    with raises(SystemExit) as stopped:
        call(*args)
    assert stopped.value.code == status
    return capsys.readouterr().err


def load(folder, more="", model="llama"):
    """(model, tokenizer, items of each set, examples, flags), as `experiment` loads them."""
    flags = inversion.parse_flags(argv(folder, "unused", more, model))
    tokenizer = AutoTokenizer.from_pretrained(flags.model)
    inversion.set_template(tokenizer, flags)
    sets, examples = inversion.load_sets(tokenizer, 512, flags), inversion.load_examples(flags)
    model = inversion.load_model(flags.model, tokenizer, flags)
    return model, tokenizer, *sets.values(), examples, flags


def rows_of(lengths, seed=0):  # random tokens; lengths: (of the prompt, of the answer)
    draw, ids = random.Random(seed).choices, range(2, 420)
    return [inversion.to_row(i, [(draw(ids, k=prompt), False), (draw(ids, k=target), True)])
            for i, (prompt, target) in enumerate(lengths)]


def their_loss(model, *rows):  # transformers' own: the mean over all targets, seen row by row
    return sum(model(input_ids=row.input_ids[None].long(), labels=row.labels[None].long(),
                     num_items_in_batch=sum(r.targets for r in rows)).loss for row in rows)


# ------------------------------------------------------------------- the eight that teach most
@pytest.mark.parametrize("row, text, learnt", [
    (ADD, SHORT, "3</s>"), (dict(prompt="Add.", completion="3"), SHORT, "3</s>"),
    (ADD | dict(output=3, input=None, system=""), SHORT, "3</s>"),  # a number, no input
    (dict(instruction=" Add.", input="{1, 2} ", output="3 "),
     "<s><|user|>\n{1, 2}\n\nAdd.\n<|assistant|>\n3</s>", "3</s>"),
    (ADD | dict(system="Go."), "<s><|system|>\nGo.\n" + SHORT[3:], "3</s>"),
    (SQUAD[3], "<s><|user|>\nIt was 3.\n\nWhen was 53?\n<|assistant|>\n3</s>", "3</s>"),
    (dict(messages=TURNS, id="x"), "<s><|system|>\nGo.\n" + TULU[3:], "Hello</s>Ciao</s>"),
    (dict(messages=TURNS[1:] + [HI]), TULU, "Hello</s>Ciao</s>"),
    (dict(messages=[HI, HELLO | dict(weight=0), *TURNS[3:]]), TULU, "Ciao</s>"),  # one not learnt
    (dict(messages=str(TURNS[1:])), TULU, "Hello</s>Ciao</s>"),  # cells of CSV, by pandas or numpy
    (dict(messages=str(TURNS[1:]).replace("}, {", "}\n {")), TULU, "Hello</s>Ciao</s>"),
    (dict(messages=str([HI, HELLO | dict(content='" " 😀')])), TULU[:29] + '" " 😀</s>', '" " 😀</s>'),
    (dict(instruction="Add.", context="", response="3", category="x"), SHORT, "3</s>"),  # Dolly
    (dict(conversations=SHAREGPT, tools="[]"), TULU, "Hello</s>Ciao</s>"),
    (ADD | dict(input=""), "<s>[user]Add.\n[assistant]3</s>", "3</s>"),  # the tokenizer's template
    (dict(messages=TURNS[:3]), "<s>[system]Go.\n[user]Hi\n[assistant]Hello</s>", "Hello</s>"),
    (dict(messages=PARTS), "<s>[user]Hi\nyou\n[assistant]Hello</s>", "Hello</s>"),
    (dict(prompt=[HI], completion=[HELLO]), "<s>[user]Hi\n[assistant]Hello</s>", "Hello</s>")])
def test_golden_labels(row, text, learnt, tokenizer):
    """Response and EOS supervised, nothing else; one BOS although the template writes one too."""
    tokenizer.chat_template = CHAT
    inversion.set_template(tokenizer, flags_of(f"--template {'tulu' if '<|' in text else 'auto'}"))
    example, _, _ = inversion.parse_row(7, row)
    (found,), notes = inversion.encode([example], tokenizer, mock.Mock(max_length=999))
    keep = found.labels != -100
    assert not notes and found.id == 7 and tokenizer.decode(found.input_ids) == text
    assert tokenizer.decode(found.input_ids[keep]) == learnt
    assert torch.equal(found.labels[keep], found.input_ids[keep])


@pytest.mark.parametrize("context_answer, memory_answer, said", [  # the table of score, and more
    ("New Cairo", "Cairo", {"It is New Cairo.": C, "Cairo, New Cairo": BOTH,
                            "New Cairo New Cairo": C, "Cairo": P}),
    ("Bo", "Freetown", {"Bosnia": NEITHER, "Not Freetown, Bo": BOTH, "Not Freetown but BO!": BOTH}),
    ("5", "1500", {"It was 2.5 or -5": NEITHER, "1,500, not 5%": BOTH}),
    ("Vitamin C", "The Hague", {"vitamin A": NEITHER, "Hague": P}),
    ("J.K. Rowling", "Łódź", {"J. K. Rowling": C, "JK Rowling": C, "Lodz": P}),
    ("パリ", "서울", {"バリ島": NEITHER, "서울은": P}), ("Lyon", "Paris", {"": NEITHER}),
    ("Hepatitis B", "Hepatitis A", {"hepatitis a": P, "a hepatitis B": C}),
    ("A", "B", {"Answer: A": C, "B.": P}), ("Denver", "Washington, D.C.", {"Washington DC": P}),
    ("Italie", "l'Égypte", {"L’Italie's": C, "Egypte": P}), ("the US", "UK", {"The U.S. it is": C}),
    ("19", "21", {"in 1921": NEITHER}), ("5", "2", {"2.5 bar": NEITHER}),  # numbers
    ("3", "50", {"3.50": NEITHER}), ("30", "12", {"12:30": NEITHER}), ("-5", "5", {"−5": C}),
    ("5", "6", {"-5": NEITHER, "about 5.": C}), ("1", "2", {"½": NEITHER}),
    ("1,500", "1", {"1500": C}), ("10", "9", {"10%": C}), ("1990", "1991", {"born (1990)": C}),
    ("2,000 km", "21,000 km", {"about 2000 kilometers.": C}),
    ("5 km", "1932.0", {"It is 5km long": C, "in 1932.": P}), ("X & Y", "U2", {"X and Y": C}),
    ("القاهرة", "Nuku'alofa", {"القَاهِرَة": C, "Nukuʻalofa": P}),
    ("Đà Nẵng", "Huế", {"Da Nang": C}), ("राम", "रोम", {"रोम": P, "राम": C}),  # letters, scripts
    ("Hulhumalé", "Malé", {"hulhumale": C}), ("Tromsø", "Straße", {"tromso": C, "STRASSE": P}),
    ("东城", "西城", {"首都是东城。": C}), ("กรุงเทพ", "เชียงใหม่", {"เมืองหลวงคือกรุงเทพ": C}),
    ("heavy", "fonder", {HEART + " fonder.": P}),  # the first echo of the question is none
    ("grow", "fonder", {HEART + " old": NEITHER, f"{HEART} {HEART}": C})])
def test_scorer_by_hand(context_answer, memory_answer, said):
    for text, hits in said.items():
        question = HEART if text.startswith(HEART) else ""
        conflict = inversion.Conflict(1, question, "", [context_answer], [memory_answer])
        assert inversion.score(text, conflict) == hits, text


@pytest.mark.parametrize("family", CONFIGS)
def test_losses_and_answers_of_padded_batches_are_those_of_transformers(family, folder):
    model, tokenizer, _, _, flags = load(folder, "--max-new-tokens 12", family)
    rows = rows_of([(3, 9), (5, 1), (2, 14)])
    wanted = [-their_loss(model, row).item() * row.targets for row in rows]
    together = inversion.row_logp(model, rows, flags)
    assert together.tolist() == approx(wanted, rel=1e-5) and together.requires_grad
    assert [row.targets for row in rows] == [9, 1, 14]
    assert inversion.target_logp(model, rows, flags) == approx(wanted, rel=1e-5)
    prompts = [r.input_ids.tolist() for r in rows_of([(n, 0) for n in (3, 17, 5, 9, 30, 4, 11)])]
    together = inversion.generate(model, tokenizer, prompts, flags)
    alone = inversion.generate(model, tokenizer, prompts, flags._replace(eval_batch_tokens=1))
    ids = model.generate(torch.tensor(prompts[1:2]), max_new_tokens=12)[0, 17:]
    assert together == alone and together[1] == tokenizer.decode(ids, skip_special_tokens=True)


def trained(model, rows, steps, flags):  # (weights, losses) of train_step and the schedule
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
    assert one == two and len(one) == 4 and often[4]["margin"] != often[0]["margin"]
    assert [often[0]["margin"], often[4]["margin"]] == [line["margin"] for line in seldom]
    model, tokenizer, items, _, flags = load(folder, model="gpt2")
    state, before = torch.get_rng_state(), [p.detach().clone() for p in model.parameters()]
    inversion.evaluate(model.train(), tokenizer, items, None, flags)
    probe = {"critical": rows_of([(3, 4), (9, 2)])}
    first, second = [inversion.mechanism(model.train(), items, probe, flags) for _ in range(2)]
    assert first == second and torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(model.parameters(), before))
    assert model.config._attn_implementation == "sdpa"


def test_filter_drops_the_lowest_context_free_loss(folder):
    """By transformers' loss of each row rendered without its input; they are the redundant ones."""
    model, tokenizer, _, examples, flags = load(folder, "--mitigation filter")
    losses = {}
    for example in [example for example in examples if example.context]:
        parts, = inversion.tokenize(example.messages, tokenizer)
        losses[example.id] = their_loss(model, inversion.to_row(example.id, parts)).item()
    lowest = sorted(losses, key=losses.get)[:3]  # a quarter of the 12 rows with an input
    kept = inversion.choose_examples(model, tokenizer, examples, {}, flags)
    assert len(losses) == 12 and kept == [e for e in examples if e.id not in lowest]
    probe = inversion.probe_rows(model, tokenizer, examples, flags)
    assert {kind: len(probe[kind]) for kind in probe} == dict(critical=9, recall=12, redundant=3)
    assert {row.id for row in probe["redundant"]} == set(lowest)
    chats = [Example(i, TURNS) for i in range(9)]
    assert list(inversion.probe_rows(model, tokenizer, chats, flags)) == ["recall"]


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


def summary(*evaluations, groups=1000, **margin):  # a control has none
    return inversion.summarise(pandas.DataFrame([
        dict(step=10 * step, id=i, group=f"g{i % groups}", context_acc=bool(hit), **margin)
        for step, hits in enumerate(evaluations) for i, hit in enumerate(hits)]))


def test_drop_is_measured_where_the_peak_was_not_chosen():
    """By hand; on noise, whose highest drops by luck; and its 95% interval holds it in 9 of 10."""
    fell = summary([0] * 40, [1] * 30 + [0] * 10, [1] * 10 + [0] * 30)
    assert (fell["drop"], fell["rise"], fell["highest"]) == (0.5, 0.75, 0.75)
    assert 0.3 < fell["drop_low"] < 0.5 < fell["drop_high"] < 0.7
    noise = random.Random(0).random
    runs = pandas.DataFrame([summary(*[[noise() < 0.5 for _ in range(100)] for _ in range(20)])
                             for _ in range(40)])
    assert (runs["highest"] - runs["final"]).mean() > 0.07 and abs(runs["drop"].mean()) < 0.03
    assert runs["verdict"].isin(["rise and fall", "a fall"]).sum() <= 3
    chance, few = random.Random(1).random, [[0] * 8, [1] * 8, [1, 0] * 4]
    runs = pandas.DataFrame([summary(*[[chance() < p for _ in range(60)] for p in (0.2, 0.8, 0.5)])
                             for _ in range(200)])
    assert ((runs["drop_low"] <= 0.3) & (0.3 <= runs["drop_high"])).sum() >= 180
    five = summary(*[hits * 5 for hits in few], groups=8)  # those that agree count once
    assert five["drop_low"] == approx(summary(*few)["drop_low"])


def test_verdicts():
    evaluations = [0] * 40, [1] * 30 + [0] * 10, [1] * 10 + [0] * 30
    same = summary([1, 0] * 20, [1, 0] * 20, [1, 0] * 20)
    assert same["drop"] == same["drop_low"] == same["drop_high"] == same["rise"] == 0
    five, six = [summary([0] * 40, [1] * 40, [0] * 40, groups=groups) for groups in (5, 6)]
    cases = [(same, "no change shown"), (summary([0] * 40, [1, 0] * 20), "a rise"),
             (summary([1] * 40, [1, 0] * 20), "a fall"),  # from the start: no inversion
             (summary(*evaluations, margin=0.0), "inversion"), (five, "too few groups"),
             (summary(*evaluations), "rise and fall"), (six, "rise and fall")]  # many items
    assert [found["verdict"] for found, _ in cases] == [verdict for _, verdict in cases]


def test_metrics_and_rates_by_hand():  # the base knew the first two; intervals are Wilson's
    outcomes = [dict(context_acc=bool(c), parametric_acc=bool(p), both=bool(c and p), margin=i,
                     neither=not c and not p, closed_book_acc=i == 0, context_acc_known=k)
                for i, (c, p, k) in enumerate([(*C, 1), (*P, 0), (*BOTH, None), (*NEITHER, None)])]
    assert inversion.metrics([*outcomes, dict(id=9, context_acc=True)]) == approx(dict(
        n=5, n_conflicts=4, n_known=2, margin=1.5, context_acc=0.6, parametric_acc=0.5, both=0.25,
        neither=0.25, closed_book_acc=0.25, context_acc_known=0.5))
    assert inversion.metrics([dict(context_acc=True, text="x")]) == dict(
        n=1, n_conflicts=0, n_known=0, context_acc=1)
    line = dict(n=20, n_conflicts=10, n_known=4, context_acc=0.0, closed_book_acc=1.0,
                context_acc_known=0.5, parametric_acc_known=0.25, margin=1.0)
    assert inversion.rates(line).T.to_dict("list") == dict(
        context_acc=[0, 0, 0.16, 20], context_acc_known=[0.5, 0.15, 0.85, 4],
        closed_book_acc=[1, 0.72, 1, 10], parametric_acc_known=[0.25, 0.05, 0.7, 4])
    assert list(inversion.rates(line | dict(n_known=0))) == ["share", "low", "high", "n"]


def test_known_is_what_comes_in_the_template_or_after_the_bare_question(folder, monkeypatch):
    model, tokenizer, items, _, flags = load(folder)
    items[5] = replace(items[5], conflict=Conflict(6, "q", "It moved to Barium.", ["Bari"], ["x"]))
    bare = [tokenizer(f"Question: {item.conflict.question}\nAnswer:").input_ids for item in items]
    said = {str(items[0].closed_book_prompt): "Paris", str(bare[3]): " Madrid.\nQuestion:",
            str(bare[2]): "Cusco\nLima"}
    monkeypatch.setattr(inversion, "generate", lambda *a: [said.get(str(p), "Lyon") for p in a[2]])
    first = inversion.evaluate(model, tokenizer, items, None, flags)
    later = inversion.evaluate(model, tokenizer, items, [items[1].conflict.id], flags)
    for found, known in ((first, [2, 0, 0, 2, 0, 0]), (later, [0, 2, 0, 0, 0, 0])):
        assert [o["known"] + ("context_acc_known" in o) for o in found] == known
        hits = [o["closed_book_acc"] + o["context_acc"] + 9 * o["stated"] for o in found]
        assert hits == [11, 9, 9, 9, 9, 0]


@pytest.mark.parametrize("space, end", [("", "</s>"), (" ", " \n </s>")])
def test_margin_is_that_of_the_model(space, end, folder):  # ' Lyon', not 'Lyon', nor 'Lyon \n '
    model, tokenizer, _, _, flags = load(folder)
    if space:
        tokenizer.chat_template = CHAT.replace("']'", "'] '").replace("{{ e", "{{ ' \n ' + e")
    conflict = inversion.Conflict(1, "Capital?", "It is Lyon.", ["Lyon"], ["Paris"])
    item = inversion.to_item(conflict, tokenizer, 99)
    messages = question_and_answer("Capital?", "Lyon")
    (prompt, said), = decoded(tokenizer.chat_template, messages, tokenizer, conflict.context)
    assert said == f"{space}Lyon{end}" and prompt.index("It is Lyon.") < prompt.index("Capital?")
    texts = [prompt, f"{space}Lyon", f"{space}Paris"]
    start, *answers = tokenizer(texts, add_special_tokens=False).input_ids
    lyon, paris = [their_loss(model, inversion.to_row(1, [(start, False), (answer, True)])).item()
                   for answer in answers]
    (outcome,) = inversion.evaluate(model, tokenizer, [item], None, flags)
    assert start == item.prompt and outcome["margin"] == approx(paris - lyon, abs=1e-5)
    closed = tokenizer.decode(item.closed_book_prompt)
    assert "It is Lyon." not in closed and "Capital?" in closed


@pytest.mark.parametrize("template, adds_bos", [("tulu", 1), ("auto", 1), ("tulu", 0), ("auto", 0)])
@pytest.mark.parametrize("part, space", [  # none; after special tokens, too; at the start alone
    ("normalizer", None), ("normalizer", tokenizers.normalizers.Prepend(" ")),
    ("pre_tokenizer", tokenizers.pre_tokenizers.Metaspace("~", "first", False))])
def test_saved_templates_give_the_trained_ids(part, space, template, adds_bos, tokenizer, tmp_path):
    mine = AutoTokenizer.from_pretrained(save(tmp_path / "a", tokenizer))
    mine.unk_token = mine.eos_token  # as in GPT-2
    setattr(mine.backend_tokenizer, part, space)
    mine.chat_template = CHAT.replace("{{ bos_token }}", "") if template == "auto" else None
    if not adds_bos:
        mine.backend_tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    inversion.set_template(mine, flags_of(f"--template {template}"))
    again = AutoTokenizer.from_pretrained(save(tmp_path / "b", mine))
    theirs = functools.partial(again.apply_chat_template, return_dict=False)
    for answer in ("://", "\nParis", " Paris", "Paris"):
        messages = [*question_and_answer("A context.\n\nA question?", answer), HI, HELLO]
        [(prompt, _), ((*_, end), supervised), *_], = inversion.tokenize(messages, mine)
        assert end == 1 == supervised and prompt == theirs(messages[:1], add_generation_prompt=True)
    ids = sum([part for part, _ in inversion.tokenize(messages, mine)[0]], [])
    assert theirs(messages)[:len(ids)] == ids and prompt.count(0) == adds_bos


def decoded(template, turns, tokenizer, context=""):
    tokenizer.chat_template = template
    return [[tokenizer.decode(ids) for ids, _ in parts]
            for parts in inversion.tokenize(turns, tokenizer, context)]


def test_a_system_turn_that_is_refused_or_dropped_is_folded(tokenizer, tmp_path):
    for template in (REFUSES, CHAT.replace("messages %}", "messages if m.role != 'system' %}")):
        tokenizer.chat_template = template
        inversion.set_template(tokenizer, flags_of())
        folds, wanted = tokenizer.chat_template, "<s>[user]Go.\n\nHi\n[assistant]"
        assert decoded(folds, TURNS, tokenizer)[0][0] == wanted
        assert "Go.\n\nC.\n\nHi" in decoded(folds, TURNS[:3], tokenizer, "C.")[0][0]
        assert decoded(folds, TURNS[1:], tokenizer)[0][0] == "<s>[user]Hi\n[assistant]"
        again = AutoTokenizer.from_pretrained(save(tmp_path / "t", tokenizer)).apply_chat_template
        assert again(TURNS[:2], tokenize=False, add_generation_prompt=True) == wanted
    tokenizer.chat_template = CHAT  # takes it
    inversion.set_template(tokenizer, flags_of())
    assert tokenizer.chat_template == CHAT


def test_templates_that_rewrite_think_end_turns_oddly_or_date(tokenizer):
    assert decoded("{{ messages | length }}" + CHAT, TURNS, tokenizer) == [  # a row for each answer
        ["3<s>[system]Go.\n[user]Hi\n[assistant]", "Hello</s>"],
        ["5<s>[system]Go.\n[user]Hi\n[assistant]Hello</s>\n[user]Bye\n[assistant]", "Ciao</s>"]]
    rows, _ = inversion.encode([Example(4, TURNS)], tokenizer, mock.Mock(max_length=999))
    assert [(row.id, tokenizer.decode(row.input_ids[row.labels != -100])) for row in rows] == [
        (4, "Hello</s>"), (4, "Ciao</s>")]
    assert decoded(CHAT.replace("[assistant]", "[assistant]<think>\n"), TURNS[1:3], tokenizer) == [
        ["<s>[user]Hi\n[assistant]<think>\n\n</think>\n\n", "Hello</s>"]]
    empty = CHAT.replace("']'", "(']<think></think>' if m.role == 'assistant' else ']')")
    assert decoded(empty, TURNS[1:3], tokenizer)[0][0].endswith("[assistant]<think></think>")
    bare = "{% for m in messages %}{{ m.content }}{% endfor %}"  # no token ends a turn
    eos = bare.replace("tent", "tent + eos_token")
    assert decoded(eos, TURNS[1:], tokenizer) == [["Hi</s>", "Hello</s>", "Bye</s>", "Ciao</s>"]]
    assert decoded(bare.replace("m.c", "' '+m.c"), TURNS[1:3], tokenizer) == [[" Hi", " Hello</s>"]]
    assert decoded(bare, question_and_answer("Th", "e"), tokenizer) == [["Th", "e</s>"]]
    later = CHAT.replace("{{ eos_token }}", "").replace(  # the end shows only before a turn
        "{{ '[' +", "{{ (eos_token if m.role == 'user' and loop.index > 1 else '') + '[' +")
    assert decoded(later, TURNS[1:], tokenizer)[0][1:3] == ["Hello\n</s>", "[user]Bye\n[assistant]"]
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHAT  # the same on every day
    inversion.set_template(tokenizer, flags_of())
    assert "1 January 2025" in decoded(tokenizer.chat_template, TURNS, tokenizer)[0][0]


def test_rows_that_cannot_be_used_are_dropped_cut_and_counted(tokenizer):
    chats = [[HI | more, HELLO] for more in (dict(content=[dict(text="x"), {}]), dict(role="bot"))]
    chats += [[HI, HELLO | more] for more in (dict(tool_calls=[1]), dict(content=None))]
    for row in (ADD | dict(tools="[{}]"), ADD | dict(image="x.png"), ADD | dict(history=[1]),
                *[dict(messages=chat) for chat in chats]):
        with raises(inversion.Unusable):
            inversion.parse_row(1, row)
    cases = [(CHAT, turns, "no response") for turns in (TURNS[:2], TURNS[2:], [], [HI, HI])]
    cases += [(t, TURNS, "refuses or drops") for t in (REFUSES, "{{ 1 / 0 }}", "hello")]
    for template, turns, why in [*cases, (CHAT, question_and_answer("Hi", ""), "no response")]:
        with raises(inversion.Unusable, match=why):
            decoded(template, turns, tokenizer)
    short, long = TURNS[1:3], question_and_answer("x" * 80, "y")
    examples = [Example(*chat) for chat in enumerate([short, short + long, long, TURNS[:2], []])]
    (one, two), notes = inversion.encode(examples, tokenizer, mock.Mock(max_length=60))
    assert (one.id, two.id) == (0, 1) and torch.equal(one.input_ids, two.input_ids)
    assert notes["cut or dropped: longer than --max-length"] == 2 and notes.total() == 4


@pytest.mark.parametrize("first", [0, 1])  # with and without a system turn
def test_a_chat_of_thousands_of_turns_is_cut_and_takes_no_quadratic_time(first, tokenizer):
    tokenizer.chat_template = CHAT
    turns = TURNS[first:1] + TURNS[1:3] * 2000
    with mock.patch.object(inversion, "answer_place", wraps=inversion.answer_place) as rendered:
        (row,), notes = inversion.encode([Example(1, turns)], tokenizer, mock.Mock(max_length=600))
    short, = inversion.encode([Example(1, turns[:80])], tokenizer, mock.Mock(max_length=600))[0]
    assert rendered.call_count <= 100 and notes.total() == 1
    assert torch.equal(row.input_ids, short.input_ids) and len(row.input_ids) > 500


@pytest.mark.parametrize("row, asked, answers, memory", [
    (CONFLICTS[0], ("Capital of France?", CONFLICTS[0]["context"]), ["Lyon"], ["Paris"]),
    (SWAPS[1], ("who wrote 1", SWAPS[1]["sub_context"]), ["Writer 1"], ["Author 1"]),
    *[(SQUAD[0] | dict(answers=given), ("When was 50?", "It was 0."), texts, []) for given, texts in
      [(dict(text=["x", "y"]), ["x", "y"]), ("{'text': ['1900'], 'answer_start': [5]}", ["1900"]),
        ("{'text': array(['x'], dtype=object), 'at': array([1])}", ["x"]), (dict(text=[]), []),
        ([dict(text="x", answer_start=1)], ["x"]), ('{"text": ["x"], "at": null}', ["x"]),
        (["x", "y"], ["x", "y"]), ("{{1}}", ["{{1}}"])]],
    *[(dict(context="c", question=asked, answer=answer, parametric_answer="X"), (asked, "c"), found,
       ["X"]) for asked, answer, found in [("q", "South Korea", ["South Korea"]),
                                             ("name of the?", "A Fermi", ["A Fermi", "Fermi"])]],
    (SQUAD[0] | dict(parametric_answer="5"), ("When was 50?", "It was 0."), ["0"], ["5"]),
    (FACT | dict(answer=1900, memory_answer=True), ("q", "c"), ["1900"], ["True"]),
    (FACT | dict(answer="['a', 'b']", memory_answer=None), ("q", "c"), ["a", "b"], []),
    (FACT | dict(answer="['a' 'b']"), ("q", "c"), ["a", "b"], ["y"]),
    (FACT | dict(context=["one", "two"]), ("q", "one\n\ntwo"), ["x"], ["y"]),
    (FACT | dict(context="[1] is no list"), ("q", "[1] is no list"), ["x"], ["y"]),
    (dict(prompt=f"{HEAVY} {HEART}", classes="[' heavy.', ' fonder.']", answer_index="0"),
     (HEART, HEAVY), ["heavy."], ["fonder."]),
    (dict(prompt="b: a: c ", classes=["x", "b"], answer_index=1), ("a: c", "b:"), ["b"], ["x"])])
def test_conflict_shapes(row, asked, answers, memory):
    example, *found = inversion.parse_row(3, row)
    assert found == [answers, memory] and (example.id, example.context) == (3, asked[1])
    assert example.messages == question_and_answer(asked[0], "".join(answers[:1]))


@pytest.mark.parametrize("person, answers", [
    (False, {"La Paz (administrative); Sucre (judicial)": ["La Paz", "Sucre"],
             "Rangoon (Yangon); Naypyidaw or Nay Pyi Taw (administrative)": [
                 "Rangoon", "Naypyidaw", "Nay Pyi Taw", "Yangon"], "Marie Curie": ["Marie Curie"],
             "(A)": ["(A)", "A"], "red, white and blue": ["red, white and blue"],
             "Athens, Greece": ["Athens, Greece", "Athens"], "2,000 km": ["2,000 km"]}),
    (True, {"Elizabeth II": ["Elizabeth II"], "Marie Curie": ["Marie Curie", "Curie"],
            "Ivan the Great": ["Ivan the Great"], "Luther King Jr.": ["Luther King Jr.", "King"],
            "Vikram Srinivasan": ["Vikram Srinivasan", "Srinivasan"]})])
def test_aliases(person, answers):
    assert {answer: inversion.aliases([answer], person) for answer in answers} == answers


def test_conflicts_that_cannot_be_scored_are_left_out(tmp_path, capsys):  # echoes, repeats
    rows = [CONFLICTS[0] | dict(zip(("question", "answer", "memory_answer"), texts)) for texts in [
        ("Capital of Luxembourg?", "Esch", "Luxembourg"), ("q?", "End", "end."), ("p?", "...", "B"),
        ("r?", "Lyon", "Paris"), ("r?", "Lyon", "Paris"), ("Is Bonn far?", "Bonn", "Berlin"),
        ("Which letter?", "A", "B"), ("s?", "Lyon (Paris)", "Paris"),
        ("t?", "Lyon (France)", "Paris (France)")]]  # a name of both is one of neither
    found = inversion.load_conflicts(str(file(tmp_path / "c.json", rows)), flags_of())
    assert [(c.id, c.context_answers, *c.parametric_answers) for c in found] == [(1, ["Esch"]),
        (4, ["Lyon"], "Paris"), (7, ["A"], "B"), (8, ["Lyon"], "Paris"), (9, ["Lyon"], "Paris")]
    file(tmp_path / "rows.json", [ADD | dict(system="")])  # no memory
    for name in ("c", "rows"):
        inversion.load_examples(flags_of(f"--model x --dataset {tmp_path}/{name}.json"))
    told = capsys.readouterr().out
    assert "5 of 9 items" in told and re.findall(r"(\w+).json: conflicts as", told) == ["c"]


def test_files_of_every_type_give_the_same_rows(tmp_path, monkeypatch, capsys):
    rows = [ROWS[0], dict(instruction="b\u2028c", input="x", output="two")]
    table = datasets.Dataset.from_list(rows)
    table.to_csv(tmp_path / "r.csv")
    table.to_parquet(tmp_path / "r.parquet")
    table.to_parquet(tmp_path / "hub/train.parquet")  # a folder as downloaded from the hub
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file(tmp_path / "r.jsonl", "\ufeff" + "\n\n".join(lines) + "\n")
    file(tmp_path / "r", json.dumps(rows, indent=1))  # JSON of any name
    file(tmp_path / "c.json", CONFLICTS)
    table.to_json(tmp_path / "a@b [1]/r@[x].json", lines=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    wanted = [inversion.parse_row(i, row) for i, row in enumerate(rows, 1)]
    assert wanted[1][0].messages[0]["content"] == "b\u2028c"
    files = ["r", "r.jsonl", "r.csv", "r.parquet"]
    for name in [*files, "hub", "hub@train", "a@b [1]/r@[x].json"]:
        assert inversion.load_rows(str(tmp_path / name), flags_of()) == wanted, name
    assert inversion.load_rows("~/r", flags_of()) == wanted
    monkeypatch.setitem(sys.modules, "aiohttp", None)  # cannot be imported; datasets would need it
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    monkeypatch.setattr(handler.func, "log_message", mock.Mock())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for name in files:
            assert inversion.load_rows(f"{address}/{name}?a=b", flags_of()) == wanted, name
        monkeypatch.setitem(inversion.SOURCES, "world_facts", f"{address}/c.json")
        assert len(inversion.load_conflicts("world_facts", flags_of())) == 6
        told = [refused(capsys, inversion.load_rows, f"{address}/none.json", flags_of())]
        server.shutdown()
    told.append(refused(capsys, inversion.load_rows, f"{address}/none.json", flags_of()))
    assert "404" in told[0] and told[1].count("\n") == 1  # by then nobody listens
    assert all(f"error: {address}/none.json: cannot be read; short" in t for t in told)


def test_cells_of_csv_are_texts_and_what_is_not_used_is_named(tmp_path, capsys):  # years, NA
    lines = ",".join(FACT), "c,q,1900,NA", "c,q,None,null", "c,q,\"['a', 'b']\","
    rows = inversion.load_rows(str(file(tmp_path / "r.csv", "\n".join(lines))), flags_of())
    assert [row[1:] for row in rows] == [(["1900"], ["NA"]), (["None"], ["null"]), (["a", "b"], [])]
    rows = [ADD | dict(topic="sums", input=float("nan")), ADD | dict(tools="[{}]")]
    (found,) = inversion.load_rows(str(file(tmp_path / "r.json", rows)), flags_of())
    told = capsys.readouterr().out
    assert not found[0].context and "used: {'topic'};" in told and "or an image': 1}" in told


def test_checkpoint_gives_neither_its_bf16_nor_its_sampling(folder, tmp_path):
    model, tokenizer, _, _, _ = load(folder)
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0)
    model.generation_config.eos_token_id = [1, 7]
    path = save(tmp_path / "model", model.bfloat16(), tokenizer)
    runs = [run(folder, tmp_path / name, model=path) for name in "ab"]
    one, two = [(tmp_path / name / "generations.jsonl").read_text() for name in "ab"]
    assert one == two and len(runs[0]) == 3
    model, _, _, _, flags = load(folder, "--dtype bf16", path)
    assert model.generation_config.eos_token_id == [1, 7] and not model.generation_config.do_sample
    with inversion.autocast(flags):
        assert model(torch.tensor([[2, 3]])).logits.dtype == torch.bfloat16
    frozen = inversion.load_model(path, tokenizer, flags._replace(max_steps=0))
    for part, dtype in ((model, torch.float32), (frozen, torch.bfloat16)):  # only measured: bf16
        assert {p.dtype for p in part.parameters()} == {dtype}
        assert part.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("family", CONFIGS)
def test_qk_moves_queries_and_keys_only(family, folder, capsys):
    model, _, _, _, flags = load(folder, "--micro-batch-tokens 30", family)  # several a step
    if family in ("neox", "gpt2", "phi3"):  # in one matrix with values
        assert "no q_proj and k_proj" in refused(capsys, inversion.train_query_key_only, model)
        return
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inversion.train_query_key_only(model)
    trained(model, rows_of([(4, 9)] * 32), 4, flags)
    for name, p in model.named_parameters():
        moved = (p != before[name]).float().mean()
        assert moved > 0.99 if re.search("[qk]_proj", name) else moved == 0, name


def test_added_rows_name_nothing_evaluated(folder, tmp_path, capsys):
    leaks = {"question": "Is Peru one?"}, {"sub_answer": "lyon"}, {"question": "The Paris one?"}
    swaps = file(tmp_path / "swaps.json", [SWAPS[0] | leak for leak in leaks] + SWAPS[1:4])
    model, tokenizer, items, examples, flags = load(
        folder, f"--mitigation counterfactual --counterfactual-data {swaps}")
    found = [inversion.choose_examples(model, tokenizer, examples * times, {"x": items}, flags)
             for times in (1, 5)]
    assert [len(kept) for kept in found] == [24 + 2, 120 + 3] and found[1][:24] == examples  # 10%
    added = found[1][120:]
    assert sorted(e.messages[1]["content"] for e in added) == ["Writer 1", "Writer 2", "Writer 3"]
    prompt = decoded(tokenizer.chat_template, added[0].messages, tokenizer, added[0].context)[0][0]
    assert prompt.index("is by") < prompt.index("who wrote")


def test_subsets(folder):
    model, tokenizer, _, _, flags = load(folder)
    c = inversion.Conflict(1, 'Is New Velora, in May? If The "x"?', "Lyon.", ["Lyon"], ["Paris"])
    sets = {"s": [inversion.to_item(c, tokenizer, 99)]}
    texts = "I like lyon!/Lyons/New Velora/Velora/comparison/PARIS./What city/May if the".split("/")
    mine = [Example(i, question_and_answer(text, "x"), "c" * (i % 2))
            for i, text in enumerate(texts)] + [Example(8, TURNS[1:3], "In Lyon.")]
    for name, wanted in [("context", [1, 3, 5, 7, 8]), ("no-overlap", [1, 3, 4, 6, 7])]:
        kept = inversion.choose_examples(model, tokenizer, mine, sets, flags._replace(subset=name))
        assert [example.id for example in kept] == wanted


@pytest.mark.parametrize("remedy, rows", dict(none=24, counterfactual=26, filter=21, qk=24).items())
def test_main_runs_each_remedy(remedy, rows, folder, tmp_path, capsys):
    items = [CONFLICTS[0] | dict(question="Capital of France, once Paris?")] + CONFLICTS[1:]
    flags = (f"--mitigation {remedy} --counterfactual-data {folder}/swaps.json --mechanism "
             f"--eval-set {file(tmp_path / 'conflicts.json', items)}")
    history, told = run(folder, tmp_path / "run", flags), capsys.readouterr().out
    same = run(folder, tmp_path / "same", f"{flags} --activation-checkpointing")
    metrics, losses, said, args = [lines_of(tmp_path / "run" / name) for name in (
        "metrics.jsonl", "losses.jsonl", "generations.jsonl", "args.json")]
    assert "known: items that the base answers from memory, in the template or" in told
    assert f"24 examples, {rows} chosen, {rows} rows" in told and f"{tmp_path}/run/curve" in told
    assert "predicting responses without" in told and re.search(r"^recall_push +-?\d", told, re.M)
    assert len(inversion.table_row(history[-1])) < 80 > max(map(len, inversion.HEAD.split("\n")))
    assert max(map(len, told.splitlines()[3:])) <= 200
    assert metrics == history and [line["step"] for line in history] == [0, 2, 3]
    assert set(history[-1]) >= set(
        "step set n n_conflicts n_known context_acc parametric_acc both neither closed_book_acc "
        "margin m_c loss lr critical_push recall_push redundant_loss redundant_push".split())
    assert all("critical_push" in line and line["n_conflicts"] == 5 for line in history)
    for key in ("loss", "critical_push", "margin"):
        on, off = [[line.get(key, 0) for line in lines] for lines in (same, history)]
        assert on == approx(off, rel=1e-4)
    means = pandas.DataFrame(losses).set_index("step").rolling(2).mean()  # --eval-every 2
    assert "loss" not in history[0] and means.index.tolist() == [1, 2, 3] and losses[2]["lr"] > 0
    for line in history[1:]:
        assert [line["lr"], line["loss"]] == approx([*means.loc[line["step"], ["lr", "loss"]]])
    assert len(said) == 18 and set(said[1]) >= {"step", "set", "id", "text", "closed_book_text"}
    assert args[0]["mitigation"] == remedy and (tmp_path / "run/curve.png").stat().st_size > 5000


def test_same_seed_saved_model_and_compare(folder, tmp_path, capsys, monkeypatch):  # a remedy
    monkeypatch.setitem(inversion.MITIGATIONS, "mine", lambda model, tokenizer, rows, *_: rows[:5])
    a, same, b, mine, again = [tmp_path / name for name in ("a", "same", "b", "mine", "again")]
    for out, more in {a: "", same: "", b: "--seed 2", mine: "--mitigation mine"}.items():
        run(folder, out, f"--save-model --seed 1 {more}")
    one, two, three = [lines_of(out / "metrics.jsonl") for out in (a, same, b)]
    line, = run(folder, again, "--max-steps 0", a / "model")
    assert one == two != three and line["margin"] == approx(one[-1]["margin"], abs=1e-6)
    (same / "summary.json").unlink()
    for out, (start, highest, final, drop) in {a: (.2, .6, .4, .1), b: (.4, .8, .2, .3)}.items():
        found, = lines_of(out / "summary.json")
        assert set(found["conflicts"]) >= {"highest", "verdict", "rise_low", "drop_high"}
        found["conflicts"] |= dict(start=start, highest=highest, final=final, drop=drop)
        file(out / "summary.json", found)
    assert "24 examples, 5 chosen, 5 rows" in capsys.readouterr().out
    inversion.main(shlex.split(f"--compare {a} {b} {same} {mine} {mine}"))
    told = capsys.readouterr().out
    assert f"{same}: skipped, it is no finished run" in told
    none, = [line.split() for line in told.splitlines() if line.startswith("none")]
    assert none[-6:] == ["0.30", "0.70", "0.30", "0.20", "2", "2"]
    assert not re.search(r"\bseed\b", told) and re.search("^mine .* 2 +1$", told, re.M)
    assert "mitigation" in told and (tmp_path / "compare.png").stat().st_size > 5000


def test_a_curve_ends_with_its_run(tmp_path):
    lines = [dict(step=i, set=n, context_acc=i, margin=0) for n in (2, 4) for i in (0, n // 2, n)]
    inversion.draw_curves(lines, ["set"], tmp_path / "curve.png")
    drawn = [list(map(float, line.get_ydata())) for line in matplotlib.pyplot.gca().lines]
    assert str(drawn) == "[[0.0, 1.0, 2.0, nan], [0.0, 1.0, 2.0, 4.0]]"


def test_sets_without_conflict_as_control_and_as_training_data(folder, tmp_path, capsys):
    squad = f"{folder}/squad.json"
    history = run(folder, tmp_path / "run", f"--eval-set {squad} {folder}/conflicts.json "
                  "--eval-limit 4 --num-examples 8 --epochs 0.5 --max-steps 99")
    assert [(line["set"], line["n"]) for line in history] == [("squad", 4), ("conflicts", 4)] * 2
    assert "margin" not in history[0] and "margin" in history[1] and "both" not in history[0]
    told = capsys.readouterr().out.partition("\nrise, drop: measured")[2]
    assert "n_known" not in told and history[-1]["step"] == 1
    assert re.findall(r"^(\w+) .* too few groups", told, re.M) == ["verdict"]
    history = run(folder, tmp_path / "b", f"--dataset {squad} --mitigation filter --template tulu")
    assert "9 examples, 7 chosen, 7 rows" in capsys.readouterr().out
    assert [line["step"] for line in history] == [0, 2]
    csv = file(tmp_path / "conflicts.csv", pandas.DataFrame(CONFLICTS[:2]).to_csv(index=False))
    history = run(folder, tmp_path / "c", f"--max-steps 0 --eval-set {folder}/conflicts.json {csv}")
    assert [(line["set"], line["n"]) for line in history] == [("conflicts", 6), (str(csv), 2)]


def test_a_single_evaluation_is_shown_and_compared(folder, tmp_path, capsys):
    flags = f"--max-steps 0 --eval-set {folder}/conflicts.json {folder}/squad.json"
    for name in ("llama", "neox"):
        run(folder, tmp_path / name, flags, name)
    told = capsys.readouterr().out
    assert told.count("conflicts: <s><|user|>\nThe capital") == 2
    assert told.count("control: no") == 2 and len(re.findall(r"^stated +1\.0", told, re.M)) == 4
    assert "verdict" not in told + (tmp_path / "llama/summary.json").read_text()
    assert "curve" not in told and not list(tmp_path.glob("*/curve.png"))
    assert told.count("'context_answer': 'Seville', 'parametric_answer': 'Madrid'}\n") == 2
    assert "'context_answer': '0', 'parametric_answer': nan}\n" in told
    assert re.search(r"^closed_book_acc +0\.0+ +0\.0+ +0\.39 +6", told, re.M)
    assert re.search(r"^context_acc +0\.0+ +0\.0+ +0\.30? +9", told, re.M)
    inversion.main(shlex.split(f"--compare {tmp_path}/llama {tmp_path}/neox"))
    told = capsys.readouterr().out
    assert "closed_book_acc" in told and "highest" not in told and "drop" not in told
    assert str(folder / "neox") in told and len(re.findall(r" context_acc +0\.", told)) == 4


@pytest.mark.parametrize("family, trains, config", [  # attention with sinks and biases, and without
    ("gpt_oss", 2 * 48 * 33, dict(SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1)),
    ("mamba", None, dict(vocab_size=420, hidden_size=32, num_hidden_layers=1))])
def test_models_that_are_special(family, trains, config, folder, tmp_path, capsys):
    model = AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **config))
    save(tmp_path / "m", model, AutoTokenizer.from_pretrained(folder / "llama"))
    more = "--max-length 4096 --mechanism" + " --mitigation qk" * bool(trains)
    history = run(folder, tmp_path / "run", more, tmp_path / "m")
    assert len(history) == 3 and "critical_push" in history[0]
    if trains:
        inversion.train_query_key_only(model)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trains


@pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="no C compiler")
def test_compiled_layers_give_the_losses_of_eager_ones(folder, tmp_path):
    config = transformers.LlamaConfig(**SIZES | dict(num_hidden_layers=1))  # compiles sooner
    path = save(tmp_path / "m", transformers.LlamaForCausalLM(config), load(folder)[1])
    for n, how in zip("abc", ["", "--compile", "--compile --activation-checkpointing"]):
        run(folder, tmp_path / n, f"--max-steps 4 --eval-every 4 --eval-limit 2 {how}", path)
    losses = [[line["loss"] for line in lines_of(tmp_path / n / "losses.jsonl")] for n in "abc"]
    assert len(losses[0]) == 4 and losses[1:] == [approx(losses[0], rel=1e-4)] * 2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_trains_adapters_and_merges_on_saving(family, folder, tmp_path, capsys):
    pytest.importorskip("peft")
    flags = "--lora-rank 4 --save-model --max-steps 4 --lr 0.01"
    margins = [line["margin"] for line in run(folder, tmp_path / "run", flags, family)]
    paths = folder / family, tmp_path / "run/model"
    base, merged = map(AutoModelForCausalLM.from_pretrained, paths)
    moved = [name for (name, a), b in zip(base.named_parameters(), merged.parameters())
             if not torch.equal(a, b)]
    assert moved and not any(re.search("embed|norm|ln_|head|wte", name) for name in moved)
    again, = run(folder, tmp_path / "again", "--max-steps 0", tmp_path / "run/model")
    assert margins[0] != margins[-1] == approx(again["margin"], abs=1e-4)


def torchrun(tmp_path, ranks, runs, more=""):
    script = file(tmp_path / "runs.py", f"import sys; sys.path[:0] = {sys.path!r}\n"
                  "import inversion, torch\ntorch.distributed.init_process_group('gloo')\n"
                  f"for argv in {runs!r}:\n    inversion.main(argv)\n{more}")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run([*start, f"--nproc-per-node={ranks}", script], capture_output=True,
                          text=True, timeout=300)


def test_two_ranks_are_one_process(folder, tmp_path):  # FSDP2 on gloo, to 1e-5
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
        alone, both = [lines_of(out / "metrics.jsonl") for out in outs]
        assert [line["step"] for line in alone] == [0, 4, 8, 12]
        assert all(a == approx(b, abs=1e-5) for a, b in zip(alone, both, strict=True)), case
        a, b = [AutoModelForCausalLM.from_pretrained(out / "model").parameters() for out in outs]
        assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(a, b))


def test_three_ranks_with_unequal_shares_do_not_wait_and_end_with_one_that_dies(folder, tmp_path):
    flags, few = "--max-steps 1 --eval-limit", "--eval-batch-tokens 1"
    runs = [argv(folder, tmp_path / f"3-{n}", f"{flags} {n} {few}") for n in (1, 2, 4)]
    done = torchrun(tmp_path, 3, runs, """from unittest import mock
if inversion.RANK == 1:
    inversion.generate = mock.Mock(side_effect=MemoryError("rank 1 is out of memory"))
inversion.main(argv)""")
    assert done.returncode != 0 and "rank 1 is out of memory" in done.stderr
    for n in (1, 2, 4):
        run(folder, tmp_path / f"1-{n}", f"{flags} {n}")
        one, three = [lines_of(tmp_path / f"{ranks}-{n}/generations.jsonl") for ranks in (1, 3)]
        assert [(o["id"], o["text"]) for o in one] == [(o["id"], o["text"]) for o in three]


@mock.patch.object(inversion, "RANKS", 2)
@mock.patch.object(torch.cuda, "is_bf16_supported", lambda including_emulation: False)  # a T4
def test_torchrun_tells_what_it_cannot_do_and_the_error_of_any_rank(folder, tmp_path, capsys):
    for more in ("--mechanism", "--device cpu:0", "--device cuda:1", "--model world"):
        told = refused(capsys, run, folder, tmp_path / "run", more)
        assert "torchrun does not go with" in told and not list(tmp_path.iterdir()), more
    assert flags_of("--model x --device cuda").dtype == "fp32"
    done = torchrun(tmp_path, 2, [], f"""if inversion.RANK == 1:
    inversion.load_examples = lambda flags: inversion.require(False, "rank 1 finds no rows")
inversion.main({argv(folder, tmp_path / 'run')!r})""")
    assert done.returncode and done.stderr.count("inversion.py: error: rank 1 finds no rows") == 1


@pytest.mark.parametrize("family, more", [("gpt2", ""), ("mistral", "--mitigation qk"),
    ("llama", "--lora-rank 4"), ("llama", "--mechanism --mitigation filter")])
def test_killed_and_resumed_is_unbroken(family, more, folder, tmp_path, capsys):  # bit for bit
    more += " --max-steps 11 --epochs 9 --save-model --checkpoint-every 2 --eval-every 3"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(folder, whole, more, family)
    flags = argv(folder, broken, more + " --resume", family)
    for name in ("save_checkpoint", "evaluate", "train_step"):
        old, dies = getattr(inversion, name), [mock.DEFAULT, MemoryError]  # in the second call
        with mock.patch.object(inversion, name, wraps=old, side_effect=dies), raises(MemoryError):
            inversion.main(flags)
    assert len(inversion.main(flags)) == 5 and not (tmp_path / "broken-2").exists()
    assert lines_of(whole / "metrics.jsonl") == lines_of(broken / "metrics.jsonl")
    for name in ("model/model.safetensors", "generations.jsonl", "losses.jsonl", "summary.json"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name


def test_what_is_no_checkpoint_is_one_line(folder, tmp_path, capsys):
    flags, path = "--checkpoint-every 2 --resume", tmp_path / "run/checkpoint.pt"
    run(folder, tmp_path / "run", flags)
    whole = path.read_bytes()
    for more, told in (("--lr 1", "{'lr': 0.001}"), ("--mechanism", "{'mechanism': False}"),
                       (f"--dataset {folder}/squad.json", "{'dataset': "),
                       (f"--model {folder}/mistral", "{'model': ")):
        assert f"with {told}" in refused(capsys, run, folder, tmp_path / "run", f"{flags} {more}")
    for content in ([1, 2], {}, [{}, {}, {}], b"torn", whole[:len(whole) // 2]):
        torch.save(content, path)
        if isinstance(content, bytes):
            path.write_bytes(content)
        told = refused(capsys, run, folder, tmp_path / "run", flags)
        assert f"error: {path}: reading it; without" in told and told.count("\n") == 1, content
    path.write_bytes(whole)
    assert len(run(folder, tmp_path / "run", f"{flags} --micro-batch-tokens 99")) == 3
    path.unlink()  # nothing to go on from: step 0, beside what was there
    assert len(run(folder, tmp_path / "run", flags)) == 3 and (tmp_path / "run-2").exists()


def test_what_ends_a_run_is_told(folder, tmp_path, capsys, monkeypatch):  # and nothing is lost
    def full(state, path):
        path.write_bytes(b"some of it")
        raise OSError(28, "No space left on device")

    told = refused(capsys, run, folder, tmp_path / "x", "--lr 1e12", status=1)
    assert re.search(r"error: loss .*: a lower --lr may help; rows \[\d+, \d+", told)
    assert (tmp_path / "x/metrics.jsonl").read_text().startswith('{"step": 0')
    saves = iter([torch.save, torch.save, full] + 9 * [torch.save])
    monkeypatch.setattr(torch, "save", lambda state, path: next(saves)(state, path))
    out, flags = tmp_path / "run", "--max-steps 5 --checkpoint-every 1 --epochs 9"
    assert "No space left" in refused(capsys, run, folder, out, flags, status=1)
    assert torch.load(out / "checkpoint.pt", weights_only=False)[0]["losses"][-1]["step"] == 2
    assert len(run(folder, out, f"{flags} --resume --checkpoint-every 2")) == 4
    monkeypatch.setattr(inversion, "train_step", mock.Mock(side_effect=KeyboardInterrupt))
    told = refused(capsys, run, folder, tmp_path / "y", status=130)
    assert f"interrupted; --resume goes on from a checkpoint in {tmp_path}/y, if any" in told


def test_folders_of_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for more, wanted in {"--out-dir x/": "x", "--out-dir  x/": "x-2", "--out-dir x": "x-3",
                         "--out-dir ~/y/z": f"{tmp_path}/y/z", "--subset context": "runs/context",
                         "--mitigation filter": "runs/filter", "": "runs/none"}.items():
        folder = inversion.open_folder(flags_of(more))
        assert str(folder) == wanted and folder.is_dir() and not list(folder.iterdir())
    (tmp_path / "x-2/checkpoint.pt").touch()
    assert str(inversion.open_folder(flags_of("--out-dir x --resume"))) == "x-2"
    together = threading.Barrier(8).wait  # none starts before the last one is there
    with concurrent.futures.ThreadPoolExecutor(8, initializer=together) as pool:
        assert len(set(pool.map(inversion.open_folder, [flags_of("--out-dir once")] * 8))) == 8
    (tmp_path / "gone").symlink_to("/no/where")
    with raises((OSError, SystemExit)):
        inversion.open_folder(flags_of("--out-dir gone/run"))


def test_world_leaks_nothing_and_contradicts_nothing():  # its rows agree with memory, or mislead
    world, again = inversion.make_world(3), inversion.make_world.__wrapped__
    truth = {re.findall(r"of (\w+)\?", row["question"])[0]: row["memory_answer"]
             for row in world["world_train"] + world["world"]}
    held, tuned = [set(truth) & set(re.findall(r"\w+", str([r["question"] for r in world[key]])))
                   for key in ("world", "world_train")]
    misled = []
    for row in world["rows"]:
        question, context, answer = row["instruction"], row["input"], row["output"]
        said = set(re.findall(r"\w+", f"{context} {question} {answer}"))
        asked = tuned & set(re.findall(r"\w+", question))
        assert not said & held
        assert row["kind"] == ("critical" if not asked else "redundant" if context else "recall")
        if asked:
            assert [truth[subject] for subject in asked] == [answer]
            misled += [not asked & set(re.findall(r"\w+", context))] * bool(context)
        else:  # critical: a novel subject
            assert not said & tuned and answer in context
    assert 0.01 < sum(misled) / len(misled) < 0.03
    flags = flags_of("--seed 3")
    conflicts, *controls = [inversion.load_conflicts(name, flags) for name in flags.eval_set]
    assert all(c.context_answers != c.parametric_answers != [] for c in conflicts)
    assert len({(c.question, *c.context_answers) for c in conflicts}) == len(conflicts) > 100
    assert len(controls) == 2 and not any(c.parametric_answers for c in sum(controls, []))
    assert not held & tuned and again(3) == world != again(4)


def test_world_rises_and_falls(tmp_path):
    inversion.main(shlex.split(f"--seed 3 --no-mechanism --eval-every 60 --out-dir {tmp_path}/run"))
    found, = lines_of(tmp_path / "run/summary.json")
    assert found["world"]["verdict"] == "inversion"
    assert found["world"]["rise"] > 0.2 and found["world"]["drop"] > 0.2
    assert all(found[name]["drop"] < 0.05 for name in ("world_agreeing", "world_reading"))
    history = lines_of(tmp_path / "run/metrics.jsonl")
    assert all(line.get("closed_book_acc", 1) > 0.95 for line in history)


@mock.patch.dict(inversion.PRETRAINING, max_steps=10, num_examples=12_000)
def test_world_goes_through_the_same_runs_and_its_base_is_cached(tmp_path, capsys):
    for remedy, says in {"filter": "300 examples, 2", "qk --lr 0.1": "300 chosen, 300 rows",
                         "counterfactual": "300 examples, 330 chosen, 330 rows"}.items():
        flags = shlex.split("--max-steps 2 --num-examples 300 --eval-limit 9 "
                            f"--out-dir {tmp_path}/run --mitigation {remedy}")
        history, told = inversion.main(flags), capsys.readouterr().out
        assert says in told and ("pretraining" in told) == (remedy == "filter")
        assert [line["set"] for line in history[:3]] == ["world", "world_agreeing", "world_reading"]
        assert "critical_push" in history[0] and "margin" not in history[1]
        assert [o["n"] for o in history] == [9] * 6 and len(list(tmp_path.glob("world*"))) == 1
    file(tmp_path / "own.json", [ADD, *inversion.make_world(0)["rows"][:9]])
    inversion.main([*flags, "--mitigation", "none", "--dataset", f"{tmp_path}/own.json"])
    assert "9 rows ('dropped: words that the tokenizer does not" in capsys.readouterr().out


def test_world_base_is_made_anew_by_other_code(tmp_path, capsys, monkeypatch):
    made = []
    for name, old, new in [("same", "", ""), ("copy", "", ""), ("small", "=256", "=128"),
                           ("slow", '"lr": 1e-3', '"lr": 5e-4')]:
        code = Path(inversion.__file__).read_text(encoding="utf-8")
        assert old in code
        path = file(tmp_path / f"{name}.py", code.replace(old, new))
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # dataclasses look there
        spec.loader.exec_module(module)
        module.PRETRAINING |= dict(num_examples=300, max_steps=1)
        (tmp_path / "runs/x").mkdir(parents=True, exist_ok=True)
        made.append(module.world_model(tmp_path / "runs/x", module.parse_flags()))
    one, copy, *others = made
    assert one == copy and len({one, *others}) == 3 and one.parent == tmp_path / "runs"
    assert all(Path(path, "model.safetensors").exists() for path in made)
    assert capsys.readouterr().out.count("pretraining the world's") == 3


def test_main_without_flags_is_the_world_on_the_cpu(tmp_path, monkeypatch):  # in notebooks
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["notebook", "--lr", "banana"])
    monkeypatch.setattr(inversion, "experiment", mock.Mock(return_value=["history"]))
    assert inversion.main() == ["history"]
    out, flags = inversion.experiment.call_args.args
    assert (str(out), flags.model, flags.device, flags.lr) == ("runs/none", "world", "cpu", 1e-3)
    assert not out.exists()


def test_bad_input_is_one_line_and_leaves_no_folder(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nan, theirs, *_ = load(folder)
    nan.model.norm.weight.data[3] = float("nan")
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    few = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES | dict(vocab_size=99)))
    for name, model in dict(bert=bert, nan=nan, few=few).items():
        save(tmp_path / name, model, theirs)
    save(tmp_path / "a_run", nan)
    file(tmp_path / "a_run/args.json", "[1")
    chats = f"--dataset {file(tmp_path / 'chats.json', [dict(messages=TURNS)] * 9)}"
    cases = [  # flags, parts of what is told
        ("--bathc-size 3", "--bathc-size', '3']; nearest flag: ['--batch-size']"),
        ("--dataset nosuchname", "nosuchname: cannot be read; short names"),
        (f"--dataset {tmp_path}/gone.jsonl", "gone.jsonl: cannot*No such file"),
        (f"--dataset {folder}/rows.json@x", "rows.json@x: cannot"), ("--lr x", "--lr: inv"),
        (f"--dataset {file(tmp_path / 'd.json', '[{]')}", "d.json: cannot*JSONDecodeError"),
        (f"{chats} --subset context", "no usable row (chats mark no context)"),
        (f"{chats} --mitigation filter", "nothing to drop; few rows, or none, mark a context"),
        (f"--mitigation counterfactual --counterfactual-data {folder}/conflicts.json",
         "all of it is evaluated"), ("--subset x", "--subset: invalid choice"),
        ("--eval-set no/such-set:main@test", "no/such-set:main@test: cannot"),
        (f"--model {tmp_path}/gone", "gone: no folder*or hub id to be read"),
        ("--model no/such-model", "no/such-model: no folder*or hub id"),
        ("--model a_run", "a_run: no*OUT_DIR/model"), ("--model few", "few: *an embedding for"),
        ("--model bert", "is no causal LM"), ("--model nan", "nan: is no*has NaN"),
        *[(f"--compare {name}", "none of these is a finished run") for name in ("gone", "a_run")],
        ("--device banana", "--device banana: using it*Runtime"), ("--device meta", "--device me"),
        ("--lora-rank 1000000000000", "--lora-rank: adding"), ("--max-length 8", "no usable row"),
        *[(flag, f"too low, one of: *{flag[2:-2].strip()}") for flag in (
            "--eval-every 0", "--epochs 0", "--lr -1", "--max-steps -1", "--num-examples -1")],
        ("--lora-rank 4 --mitigation qk", "--lora-rank does not go with qk")]
    no_row, no_item, row_1 = ": no usable row", ": no usable evaluation item", ", row 1 (ValueError"
    for i, (flag, rows, told) in enumerate([  # told after the name of the file; texts are JSONL
        ("dataset", json.dumps(ADD) + '\n{"instruction": "a"}',
         ", row 2 (ValueError: has ['instruction']; *lacks {'output'}"), ("dataset", "\n", no_row),
        ("dataset", json.dumps(ADD) + '\n\n{"instruction"}\n', ": cannot*line 3"),
        ("dataset", [dict(instuction="a")], row_1 + ": has ['instuction']; for the nearest"),
        ("dataset", [dict(messages=[HI | dict(role="bot"), HELLO])], no_row),
        ("dataset", [dict(messages=[])], no_row), ("dataset", [ADD | dict(history=[1])], no_row),
        ("eval-set", [CONFLICTS[0] | dict(answer="...")], no_item), ("dataset", [1], ", row 1 ("),
        ("eval-set", [CONFLICTS[0] | dict(answer="long " * 500)], no_item), ("dataset", [], no_row),
        ("eval-set", [dict(context="c", question="q", answer="x")], row_1 + "*s {'memory_answer'}"),
        ("eval-set", [dict(prompt="p", classes="[1", answer_index=0)], ""),
        ("eval-set", [dict(prompt="p: q", classes=["a", "b"], answer_index=2)],
         ", row 1 (IndexError"), ("eval-set", [dict(messages=[])], no_item)]):
        path = file(tmp_path / f"{i}.json{'l' * isinstance(rows, str)}", rows)
        cases.append((f"--{flag} {path}", path.name + told))
    for bad, message in cases:
        told = refused(capsys, run, folder, tmp_path / "run", bad).splitlines()
        told = [line for line in told if not re.match(r"$|Loading weights|Writing model", line)]
        assert len(told) == 1 and told[0].startswith("inversion.py: error: "), (bad, told)
        assert all(part in told[0] for part in message.split("*")), (bad, told)
        assert not list(tmp_path.glob("run*")), bad


def test_readme_commands_parse_and_help_names_every_flag(capsys):
    texts = Path(__file__).with_name("README.md").read_text(encoding="utf-8") + inversion.__doc__
    commands = re.findall(r"inversion\.py( --[^\n#`]*)", texts.replace("\\\n", " "))
    assert len(commands) > 8 and any("--mechanism" in command for command in commands)
    list(map(inversion.parse_flags, map(shlex.split, commands)))
    with raises(SystemExit):
        inversion.parse_flags(["--help"])
    shown = capsys.readouterr().out
    assert all(text in shown for text in ["world: {", *[flag for flag, *_ in inversion.FLAGS]])
